"""The checkpoint that every format is read into and written from: named lazy tensors and what belongs to them.

Names and layouts of tensors are the canonical ones of `castalia.model.transformer`; see `docs/checkpoints.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from castalia.checkpoint.named_tensors import NamedTensors
from castalia.checkpoint.neox_defects import INHERITED
from castalia.config.schema import ModelConfig, RunConfig
from castalia.storage.lazy import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this process holds, to be filled or written."""

    tensor: torch.Tensor
    shape: tuple[int, ...]  # of the whole tensor
    start: tuple[int, ...]  # where the part begins in it

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Shard:
        """A tensor that this process holds as a whole."""
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.dim())


class AdamState(TypedDict):
    """The optimizer state of one parameter. The three tensors are fp32 and have the parameter's shape.

    Native checkpoints may hold the state of other optimizers, with other tensors in place of the two moments.
    """

    master: TensorRef
    exp_avg: TensorRef
    exp_avg_sq: TensorRef
    step: int


def state_tensors(state: AdamState) -> dict[str, TensorRef]:
    """The tensors of one parameter's optimizer state by their kind, whatever the optimizer."""
    return {kind: value for kind, value in state.items() if kind != "step"}  # type: ignore[misc]


@dataclass(frozen=True)
class Progress:
    """How far the run has come. A run that has not started yet has zeros."""

    step: int = 0  # steps done, skipped ones included
    skipped: int = 0  # steps without an update: after an overflow or a spike, or before a rewind
    tokens: int = 0
    loss_scale: Mapping[str, float] | None = None  # fp16: the scaler's own counters
    schedule: Mapping[str, object] | None = None  # the learning-rate schedule that NeoX stored, if any
    # The last losses and gradient norms, by which spikes are detected.
    watch: Mapping[str, Sequence[float]] | None = None


class GuessNote(str):
    """A note on a value that neither tensors nor a config show, and on which it depends what the model computes."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What a format's files say besides tensors, progress and config; None or empty where they do not."""

    era: str | None = None  # of GPT-NeoX: "v1", "v2", "w1-w3" or "head"
    version: str | None = None  # of DeepSpeed
    tp: int | None = None  # ranks that the files were cut over
    pp: int | None = None
    dp: int | None = None
    zero: int | None = None  # stage
    pipeline_files: bool | None = None  # whether each layer has files of its own
    optimizer_files: int | None = None
    model_type: str | None = None  # of Hugging Face
    versions: Mapping[str, str] | None = None  # of the programs that wrote a native checkpoint
    data_fingerprint: str | None = None  # of a native checkpoint's data
    held_out: str | None = None  # digest of the part of `data.path` that its run left for validation
    base: str | None = None  # the path of the model below the adapters of a PEFT folder
    gqa_rows: str | None = None  # NeoX's order of the rows of grouped queries
    adam_steps_stored: bool | None = None
    guesses: tuple[str, ...] = ()  # settings of the model that neither tensors nor a config showed
    stored_arguments: tuple[str, ...] = ()  # settings that the training program's stored arguments showed
    masters_apart: tuple[str, ...] = ()  # tensors, by their names in the files, that are not their masters rounded
    disagreements: tuple[str, ...] = ()  # of files opened with `tolerant`: a line for each
    other_model: ModelConfig | None = None  # of a config that describes another model, and where it was read from
    other_source: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any format: opened, but no tensor is read as a whole."""

    path: str
    format: str  # a key of `castalia.checkpoint.formats.FORMATS`
    model: Mapping[str, TensorRef]
    optimizer: Mapping[str, AdamState] | None
    progress: Progress
    config: RunConfig | None
    notes: tuple[str, ...] = ()  # for whoever uses the model: what was interpreted, and each `GuessNote`
    state_notes: tuple[str, ...] = ()  # for whoever continues training: about the optimizer state
    facts: CheckpointFacts = CheckpointFacts()
    # Traces of defects of GPT-NeoX and DeepSpeed (see `castalia.checkpoint.neox_defects`):
    release: str | None = None  # of NeoX, "v1" or "head": which trained it, or whose behaviour its run follows
    summed_bias_ranks: int = 1  # T when row-parallel biases were summed over T tensor ranks
    # (T, P) when gradient norms were those of the first tensor rank and stage alone.
    norm_ranks: tuple[int, int] = (1, 1)
    summed_micro_batches: int = 1  # n when Adam saw gradients summed over n micro-batches; 1: their means

    def __post_init__(self) -> None:
        named: dict[str, object] = {"model": NamedTensors(self.model, self.config.model if self.config else None)}
        if self.optimizer is not None:
            named["optimizer"] = NamedTensors(self.optimizer)
        for field, tensors in named.items():
            object.__setattr__(self, field, tensors)  # the dataclass is frozen

    def __getitem__(self, name: str) -> TensorRef:
        """A weight by its name, ours or another program's: `checkpoint.model[name]`. Raises KeyError."""
        return self.model[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the weights, our own."""
        return iter(self.model)

    def __contains__(self, name: object) -> bool:
        """Whether there is a weight of this name, our own."""
        return name in self.model

    def __repr__(self) -> str:
        """About ten lines: where it lies, its model, its progress, and how its tensors begin."""
        model = self.config.model if self.config else None
        shown = [f"  {name}: {ref!r}" for name, ref in list(self.model.items())[:4]]
        more = [f"  ... and {len(self.model) - 4} more tensors"] if len(self.model) > 4 else []
        state = f"state of {len(self.optimizer)} tensors" if self.optimizer else "none stored"
        layers = f"{model.num_layers} layers x {model.hidden_size}" if model else "no config"
        head = [f"Checkpoint({self.path!r}, format {self.format!r})", f"  model: {layers}"]
        return "\n".join(
            [
                *head,
                f"  step: {self.progress.step}, tokens: {self.progress.tokens}",
                f"  optimizer: {state}",
                *shown,
                *more,
            ]
        )

    @property
    def inherited(self) -> dict[str, object]:
        """The traces of defects, which conversions carry on."""
        return {name: getattr(self, name) for name in INHERITED}
