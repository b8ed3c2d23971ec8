"""The whole configuration of a run: frozen sections of plain values.

Derived values are properties and are never stored. Reading files, origins and error messages are `load.py`'s affair,
contradictions between values are `check.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from os.path import normpath
from types import MappingProxyType
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PrivateAttr,
    ValidationError,
)
from typing_extensions import Self

from castalia.errors import ConfigError
from castalia.reading import fits, reason, short

LARGEST = (1 << 32) - 1  # of whole numbers: what a generator's seed can be, and more than there is of anything
PositiveInt = Annotated[int, Gt(0), Le(LARGEST)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST)]
Fraction = NonNegativeFloat
InitMethod = Literal[
    "normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init",
    "xavier_uniform", "xavier_normal", "orthogonal", "scaled_orthogonal",
]  # fmt: skip


class Section(BaseModel):
    """A part of the config: frozen, and without any key that it does not declare."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def with_(self, changes: Mapping[str, Any]) -> Self:
        """A copy with other values at dotted paths such as "train.steps"; its origins and notes are the same.

        Values are validated as those of files are, but for contradictions between them, which `check.py` looks for.
        Raises ConfigError with one line for each value that is refused.
        """
        return self._with(changes, "")

    def _with(self, changes: Mapping[str, Any], prefix: str) -> Self:
        values: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {}
        for path, value in changes.items():
            name, _, rest = path.partition(".")
            if rest:
                inner.setdefault(name, {})[rest] = value
            else:
                values[name] = value
        for name, nested in inner.items():
            values[name] = getattr(self, name)._with(nested, f"{prefix}{name}.")
        try:
            valid = type(self).model_validate(self.__dict__ | values)
        except ValidationError as error:
            lines = (
                f"{prefix}{'.'.join(map(str, found['loc']))}={short(found['input'])} {reason(found)}"
                for found in error.errors()
            )
            raise ConfigError("\n".join(lines)) from error
        return self.model_copy(update={name: getattr(valid, name) for name in values})


class RopeScaling(Section):
    """How rotary frequencies are stretched beyond the length they were trained for."""

    kind: Literal["linear", "yarn", "llama3"]
    factor: PositiveFloat = Field(description="how many times longer sequences may become")
    original_positions: PositiveInt | None = Field(None, description="length that the model was trained for")
    beta_fast: float = Field(32.0, description="of yarn: dimensions that turn more often than this stay as they are")
    beta_slow: float = Field(1.0, description="of yarn: dimensions that turn less often are stretched in full")
    low_freq_factor: float = Field(1.0, description="of llama3")
    high_freq_factor: float = Field(4.0, description="of llama3")
    attention_factor: float | None = Field(None, description="of yarn; None: 0.1 ln(factor) + 1")


class MuPConfig(Section):
    """Maximal-update parametrization: learning rates that were found at one width hold at all others."""

    base_width: PositiveInt | None = Field(None, description="hidden_size that the rates were found at; None: this one")
    embedding_multiplier: PositiveFloat = Field(1.0, description="of the embedded tokens and positions")
    position_multiplier: PositiveFloat = Field(1.0, description="of learned or sinusoidal positions")
    attention_temperature: PositiveFloat = Field(1.0, description="scores are q k / (head size * this)")
    output_temperature: PositiveFloat = Field(1.0, description="logits are divided by it, and by the width's ratio")
    init_scale: PositiveFloat = Field(1.0, description="of all random initial values")


class ModelConfig(Section):
    num_layers: Annotated[int, Gt(0), Le(10_000)]
    hidden_size: Annotated[int, Gt(0), Le(1 << 24)]
    num_heads: Annotated[int, Gt(0), Le(1 << 16)]
    num_kv_heads: PositiveInt | None = Field(None, description="key/value heads; None: as many as query heads")
    mlp_size: PositiveInt | None = Field(None, description="inner width of the MLP; None: 4 * hidden_size")
    vocab_size: PositiveInt | None = Field(None, description="logical vocabulary; None: the tokenizer's")
    vocab_multiple: PositiveInt = Field(128, description="the embedding's rows are padded to a multiple of this")
    max_positions: PositiveInt | None = Field(None, description="longest sequence; None: data.seq_length")

    position: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = "rotary"
    rotary_pct: PositiveFloat = Field(1.0, le=1.0, description="share of each head's dimensions that rotate")
    rotary_base: PositiveFloat = Field(10000.0, description="longest wave length of the rotation, over 2 pi")
    rope_scaling: RopeScaling | None = Field(None, description="None: rotary frequencies as they are")
    norm: Literal["layernorm", "rmsnorm", "scalenorm", "layernorm_no_params"] = "layernorm"
    norm_eps: PositiveFloat = 1e-5
    rms_eps_inside: bool = Field(True, description="x / sqrt(mean(x^2) + eps); false: x / (rms(x) + eps)")
    qk_norm: bool = Field(False, description="norm over all heads of the queries and of the keys, as NeoX does")
    activation: Literal[
        "gelu", "gelu_tanh", "relu", "silu", "mish", "softsign", "sigmoid", "identity"
    ] = "gelu_tanh"  # fmt: skip
    gated_mlp: bool = Field(False, description="activation(gate(x)) * up(x) instead of activation(up(x))")
    parallel_residual: bool = Field(False, description="x + attention(norm1 x) + mlp(norm2 x)")
    shared_norm: bool = Field(False, description="parallel residual with one norm for both branches")
    attention_bias: bool = Field(True, description="in both matrices of the attention")
    mlp_bias: bool = Field(True, description="in all matrices of the MLP")
    tie_embeddings: bool = Field(False, description="the head is the embedding itself")
    reward_head: bool = Field(False, description="a reward model: the head gives one number instead of logits")
    sliding_window: PositiveInt | None = Field(None, description="a token sees itself and this many before it")
    embedding_dropout: Fraction = Field(0.0, lt=1.0, description="of the embedded tokens")
    hidden_dropout: Fraction = Field(0.0, lt=1.0, description="of what attention and MLP add")
    attention_dropout: Fraction = Field(0.0, lt=1.0, description="of the attention's weights")

    mup: MuPConfig | None = Field(None, description="None: the standard parametrization")

    init: Literal["seeded", "neox"] | None = Field(
        None,
        description="seeded: by (seed, name, position); neox: the original's CPU stream for one process; "
        "None: neox under neox_exact",
    )
    init_passes: Literal[1, 2] = Field(1, description="with init=neox: 2 for pipe_parallel_size 0, which builds twice")
    init_method: InitMethod = Field("normal", description="embeddings, head, attention input, first MLP matrix")
    output_init_method: InitMethod = Field("scaled_normal", description="attention output and second MLP matrix")
    init_std: PositiveFloat = Field(0.02, description="of the methods whose name ends in normal")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        return self.mlp_size or 4 * self.hidden_size

    @property
    def width_multiplier(self) -> float:
        """Under muP the width over the one that the rates were found at, else 1."""
        return self.hidden_size / (self.mup.base_width or self.hidden_size) if self.mup else 1.0

    @property
    def rotary_size(self) -> int:
        """Rotating dimensions of each head."""
        return int(self.head_size * self.rotary_pct)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding. Raises ValueError while the vocabulary is unknown."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is unknown until the tokenizer is read")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class Text(Section):
    """One indexed corpus: the path of its `.bin` and `.idx` without the ending."""

    path: str
    labels: str | None = Field(None, description="prefix of label ids, -100 where no loss is taken")
    references: str | None = Field(
        None, description="prefix of the reference model's log-probabilities, fp32: number t is of token t + 1"
    )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All corpora that are named here."""
        return tuple(prefix for prefix in (self.path, self.labels, self.references) if prefix)


def _as_text(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Source(Text):
    """A corpus of the data, with what belongs to each of its documents."""

    weight: PositiveFloat = 1.0
    rejected: Annotated[Text | None, BeforeValidator(_as_text)] = Field(
        None, description="of pairs: the worse text for each document of path; a prefix, or {path, labels, references}"
    )
    rewards: str | None = Field(
        None, description="prefix of one number a document, for objective=kto: above 0 wanted, below 0 unwanted"
    )

    @property
    def prefixes(self) -> tuple[str, ...]:
        others = (self.rejected.prefixes if self.rejected else ()) + ((self.rewards,) if self.rewards else ())
        return super().prefixes + others


def _as_sources(value: object) -> object:
    """`train: corpus` and `train: [a, b]` mean sources of weight 1."""
    entries = (value,) if isinstance(value, str | dict | Source) else value
    if not isinstance(entries, tuple | list):
        return entries
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class Warmup(Section):
    """A size that rises over the first steps: floor(start + (whole - start) * (step / steps)^(1 / root)), with steps
    counted from 1, rounded down to a multiple; from then on the whole."""

    start: PositiveInt = Field(description="size of the first steps")
    steps: PositiveInt = Field(description="about so many steps until the whole size is reached")
    multiple: PositiveInt | None = Field(None, description="sizes are multiples of this; None: of start")
    root: PositiveInt = Field(1, description="1: the size rises linearly; 2: with the square root of the step; ...")

    @property
    def unit(self) -> int:
        return self.multiple or self.start

    def at(self, step: int, whole: int) -> int:
        """The size in a step, from 0."""
        share = ((step + 1) / self.steps) ** (1 / self.root)
        size = math.floor(share * (whole - self.start) + self.start)
        return min(whole, size - size % self.unit)


def split_shares(split: str) -> list[float]:
    """The three numbers of texts such as "969, 30, 1", "8/1/1" or "1", where two are 0. Raises ValueError.

    Like GPT-NeoX this reads over a fourth one, which a config may not have.
    """
    try:
        shares = [float(part) for part in re.split("[,/]", split)]
    except ValueError:
        raise ValueError("no list of numbers such as '969, 30, 1'") from None
    shares = (shares + [0.0, 0.0])[:3]
    if not 0 < sum(shares) < math.inf or min(shares) < 0:
        raise ValueError("it leaves no documents: its parts must not be negative nor all zero")
    return shares


def _split(value: str) -> str:
    split_shares(value)
    if (count := len(re.split("[,/]", value))) > 3:
        raise ValueError(f"{count} parts; there are three: training, validation and test")
    return value


class DataConfig(Section):
    path: str | None = Field(None, description="one corpus that `split` divides; excludes train, valid and test")
    split: Annotated[str, AfterValidator(_split)] = Field(
        "969, 30, 1", description="shares of training, validation and test"
    )
    train: Sources = ()
    valid: Sources = ()
    test: Sources = ()
    seq_length: PositiveInt = Field(2048, description="tokens of a sequence")
    seq_length_warmup: Warmup | None = Field(
        None, description="the first steps train on the beginning of each sequence only; None: on all of it"
    )
    packing: Literal["packed", "pack_until_overflow", "unpacked"] = Field(
        "packed", description="documents end to end; whole ones until one does not fit; one a sample"
    )
    allow_chopped: bool = Field(True, description="false: leave out documents longer than a sample")
    weight_by_documents: bool = Field(False, description="weights from document counts; replaces the given weights")
    weight_alpha: PositiveFloat = Field(1.0, description="with weight_by_documents: below 1 favours small corpora")
    mask_after_eod: bool = Field(False, description="no loss on the token that follows an end-of-document token")
    mask_documents: bool = Field(False, description="tokens see only their own document; positions restart")
    cache_dir: str | None = Field(None, description="folder of index files; None: beside the data")
    pass_multiple: PositiveInt | None = Field(
        None,
        description="a pass over the data ends with a multiple of so many sequences; None: of a forward pass of all "
        "ranks, which is what a run goes on with",
    )


class TokenizerConfig(Section):
    kind: (
        Literal["hf", "gpt2", "hf_gpt2", "sentencepiece", "neox_sentencepiece", "tiktoken", "char", "bytes"] | None
    ) = None
    path: str | None = Field(None, description="tokenizer.json, vocab.json, model file or folder")
    merges: str | None = Field(None, description="merges.txt of GPT-2 BPE files")


class ParameterGroup(Section):
    match: str = Field(
        description="regular expression, searched in the tensors' names; the first group that fits counts"
    )
    lr_scale: PositiveFloat = Field(1.0, description="times optimizer.lr")
    weight_decay: NonNegativeFloat | None = Field(None, description="None: as without the group")


class LoraConfig(Section):
    """Low-rank adapters: W x + alpha / rank * B (A x), with W as it was loaded."""

    rank: PositiveInt = Field(16, description="columns of B and rows of A")
    alpha: PositiveFloat | None = Field(None, description="what B (A x) is multiplied by, times the rank; None: 2 rank")
    dropout: Fraction = Field(0.0, lt=1.0, description="of an adapter's input; the head's has none")
    targets: tuple[Literal["attn.qkv", "attn.out", "mlp.up", "mlp.gate", "mlp.down", "head"], ...] = Field(
        (), description="matrices with an adapter; none named: all of the blocks"
    )

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied by."""
        return (self.alpha or 2 * self.rank) / self.rank


class FinetuneConfig(Section):
    """What of the loaded model trains, and what is added to it."""

    lora: LoraConfig | None = Field(None, description="{}: adapters of rank 16; None: no adapters")
    train: tuple[str, ...] = Field(
        (), description="regular expressions, searched in the tensors' names: what trains; none: all, or the adapters"
    )
    freeze: tuple[str, ...] = Field((), description="regular expressions: what does not train")
    add_tokens: tuple[str, ...] = Field(
        (), description="new entries of the vocabulary; with init_from their rows begin as the mean of all others"
    )

    def trains(self, name: str) -> bool:
        """Whether a tensor of this name learns. Adapters do, whatever `train` says."""
        wanted = any(fits(pattern, name) for pattern in self.train) if self.train else self.lora is None
        return (wanted or is_adapter(name)) and not any(fits(pattern, name) for pattern in self.freeze)


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_a", ".lora_b"))


class OptimizerConfig(Section):
    name: Literal["adamw", "lion", "sgd", "adafactor", "muon"] = Field(
        "adamw",
        description="muon: on the matrices of the blocks, adamw on the rest; adafactor: lr is relative to the weights",
    )
    lr: PositiveFloat = Field(3e-4, description="the highest learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of adamw, lion and muon's adamw")
    eps: PositiveFloat = Field(1e-8, description="of adamw and muon's adamw")
    momentum: Fraction = Field(0.95, lt=1.0, description="of sgd and muon")
    weight_decay: NonNegativeFloat = Field(0.1, description="on matrices and embeddings; never on norms and biases")
    groups: tuple[ParameterGroup, ...] = Field((), description="tensors with a rate or a decay of their own")
    layer_decay: PositiveFloat = Field(
        1.0, le=1.0, description="times the rate of a block for each block above it; embeddings lie below all blocks"
    )
    clip_norm: PositiveFloat | None = Field(1.0, description="largest gradient norm; None switches clipping off")


class ScheduleConfig(Section):
    style: Literal["constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="wsd: constant, then linear over the last `cooldown`; inverse_sqrt: ~ 1 / sqrt(step)"
    )
    warmup: Fraction = Field(0.01, le=1.0, description="share of the decay steps")
    warmup_steps: NonNegativeInt | None = Field(None, description="the warm-up in steps; replaces warmup")
    cooldown: Fraction = Field(0.2, le=1.0, description="of wsd: share of the decay steps in which the rate falls")
    decay_steps: PositiveInt | None = Field(None, description="None: train.steps * decay_fraction")
    decay_fraction: PositiveFloat | None = Field(None, le=1.0, description="share of train.steps until the decay ends")
    min_lr: NonNegativeFloat = Field(0.0, description="the rate never falls below it after the warm-up")

    @property
    def ends(self) -> bool:
        """Whether the rate comes to an end at all."""
        return self.style not in ("constant", "inverse_sqrt")

    def decay_end(self, steps: int) -> int:
        """The step at which the decay of a run of this many steps ends; 0 where that is unknown (`steps` is 0)."""
        return self.decay_steps or math.floor(steps * (self.decay_fraction or 1.0))

    def warmup_length(self, end: int) -> float:
        """Steps, not rounded, of a decay that ends at step `end`."""
        return self.warmup * end if self.warmup_steps is None else float(self.warmup_steps)


class ParallelConfig(Section):
    """The layout: world = pp * dp * cp * tp, where dp is what the other three leave of the ranks."""

    tp: PositiveInt = Field(1, description="tensor ranks: heads, MLP widths and vocabulary are split")
    pp: PositiveInt = Field(1, description="pipeline ranks: blocks are split")
    cp: PositiveInt = Field(1, description="context ranks: sequences are split")
    cp_kind: Literal["gather", "ulysses", "ring"] = Field(
        "gather",
        description="how context ranks attend: all gather keys and values; each takes whole sequences of its share of "
        "the heads; keys and values travel around",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        0, description="0 replicate; 1, 2 shard optimizer and gradients; 3 parameters too"
    )
    dp_replicate: PositiveInt | None = Field(None, description="with zero >= 1: copies of the sharded model (HSDP)")
    sequence_parallel: bool = Field(False, description="tensor ranks split activations between their matrices too")
    pipeline: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = Field("1f1b", description="pipeline schedule")
    stages_per_rank: PositiveInt | None = Field(None, description="None: 2 for interleaved and zero-bubble, else 1")
    offload: bool = Field(False, description="keep sharded parameters and optimizer state in CPU memory")
    timeout: PositiveFloat = Field(600.0, description="seconds that ranks wait for one that does not come")
    gpus: PositiveInt | None = Field(None, description="devices of the whole run, for planning; None: those it runs on")

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model together: tp * pp * cp."""
        return self.tp * self.pp * self.cp


class LossScaleConfig(Section):
    """fp16 only. `rule` names which of DeepSpeed's two dynamic rules applies."""

    static: PositiveFloat | None = Field(None, description="a fixed scale; None: dynamic")
    initial: PositiveFloat = Field(2.0**16, description="of the first step")
    window: PositiveInt = Field(1000, description="it doubles after so many good steps")
    hysteresis: PositiveInt = Field(2, description="of zero: it halves at the so-manieth overflow")
    minimum: PositiveFloat = Field(1.0, description="it never gets smaller")
    consecutive_hysteresis: bool = Field(False, description="of zero: every good step forgives earlier overflows")
    rule: Literal["zero", "stage0"] | None = Field(None, description="None: zero for parallel.zero >= 1, else stage0")


class PrecisionConfig(Section):
    compute: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 where the hardware has it")
    loss_scale: LossScaleConfig = LossScaleConfig()


class PreferenceConfig(Section):
    """What train.objective=dpo, kto and reward learn from pairs or from judged texts."""

    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="of dpo")
    beta: PositiveFloat = Field(0.1, description="of dpo and kto: how dear it is to leave the reference model")
    reference: str | None = Field(
        None,
        description="of dpo and kto: checkpoint of the reference model; None: the weights that the run starts from",
    )
    reference_free: bool = Field(False, description="of dpo: the reference finds all texts equally likely")
    desirable_weight: NonNegativeFloat = Field(1.0, description="of kto: of the loss of wanted texts")
    undesirable_weight: NonNegativeFloat = Field(1.0, description="of kto: of the loss of unwanted texts")


class EarlierBatch(Section):
    """The size of the batches before a resumed run was given another one."""

    until: PositiveInt = Field(description="the last step, from 1, of this size")
    batch_size: PositiveInt = Field(description="sequences (or pairs) of a step over all ranks")


class TrainConfig(Section):
    objective: Literal["causal", "dpo", "kto", "reward"] = Field(
        "causal", description="the next token; or what `preference` describes"
    )
    steps: PositiveInt | None = Field(None, description="optimizer steps; or give epochs")
    epochs: PositiveInt | None = Field(None, description="passes over the data")
    batch_size: PositiveInt | None = Field(None, description="sequences (or pairs) of a step over all ranks")
    batch_size_warmup: Warmup | None = Field(
        None, description="the first steps train on fewer sequences; None: on the whole batch"
    )
    earlier_batches: tuple[EarlierBatch, ...] = Field(
        (), description="a resumed run writes here what batch_size was until when, so that it reads on where it was"
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="sequences (or pairs) of one forward pass on one rank"
    )
    accumulation: PositiveInt | None = Field(None, description="forward passes of a step")
    z_loss: NonNegativeFloat = Field(
        0.0,
        description="times the square of log(sum of exp(logits)): added to each token's loss in training; "
        "of objective=reward: times the squares of both rewards",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what of a block the backward pass computes again: nothing, all but matrices, everything"
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="compile the blocks; auto: after ten steps of runs on GPUs that are long enough to repay it",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    deterministic: bool = Field(
        False,
        description="the same bits in every repetition on GPUs too, more slowly; on CPUs they are the same anyway",
    )
    exit_interval: PositiveInt | None = Field(None, description="save and stop at the next multiple of this step")
    max_hours: PositiveFloat | None = Field(
        None, description="save and stop before so many hours have passed since this start; the run can go on"
    )


class CheckpointConfig(Section):
    dir: str | None = Field(None, description="the run's folder")
    resume: str | None = Field(None, description="go on from this run or checkpoint: everything is restored")
    init_from: str | None = Field(None, description="start from these weights: a new run")
    step: NonNegativeInt | None = Field(None, description="which step to resume or start from; None: the latest")
    every: PositiveInt | None = Field(None, description="save at multiples of this step")
    log_base: float | None = Field(None, gt=1.0, description="save at 1, base, base^2, ...")
    log_until: PositiveInt | None = Field(None, description="last step of the log_base series")
    steps: tuple[NonNegativeInt, ...] = Field((), description="further steps to save; 0 is before the first step")
    keep_last: PositiveInt | None = Field(None, description="delete older checkpoints, milestones excepted")
    keep_every: PositiveInt | None = Field(None, description="milestones: multiples of this step are never deleted")
    save_optimizer: bool = Field(True, description="without it a run cannot be resumed")
    load_optimizer: bool = Field(True, description="false: resume with a fresh optimizer")
    other_data: bool = Field(False, description="resume although the data or their order have changed")
    schedule_from: Literal["config", "checkpoint"] | None = Field(
        None, description="which learning-rate schedule a resumed run follows; None: they must agree"
    )

    @property
    def starts_if_empty(self) -> bool:
        """Resuming from the run's own folder: an empty one is the first start of a new run, not an error."""
        return None not in (self.resume, self.dir) and normpath(str(self.resume)) == normpath(str(self.dir))


class WandbConfig(Section):
    """Weights & Biases. Its key comes from `wandb login` or the environment, never from a config."""

    project: str = "castalia"
    name: str | None = None
    group: str | None = None
    team: str | None = None
    host: str | None = Field(None, description="address of a server of your own")
    mode: Literal["online", "offline", "disabled"] | None = Field(None, description="None: as WANDB_MODE says")


class ProfileConfig(Section):
    """A trace and a summary of some steps; on a GPU also a snapshot of its memory."""

    start: PositiveInt = Field(10, description="first step")
    stop: PositiveInt = Field(12, description="last step")
    dir: str | None = Field(None, description="None: profile/ in the run's folder")


class LogConfig(Section):
    every: PositiveInt = Field(10, description="a line on the terminal after so many steps")
    tensorboard: str | None = Field(None, description="folder of TensorBoard event files")
    wandb: WandbConfig | None = Field(None, description="None: nothing goes to Weights & Biases")
    csv: bool = Field(False, description="metrics.csv beside metrics.jsonl")
    layers_every: PositiveInt | None = Field(
        None, description="every so many steps, each layer's activations, gradients and weights go to layers.jsonl"
    )
    profile: ProfileConfig | None = Field(None, description="None: no profile; {} for steps 10 to 12")
    peak_tflops: PositiveFloat | None = Field(
        None, description="of one device, for MFU; None: of known devices, and of CPUs as measured if they are idle"
    )


class WatchConfig(Section):
    """What is noticed while training goes to events.jsonl; the policy says what becomes of spikes."""

    policy: Literal["report", "stop", "skip", "rewind"] = Field(
        "report",
        description="of a step whose loss or gradient norm is a spike: apply it nevertheless; save what was before it "
        "and stop; leave its update out; go back to an earlier checkpoint and leave out all batches since then",
    )
    window: Annotated[int, Ge(8), Le(LARGEST)] = Field(
        100, description="steps whose median is the usual value; until half of them are done nothing is a spike"
    )
    threshold: PositiveFloat = Field(
        10.0, description="a spike is so many spreads above the median; the spread is told from changes step by step"
    )
    back: PositiveInt = Field(1, description="of rewind: how many checkpoints")
    dead_every: PositiveInt | None = Field(100, description="look for MLP units without gradient after so many steps")


class EvalConfig(Section):
    every: PositiveInt | None = Field(1000, description="evaluate after so many steps; None: never between")
    batches: NonNegativeInt = Field(10, description="global batches of one evaluation")
    at_end: bool = Field(True, description="evaluate after the last step")


class GenerateConfig(Section):
    """None: what the model's generation_config.json says, else greedy with 64 tokens."""

    temperature: NonNegativeFloat | None = Field(
        None, description="0: always the likeliest token; null: as the model's generation_config.json says, else 0"
    )
    top_k: NonNegativeInt | None = Field(
        None, description="only the k likeliest tokens, 0: all; null: as that file says, else 0"
    )
    top_p: NonNegativeFloat | None = Field(
        None, le=1.0, description="only the likeliest that hold this share, 0: all; null: as that file says, else 0"
    )
    max_tokens: PositiveInt | None = Field(None, description="of one text; null: as that file says, else 64")
    num_samples: PositiveInt = Field(1, description="texts for each prompt")
    mode: Literal["unconditional", "input-file", "interactive"] | None = Field(
        None, description="where prompts come from"
    )
    input_file: str | None = Field(None, description="a prompt on each line")
    output_file: str | None = Field(None, description="prompts and texts, a JSON object a line")
    prompt_end: str = Field("\n", description="what ends a prompt that is typed")


class RunConfig(Section):
    """Everything that a run depends on. `model` is None in overlays that describe no architecture."""

    model: ModelConfig | None = None
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    train: TrainConfig = TrainConfig()
    preference: PreferenceConfig = PreferenceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    watch: WatchConfig = WatchConfig()
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    seed: PositiveInt = Field(1234, description="of initial weights, data order and dropout")
    neox_exact: bool = Field(False, description="bring back every defect of the original that changes numbers")

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def origins(self) -> Mapping[str, str]:
        """Dotted path of each value that was given -> "file.yml:12", "command line" or "NeoX default"."""
        return MappingProxyType(self._origins)

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings and keys without effect, one line each."""
        return self._notes

    def at(self, path: str) -> Any:
        """The value at a dotted path such as "optimizer.lr"; None below an optional section that is absent."""
        value: Any = self
        for name in path.split("."):
            value = None if value is None else getattr(value, name)
        return value

    def with_notes(self, *notes: str) -> Self:
        """A copy with further notes."""
        copy = self.model_copy()
        copy._notes = (*self._notes, *notes)
        return copy

    def place(self, *paths: str) -> str:
        """The start of a message about these values: "a.yml:3, command line: "; empty if all are defaults."""
        places = dict.fromkeys(self._origins[path] for path in paths if path in self._origins)
        return f"{', '.join(places)}: " if places else ""

    def __eq__(self, other: object) -> bool:
        """Values alone count, not where they came from."""
        return isinstance(other, RunConfig) and self.__dict__ == other.__dict__


class CompleteConfig(RunConfig):
    """A config that describes its model: what ranks, model code and a running training are given."""

    model: ModelConfig

    @property
    def vocab_size(self) -> int:
        """Token ids of the model. Raises ConfigError while they are unknown."""
        if self.model.vocab_size is None:
            raise ConfigError("the vocabulary is unknown: give tokenizer.path, or model.vocab_size without a tokenizer")
        return self.model.vocab_size

    @property
    def steps(self) -> int:
        """Optimizer steps of the run. Raises ConfigError while only its epochs are known."""
        if self.train.steps is None:
            raise ConfigError("the length of the run is unknown; give train.steps")
        return self.train.steps


def complete(config: RunConfig) -> CompleteConfig:
    """The same config, its origins and notes included, as one with a model. Raises ConfigError where it has none."""
    if config.model is None:
        raise ConfigError("the config describes no model: give model.num_layers, hidden_size, num_heads, ...")
    whole = CompleteConfig.model_construct(config.model_fields_set, **config.__dict__)
    whole._origins, whole._notes = config._origins, config._notes
    return whole
