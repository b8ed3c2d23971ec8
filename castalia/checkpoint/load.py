"""From a checkpoint of any format into modules and optimizers: strictly, tensor by tensor, and saying what came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from castalia.checkpoint.formats import open_checkpoint
from castalia.checkpoint.rules import drift
from castalia.checkpoint.stored import StoredTensor
from castalia.checkpoint.tensors import Checkpoint, TensorRef
from castalia.config.schema import Model, Tokenizer
from castalia.errors import CheckpointError
from castalia.model.transformer import Transformer

VOCABULARY = ("embed.weight", "head.weight")  # tensors with a row for each token
TITLES = {
    "native": "Castalia",
    "neox": "NeoX",
    "megatron-deepspeed": "Megatron-DeepSpeed",
    "huggingface": "Hugging Face",
}


class AnyOptimizer(Protocol):
    """One of torch's, or several as one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]: ...


@dataclass(frozen=True)
class LoadReport:
    """What was loaded. `str()` is one line for the terminal; `notes` are further ones."""

    loaded: int
    expected: int
    parameters: int
    source: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.loaded} of {self.expected} tensors, {readable(self.parameters)} parameters, {self.source}"


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model of a checkpoint of any format, in eval mode; `module(tokens)` gives logits [batch, time, padded vocab].

    `dtype`: of the parameters and the computation; None for fp32, which holds every stored value exactly.
    """
    return build_model(open_checkpoint(path), device, dtype)


def build_model(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """`load_model` for a checkpoint that is open already."""
    cfg = architecture(checkpoint)
    with torch.device("meta"):
        model = Transformer(cfg, exact=checkpoint.config is not None and checkpoint.config.neox_exact)
    model.to(dtype or torch.float32).to_empty(device=device)
    load_weights(model, checkpoint)
    return model.eval()


def architecture(checkpoint: Checkpoint) -> Model:
    """The model that the tensors belong to. Where the vocabulary is unknown, it is all rows of the embedding."""
    if checkpoint.config is None or checkpoint.config.model is None:
        raise CheckpointError(
            f"{checkpoint.path} does not say which architecture its tensors belong to; give its config with --config"
        )
    model = checkpoint.config.model
    if model.vocab_size is None and "embed.weight" in checkpoint.model:
        rows = checkpoint.model["embed.weight"].shape[0]
        model = model.model_copy(update={"vocab_size": rows, "vocab_multiple": 1})
    return model


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> LoadReport:
    """Fill every parameter, one at a time. The padding of the vocabulary may differ; anything else must match.

    Raises CheckpointError listing all missing, unexpected and mis-shaped tensors; the model is untouched then.
    """
    targets = dict(model.named_parameters())
    vocab_size = model.cfg.vocab_size if isinstance(model, Transformer) else None
    notes = _check(targets, checkpoint.model, vocab_size, checkpoint.path)
    with torch.no_grad():
        for name, parameter in targets.items():
            _fill(parameter, checkpoint.model[name])
    if apart := drift(checkpoint.model):
        farthest = max(apart, key=lambda name: apart[name])
        notes += (
            f"{len(apart)} tensors had drifted apart between tensor ranks and were averaged; the farthest is "
            f"{farthest}, by {apart[farthest]:.2g}",
        )
    elements = sum(parameter.numel() for parameter in targets.values())
    return LoadReport(len(targets), len(targets), elements, describe(checkpoint), notes=notes)


def load_optimizer(optimizer: AnyOptimizer, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the optimizer's state, which must exist, and the parameters from the masters. Call it after `load_weights`.

    Raises CheckpointError if the checkpoint has no state, that of another optimizer, or none for some parameter.
    """
    if checkpoint.optimizer is None:
        raise CheckpointError(
            f"{checkpoint.path} holds no optimizer state, so it cannot be resumed. Start a new run from its weights "
            "with checkpoint.init_from, or go on with fresh moments with checkpoint.load_optimizer=false."
        )
    states = optimizer_state(optimizer, model)
    targets = {name: parameter for name, parameter in model.named_parameters() if name in states}
    saved: dict[str, Mapping[str, Any]]
    saved = {name: state for name, state in checkpoint.optimizer.items() if name in targets}
    vocab_size = model.cfg.vocab_size if isinstance(model, Transformer) else None
    where = f"the optimizer state of {checkpoint.path}"
    _check(targets, {name: state["master"] for name, state in saved.items()}, vocab_size, where)
    for name, state in states.items():
        theirs, ours = (set(each) - {"master", "step"} for each in (saved[name], state))
        if theirs != ours:
            raise CheckpointError(
                f"{where} is that of another optimizer: {name} has {_listed(theirs)}, but this one needs "
                f"{_listed(ours)}. Resume with the same optimizer.name and momentum, or go on with a fresh state with "
                "checkpoint.load_optimizer=false."
            )
        for kind in ours:
            _check({name: state[kind]}, {name: saved[name][kind]}, vocab_size, where)
    with torch.no_grad():
        for name, parameter in targets.items():
            if saved[name]["master"] is not checkpoint.model.get(name):
                _fill(parameter, saved[name]["master"])
            for kind, tensor in states[name].items():
                if kind == "step":
                    tensor.fill_(saved[name]["step"])
                else:
                    _fill(tensor, saved[name][kind])


def _listed(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds)) or "nothing"


def optimizer_state(optimizer: AnyOptimizer, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The state of each trained parameter by its name, as `Writer.save` takes it."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    state = optimizer.state
    return {name: state.get(parameter, {}) for name, parameter in model.named_parameters() if parameter in trained}


def load_tokenizer_for(checkpoint: Checkpoint):  # noqa: ANN201 - any of the tokenizers of castalia.data.tokenizer
    """The tokenizer that a checkpoint was trained with: the run's copy, else what the config names."""
    from castalia.data.tokenizer import load_tokenizer

    if checkpoint.config is None:
        raise CheckpointError(f"{checkpoint.path} does not name its tokenizer; give one with --tokenizer")
    folder = Path(checkpoint.path)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if (run / "tokenizer").is_dir():
        return load_tokenizer(Tokenizer(path=str(run / "tokenizer")))
    given = checkpoint.config.tokenizer
    found = {key: _beside(run, getattr(given, key)) for key in ("path", "merges")}
    return load_tokenizer(given.model_copy(update=found))


def describe(checkpoint: Checkpoint) -> str:
    """For instance "NeoX v1, TP 2 x PP 4, step 150000"."""
    kind, layout = (checkpoint.details.get(key) for key in ("era", "layout"))
    kind = kind or checkpoint.details.get("model_type")
    title = TITLES.get(checkpoint.format, checkpoint.format) + (f" {kind}" if kind else "")
    step = [] if checkpoint.format == "huggingface" else [f"step {checkpoint.progress.step}"]
    return ", ".join([title, *([str(layout)] if layout else []), *step])


def readable(count: int) -> str:
    """162.5M, 20.55B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)


def _check(
    targets: Mapping[str, torch.Tensor], found: Mapping[str, TensorRef], vocab_size: int | None, where: str
) -> tuple[str, ...]:
    """Notes on vocabularies that are padded differently. Raises CheckpointError for every other difference."""
    problems = [f"missing: {name} {list(targets[name].shape)}" for name in targets if name not in found]
    problems += [f"unexpected: {name} {list(found[name].shape)}" for name in found if name not in targets]
    notes = []
    for name in targets.keys() & found.keys():
        have, want = tuple(found[name].shape), tuple(targets[name].shape)
        if have == want:
            continue
        if name in VOCABULARY and have[1:] == want[1:] and vocab_size and min(have[0], want[0]) >= vocab_size:
            change = "zeros added" if have[0] < want[0] else "the others left out"
            notes.append(f"{name}: {have[0]} rows in the checkpoint, {want[0]} in the model: {change}, all padding")
        else:
            problems.append(f"{name} has shape {list(have)} in the checkpoint, {list(want)} in the model")
    if problems:
        both = len(targets.keys() & found.keys())
        lines = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise CheckpointError(f"{where} does not fit the model: {both} of {len(targets)} tensors are in both{lines}")
    return tuple(sorted(notes))


def _fill(target: torch.Tensor, source: TensorRef) -> None:
    """Copy; where the vocabulary's padding differs, common rows are copied and further ones are zero."""
    if tuple(source.shape) != tuple(target.shape):
        rows = min(target.shape[0], source.shape[0])
        target[:rows].copy_(source.read([slice(0, rows), *(slice(None) for _ in source.shape[1:])]))
        target[rows:].zero_()
    elif isinstance(source, StoredTensor) and source.dtype == target.dtype and target.device.type == "cpu":
        source.read(out=target.detach())  # without a second copy
    else:
        target.copy_(source.read())


def _beside(folder: Path, path: str | None) -> str | None:
    """A relative path means one below `folder` where that exists, else one below the working directory."""
    return str(folder / path) if path is not None and (folder / path).exists() else path
