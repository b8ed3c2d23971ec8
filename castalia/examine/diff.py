"""Compare two checkpoints: their structure, the figures of each tensor, and a verdict on how they are related."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from castalia.checkpoint.compare import Relation, equal, relate
from castalia.checkpoint.tensors import AdamState, Checkpoint, state_tensors
from castalia.config.schema import ModelConfig
from castalia.config.tensor_row import Kind
from castalia.config.tensor_table import in_order, row_of
from castalia.examine.layer_changes import layer_of

Verdict = Literal[
    "identical", "dtype", "padding", "layout", "transposed", "bias_summed", "halves_swapped", "tied",
    "fine_tune", "siblings", "same_init", "unrelated", "other_architecture", "not_finite",
]  # fmt: skip
EXPLAINED = (
    "transposed",
    "layout",
    "bias_summed",
    "halves_swapped",
)  # the same values, but another model if both are read in the same way
# Settings that change the random draw of a run with the same seed, in programs that draw on each rank or device.
CAUSES = (
    "the number of tensor ranks: shards have other shapes, and each rank a stream of its own",
    "the number of pipeline stages: each starts a stream, and interior stages another seed",
    "pipe_parallel_size 0 instead of 1: layers are built twice, and the weights are the second draw",
    "the GPU model: CUDA's generator numbers its streams by the threads that a device runs",
    "padding of the vocabulary, dtype, optional layers, library versions: other shapes, order or count of draws",
)
SAME_STD = 0.03  # largest relative difference of standard deviations from one init method, without sampling error
ARCHITECTURE_ONLY = re.compile(
    "init|dropout|vocab|max_positions"
)  # settings that do not change what the model computes


@dataclass(frozen=True)
class PartRatio:
    """The standard deviations of one kind of tensor, over all blocks."""

    part: str
    tensors: int
    std_a: float
    std_b: float
    error: float  # relative standard error of the ratio, from the number of elements

    @property
    def ratio(self) -> float:
        """B's standard deviation over A's."""
        return self.std_b / self.std_a if self.std_a else math.inf


@dataclass(frozen=True)
class Diff:
    """The result of a comparison."""

    verdict: Verdict
    words: str
    structure: tuple[str, ...]  # settings and tensors that only one side has, or that differ
    relations: Mapping[str, Relation]  # of the tensors that both have
    parts: tuple[PartRatio, ...]
    updates: Mapping[str, float]  # relative change of each layer, in the order of the model
    optimizer: str

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors in each kind of relation."""
        return dict(Counter(relation.kind for relation in self.relations.values()))

    def as_json(self) -> dict:
        """Everything, as values of JSON."""
        tensors = {
            name: {"relation": relation.kind, "detail": relation.detail}
            | (asdict(relation.figures) | {"relative": relation.figures.relative} if relation.figures else {})
            for name, relation in self.relations.items()
        }
        return {
            "verdict": self.verdict,
            "words": self.words,
            "tensors_compared": len(self.relations),
            "counts": self.counts,
            "structure": list(self.structure),
            "parts": [asdict(part) | {"ratio": part.ratio} for part in self.parts],
            "updates": dict(self.updates),
            "causes": list(CAUSES) if self.verdict == "same_init" else [],
            "optimizer": self.optimizer,
            "tensors": tensors,
        }


def diff(a: Checkpoint, b: Checkpoint, advance: Callable[[str], None] = lambda name: None) -> Diff:
    """Compare two checkpoints, a piece of a tensor at a time. `advance` is called with the name of each tensor."""
    model = a.config.model if a.config else None
    relations = {}
    for name in in_order(sorted(a.model.keys() & b.model.keys())):
        advance(name)
        relations[name] = relate(name, a.model[name], b.model[name], model, b.model)
    structure = _structure(a, b)
    parts = _parts(relations)
    verdict, words = _judge(a, b, relations, parts)
    updates = _updates(relations)
    return Diff(verdict, words, structure, relations, parts, updates, _optimizer(a, b, relations))


def _structure(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    lines = []
    if a.config and b.config and a.config.model and b.config.model:
        left, right = model_settings(a.config.model), model_settings(b.config.model)
        lines += [f"model.{key}: {left[key]} | {right[key]}" for key in left if left[key] != right[key]]
    lines += [f"only in A: {name} {list(a.model[name].shape)}" for name in in_order(list(a.model.keys() - b.model))]
    lines += [f"only in B: {name} {list(b.model[name].shape)}" for name in in_order(list(b.model.keys() - a.model))]
    if a.progress.step != b.progress.step:
        lines.append(f"step: {a.progress.step} | {b.progress.step}")
    return tuple(lines)


def model_settings(model: ModelConfig) -> dict[str, object]:
    """The settings that change what the model computes, with the values that None stands for."""
    values = {key: value for key, value in model.model_dump().items() if not ARCHITECTURE_ONLY.search(key)}
    # A run under `neox_exact` leaves what its blocks mix to that, as the checkpoint does that it goes on from.
    over = model.rwkv_over or "time"
    return values | {"num_kv_heads": model.kv_heads, "mlp_size": model.mlp_width, "rwkv_over": over}


def _parts(relations: Mapping[str, Relation]) -> tuple[PartRatio, ...]:
    ratios = []
    drawn = {name: r.figures for name, r in relations.items() if r.figures and row_of(name).is_drawn}
    for part in get_args(Kind):
        figures = [f for name, f in drawn.items() if row_of(name).kind == part]
        if figures:
            count = sum(f.count for f in figures)
            # The root of the mean of variances, weighted by the number of elements.
            std_a, std_b = (
                math.sqrt(sum(getattr(f, key) ** 2 * f.count for f in figures) / count) for key in ("std_a", "std_b")
            )
            ratios.append(PartRatio(part, len(figures), std_a, std_b, 1 / math.sqrt(count)))
    return tuple(ratios)


def _updates(relations: Mapping[str, Relation]) -> dict[str, float]:
    """The relative change of each block, of embedding, positions, norm and head."""
    change: dict[str, list[float]] = {}  # layer -> sums of squares of differences and of A's values
    for name, relation in relations.items():
        if relation.figures:
            sums = change.setdefault(layer_of(name), [0.0, 0.0])
            sums[0] += relation.figures.count * relation.figures.rms_diff**2
            sums[1] += relation.figures.count * relation.figures.rms_a**2
    return {layer: math.sqrt(changed / size) if size else 0.0 for layer, (changed, size) in change.items()}


def _judge(
    a: Checkpoint, b: Checkpoint, relations: Mapping[str, Relation], parts: Iterable[PartRatio]
) -> tuple[Verdict, str]:
    kinds = Counter(relation.kind for relation in relations.values())
    alone = a.model.keys() ^ b.model.keys()
    tied = alone == {"head.weight"}
    if not relations or kinds["shape"] or (alone and not tied):
        return "other_architecture", _other_architecture(relations, alone)
    if all(relation.exact for relation in relations.values()):
        return _exact(a, b, relations, kinds, tied)
    if broken := [name for name, relation in relations.items() if relation.kind == "not_finite"]:
        sound = {name: relation for name, relation in relations.items() if name not in broken}
        rest = f"; the others: {_judge(a, b, sound, _parts(sound))[1]}" if sound else ""
        return "not_finite", f"{len(broken)} tensors hold NaN or infinite values, {broken[0]} first{rest}"
    # From here on some tensors differ in their values: only random matrices can show how the two are related.
    matrices = {name: r for name, r in relations.items() if row_of(name).is_drawn and not r.exact}
    moved = [name for name, relation in matrices.items() if relation.kind == "moved"]
    if moved and (one_seed := _one_seed(a, b)):
        return "siblings", f"{one_seed}: {_moved(relations, matrices, moved)}"
    # A fine-tune moves matrices a little; a few, such as a new head, may have nothing in common.
    if len(moved) * 2 >= len(matrices):
        return "fine_tune", f"{_descent(a, b)}: {_moved(relations, matrices, moved)}"
    constant = {name: r for name, r in relations.items() if not row_of(name).is_drawn}
    untouched = all(relation.harmless for relation in constant.values())
    if untouched and not moved and all(abs(part.ratio - 1) < SAME_STD + 4 * part.error for part in parts):
        return "same_init", _same_init(relations, matrices, parts)
    correlation = max((abs(r.figures.correlation) for r in matrices.values() if r.figures), default=0.0)
    scale = max((abs(part.ratio - 1) for part in parts), default=0.0)
    return "unrelated", (
        f"unrelated weights of one architecture: {len(matrices)} matrices have nothing to do with each other "
        f"(correlations up to {correlation:.3f}); standard deviations differ by up to {scale:.1%}"
    )


def _exact(
    a: Checkpoint, b: Checkpoint, relations: Mapping[str, Relation], kinds: Counter, tied: bool
) -> tuple[Verdict, str]:
    """The verdict on two checkpoints that hold the same values, possibly rearranged, scaled or rounded."""
    total = len(relations)
    details = {
        kind: sorted({r.detail for r in relations.values() if r.kind == kind}) for kind in kinds if kind != "identical"
    }
    listed = "; ".join(f"{kinds[kind]} {_PHRASES[kind]} ({'; '.join(texts)})" for kind, texts in details.items())
    same = f"{kinds.get('identical', 0)} of {total} tensors bit-identical"
    for kind in EXPLAINED:
        if kinds.get(kind):
            return kind, f"the same values in another form: {same}; {listed}. Read alike, they are two models"  # type: ignore[return-value]
    if tied:
        return "tied", f"{_tied(a, b)}; else {same}" + (f"; {listed}" if listed else "")
    if kinds.get("padding"):
        return "padding", f"the same model with other padding of the vocabulary: {same}; {listed}"
    if kinds.get("dtype"):
        return "dtype", f"the same weights in another dtype: {listed}" + (f"; {same}" if "identical" in kinds else "")
    return "identical", f"identical: all {total} tensors, bit for bit"


_PHRASES = {
    "dtype": "equal after rounding",
    "padding": "differ in padding only",
    "layout": "with permuted rows",
    "transposed": "transposed",
    "bias_summed": "biases summed over tensor ranks, or divided by them, once too often",
    "halves_swapped": "with the halves of the gated MLP swapped",
}


def _tied(a: Checkpoint, b: Checkpoint) -> str:
    side, other = ("A", a) if "head.weight" in a.model else ("B", b)
    head, embedding = other.model["head.weight"], other.model["embed.weight"]
    copy = "is its embedding, so both compute the same" if equal(head, embedding) else "is not its embedding"
    return f"tied against untied: only {side} has a head, which {copy}"


def _one_seed(a: Checkpoint, b: Checkpoint) -> str:
    """A description of two runs of ours that began with the same weights; empty if their configs do not say so."""
    if not (a.config and b.config and a.facts.data_fingerprint and b.facts.data_fingerprint):
        return ""  # at least one was not trained here
    if a.config.checkpoint.init_from or b.config.checkpoint.init_from or not (a.progress.step and b.progress.step):
        return ""
    drawn = [(side.seed, _drawn(side.model), side.neox_exact) for side in (a.config, b.config) if side.model]
    if drawn[0] != drawn[1] or (_same_run(a, b) and a.progress.step != b.progress.step):
        return ""
    steps = [f"{side.progress.step:,}" for side in (a, b)]
    after = f"{' and '.join(steps)} steps" if steps[0] != steps[1] else f"{steps[0]} steps each"
    return f"two runs from the same initial weights (seed {a.config.seed}), after {after}"


_DRAWN_FROM = {"num_heads", "num_kv_heads", "vocab_size", "mup", "init", "init_passes", "init_std"}
_DRAWN_FROM |= {"init_method", "output_init_method"}


def _drawn(model: ModelConfig) -> dict[str, object]:
    """What initial weights depend on, besides the seed and the shapes of the tensors."""
    return model.model_dump(include=_DRAWN_FROM)


def _same_run(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both belong to one run, or to runs of the same config and data."""
    assert a.config and b.config
    known = a.facts.data_fingerprint
    alike = ("model", "optimizer", "schedule", "precision", "finetune", "seed", "neox_exact")
    return bool(known and known == b.facts.data_fingerprint) and all(
        getattr(a.config, name) == getattr(b.config, name) for name in alike
    )


def _descent(a: Checkpoint, b: Checkpoint) -> str:
    if a.config and b.config and a.progress.step != b.progress.step and _same_run(a, b):
        later, earlier = ("A", "B") if a.progress.step > b.progress.step else ("B", "A")
        return f"{later} is a later step of {earlier}'s run, or of the same run once more"
    return "they come from the same weights: one is a fine-tune or a later step of the other, or both are of a third"


def _moved(relations: Mapping[str, Relation], matrices: Mapping[str, Relation], moved: list[str]) -> str:
    sizes = [r.figures.relative for name in moved if (r := matrices[name]).figures]
    kept = sum(relation.exact for relation in relations.values())
    others = [name for name in matrices if name not in moved]
    return (
        f"{kept} of {len(relations)} tensors are the same"
        + (f", {len(moved)} matrices changed by {min(sizes):.2%} to {max(sizes):.2%} of their norm" if sizes else "")
        + (f"; {len(others)} are new, or changed beyond recognition: {', '.join(others[:5])}" if others else "")
    )


def _same_init(relations: Mapping[str, Relation], matrices: Mapping[str, Relation], parts: Iterable[PartRatio]) -> str:
    same = sum(relation.kind == "identical" for relation in relations.values())
    constants = "all norms and biases" if same == len(relations) - len(matrices) else "norms and biases"
    spread = max((abs(part.ratio - 1) for part in parts), default=0.0)
    return (
        f"{same} of {len(relations)} tensors bit-identical: {constants}; the {len(matrices)} that differ are exactly "
        f"the random matrices; standard deviations agree within {max(1, math.ceil(spread * 100))}%: "
        "same init method, different random draw"
    )


def _other_architecture(relations: Mapping[str, Relation], alone: Iterable[str]) -> str:
    shapes = [f"{name} {relation.detail}" for name, relation in relations.items() if relation.kind == "shape"]
    few = shapes[:3] + [f"{name} on one side only" for name in in_order(list(alone))[:3]]
    return (
        f"models of different architectures: {len(shapes)} shapes differ, {len(list(alone))} tensors stand alone: "
        + ("; ".join(few) or "no tensor has a counterpart")
    )


def _optimizer(a: Checkpoint, b: Checkpoint, relations: Mapping[str, Relation]) -> str:
    """Whether the optimizer states are equal, which is only compared if the weights are."""
    if a.optimizer is None or b.optimizer is None:
        sides = " and ".join(name for name, side in (("A", a), ("B", b)) if side.optimizer is not None)
        return f"optimizer state: {f'only in {sides}' if sides else 'none'}"
    if not all(relation.harmless for relation in relations.values()):
        return "optimizer state: in both, not compared since the weights differ"
    names = a.optimizer.keys() & b.optimizer.keys()
    total = len({**a.optimizer, **b.optimizer})
    same = sum(_same_state(a.optimizer[name], b.optimizer[name]) for name in names)
    return f"optimizer state: {same} of {total} parameters equal (masters, moments, step)"


def _same_state(a: AdamState, b: AdamState) -> bool:
    left, right = state_tensors(a), state_tensors(b)
    return (
        a["step"] == b["step"] and left.keys() == right.keys() and all(equal(left[kind], right[kind]) for kind in left)
    )
