"""The names of tensors in NeoX and Megatron-DeepSpeed, and how tensor ranks share each tensor.

Names are `position.name`: the position in the pipeline's list of layers, and the name in that layer's file. Source:
`megatron/model/gpt2_model.py` and `transformer.py` of GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from castalia.checkpoint.mamba_tensors import mamba_rules
from castalia.checkpoint.rules import (
    Chain,
    ConcatRanks,
    FirstOfRanks,
    Interleave,
    Inverse,
    OnEachRank,
    Op,
    PermuteRows,
    Rule,
    SameOnRanks,
    SumOverRanks,
    Unfold,
)
from castalia.checkpoint.rwkv_tensors import rwkv_rules
from castalia.config.schema import LayerKind, ModelConfig
from castalia.config.tensor_table import tensor_shapes

NORM_PARAMETERS = {
    "layernorm": {"weight": "weight", "bias": "bias"},
    "rmsnorm": {"weight": "scale"},
    "scalenorm": {"weight": "g"},
    "layernorm_no_params": {},
}
GqaRows = Literal["old", "new"]


@dataclass(frozen=True)
class Names:
    """What differs between the two programs, and between NeoX's eras."""

    embedding: int = 0  # its position
    first_block: int = 2  # its position
    attention: str = "attention"
    up: str = "mlp.linear1"
    down: str = "mlp.linear2"
    gate: str | None = None  # None: gated models store up and gate as one matrix, [up; gate]
    final_norm: str = "norm."

    def norm_position(self, num_layers: int) -> int:
        """The position of the final norm."""
        return self.first_block + num_layers + 1

    def head(self, num_layers: int) -> str:
        """The name of the head's matrix."""
        return f"{self.first_block + num_layers + 2}.final_linear.weight"


HEAD = Names()
LEGACY = Names(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
W123 = Names(up="mlp.w3", down="mlp.w2", gate="mlp.w1")
MEGATRON = Names(1, 3, "self_attention", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", final_norm="")


def table(names: Names, model: ModelConfig, tp: int, qkv: Op) -> list[Rule]:
    """The rules of a model on `tp` tensor ranks; `qkv` is the operation on the fused attention matrix."""
    shards, columns = ConcatRanks(tp), ConcatRanks(tp, dim=1)
    # Under the Sinkhorn router only the first tensor rank has the right gradients, and the other copies drift.
    drifts = model.experts is not None and model.experts.router == "sinkhorn"
    copies: Op = FirstOfRanks(tp) if drifts else SameOnRanks(tp)
    # With a parallel residual every rank adds its bias before the all-reduce; otherwise one copy is added after it.
    added: Op = SumOverRanks(tp) if model.parallel_residual else copies

    def norm(ours: str, theirs: str) -> list[Rule]:
        """The rules of a norm's parameters."""
        parameters = NORM_PARAMETERS[model.norm].items()
        return [Rule(f"{ours}.{mine}", f"{theirs}{its}", copies) for mine, its in parameters]

    def linear(ours: str, theirs: str, weight: Op, bias: Op | None) -> list[Rule]:
        """The rules of a matrix and, if it has one, its bias, in every block."""
        rules = [Rule(f"blocks.{{i}}.{ours}.weight", f"{{layer}}.{theirs}.weight", weight)]
        return rules + ([Rule(f"blocks.{{i}}.{ours}.bias", f"{{layer}}.{theirs}.bias", bias)] if bias else [])

    # In the order of NeoX's modules, which is also the order of its optimizer.
    blocks: dict[LayerKind, list[Rule]] = {}
    if model.other_kinds:
        blocks = {"gmlp": _gated(model, "gmlp"), "amlp": _gated(model, "amlp")}
        blocks["mamba"] = norm("blocks.{i}.norm1", "{layer}.norm.") + mamba_rules(model, "{layer}.mixer.")
        blocks["rwkv"] = rwkv_rules(model, "{layer}.")
    block = norm("blocks.{i}.norm1", "{layer}.input_layernorm.")
    biased = model.attention_bias
    if model.qk_norm:
        block += linear("attn.qk_norm", f"{names.attention}.qk_layernorm", shards, shards)
    block += linear("attn.qkv", f"{names.attention}.query_key_value", qkv, qkv if biased else None)
    block += linear("attn.out", f"{names.attention}.dense", columns, added if biased else None)
    if not model.has_one_norm:
        block += norm("blocks.{i}.norm2", "{layer}.post_attention_layernorm.")
    mlp: dict[LayerKind, list[Rule]] = {"dense": [], "moe": []}
    if model.gated_mlp and names.gate is None:
        half = model.mlp_width // tp
        halves = OnEachRank(Inverse(Interleave((half, half))), shards)
        for kind in ["weight", "bias"] if model.mlp_bias else ["weight"]:
            ours = f"blocks.{{i}}.mlp.up.{kind} blocks.{{i}}.mlp.gate.{kind}"
            mlp["dense"].append(Rule(ours, f"{{layer}}.{names.up}.{kind}", halves))
    else:
        mlp["dense"] += linear("mlp.up", names.up, shards, shards if model.mlp_bias else None)
        if model.gated_mlp and names.gate:
            mlp["dense"] += linear("mlp.gate", names.gate, shards, shards if model.mlp_bias else None)
    mlp["dense"] += linear("mlp.down", names.down, columns, added if model.mlp_bias else None)
    if model.experts:
        apart = Chain(shards, Unfold(model.experts.count))  # [e f / tp, h] on each rank -> [e, f, h]
        mlp["moe"] = linear("mlp.router", "mlp.router.layer", copies, None)
        for ours, theirs in {"up": "w1", "down": "w2"}.items():
            mlp["moe"].append(Rule(f"blocks.{{i}}.mlp.experts.{ours}", f"{{layer}}.mlp.experts.mlp.{theirs}", apart))

    rules = [Rule("embed.weight", f"{names.embedding}.word_embeddings.weight", shards)]
    if model.position == "learned":
        rules.append(Rule("positions.weight", f"{names.embedding}.position_embeddings.weight", copies))
    blocks |= {"dense": [*block, *mlp["dense"]], "moe": [*block, *mlp["moe"]]}
    for i, kind in enumerate(model.layer_kinds):
        rules += [rule.at(i=i, layer=names.first_block + i) for rule in blocks[kind]]
    rules += norm("norm", f"{names.norm_position(model.num_layers)}.{names.final_norm}")
    if not model.tie_embeddings:
        rules.append(Rule("head.weight", names.head(model.num_layers), shards))
    return rules


def _gated(model: ModelConfig, kind: LayerKind) -> list[Rule]:
    """The rules of a gMLP or aMLP block, which one tensor rank has as a whole."""

    def pairs(ours: str, theirs: str, parameters: Mapping[str, str]) -> list[Rule]:
        return [Rule(f"blocks.{{i}}.{ours}.{mine}", f"{{layer}}.{theirs}.{its}") for mine, its in parameters.items()]

    norm, linear = NORM_PARAMETERS[model.norm], {"weight": "weight", "bias": "bias"}
    rules = pairs("norm1", "norm", norm) + pairs("gmlp.up", "input_linear", linear)
    rules += pairs("gmlp.norm", "sgu.norm", norm) + pairs("gmlp.spatial", "sgu.proj", linear)
    if kind == "amlp":
        rules += pairs("gmlp.attn.qkv", "sgu.attn.proj_qkv", linear)
        rules += pairs("gmlp.attn.out", "sgu.attn.proj_ffn", linear)
    return rules + pairs("gmlp.down", "output_linear", linear)


def first_rank(model: ModelConfig, tp: int, pp: int) -> dict[str, tuple[int, int] | None]:
    """The tensors that the first tensor rank of the first stage holds in NeoX's first release.

    By our names: (dim, size) for the first `size` entries in dimension `dim`, None for the whole tensor.
    """
    from castalia.checkpoint.formats.deepspeed.write import cut_stages  # imports torch

    stage = cut_stages([0, 1, *[1] * model.num_layers, 1, 0, 0], pp, "v1")[0]
    shapes, held = tensor_shapes(model), {}
    for rule in table(LEGACY, model, tp, neox_qkv(model, tp, "new")):
        if int(rule.theirs.partition(".")[0]) in stage:
            dim = rule.op.dim if isinstance(rule.op, ConcatRanks) else None
            held[rule.ours] = None if dim is None else (dim, shapes[rule.ours][dim] // tp)
    return held


def neox_qkv(model: ModelConfig, tp: int, rows: GqaRows) -> Op:
    """The operation on NeoX's fused query/key/value rows.

    Ours are grouped by key/value head: the group's queries, its key, its value. Without grouped queries NeoX has the
    same. With them each tensor rank has all its queries, then its keys, then its values ("new" rows), or for each query
    head the query and the head's share of a key and a value ("old" rows).
    """
    n, kv, d = model.num_heads, model.kv_heads, model.head_size
    if kv == n:
        return ConcatRanks(tp)
    # The rank's rows are split into queries, keys and values, which are then interleaved by group.
    grouped = Interleave((n // kv * d, d, d), kv // tp)
    split = (
        Interleave((n // tp * d, kv // tp * d, kv // tp * d))
        if rows == "new"
        else Interleave((d, d * kv // n, d * kv // n), n // tp)
    )
    return OnEachRank(Chain(Inverse(split), grouped), ConcatRanks(tp))


def megatron_qkv(model: ModelConfig, tp: int, version: float) -> Op:
    """The operation on Megatron's fused query/key/value rows, by checkpoint version.

    Each tensor rank has n heads of d dimensions in the order (3, n, d) in version 0, (n, d, 3) in version 1, and since
    version 2 in our order (n, 3, d).
    """
    n, d = model.num_heads // tp, model.head_size
    if version >= 2:
        return ConcatRanks(tp)
    order = PermuteRows((n, d, 3), (0, 2, 1)) if version >= 1 else PermuteRows((3, n, d), (1, 0, 2))
    return OnEachRank(order, ConcatRanks(tp))
