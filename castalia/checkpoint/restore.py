"""Fill parameters and optimizers from a checkpoint of any format, tensor by tensor: all of them, or none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from castalia.checkpoint.architecture_check import mismatches
from castalia.checkpoint.description import describe, model_folder, tokenizer_settings
from castalia.checkpoint.rules import drift
from castalia.checkpoint.tensors import Checkpoint, Shard
from castalia.config.schema import ModelConfig, TokenizerConfig
from castalia.config.tensor_table import adapter_shapes, row_of, tensor_shapes
from castalia.errors import CheckpointError
from castalia.storage.derived import Padded, part
from castalia.storage.lazy import TensorRef, name_of
from castalia.units import short_number

if TYPE_CHECKING:
    from castalia.data.tokenizer import Tokenizer

MAX_READERS = 4  # threads


class StatefulOptimizer(Protocol):
    """The part of torch's optimizers that we use; an optimizer that combines several has it too."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As of `torch.optim.Optimizer`."""

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:
        """As of `torch.optim.Optimizer`."""


@dataclass(frozen=True)
class LoadReport:
    """What was loaded. `str()` gives a line for the terminal, `notes` further lines."""

    loaded: int
    expected: int
    parameters: int
    source: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.loaded} of {self.expected} tensors, {short_number(self.parameters)} parameters, {self.source}"


def architecture(checkpoint: Checkpoint) -> ModelConfig:
    """The model that a checkpoint's tensors belong to.

    Where the size of the vocabulary is unknown, all rows of the embedding count. Raises CheckpointError without a
    config.
    """
    if checkpoint.config is None or checkpoint.config.model is None:
        raise CheckpointError(
            f"{checkpoint.path} does not say which architecture its tensors belong to; give its config with --config"
        )
    model = checkpoint.config.model
    if model.vocab_size is None and "embed.weight" in checkpoint.model:
        rows = checkpoint.model["embed.weight"].shape[0]
        model = model.with_({"vocab_size": rows, "vocab_multiple": 1})
    return model


def load_shards(shards: Mapping[str, Shard], cfg: ModelConfig, checkpoint: Checkpoint, added: int = 0) -> LoadReport:
    """Fill the parts of the model `cfg` that this process holds, one tensor at a time. The whole checkpoint must fit.

    The padding of the vocabulary may differ, and its last `added` entries may be missing; anything else must match.
    Raises CheckpointError listing all missing, unexpected and mis-shaped tensors; nothing is filled then.
    """
    expected = tensor_shapes(cfg) | adapter_shapes(cfg, checkpoint.config.finetune.lora if checkpoint.config else None)
    notes = _require_fit(expected, checkpoint.model, cfg.vocab_size and cfg.vocab_size - added, checkpoint.path)
    _fill_all([(shard, checkpoint.model[name]) for name, shard in shards.items()])
    if distances := drift(checkpoint.model):
        farthest = max(distances, key=lambda name: distances[name])
        notes += (
            f"{len(distances)} tensors had drifted apart between tensor ranks and were averaged; the farthest is "
            f"{farthest}, by {distances[farthest]:.2g}",
        )
    elements = sum(math.prod(shape) for shape in expected.values())
    return LoadReport(len(expected), len(expected), elements, describe(checkpoint), notes=notes)


def fitting_tensors(cfg: ModelConfig, checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The tensors of the model `cfg` in its shapes, for whoever reads them when they are needed.

    Rows that pad the vocabulary are added as zeros or left out. Raises CheckpointError as `load_shards` does.
    """
    expected = tensor_shapes(cfg)
    _require_fit(expected, checkpoint.model, cfg.vocab_size, checkpoint.path)
    return {name: _with_rows(checkpoint.model[name], shape[0]) for name, shape in expected.items()}


def _with_rows(source: TensorRef, rows: int) -> TensorRef:
    return Padded(source, rows) if len(source) < rows else part(source, 0, rows)


def load_optimizer(
    optimizer: StatefulOptimizer,
    parameters: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    vocab_size: int | None = None,
    shard: Callable[[torch.Tensor], Shard] = Shard.whole,
) -> None:
    """Fill the optimizer's state, whose tensors must exist, and the parameters from the fp32 masters.

    Call it after `load_shards`, which fills the parameters from the weights. `shard` says which part of the whole
    tensor a parameter or a state tensor is. Raises CheckpointError if the checkpoint has no optimizer state, the state
    of another optimizer, or none for some parameter.
    """
    if checkpoint.optimizer is None:
        raise CheckpointError(
            f"{checkpoint.path} holds no optimizer state, so it cannot be resumed{_because(checkpoint)}. Start a new "
            "run from its weights with checkpoint.init_from, or continue with fresh moments with "
            "checkpoint.load_optimizer=false."
        )
    # Everything is checked before anything is filled.
    states = optimizer_state(optimizer, parameters)
    saved: dict[str, Mapping[str, Any]] = {n: state for n, state in checkpoint.optimizer.items() if n in states}
    where = f"the optimizer state of {checkpoint.path}"
    targets: dict[str, dict[str, Shard]] = {"master": {name: shard(parameters[name]) for name in states}}
    for name, state in states.items():
        stored, wanted = (set(kinds) - {"master", "step"} for kinds in (saved.get(name, state), state))
        if stored != wanted:
            raise CheckpointError(
                f"{where} is that of another optimizer: {name} has {_in_words(stored)}, but this one needs "
                f"{_in_words(wanted)}. Resume with the same optimizer.name and momentum, or continue with a fresh "
                "state with checkpoint.load_optimizer=false."
            )
        for kind in wanted:
            targets.setdefault(kind, {})[name] = shard(state[kind])
    for kind, shards in targets.items():
        sources = {name: saved[name][kind] for name in shards if name in saved}
        _require_fit({name: target.shape for name, target in shards.items()}, sources, vocab_size, where)
    for name, state in states.items():
        if saved[name]["master"] is checkpoint.model.get(name):
            del targets["master"][name]  # the weight itself, which `load_shards` has loaded
        if "step" in state:
            state["step"].fill_(saved[name]["step"])
    _fill_all([(target, saved[name][kind]) for kind, parts in targets.items() for name, target in parts.items()])


def _because(checkpoint: Checkpoint) -> str:
    return f" ({'; '.join(checkpoint.state_notes)})" if checkpoint.state_notes else ""


def _in_words(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds)) or "nothing"


def optimizer_state(
    optimizer: StatefulOptimizer, parameters: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer state of each trained parameter by name, as `CheckpointSaver.save` takes it."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    state = optimizer.state
    return {name: state.get(parameter, {}) for name, parameter in parameters.items() if parameter in trained}


def require_finite(parameters: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises CheckpointError that names the first block with NaN or infinite weights.

    `parameters` are in the order of the model; `where` names them in the error.
    """
    bad = [name for name, p in parameters.items() if p.numel() and not _all_finite(p.detach())]
    if not bad:
        return
    first = parameters[bad[0]].detach()
    count = int((~first.isfinite()).sum())
    block = re.match(r"blocks\.\d+|\w+", bad[0])
    narrow = first.dtype != torch.float32
    held = f" in {name_of(first.dtype)} (fp32 may hold what that cannot)" if narrow else ""
    raise CheckpointError(
        f"{where}: {bad[0]} has {count} NaN or infinite values of {first.numel()}{held}, and {len(bad) - 1} other "
        f"tensors have some. The first place is {block[0] if block else bad[0]}; nothing that this model computes "
        "means anything. `castalia inspect --tensors` lists them all; take an earlier step, or a sound copy"
    )


def _all_finite(tensor: torch.Tensor) -> bool:
    return all(bool(end.isfinite()) for end in tensor.aminmax())  # NaN spreads to both; no copy is made


def load_tokenizer_for(checkpoint: Checkpoint, path: str | None = None) -> Tokenizer:
    """The tokenizer at `path`, else the one that the checkpoint was trained with.

    Raises CheckpointError where the checkpoint names none, and what `load_tokenizer` raises.
    """
    from castalia.data.tokenizer import load_tokenizer

    settings = TokenizerConfig(path=path) if path else tokenizer_settings(checkpoint)
    if settings is None:
        raise CheckpointError(f"{checkpoint.path} does not name its tokenizer; give one with --tokenizer")
    refuse_missing_tokenizer(checkpoint, settings)
    neox = checkpoint.config is not None and checkpoint.config.neox_exact
    return load_tokenizer(settings, neox=neox, model=model_folder(checkpoint))


def refuse_missing_tokenizer(checkpoint: Checkpoint, settings: TokenizerConfig) -> None:
    """Raises CheckpointError where there is no such file as the checkpoint names."""
    if settings.path and not Path(settings.path).exists():
        where = checkpoint.config.place("tokenizer.path") if checkpoint.config else ""
        raise CheckpointError(
            f"{where}the checkpoint {checkpoint.path} names the tokenizer {settings.path}, which is neither here nor "
            "beside it; give the file with --tokenizer (train, finetune: tokenizer.path=FILE)"
        )


def find_tokenizer(checkpoint: Checkpoint, path: str | None) -> Tokenizer | None:
    """The one that is asked for, else the checkpoint's; None where it names none."""
    named = checkpoint.config.tokenizer if checkpoint.config else None
    return load_tokenizer_for(checkpoint, path) if path or (named and (named.path or named.kind)) else None


def _require_fit(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorRef], vocab_size: int | None, where: str
) -> tuple[str, ...]:
    """Notes on vocabularies that are padded differently. Raises CheckpointError for any other difference."""
    notes, fitting = [], dict(expected)
    for name in (name for name in expected if name in tensors and row_of(name).has_token_rows):
        have, want = tuple(tensors[name].shape), tuple(expected[name])
        # Rows beyond the vocabulary belong to no token, so that their number may differ.
        if have != want and have[1:] == want[1:] and vocab_size and min(have[0], want[0]) >= vocab_size:
            change = "zeros added" if have[0] < want[0] else "the others left out"
            notes.append(f"{name}: {have[0]} rows in the checkpoint, {want[0]} in the model: {change}, all padding")
            fitting[name] = have
    if problems := mismatches(fitting, tensors, "the model"):
        both = len(expected.keys() & tensors.keys())
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise CheckpointError(f"{where} does not fit the model: {both} of {len(expected)} tensors are in both{lines}")
    return tuple(sorted(notes))


def fill_with_mean(shard: Shard, source: TensorRef, first: int, stop: int) -> None:
    """Set rows `first` to `stop` of the whole tensor to the mean of the source's rows before them."""
    # the shard is [rows, columns] of the whole tensor from `shard.start` on
    begin, columns = shard.start[0], slice(shard.start[1], shard.start[1] + shard.tensor.shape[1])
    rows = shard.tensor.detach()[max(first - begin, 0) : max(stop - begin, 0)]
    if len(rows):
        rows.copy_(source.read([slice(0, first), columns]).double().mean(dim=0))


def _fill_all(parts: Sequence[tuple[Shard, TensorRef]]) -> None:
    """Fill all shards in a few threads, each of which reads one source at a time."""
    num_readers, rest = min(MAX_READERS, torch.get_num_threads()), iter(parts)

    def fill_some(_: int) -> None:
        """One thread's work."""
        for each in rest:  # threads share the iterator: a task for each tensor would cost more than small tensors do
            _fill(*each)

    with ThreadPoolExecutor(num_readers) as readers:
        list(readers.map(fill_some, range(num_readers)))  # raises what went wrong


def _fill(shard: Shard, source: TensorRef) -> None:
    """Copy a shard's part of the source. Rows that the source lacks are padding and become zero."""
    target = shard.tensor.detach()
    whole = tuple(source.shape) == tuple(target.shape) and not any(shard.start)
    ends = zip(shard.start, target.shape, source.shape, strict=True)
    slices = None if whole else [slice(start, min(start + size, end)) for start, size, end in ends]
    there = target if slices is None else target[: max(0, slices[0].stop - slices[0].start)]
    if there.numel():
        source.read(slices, out=there)
    if slices:
        target[len(there) :].zero_()
