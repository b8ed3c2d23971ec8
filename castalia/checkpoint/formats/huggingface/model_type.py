"""What is said of one model type of Hugging Face, and rules that follow from the names of its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from castalia.checkpoint.formats.huggingface.idle_keys import IDLE, REFUSED
from castalia.checkpoint.rules import (
    Chain,
    Each,
    Interleave,
    Inverse,
    Op,
    PermuteRows,
    Rule,
    Same,
    Transpose,
    Unfold,
)
from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import AFTER_BLOCKS, BEFORE_BLOCKS, BLOCK, row_of, shapes_of

ACTIVATIONS = {  # `hidden_act` -> ours; the first of several that mean the same is written
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu", "mish": "mish",
    "sigmoid": "sigmoid", "linear": "identity",
}  # fmt: skip


Said = str | bool | float  # of a key of config.json
EVERYWHERE = ("dtype", "torch_dtype", "quantization_config", "is_causal")  # keys of every class, which are read
CLASSIFIER = "ForSequenceClassification"  # how the names of such classes end
SCORE = "score.weight"  # their head, which stands outside of the prefix as the others do


@dataclass(frozen=True)
class Family:
    """One `model_type`: what the keys of its config.json and its tensors are in our model."""

    class_name: str
    prefix: str  # of the tensors of the model without its head
    head: str
    # Keys of config.json in the order in which they are written. A name is that of our setting; of several names, the
    # first is written and all are read. A truth value or a number is the only one that our model has an equal of.
    keys: Mapping[str, Said]
    fixed: Mapping[str, Any]  # settings of ours that the model type fixes
    # The values of our settings that the class can compute; None: any. Of settings left out, those in `FREE` may have
    # any value, others must have the default. Without those of `experts`, the class has no mixtures.
    holds: Mapping[str, set | None]
    defaults: Mapping[str, Any]  # what a missing key of config.json means; it differs between the types
    rules: Callable[[ModelConfig], list[Rule]]
    # The modules with parameters in the order in which the class defines them, which numbers the Trainer's optimizer
    # state: before the blocks, in each block, after the blocks; heads follow. Empty: no such state is read or written.
    modules: tuple[str, str, str]
    head_modules: tuple[str, ...] = ("lm_head",)  # its name in transformers 5, and its name before
    foreign: tuple[str, ...] = ()  # keys that are written for the sake of related classes, but which this one ignores
    beside: tuple[str, ...] = ()  # further keys: read together with another, or without an effect in this class
    refused: tuple[str, ...] = ()  # keys that must be false, and are not written
    gelu_tanh: str = "gelu_pytorch_tanh"  # as the published models of this class call it
    aliases: Mapping[str, str] = field(default_factory=dict)  # other spellings of keys, which are not written
    # Of keys whose values are not ours: their values -> ours. Of equal ones of ours the first is written.
    words: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    scales_embedding: bool = False  # whether the class multiplies embeddings by the root of the hidden size

    @property
    def known(self) -> frozenset[str]:
        """All keys of config.json that are read, refused, or known to change nothing."""
        own = {*self.keys, *self.aliases, *self.refused, *self.beside}
        return (IDLE | {*own, *REFUSED, "vocab_size", "tie_word_embeddings", *EVERYWHERE}) - {*self.foreign}

    @property
    def reward_class(self) -> str:
        """The class of reward models, which `AutoModelForSequenceClassification` chooses."""
        return self.class_name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + CLASSIFIER


def by_group(model: ModelConfig) -> Interleave:
    """From three tensors, all queries, all keys, all values, to our fused one."""
    size = model.head_size
    return Interleave((model.num_heads // model.kv_heads * size, size, size), model.kv_heads)


def by_group_of_pairs(model: ModelConfig) -> Op:
    """As `by_group`, where row 2j of a head rotates together with row 2j + 1: ours are row j and row j + half."""

    def halves(heads: int) -> Op:
        """The rotating rows of each head in our order."""
        rotating, rest = model.rotary_size, model.head_size - model.rotary_size
        order = PermuteRows((heads, rotating // 2, 2), (0, 2, 1))
        if not rest:
            return order
        split = Interleave((rotating, rest), heads)
        return Chain(Inverse(split), Each((order, Same())), split)

    return Chain(Each((halves(model.num_heads), halves(model.kv_heads), Same())), by_group(model))


def by_module(
    layer: str, inside: Mapping[str, str], outside: Mapping[str, str], qkv: Callable[[ModelConfig], Op] = by_group
) -> Callable[[ModelConfig], list[Rule]]:
    """The rules of a class that has the tensors of our modules, with other names.

    `layer`: the prefix of a block, with {i}; `inside`: our modules of a block -> theirs, and our tensors whose names
    have another end there, in which {e} is the number of an expert; `outside`: the modules of the model. `qkv`: how its
    tensors become our fused one.
    """

    def rule(name: str, theirs: str, op: Op) -> Rule:
        kind = name.rpartition(".")[2]
        return Rule(name, " ".join(f"{module}.{kind}" for module in theirs.split()), op)

    def inner(name: str, model: ModelConfig) -> Rule:
        tensor, row = name.removeprefix("blocks.{i}."), row_of(name)
        if row.kind == "experts":
            return Rule(name, _each_expert(layer + inside[tensor], model), _stacked(model, tensor.endswith(".down")))
        if tensor in inside:
            return Rule(name, layer + inside[tensor])
        names = " ".join(layer + each for each in inside[row.module].split())
        return rule(name, names, qkv(model) if row.module == "attn.qkv" else Same())

    def rules(model: ModelConfig) -> list[Rule]:
        """All but that of the head."""
        kinds = model.layer_kinds
        blocks = {kind: [inner(name, model) for name in shapes_of(BLOCK, model, kind)] for kind in set(kinds)}
        ends = shapes_of((*BEFORE_BLOCKS, *AFTER_BLOCKS), model)
        parts = {name: outside[module] for name in ends if (module := row_of(name).module) in outside}
        inside_rules = [rule.at(i=i) for i, kind in enumerate(kinds) for rule in blocks[kind]]
        return [rule(name, theirs, Same()) for name, theirs in parts.items()] + inside_rules

    return rules


def _each_expert(theirs: str, model: ModelConfig) -> str:
    """The names of a matrix of each expert, which are tensors of their own there."""
    assert model.experts is not None
    return " ".join(theirs.replace("{e}", str(number)) for number in range(model.experts.count))


def _stacked(model: ModelConfig, down: bool) -> Op:
    """From matrices [f, h], of `down` [h, f], to [e, f, h]."""
    assert model.experts is not None
    stacked = (Interleave((model.expert_width,) * model.experts.count), Unfold(model.experts.count))
    return Chain(Transpose(), *stacked) if down else Chain(*stacked)
