"""Compare a checkpoint's tensors with the architecture that its config describes, once, when it is opened."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from castalia.checkpoint.adapters import adapters_of
from castalia.checkpoint.rules import STATE_ROLES
from castalia.checkpoint.sampled_values import middle, rounded
from castalia.checkpoint.tensors import Checkpoint, state_tensors
from castalia.config.tensor_table import adapter_shapes, tensor_shapes
from castalia.errors import CheckpointError
from castalia.storage.extent import FileTensor
from castalia.storage.lazy import TensorRef

MAX_LINES = 12


def differences(checkpoint: Checkpoint) -> list[str]:
    """A line for each tensor that is missing, unexpected or of the wrong shape, in model and optimizer state.

    Empty where no config says what the architecture is.
    """
    model = checkpoint.config.model if checkpoint.config else None
    if model is None:
        return []
    if model.vocab_size is None:  # the rows of the embedding then decide
        embedding = checkpoint.model.get("embed.weight")
        rows = embedding.shape[0] if embedding is not None and embedding.shape else 1
        model = model.with_({"vocab_size": rows, "vocab_multiple": 1})
    expected = tensor_shapes(model) | adapter_shapes(model, adapters_of(checkpoint))
    return [*mismatches(expected, checkpoint.model, "the architecture"), *_strange_state(checkpoint)]


def _strange_state(checkpoint: Checkpoint) -> list[str]:
    lines = []
    for name, state in (checkpoint.optimizer or {}).items():
        weight = checkpoint.model.get(name)
        # Other optimizers than AdamW have tensors of other shapes, too.
        shapes = {kind: tuple(ref.shape) for kind, ref in state_tensors(state).items() if kind in STATE_ROLES}
        if weight is None:
            lines.append(f"the optimizer has a state for {name}, which the model does not have")
        else:
            lines += [
                f"{name} has shape {list(weight.shape)}, its {kind} in the optimizer {list(shape)}"
                for kind, shape in shapes.items()
                if shape != tuple(weight.shape)
            ]
    return lines


def mismatches(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorRef], by: str) -> list[str]:
    """A line for each tensor that is missing, unexpected, or of another shape than `expected`.

    `by` says in the text what expects them: "the model", for instance.
    """
    lines = [f"missing: {name} {list(expected[name])}" for name in expected if name not in tensors]
    lines += [f"unexpected: {name} {list(tensors[name].shape)}" for name in tensors if name not in expected]
    lines += [
        f"{name} has shape {list(tensors[name].shape)} in the checkpoint, {list(shape)} in {by}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    return lines


def unrounded(weights: Mapping[str, TensorRef], masters: Mapping[str, TensorRef]) -> list[str]:
    """The names of weights that are not their fp32 masters rounded, judged by a few stored values of each.

    Both must be as they are stored, before any rule is applied: a rule that permutes or transposes would put other
    values in the sampled places.
    """
    changed = []
    for name in weights.keys() & masters.keys():
        weight, master = weights[name], masters[name]
        # The same bytes need no comparison; strided ones (views) cannot be compared by position.
        if weight.runs() == master.runs() or not all(map(_in_order, (weight, master))):
            continue
        if not np.array_equal(middle(weight), rounded(middle(master), weight.dtype_name), equal_nan=True):
            changed.append(name)
    return sorted(changed)


def _in_order(ref: TensorRef) -> bool:
    return not isinstance(ref, FileTensor) or ref.in_order


def refuse(checkpoint: Checkpoint, lines: list[str]) -> None:
    """Raises CheckpointError with the lines of `differences`, if there are any."""
    if lines:
        rest = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        raise CheckpointError(
            f"{checkpoint.path}: the tensors are not those of the architecture that its config or stored arguments "
            "describe: one of the two was changed, or files of two models are mixed"
            + "".join(f"\n  {line}" for line in [*lines[:MAX_LINES], *rest])
        )
