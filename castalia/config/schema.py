"""The whole configuration of a run: frozen sections of plain values.

Derived values are properties and are never stored. `load.py` reads files, records where each value came from and words
the error messages; `check.py` looks for values that contradict each other. The descriptions are what
`castalia config explain` prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from os.path import normpath
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
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

LARGEST = (1 << 32) - 1  # for whole numbers: the largest seed of a generator, and more than any count needs
PositiveInt = Annotated[int, Gt(0), Le(LARGEST)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST)]
Fraction = NonNegativeFloat
InitMethod = Literal[
    "normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init",
    "xavier_uniform", "xavier_normal", "orthogonal", "scaled_orthogonal",
]  # fmt: skip


class Section(BaseModel):
    """A part of the config: frozen, and with no other keys than those it declares."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def with_(self, changes: Mapping[str, Any]) -> Self:
        """A copy with new values at dotted paths such as "train.steps"; origins and notes are kept.

        Each value is validated as it would be in a file; contradictions between values are left to `check.py`.
        Raises ConfigError with one line for each value that is refused.
        """
        return self._with(changes, "")

    def _with(self, changes: Mapping[str, Any], prefix: str) -> Self:
        # Changes of this section itself, and those of sections in it by their name.
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
                f"{prefix}{'.'.join(map(str, problem['loc']))}={short(problem['input'])} {reason(problem)}"
                for problem in error.errors()
            )
            raise ConfigError("\n".join(lines)) from error
        # A copy, because it keeps origins, notes and which fields were given; pydantic does not validate it.
        return self.model_copy(update={name: getattr(valid, name) for name in values})


class RopeScaling(Section):
    """How rotary frequencies are scaled for sequences longer than those of the training."""

    kind: Literal["linear", "yarn", "llama3"] = Field(
        description="linear: all rotations are slowed down by the factor; yarn, llama3: only the slow ones"
    )
    factor: PositiveFloat = Field(description="how many times longer sequences become")
    original_positions: PositiveInt | None = Field(
        None, description="length that the model was trained for; None: model.max_positions"
    )
    beta_fast: float = Field(
        32.0,
        description="yarn: dimensions that turn more often than this within the original length are left unchanged",
    )
    beta_slow: float = Field(
        1.0, description="yarn: dimensions that turn less often than this are slowed down by the whole factor"
    )
    low_freq_factor: float = Field(1.0, description="llama3: the same as beta_slow")
    high_freq_factor: float = Field(4.0, description="llama3: the same as beta_fast")
    attention_factor: float | None = Field(
        None, description="yarn: rotated queries and keys are multiplied by this; None: 0.1 ln(factor) + 1"
    )


class MuPConfig(Section):
    """Maximal update parametrization (muP): learning rates tuned at one width are right at every width."""

    base_width: PositiveInt | None = Field(
        None, description="hidden_size at which the learning rates were tuned; None: this model's"
    )
    embedding_multiplier: PositiveFloat = Field(1.0, description="multiplies token and position embeddings")
    position_multiplier: PositiveFloat = Field(1.0, description="multiplies learned or sinusoidal positions")
    attention_temperature: PositiveFloat = Field(1.0, description="attention scores are q k / (head size * this)")
    output_temperature: PositiveFloat = Field(1.0, description="logits are divided by this and by the width ratio")
    init_scale: PositiveFloat = Field(1.0, description="multiplies all random initial values")


# What stands in a block: attention with an MLP or with a mixture of experts, or another layer in place of both.
LayerKind = Literal["dense", "moe", "gmlp", "amlp", "mamba", "rwkv"]
Named = TypeVar("Named", bound=str | bool)
MixerKind = Literal["attention", "gmlp", "amlp", "mamba", "rwkv"]  # what mixes the tokens of a block


def shortest(kinds: Sequence[Named]) -> tuple[Named, ...]:
    """The shortest pattern that gives these kinds when it is repeated."""
    sizes = (size for size in range(1, len(kinds)) if all(k == kinds[i % size] for i, k in enumerate(kinds)))
    return tuple(kinds[: next(sizes, len(kinds))])


Pattern = Annotated[tuple[bool, ...], MinLen(1), MaxLen(10_000)]  # of blocks


class MambaConfig(Section):
    """Sizes of Mamba blocks."""

    width: PositiveInt | None = Field(None, description="channels; None: 2 * hidden_size")
    states: Annotated[int, Gt(0), Le(1 << 12)] = Field(16, description="values that each channel remembers")
    taps: Annotated[int, Gt(0), Le(1 << 8)] = Field(4, description="tokens that the convolution sees, its own included")
    rank: PositiveInt | None = Field(None, description="rank of the steps; None: hidden_size / 16, rounded up")
    conv_bias: bool = Field(True, description="a bias in the convolution")
    linear_bias: bool = Field(False, description="biases in the matrices")


class RWKVConfig(Section):
    """Sizes of RWKV-6 blocks."""

    width: PositiveInt | None = Field(
        None,
        description="inner width of the channel mix; None: 3.5 * hidden_size, rounded down to a multiple of 32",
    )
    mix_rank: PositiveInt = Field(32, description="rank of what a token adds to the mixes with the token before")
    decay_rank: PositiveInt = Field(64, description="rank of what a token adds to the decays")


class ExpertsConfig(Section):
    """A mixture of experts in place of the MLP of some blocks: a router chooses a few experts for each token."""

    count: Annotated[int, Ge(2), Le(1 << 16)] = Field(description="experts of a block")
    top_k: PositiveInt = Field(1, description="experts that compute each token")
    first: NonNegativeInt = Field(0, description="the first block that has experts")
    every: PositiveInt = Field(
        1, description="blocks first, first + every, first + 2 * every, ... have experts, the others an MLP"
    )
    width: PositiveInt | None = Field(None, description="inner width of one expert; None: that of the MLP")
    gated: bool = Field(False, description="activation(gate(x)) * up(x) in each expert instead of activation(up(x))")
    shared_width: PositiveInt | None = Field(
        None, description="inner width of a further expert that computes every token; None: there is none"
    )
    shared_gate: bool = Field(False, description="the shared expert's output is multiplied by a sigmoid of the token")
    router: Literal["topk", "balanced", "sinkhorn"] = Field(
        "topk",
        description="topk: the experts with the largest softmax; balanced: with the largest sigmoid plus a bias, which "
        "evens out the load from step to step, as in DeepSeek-V3; sinkhorn: as GPT-NeoX, in training a choice that "
        "balances the experts over the micro-batch, so that it depends on later tokens, too",
    )
    balance_rate: NonNegativeFloat = Field(
        0.001, description="balanced: how far a step moves the bias of an expert; 0: it stays"
    )
    norm_topk: bool | None = Field(
        None,
        description="divide the shares of a token's experts by their sum; None: with router=balanced and top_k > 1",
    )
    routed_scale: PositiveFloat = Field(1.0, description="multiplies the shares")
    sinkhorn_stop: Literal["relative", "absolute", "inverted"] | None = Field(
        None,
        description="sinkhorn: when its at most three iterations end; relative: once they change little; absolute: as "
        "in GPT-NeoX, in practice after one; inverted: as in GPT-NeoX before 2026-05-20, in practice after three; "
        "None: absolute under neox_exact, else relative",
    )
    jitter: Annotated[float, Ge(0), Lt(1)] = Field(
        0.0, description="topk: in training the router sees its input times random numbers within 1 +- this"
    )

    @property
    def divides_shares(self) -> bool:
        """Whether a token's shares are divided by their sum, where `norm_topk` may be None."""
        return self.router == "balanced" and self.top_k > 1 if self.norm_topk is None else self.norm_topk


@lru_cache
def _layer_kinds(pattern: tuple[Any, ...], num_layers: int, mixed: range) -> tuple[LayerKind, ...]:
    """What stands in each block; kept, since a plan asks for it a hundred thousand times."""
    mixers = (pattern[layer % len(pattern)] for layer in range(num_layers))
    return tuple(
        mixer if mixer != "attention" else "moe" if layer in mixed else "dense" for layer, mixer in enumerate(mixers)
    )


class ModelConfig(Section):
    """The architecture and its initial values."""

    # Shape of the network.
    num_layers: Annotated[int, Gt(0), Le(10_000)] = Field(description="transformer blocks")
    hidden_size: Annotated[int, Gt(0), Le(1 << 24)] = Field(description="width of the hidden state")
    num_heads: Annotated[int, Gt(0), Le(1 << 16)] = Field(description="query heads")
    num_kv_heads: PositiveInt | None = Field(None, description="key/value heads; None: as many as query heads")
    head_dim: PositiveInt | None = Field(None, description="dimensions of one head; None: hidden_size / num_heads")
    mlp_size: PositiveInt | None = Field(None, description="inner width of the MLP; None: 4 * hidden_size")
    vocab_size: PositiveInt | None = Field(None, description="token ids, without padding; None: the tokenizer's")
    vocab_multiple: PositiveInt = Field(128, description="the embedding is padded to a multiple of this many rows")
    max_positions: PositiveInt | None = Field(None, description="longest sequence; None: data.seq_length")

    # Positions, norms and activations. A pattern says it of blocks 0, 1, ..., again from its beginning after its end.
    position: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = Field(
        "rotary", description="how positions enter the model"
    )
    rotary_pct: PositiveFloat = Field(1.0, le=1.0, description="share of each head's dimensions that are rotated")
    rotary_base: PositiveFloat = Field(10000.0, description="base of the rotary frequencies (theta)")
    rope_scaling: RopeScaling | None = Field(
        None, description="how rotary frequencies are scaled for longer sequences; None: not at all"
    )
    rotary_pattern: Pattern = Field((True,), description="which blocks rotate queries and keys")
    position_offset: Annotated[int, Ge(0), Le(1 << 16)] = Field(
        0, description="rows of the learned positions before that of the first token, as OPT has them"
    )
    norm: Literal["layernorm", "rmsnorm", "scalenorm", "layernorm_no_params"] = Field(
        "layernorm", description="normalization layer"
    )
    norm_eps: PositiveFloat = Field(1e-5, description="epsilon of the norms")
    rms_eps_inside: bool = Field(True, description="RMSNorm: x / sqrt(mean(x^2) + eps); false: x / (rms(x) + eps)")
    embedding_norm: bool = Field(
        False, description="LayerNorm of the embedded tokens, before the first block, as in BLOOM and RWKV's own models"
    )
    zero_centered_norms: bool = Field(False, description="RMSNorm multiplies by 1 + weight, as in Gemma")
    norm_placement: Literal["before", "after", "both"] = Field(
        "before",
        description="of attention and MLP, here f; before: x + f(norm x); after: x + norm f(x), as in OLMo 2; both: x "
        "+ norm f(norm x), as in Gemma 2",
    )
    qk_norm: bool | Literal["head", "each_head", "width"] = Field(
        False,
        description="normalize queries and keys; head: each head, with one weight for all of them (Qwen3); each_head: "
        "with a weight for each (StableLM 2); width: all heads together (OLMo 2); true: as width, with one weight for "
        "queries and keys (GPT-NeoX)",
    )
    activation: Literal[
        "gelu", "gelu_tanh", "relu", "silu", "mish", "softsign", "sigmoid", "identity"
    ] = Field("gelu_tanh", description="activation function of the MLP")  # fmt: skip
    gated_mlp: bool = Field(False, description="activation(gate(x)) * up(x) instead of activation(up(x))")
    parallel_residual: bool = Field(
        False,
        description="x + attention(norm1 x) + mlp(norm2 x); in blocks with experts GPT-NeoX drops the attention then, "
        "as neox_exact does",
    )
    shared_norm: bool = Field(False, description="parallel residual with one norm for both branches")
    attention_bias: bool = Field(True, description="biases in both attention matrices")
    attention_out_bias: bool | None = Field(
        None, description="a bias in the attention output matrix; None: as attention_bias"
    )
    attention_scale: PositiveFloat | None = Field(
        None, description="attention scores are q k times this; None: 1 / sqrt(head size)"
    )
    clip_qkv: PositiveFloat | None = Field(
        None, description="queries, keys and values are clipped to +- this; None: not at all"
    )
    attention_softcap: PositiveFloat | None = Field(
        None, description="attention scores s become c tanh(s / c), as in Gemma 2; None: they stay"
    )
    mlp_bias: bool = Field(True, description="biases in all MLP matrices")
    tie_embeddings: bool = Field(False, description="the output head shares the embedding matrix")
    head_bias: bool = Field(False, description="a bias in the output head, as in Phi and GPT-J")
    logit_softcap: PositiveFloat | None = Field(
        None, description="logits x become c tanh(x / c), as in Gemma 2; None: they stay"
    )
    reward_head: bool = Field(False, description="a reward model: the head returns one number in place of logits")
    sliding_window: PositiveInt | None = Field(
        None, description="a token attends to itself and this many before it; None: to all before it"
    )
    window_pattern: Pattern = Field((True,), description="which blocks have the sliding window")
    embedding_multiplier: PositiveFloat = Field(1.0, description="multiplies the token embeddings")
    embedding_dropout: Fraction = Field(0.0, lt=1.0, description="dropout of the embedded tokens")
    hidden_dropout: Fraction = Field(0.0, lt=1.0, description="dropout of attention and MLP outputs")
    attention_dropout: Fraction = Field(0.0, lt=1.0, description="dropout of the attention weights")

    experts: ExpertsConfig | None = Field(None, description="a mixture of experts; None: every block has an MLP")
    pattern: Annotated[tuple[MixerKind, ...], MinLen(1), MaxLen(10_000)] = Field(
        ("attention",),
        description="what mixes the tokens of blocks 0, 1, ..., again from its beginning after its end; the other "
        "kinds are a whole block, without attention and MLP",
    )
    mamba: MambaConfig | None = Field(None, description="sizes of mamba blocks; None: the defaults")
    rwkv: RWKVConfig | None = Field(None, description="sizes of rwkv blocks; None: the defaults")
    rwkv_over: Literal["time", "batch"] | None = Field(
        None,
        description="what rwkv blocks mix; time: the tokens of a sequence; batch: as in GPT-NeoX, the rows of a "
        "micro-batch, so that a token sees none of its own text; None: batch under neox_exact, else time",
    )
    amlp_size: PositiveInt = Field(64, description="width of the single attention head in amlp blocks")
    mup: MuPConfig | None = Field(
        None, description="maximal update parametrization; None: the standard parametrization"
    )

    # Initial values.
    init: Literal["seeded", "neox"] | None = Field(
        None,
        description="seeded: by (seed, name, position); neox: GPT-NeoX's CPU random stream on one process; None: "
        "neox under neox_exact, else seeded",
    )
    init_passes: Literal[1, 2] = Field(
        1, description="init=neox: 2 for pipe_parallel_size 0, where GPT-NeoX builds the model twice"
    )
    init_method: InitMethod = Field(
        "normal", description="initial values of embeddings, head, attention input and first MLP matrix"
    )
    output_init_method: InitMethod = Field(
        "scaled_normal", description="initial values of the attention output and the second MLP matrix"
    )
    init_std: PositiveFloat = Field(0.02, description="standard deviation, for methods whose name ends in normal")

    @property
    def has_one_norm(self) -> bool:
        """Whether attention and MLP of a block read one normed input, which only a parallel residual allows."""
        return self.parallel_residual and self.shared_norm

    @property
    def kv_heads(self) -> int:
        """Key/value heads, where `num_kv_heads` may be None."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Dimensions of one head, where `head_dim` may be None."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def out_bias(self) -> bool:
        """Whether the attention output has a bias, where `attention_out_bias` may be None."""
        return self.attention_bias if self.attention_out_bias is None else self.attention_out_bias

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP, where `mlp_size` may be None."""
        return self.mlp_size or 4 * self.hidden_size

    @property
    def expert_width(self) -> int:
        """Inner width of an expert, where `experts.width` may be None; 0 without experts."""
        return (self.experts.width or self.mlp_width) if self.experts else 0

    @property
    def shared_mlp(self) -> ModelConfig:
        """The model whose MLP the shared expert is: one without biases, and gated where the other experts are."""
        assert self.experts is not None and self.experts.shared_width
        wanted = {"mlp_size": self.experts.shared_width, "gated_mlp": self.experts.gated, "mlp_bias": False}
        return self.model_copy(update=wanted)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What stands in each block."""
        mixed = range(self.experts.first, self.num_layers, self.experts.every) if self.experts else range(0)
        return _layer_kinds(tuple(self.pattern), self.num_layers, mixed)

    @property
    def attention_layers(self) -> int:
        """Blocks that have attention, with heads, keys and values."""
        return self.layer_kinds.count("dense") + self.layer_kinds.count("moe")

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a block; None: it sees all tokens before."""
        return self.sliding_window if self.window_pattern[layer % len(self.window_pattern)] else None

    def rotates(self, layer: int) -> bool:
        """Whether a block rotates queries and keys."""
        return self.rotary_pattern[layer % len(self.rotary_pattern)]

    @property
    def windowed_share(self) -> float:
        """The share of the blocks with attention that have the sliding window; 0 without one."""
        if self.sliding_window is None:
            return 0.0
        layers = [layer for layer, kind in enumerate(self.layer_kinds) if kind in ("dense", "moe")]
        return sum(self.window_of(layer) is not None for layer in layers) / max(1, len(layers))

    @property
    def window(self) -> int | None:
        """The sliding window; None also where no block with attention has it."""
        return self.sliding_window if self.windowed_share else None

    @property
    def other_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of those blocks that have no attention, each once."""
        return tuple(dict.fromkeys(kind for kind in self.layer_kinds if kind not in ("dense", "moe")))

    @property
    def mamba_sizes(self) -> MambaConfig:
        """The sizes of mamba blocks, where `mamba` may be None."""
        return self.mamba or MambaConfig()

    @property
    def mamba_width(self) -> int:
        """Channels of a mamba block."""
        return self.mamba_sizes.width or 2 * self.hidden_size

    @property
    def mamba_rank(self) -> int:
        """The rank of a mamba block's steps."""
        return self.mamba_sizes.rank or -(-self.hidden_size // 16)

    @property
    def rwkv_sizes(self) -> RWKVConfig:
        """The sizes of rwkv blocks, where `rwkv` may be None."""
        return self.rwkv or RWKVConfig()

    @property
    def rwkv_width(self) -> int:
        """Inner width of the channel mix of an rwkv block."""
        return self.rwkv_sizes.width or max(32, 7 * self.hidden_size // 2 // 32 * 32)

    @property
    def width_multiplier(self) -> float:
        """The width divided by muP's base width; 1 without muP."""
        return self.hidden_size / (self.mup.base_width or self.hidden_size) if self.mup else 1.0

    @property
    def rotary_size(self) -> int:
        """Dimensions of each head that are rotated."""
        return int(self.head_size * self.rotary_pct)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, padding included. Raises ValueError while the vocabulary is unknown."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is unknown until the tokenizer is read")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class Text(Section):
    """One indexed corpus, and the corpora that hold labels and reference log-probabilities of its tokens."""

    path: str = Field(description="prefix of the corpus: its .bin and .idx without the ending")
    labels: str | None = Field(None, description="prefix of label ids, -100 where no loss is taken")
    references: str | None = Field(
        None, description="prefix of the reference model's fp32 log-probabilities; entry t is that of token t + 1"
    )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of all corpora that this source reads."""
        return tuple(prefix for prefix in (self.path, self.labels, self.references) if prefix)


def _as_text(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Source(Text):
    """A corpus of the training, validation or test data, and what is known of each of its documents."""

    weight: PositiveFloat = Field(1.0, description="share of the samples, relative to the other sources")
    rejected: Annotated[Text | None, BeforeValidator(_as_text)] = Field(
        None,
        description="preference pairs: the rejected text for each document of path; a prefix, or {path, labels, "
        "references}",
    )
    rewards: str | None = Field(
        None, description="objective=kto: prefix of one number per document; above 0 desirable, below 0 undesirable"
    )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes of all corpora that this source reads, those of rejected texts and rewards included."""
        others = (self.rejected.prefixes if self.rejected else ()) + ((self.rewards,) if self.rewards else ())
        return super().prefixes + others


def _as_sources(value: object) -> object:
    """`train: corpus` and `train: [a, b]` are short for sources of weight 1, and null for none."""
    entries = () if value is None else (value,) if isinstance(value, str | dict | Source) else value
    if not isinstance(entries, tuple | list):
        return entries
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class Warmup(Section):
    """A size that rises over the first steps.

    In step n, counted from 1, it is floor(start + (whole - start) * (n / steps)^(1 / root)), rounded down to a multiple
    of `unit` and at most the whole. DeepSpeed's curriculum learning has the same rule.
    """

    start: PositiveInt = Field(description="size of the first steps")
    steps: PositiveInt = Field(description="steps after which the full size is reached, approximately")
    multiple: PositiveInt | None = Field(None, description="sizes are multiples of this; None: of start")
    root: PositiveInt = Field(1, description="1: the size rises linearly; 2: with the square root of the step; ...")

    @property
    def unit(self) -> int:
        """What all sizes are multiples of."""
        return self.multiple or self.start

    def at(self, step: int, whole: int) -> int:
        """The size in a step, counted from 0."""
        share = ((step + 1) / self.steps) ** (1 / self.root)
        size = math.floor(share * (whole - self.start) + self.start)
        return min(whole, size - size % self.unit)


def split_shares(split: str) -> list[float]:
    """Shares of training, validation and test in a text such as "969, 30, 1" or "8/1/1"; missing ones are 0.

    A fourth number is ignored as in GPT-NeoX, although a config may not have one. Raises ValueError for anything else.
    """
    try:
        shares = [float(part) for part in re.split("[,/]", split)]
    except ValueError:
        raise ValueError("no list of numbers such as '969, 30, 1'") from None
    shares = (shares + [0.0, 0.0])[:3]  # GPT-NeoX pads with zeros and cuts in the same way
    if not 0 < sum(shares) < math.inf or min(shares) < 0:
        raise ValueError("it leaves no documents: its parts must not be negative nor all zero")
    return shares


def _split(value: str) -> str:
    split_shares(value)
    if (count := len(re.split("[,/]", value))) > 3:
        raise ValueError(f"{count} parts; there are three: training, validation and test")
    return value


class DataStage(Section):
    """What the steps from some step on train on. What a stage leaves out is as in `data`, not as in the stage before.

    Each step takes the samples that it would take if the whole run had these settings.
    """

    first_step: PositiveInt = Field(description="first step of the stage, counted from 1")
    train: Sources = Field((), description="training corpora; empty: those of data.train or data.path")
    seq_length: PositiveInt | None = Field(
        None, description="tokens in a sequence, at most data.seq_length; None: data.seq_length"
    )


class DataConfig(Section):
    """The corpora and how samples are made of them."""

    path: str | None = Field(None, description="one corpus, divided by `split`; excludes train, valid and test")
    split: Annotated[str, AfterValidator(_split)] = Field(
        "969, 30, 1", description="shares of training, validation and test"
    )
    holdout: Literal["hash", "contiguous"] = Field(
        "hash",
        description="documents that `split` gives to validation and test: hash: some of each file, by a hash of each "
        "document, equal texts together; contiguous: the last ones, as Megatron and GPT-NeoX do",
    )
    train: Sources = Field((), description="training corpora: a prefix or a list of sources")
    valid: Sources = Field((), description="validation corpora")
    test: Sources = Field((), description="test corpora")
    seq_length: PositiveInt = Field(2048, description="tokens in a sequence")
    seq_length_warmup: Warmup | None = Field(
        None,
        description="the first steps train on the beginning of each sequence only; None: all steps train on whole ones",
    )
    packing: Literal["packed", "pack_until_overflow", "unpacked"] = Field(
        "packed",
        description="packed: documents follow one another and are cut where a sequence is full; pack_until_overflow: "
        "as many whole documents as fit into a sequence; unpacked: each sequence holds one document",
    )
    allow_chopped: bool = Field(True, description="false: leave out documents longer than a sample")
    weight_by_documents: bool = Field(
        False, description="derive weights from document counts, replacing the given weights"
    )
    weight_alpha: PositiveFloat = Field(1.0, description="weight_by_documents: values below 1 favour small corpora")
    mask_after_eod: bool = Field(False, description="no loss on the token that follows an end-of-document token")
    mask_documents: bool = Field(False, description="tokens attend only within their own document; positions restart")
    stages: tuple[DataStage, ...] = Field(
        (),
        description="other corpora or sequence lengths from some steps on: a list of {first_step, train, seq_length}",
    )
    intervene: str | None = Field(
        None, description="file of rows that single steps train on instead, or that the loss leaves out"
    )
    cache_dir: str | None = Field(None, description="folder of index files; None: next to the data")
    shuffled_passes: PositiveInt | None = Field(
        16,
        description="passes over the training data that are shuffled together; the order of so many then repeats, so "
        "that its index files stay small; None: all passes of the run, as GPT-NeoX does",
    )
    pass_multiple: PositiveInt | None = Field(
        None,
        description="a pass over the data ends at a multiple of this many sequences; None: of one forward pass on "
        "all ranks, which a run keeps when it is resumed",
    )


class TokenizerConfig(Section):
    """The tokenizer of the corpora."""

    kind: (
        Literal["hf", "gpt2", "hf_gpt2", "sentencepiece", "neox_sentencepiece", "tiktoken", "char", "bytes"] | None
    ) = Field(None, description="kind of tokenizer; None: determined by its files")
    path: str | None = Field(None, description="tokenizer.json, vocab.json, model file or folder")
    merges: str | None = Field(None, description="merges.txt of GPT-2 BPE files")


class ParameterGroup(Section):
    """Tensors with their own learning rate or weight decay."""

    match: str = Field(
        description="regular expression, searched in the tensors' names; the first group that matches applies"
    )
    lr_scale: PositiveFloat = Field(1.0, description="multiplies optimizer.lr")
    weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay of the group; None: optimizer.weight_decay as usual"
    )


LoraTarget = Literal[
    "attn.qkv", "attn.out", "mlp.up", "mlp.gate", "mlp.down", "mlp.shared.up", "mlp.shared.gate", "mlp.shared.down",
    "head", "gmlp.up", "gmlp.down", "gmlp.attn.qkv", "gmlp.attn.out",
    "mamba.in_x", "mamba.in_z", "mamba.x_proj", "mamba.dt_proj", "mamba.out",
    "rwkv.time.receptance", "rwkv.time.key", "rwkv.time.value", "rwkv.time.gate", "rwkv.time.out",
    "rwkv.channels.key", "rwkv.channels.receptance", "rwkv.channels.value",
]  # fmt: skip


class LoraConfig(Section):
    """Low-rank adapters (LoRA): W x + alpha / rank * B (A x), where W keeps its loaded value.

    Names of matrices in other programs are translated while a config is read, see `lora_names.py`.
    """

    rank: PositiveInt = Field(16, description="columns of B and rows of A")
    alpha: PositiveFloat | None = Field(None, description="B (A x) is scaled by alpha / rank; None: 2 * rank")
    dropout: Fraction = Field(0.0, lt=1.0, description="dropout of an adapter's input; the head's adapter has none")
    targets: tuple[LoraTarget, ...] = Field(
        (),
        description="matrices that get an adapter, also by the names of transformers, such as q_proj, query_key_value "
        "or all-linear; empty: all matrices of the blocks",
    )
    rslora: bool = Field(False, description="rank-stabilized (rsLoRA): the scale is alpha / sqrt(rank)")

    @property
    def scale(self) -> float:
        """The factor of B (A x)."""
        return (self.alpha or 2 * self.rank) / (math.sqrt(self.rank) if self.rslora else self.rank)


class FinetuneConfig(Section):
    """Which parts of the loaded model train, and what is added to it."""

    lora: LoraConfig | None = Field(None, description="{}: adapters of rank 16; None: no adapters")
    train: tuple[str, ...] = Field(
        (),
        description="regular expressions, searched in the tensors' names: the tensors that train; empty: all, or "
        "only the adapters if there are any",
    )
    freeze: tuple[str, ...] = Field((), description="regular expressions: tensors that do not train")
    add_tokens: tuple[str, ...] = Field(
        (), description="new vocabulary entries; with init_from their embedding rows start as the mean of all others"
    )

    def trains(self, name: str) -> bool:
        """Whether the tensor of this name trains. Adapters do whether or not `train` names them."""
        wanted = any(fits(pattern, name) for pattern in self.train) if self.train else self.lora is None
        kept = is_balance(name) or any(fits(pattern, name) for pattern in self.freeze)
        return (wanted or is_adapter(name)) and not kept


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to a LoRA adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def is_balance(name: str) -> bool:
    """Whether a tensor of this name is a router's bias for balancing, which no gradient changes."""
    return name.endswith(".router.balance.bias")


class OptimizerConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "lion", "sgd", "adafactor", "muon"] = Field(
        "adamw",
        description="muon: on the matrices of the blocks, adamw on the rest; adafactor: lr is relative to the size "
        "of the weights",
    )
    lr: PositiveFloat = Field(3e-4, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="adamw, lion, and the adamw part of muon")
    eps: PositiveFloat = Field(1e-8, description="adamw and the adamw part of muon")
    momentum: Fraction = Field(0.95, lt=1.0, description="sgd and muon")
    weight_decay: NonNegativeFloat = Field(
        0.1, description="applies to matrices and embeddings, never to norms and biases"
    )
    groups: tuple[ParameterGroup, ...] = Field((), description="tensors with their own learning rate or weight decay")
    layer_decay: PositiveFloat = Field(
        1.0,
        le=1.0,
        description="the learning rate of a block is multiplied by this once for each block above it; embeddings lie "
        "below all blocks",
    )
    clip_norm: PositiveFloat | None = Field(1.0, description="largest gradient norm; None switches clipping off")


class ScheduleConfig(Section):
    """The learning rate as a function of the step."""

    style: Literal["constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="wsd: constant, then linear over the last `cooldown`; inverse_sqrt: ~ 1 / sqrt(step)"
    )
    warmup: Fraction = Field(
        0.01,
        le=1.0,
        description="how long the learning rate rises at first, as a share of the steps until the decay ends. Step n "
        "gets lr * (n - 1) / these steps, step 1 the rate of step 2, as in GPT-NeoX: a rate of 0 would teach nothing",
    )
    warmup_steps: NonNegativeInt | None = Field(
        None, description="how long the learning rate rises at first, in steps; takes the place of warmup"
    )
    cooldown: Fraction = Field(
        0.2, le=1.0, description="wsd: how long the rate falls at the end, as a share of the steps until the decay ends"
    )
    decay_steps: PositiveInt | None = Field(
        None, description="step at which the decay ends; None: train.steps * decay_fraction"
    )
    decay_fraction: PositiveFloat | None = Field(
        None, le=1.0, description="share of train.steps after which the decay ends; None: all of them"
    )
    min_lr: NonNegativeFloat = Field(0.0, description="lowest learning rate after the warm-up")

    @property
    def ends(self) -> bool:
        """Whether the style has an end, at which the rate is `min_lr`."""
        return self.style not in ("constant", "inverse_sqrt")

    def decay_end(self, steps: int) -> int:
        """The step at which the decay of a run of this many steps ends; 0 where that is unknown (`steps` is 0)."""
        return self.decay_steps or math.floor(steps * (self.decay_fraction or 1.0))

    def warmup_length(self, end: int) -> float:
        """Warm-up steps, not rounded, of a schedule whose decay ends at step `end`."""
        return self.warmup * end if self.warmup_steps is None else float(self.warmup_steps)


class ParallelConfig(Section):
    """The layout: world size = pp * dp * cp * tp, where dp follows from the number of ranks and the other three."""

    tp: PositiveInt = Field(1, description="tensor-parallel ranks: heads, MLP columns and vocabulary are split")
    pp: PositiveInt = Field(1, description="pipeline-parallel ranks: blocks are split")
    cp: PositiveInt = Field(1, description="context-parallel ranks: sequences are split")
    expert: PositiveInt = Field(
        1, description="expert-parallel ranks: so many data ranks share out the experts, and send each other tokens"
    )
    cp_kind: Literal["gather", "ulysses", "ring"] = Field(
        "gather",
        description="how context-parallel ranks attend: gather collects all keys and values; ulysses gives each rank "
        "whole sequences for its share of the heads; ring passes keys and values around",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        0, description="0: replicate; 1, 2: shard optimizer state and gradients; 3: parameters too"
    )
    dp_replicate: PositiveInt | None = Field(None, description="zero >= 1: copies of the sharded model (HSDP); None: 1")
    sequence_parallel: bool = Field(
        False, description="tensor-parallel ranks also split the activations between their matrices"
    )
    pipeline: Literal["gpipe", "1f1b", "interleaved", "zero-bubble"] = Field("1f1b", description="pipeline schedule")
    stages_per_rank: PositiveInt | None = Field(
        None, description="pipeline stages on each rank; None: 2 for interleaved and zero-bubble, else 1"
    )
    offload: bool = Field(False, description="keep sharded parameters and optimizer state in CPU memory")
    timeout: PositiveFloat = Field(600.0, description="seconds to wait for a rank that does not answer")
    gpus: PositiveInt | None = Field(None, description="devices of the whole run, for planning; None: those it runs on")

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model together: tp * pp * cp."""
        return self.tp * self.pp * self.cp


class LossScaleConfig(Section):
    """Loss scaling in fp16. `rule` names one of DeepSpeed's two rules for dynamic scales."""

    static: PositiveFloat | None = Field(None, description="a fixed scale; None: dynamic")
    initial: PositiveFloat = Field(2.0**16, description="scale of the first step")
    window: PositiveInt = Field(1000, description="steps without overflow after which the scale is doubled")
    hysteresis: PositiveInt = Field(
        2, description="zero rule: the scale is halved at the overflow of this number since it was last doubled"
    )
    minimum: PositiveFloat = Field(1.0, description="lowest scale")
    consecutive_hysteresis: bool = Field(False, description="zero rule: a step without overflow starts that count anew")
    rule: Literal["zero", "stage0"] | None = Field(None, description="None: zero for parallel.zero >= 1, else stage0")


class PrecisionConfig(Section):
    """The number formats of training; parameters, gradients and optimizer state are always fp32."""

    compute: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="dtype of matrix products; auto: bf16 where the hardware has it; fp8: float8 in the matrices of "
        "attention and dense MLPs while training, bf16 in all else",
    )
    loss_scale: LossScaleConfig = LossScaleConfig()


class PreferenceConfig(Section):
    """Settings of train.objective=dpo, kto, orpo and reward, which learn from pairs of texts or from rated texts."""

    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="dpo: form of the loss")
    beta: PositiveFloat = Field(
        0.1,
        description="dpo and kto: strength of the penalty for drifting from the reference model; orpo: weight of the "
        "odds ratio beside the loss of the preferred texts",
    )
    reference: str | None = Field(
        None,
        description="dpo and kto: checkpoint of the reference model; None: the weights that the run starts from",
    )
    reference_free: bool = Field(
        False, description="dpo: no reference model; all texts count as equally likely under it"
    )
    desirable_weight: NonNegativeFloat = Field(1.0, description="kto: weight of the loss of desirable texts")
    undesirable_weight: NonNegativeFloat = Field(1.0, description="kto: weight of the loss of undesirable texts")


class EarlierBatch(Section):
    """A batch size that a run had before it was resumed with another one."""

    until: PositiveInt = Field(description="last step, from 1, with this batch size")
    batch_size: PositiveInt = Field(description="sequences (or pairs) of a step over all ranks")


class TrainConfig(Section):
    """What a step trains on, and how many there are."""

    objective: Literal["causal", "dpo", "kto", "orpo", "reward"] = Field(
        "causal", description="causal: predict the next token; dpo, kto, orpo, reward: see `preference`"
    )
    steps: PositiveInt | None = Field(None, description="optimizer steps; or give epochs")
    epochs: PositiveInt | None = Field(None, description="passes over the data")
    batch_size: PositiveInt | None = Field(None, description="sequences (or pairs) of a step over all ranks")
    batch_size_warmup: Warmup | None = Field(
        None, description="the first steps train on fewer sequences; None: every step has the whole batch"
    )
    earlier_batches: tuple[EarlierBatch, ...] = Field(
        (),
        description="written by a resumed run whose batch_size changed: which size applied until which step, so that "
        "it continues at the right place in the data",
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="sequences (or pairs) of one forward pass on one rank"
    )
    accumulation: PositiveInt | None = Field(None, description="gradient accumulation: forward passes per step")
    z_loss: NonNegativeFloat = Field(
        0.0,
        description="adds this times the square of log(sum of exp(logits)) to each token's training loss; "
        "objective=reward: this times the squares of both rewards",
    )
    recompute: Literal["none", "selective", "full", "auto"] = Field(
        "none",
        description="activation checkpointing: what the backward pass of a block computes again; none: nothing, "
        "selective: all but matrix products, full: everything, auto: everything in as many blocks as memory asks for, "
        "in those first that take the least time for the bytes that they free",
    )
    compile: Literal["auto", True, False] = Field(
        "auto",
        description="compile the blocks; auto: after ten steps, in GPU runs that are long enough to repay it",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto: a GPU where there is one; mps: Apple's, for one process"
    )
    deterministic: bool = Field(
        False,
        description="bit-for-bit reproducible on GPUs too, more slowly; CPU runs always are",
    )
    exit_interval: PositiveInt | None = Field(None, description="save and stop at the next multiple of this step")
    max_hours: PositiveFloat | None = Field(
        None, description="save and stop before this many hours have passed since this start; the run can be resumed"
    )


class CheckpointConfig(Section):
    """Where a run is saved, when, and what it starts from."""

    dir: str | None = Field(None, description="the run's folder")
    resume: str | None = Field(None, description="continue from this run or checkpoint; everything is restored")
    init_from: str | None = Field(None, description="start a new run from these weights")
    step: NonNegativeInt | None = Field(None, description="step to resume or to start from; None: the latest")
    every: PositiveInt | None = Field(None, description="save at multiples of this step")
    log_base: float | None = Field(None, gt=1.0, description="save at steps 1, base, base^2, ...")
    log_until: PositiveInt | None = Field(None, description="last step of the log_base series")
    steps: tuple[NonNegativeInt, ...] = Field((), description="further steps to save; 0 is before the first step")
    keep_last: PositiveInt | None = Field(
        None, description="keep only this many checkpoints, and milestones; older ones are deleted"
    )
    keep_every: PositiveInt | None = Field(None, description="milestones: multiples of this step are never deleted")
    keep_best: bool = Field(
        True, description="keep the checkpoint with the lowest validation loss as checkpoints/best, whatever is deleted"
    )
    save_minutes: PositiveFloat | None = Field(
        15.0, description="save as well when the last save is this many minutes old; the next save replaces such a one"
    )
    save_optimizer: bool = Field(True, description="save the optimizer state, without which a run cannot be resumed")
    load_optimizer: bool = Field(True, description="false: resume with a fresh optimizer")
    other_data: bool = Field(False, description="resume although the data or their order have changed")
    schedule_from: Literal["config", "checkpoint"] | None = Field(
        None, description="which learning-rate schedule a resumed run follows; None: they must agree"
    )

    @property
    def starts_if_empty(self) -> bool:
        """Whether the run resumes from its own folder, so that an empty folder means its first start, not an error."""
        return None not in (self.resume, self.dir) and normpath(str(self.resume)) == normpath(str(self.dir))


class WandbConfig(Section):
    """Weights & Biases. The API key comes from `wandb login` or the environment, never from a config."""

    project: str = Field("castalia", description="project")
    name: str | None = Field(None, description="name of the run")
    group: str | None = Field(None, description="group of runs")
    team: str | None = Field(None, description="team or user that owns it")
    host: str | None = Field(None, description="address of a self-hosted server")
    mode: Literal["online", "offline", "disabled"] | None = Field(None, description="None: as WANDB_MODE says")


class ProfileConfig(Section):
    """A profile of some steps: a trace, a summary and, on a GPU, a memory snapshot."""

    start: PositiveInt = Field(10, description="first step")
    stop: PositiveInt = Field(12, description="last step")
    dir: str | None = Field(None, description="folder of the profile; None: profile/ in the run's folder")


class LogConfig(Section):
    """What is recorded of a run, and where."""

    every: PositiveInt = Field(10, description="steps between two lines on the terminal")
    tensorboard: str | None = Field(None, description="folder of TensorBoard event files")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; None: off")
    csv: bool = Field(False, description="write metrics.csv next to metrics.jsonl")
    layers_every: PositiveInt | None = Field(
        None, description="write activations, gradients and weights of each layer to layers.jsonl after this many steps"
    )
    profile: ProfileConfig | None = Field(None, description="None: no profile; {}: of steps 10 to 12")
    peak_tflops: PositiveFloat | None = Field(
        None, description="peak of one device, for MFU; None: known for common devices, and measured on idle CPUs"
    )


class WatchConfig(Section):
    """Detection of loss spikes, which are written to events.jsonl and handled as the policy says."""

    policy: Literal["report", "stop", "skip", "rewind"] = Field(
        "report",
        description="what to do with a step whose loss or gradient norm is a spike; report: apply it all the same; "
        "stop: save the state before it and stop; skip: leave its update out; rewind: return to an earlier "
        "checkpoint and leave out all batches since",
    )
    window: Annotated[int, Ge(8), Le(LARGEST)] = Field(
        100, description="steps over which the median is taken; no spikes are detected before half of them are done"
    )
    threshold: PositiveFloat = Field(
        10.0,
        description="a spike lies this many spreads above the median; the spread is estimated from the changes "
        "between steps",
    )
    back: PositiveInt = Field(1, description="rewind: how many checkpoints to go back")
    dead_every: PositiveInt | None = Field(
        100, description="look for MLP units without gradient after this many steps; None: never"
    )


class EvalConfig(Section):
    """Evaluation on the validation data during training."""

    every: PositiveInt | None = Field(1000, description="evaluate after this many steps; None: only at the end")
    batches: NonNegativeInt | None = Field(
        10, description="global batches in one evaluation; None: all validation data, each document once"
    )
    at_end: bool = Field(True, description="evaluate after the last step")
    patience: PositiveInt | None = Field(
        None,
        description="save and stop once this many evaluations in a row have brought no lower loss than the best "
        "before them; None: never",
    )
    tasks: list[str] | None = Field(
        None, description="tasks of lm-eval, or their YAML files, that are asked of the saved model; None: none"
    )
    tasks_every: PositiveInt | None = Field(None, description="ask them after this many steps; None: only at the end")
    tasks_limit: PositiveInt | None = Field(None, description="questions of each task, the first ones; None: all")
    suite: list[str] | None = Field(
        None, description="tasks of lm-eval that `castalia eval` asks in place of the losses; None: none"
    )
    results_prefix: str = Field("", description="where their results go: PREFIX_eval_results_DATE.json")


class GenerateConfig(Section):
    """Text generation. None: as the model's generation_config.json says, else greedy with 64 tokens."""

    temperature: NonNegativeFloat | None = Field(
        None, description="0: always the most likely token; null: as the model's generation_config.json says, else 0"
    )
    top_k: NonNegativeInt | None = Field(
        None, description="sample from the k most likely tokens only, 0: from all; null: as that file says, else 0"
    )
    top_p: NonNegativeFloat | None = Field(
        None,
        le=1.0,
        description="sample from the most likely tokens that hold this share only, 0: from all; null: as that file "
        "says, else 0",
    )
    max_tokens: PositiveInt | None = Field(None, description="length of one text; null: as that file says, else 64")
    num_samples: PositiveInt = Field(1, description="texts for each prompt")
    mode: Literal["unconditional", "input-file", "interactive"] | None = Field(
        None, description="where prompts come from"
    )
    input_file: str | None = Field(None, description="one prompt per line")
    output_file: str | None = Field(None, description="prompts and texts, one JSON object per line")
    prompt_end: str = Field("\n", description="what ends a prompt that is typed")


class RunConfig(Section):
    """Everything that a run depends on. `model` is None in files that only change settings."""

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
    neox_exact: bool = Field(False, description="reproduce every defect of GPT-NeoX that changes numbers")

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    @property
    def origins(self) -> Mapping[str, str]:
        """Dotted path of each value that was given -> "file.yml:12", "command line" or "NeoX default"."""
        return MappingProxyType(self._origins)

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings, and settings without effect: one line each."""
        return self._notes

    def at(self, path: str) -> Any:
        """The value at a dotted path such as "optimizer.lr"; None below an optional section that is absent."""
        value: Any = self
        for name in path.split("."):
            value = None if value is None else getattr(value, name)
        return value

    def with_notes(self, *notes: str) -> Self:
        """A copy with these notes after its own."""
        copy = self.model_copy()
        copy._notes = (*self._notes, *notes)
        return copy

    def place(self, *paths: str) -> str:
        """The beginning of a message about these values: "a.yml:3, command line: "; empty if all are defaults."""
        places = dict.fromkeys(self._origins[path] for path in paths if path in self._origins)
        return f"{', '.join(places)}: " if places else ""

    def __eq__(self, other: object) -> bool:
        """Configs with the same values are equal, wherever the values came from."""
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
    # Without validation: the values are those of a valid config.
    whole = CompleteConfig.model_construct(config.model_fields_set, **config.__dict__)
    whole._origins, whole._notes = config._origins, config._notes
    return whole
