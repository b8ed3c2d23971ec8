"""Prove that two checkpoints are the same model: run both on the same tokens, and compare all their tensors.

Both sides are read from disk block by block (`castalia.streaming`), one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from castalia.checkpoint.compare import Relation, equal, relate
from castalia.checkpoint.neox_defects import with_micro_batches
from castalia.checkpoint.restore import architecture
from castalia.checkpoint.tensors import Checkpoint, state_tensors
from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import in_order, row_of
from castalia.plan.stream_plan import EvaluationShape, StreamPlan, evaluation_work, least_budget, plan_stream
from castalia.storage.gguf_file import QuantizedTensor
from castalia.storage.lazy import TensorRef, everything
from castalia.streaming.open_streamed import open_streamed
from castalia.streaming.stream_units import ModelUnits, units_of

NUM_TOKENS = 64
# The largest difference of logits, relative to the largest logit, that rounding weights to a dtype may cause; that of
# q8_0; and that which the approximation of GELU by tanh may cause.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
QUANTIZED = 1e-1
APPROXIMATED = 2e-2


@dataclass(frozen=True)
class Proof:
    """How two checkpoints compare. `str()` gives lines for the terminal."""

    max_diff: float  # of logits
    scale: float  # largest logit
    kl: float  # mean over tokens, in nats
    agreement: float  # share of tokens after which both find the same token likeliest
    tokens: int
    equal_tensors: int
    num_tensors: int
    equal_state: int | None  # tensors of the optimizer; None if a side has no state
    num_state: int
    rounded: int  # biases among the equal tensors that differ only by the rounding of a division over tensor ranks
    difference: str  # the first tensor that differs, and how; empty if none does
    tolerance: float
    judged: float  # the largest difference, or that of the middle token where rounding may choose other experts

    @property
    def holds(self) -> bool:
        """Whether both are the same model, up to the rounding of their dtypes."""
        same_state = self.equal_state is None or self.equal_state == self.num_state
        return not self.difference and same_state and self.judged <= self.tolerance * max(self.scale, 1.0)

    def __str__(self) -> str:
        lines = [
            f"verified on {self.tokens} tokens: max |Δlogit| {self.max_diff:.3g} (largest logit {self.scale:.3g}), "
            f"KL {self.kl:.3g}, same likeliest token {self.agreement:.1%}",
            f"weights: {self.equal_tensors} of {self.num_tensors} tensors equal",
        ]
        if self.judged < self.max_diff:
            lines.append(
                f"rounded weights may choose other experts for a token: judged by the middle one, {self.judged:.3g}"
            )
        if self.equal_state is not None:
            lines.append(
                f"optimizer: {self.equal_state} of {self.num_state} tensors {'equal' if self.rounded else 'bit-equal'}"
            )
        if self.rounded:
            lines.append(f"{self.rounded} of these are biases that dividing over tensor ranks has rounded, as it must")
        if self.difference:
            lines.append(f"first difference: {self.difference}")
        return "\n".join(lines)


def verify(source: Checkpoint, result: Checkpoint, memory: int | None = None, held: Checkpoint | None = None) -> Proof:
    """Compare a checkpoint with its conversion. Both may have any format and dtype.

    `memory`: bytes that it may take; None: as little as it can. `held`: what the conversion should hold, where that is
    not the source's tensors; logits are compared with the source in any case. Raises ConfigError where memory is too
    little.
    """
    source = with_micro_batches(source, result.summed_micro_batches)
    left, right = architecture(source), architecture(result)
    vocab = min(left.vocab_size or 0, right.vocab_size or 0) or left.padded_vocab_size
    tokens = probe_tokens(vocab, min(NUM_TOKENS, left.max_positions or NUM_TOKENS))
    a, b = (logits(side, tokens, vocab, memory) for side in (source, result))
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    kl = (log_a.exp() * (log_a - log_b)).sum(-1).mean()
    held = held or source
    equal_tensors, rounded, difference = _compare(held, result, architecture(held))
    equal_state, num_state = _compare_state(source, result)
    dtypes = {ref.dtype for side in (source, result) for ref in side.model.values()}
    quantized = any(isinstance(ref, QuantizedTensor) for ref in everything(result.model.values()))
    further = [QUANTIZED * quantized, APPROXIMATED * (left.activation != right.activation)]
    # Equal weights of one dtype give equal logits; otherwise weights may differ by a rounding.
    tolerance = (
        TOLERANCE[torch.float32] if len(dtypes) == 1 and not rounded else max(TOLERANCE[dtype] for dtype in dtypes)
    )
    alike = (a == b) | (a.isnan() & b.isnan())  # a model with NaN among its weights can be converted, too
    apart = (a - b).abs().masked_fill(alike, 0.0).amax(-1)  # [batch, time]
    switches = left.experts is not None and tolerance > TOLERANCE[torch.float32]
    return Proof(
        max_diff=float(apart.max()),
        scale=float(a.abs().nan_to_num(0.0).max()),
        kl=float(kl),
        agreement=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
        tokens=tokens.numel(),
        equal_tensors=equal_tensors,
        num_tensors=len(held.model.keys() | result.model.keys()),
        equal_state=equal_state,
        num_state=num_state,
        rounded=rounded,
        difference=difference,
        tolerance=max(tolerance, *further),
        judged=float(apart.median() if switches else apart.max()),
    )


def probe_tokens(vocab: int, length: int) -> Tensor:
    """Tokens [2, length / 2] drawn from the whole vocabulary, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (2, max(1, length // 2)), generator=generator)


@torch.no_grad()
def logits(checkpoint: Checkpoint, tokens: Tensor, vocab: int, memory: int | None = None) -> Tensor:
    """The model's fp32 logits [batch, time, vocab], of reward models [batch, time, 1].

    It takes no more than `memory`, or as little as it can. Raises ConfigError where that is too little.
    """
    units, plan = probe_plan(checkpoint, tokens.shape, memory)
    model = open_streamed(checkpoint, architecture(checkpoint), units, plan, finite=False)
    try:
        if model.reward is not None:
            return F.linear(model.hidden(tokens), model.reward.weight.float())
        output = model(tokens)
        assert isinstance(output, Tensor)
        return output[..., :vocab]
    finally:
        model.reader.close()


def probe_plan(
    checkpoint: Checkpoint, shape: Sequence[int] = (2, NUM_TOKENS // 2), memory: int | None = None
) -> tuple[ModelUnits, StreamPlan]:
    """What is read together to compute with probe tokens of this shape, and the plan. ConfigError as `plan_stream`."""
    model = architecture(checkpoint)
    units = units_of(checkpoint, model, torch.float32)
    sizes, work = units.sizes(), evaluation_work(model, EvaluationShape(shape[1], shape[0], shape[0], False), 4)
    return units, plan_stream(sizes, work, least_budget(sizes, work) if memory is None else memory)


def _compare(source: Checkpoint, result: Checkpoint, model: ModelConfig) -> tuple[int, int, str]:
    """The number of equal weights, how many of them are equal only up to rounding, and the first difference."""
    same, rounded, difference = 0, 0, ""
    ranks = max(source.summed_bias_ranks, result.summed_bias_ranks)
    for name in in_order(sorted(source.model.keys() | result.model.keys())):
        a, b = source.model.get(name), result.model.get(name)
        if a is None or b is None:
            difference = difference or f"{name} is only in the {'result' if a is None else 'source'}"
        elif equal(a, b):
            same += 1
        elif _rounded(name, a, b, ranks):
            same, rounded = same + 1, rounded + 1
        elif not difference:
            relation = relate(name, a, b, model, result.model)
            if relation.harmless:
                same += 1
            else:
                difference = f"{name}: {describe(relation)}"
    return same, rounded, difference


def _rounded(name: str, a: TensorRef, b: TensorRef, ranks: int) -> bool:
    """Whether b may be the bias a after division over the tensor ranks, rounding on each, and summation."""
    if ranks == 1 or not row_of(name).row_parallel_bias or a.shape != b.shape:
        return False
    dtype = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)  # the coarser, which was rounded to
    left, right, limits = a.read().to(dtype).double(), b.read().double(), torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    return bool(((left - right).abs() <= left.abs() * limits.eps + ranks * smallest / 2).all())


def _compare_state(source: Checkpoint, result: Checkpoint) -> tuple[int | None, int]:
    """The number of equal tensors of the optimizer, and of all. Padding rows that one side lacks are not compared."""
    if source.optimizer is None or result.optimizer is None:
        return None, 0
    same = total = 0
    ranks = max(source.summed_bias_ranks, result.summed_bias_ranks)
    for name in source.optimizer.keys() | result.optimizer.keys():
        left, right = (
            state_tensors(side.optimizer[name]) if name in side.optimizer else {}
            for side in (source, result)
            if side.optimizer
        )
        total += len(left.keys() | right.keys())
        if left and right and source.optimizer[name]["step"] == result.optimizer[name]["step"]:
            same += sum(_same(name, kind, left[kind], right[kind], ranks) for kind in left.keys() & right.keys())
    return same, total


def _same(name: str, kind: str, a: TensorRef, b: TensorRef, ranks: int) -> bool:
    if kind == "master" and _rounded(name, a, b, ranks):
        return True
    if row_of(name).has_token_rows and a.shape != b.shape:
        return relate(name, a, b, None).harmless
    return equal(a, b)


def describe(relation: Relation) -> str:
    """A phrase about a tensor that differs."""
    looks = {
        "transposed": "looks transposed",
        "layout": "its rows are permuted",
        "bias_summed": "a bias that was summed over tensor ranks once too often, or once too little",
        "halves_swapped": "the halves of the gated MLP are swapped",
        "shape": "shapes differ",
        "moved": "the values are near, but not the same",
        "not_finite": "some values are NaN or infinite",
        "unrelated": "the values have nothing to do with each other",
    }
    figures = relation.figures
    size = f" (max |Δ| {figures.max_diff:.3g}, relative {figures.relative:.3g})" if figures else ""
    return looks[relation.kind] + (f": {relation.detail}" if relation.detail else "") + size
