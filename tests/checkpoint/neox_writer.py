"""A small writer of NeoX folders, straight from the description of the formats and without our rules.

It covers what the genuine fixtures do not: other layouts, eras, ZeRO stages, grouped queries in both orders.
"""

from __future__ import annotations

import json
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from castalia.config.schema import ModelConfig
from castalia.model.transformer import Transformer

ROLES = ("master", "exp_avg", "exp_avg_sq")
STEP, ITERATION, SKIPPED = 7, 9, 2


@dataclass
class Written:
    """What a folder holds, under our names."""

    path: Path
    model: ModelConfig
    weights: dict[str, torch.Tensor]
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # role -> name -> tensor


@contextmanager
def stand_in(name: str) -> Iterator[type]:
    """A class that pickles under a foreign dotted name."""
    module, _, cls = name.rpartition(".")
    made = type(cls, (), {"__module__": module})
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[module], cls, made)
    try:
        yield made
    finally:
        for name, old in before.items():
            sys.modules.pop(name) if old is None else sys.modules.__setitem__(name, old)


def write(
    path: Path, model: ModelConfig, *, tp=1, pp=1, dp=1, kind="plain", era="head", rows="new", pipeline=True,
    dtype=torch.float32, no_decay=True, yml=True,
) -> Written:  # fmt: skip
    """`kind`: none, plain, flat, zero, elastic, bf16, stage3, old1, old1_plain, old2, or universal."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(model).named_parameters()}
    states = {role: {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for role in ROLES}
    weights = {name: tensor.to(dtype) for name, tensor in states["master"].items()}
    path.mkdir(parents=True)
    their = {role: [split(model, states[role], role, tp, rank, era, rows) for rank in range(tp)] for role in ROLES}
    half = [{name: tensor.to(dtype) for name, tensor in rank.items()} for rank in their["master"]]
    if pipeline and kind != "stage3":
        for rank, held in enumerate(half):
            for position in sorted({int(name.split(".")[0]) for name in held}):
                layer = OrderedDict(
                    (n.split(".", 1)[1], t) for n, t in held.items() if int(n.split(".")[0]) == position
                )
                if era == "v1" and "attention.dense.weight" in layer:
                    layer["attention.rotary_emb.inv_freq"] = torch.ones(model.rotary_size // 2, dtype=dtype)
                torch.save(layer, path / f"layer_{position:02d}-model_{rank:02d}-model_states.pt")
    stages = stage_names(model, list(half[0]), pp)
    for stage, names in enumerate(stages):
        for rank in range(tp):
            parts = {role: {name: their[role][rank][plain(name)] for name in names} for role in ROLES}
            write_rank(
                path, model, stage * tp + rank, parts, half[rank], tp, pp, dp, kind, era, pipeline, no_decay, dtype
            )
    if yml:
        (path / "configs").mkdir()
        (path / "configs" / "config.yml").write_text(config_yml(model))
    if model.parallel_residual and dtype != torch.float32:  # the sum of rounded parts
        for name in weights:
            if name.endswith(("attn.out.bias", "mlp.down.bias")):
                weights[name] = ((states["master"][name] / tp).to(dtype).double() * tp).to(dtype)
    if kind == "stage3":
        weights = {name: tensor.to(dtype) for name, tensor in states["master"].items()}
    return Written(path, model, weights, {} if kind == "none" else states)


def config_yml(model: ModelConfig) -> str:
    fields = model.model_dump(exclude={"vocab_size", "vocab_multiple", "rms_eps_inside"}, exclude_none=True)
    return f"data: {{seq_length: {model.max_positions}}}\nmodel:\n" + "".join(
        f"  {name}: {json.dumps(value)}\n"
        for name, value in fields.items()  # YAML reads JSON
    )


def split(
    model: ModelConfig, ours: dict, role: str, tp: int, rank: int, era: str, rows: str
) -> dict[str, torch.Tensor]:
    """One tensor rank's tensors, in the order in which modules hold them."""
    n, kv, d, layers = model.num_heads, model.kv_heads, model.head_size, model.num_layers

    def shard(tensor, dim=0):
        return tensor.chunk(tp, dim)[rank].clone()

    def added(bias):
        summed = model.parallel_residual and role == "master"
        return bias / tp if summed else bias.clone()

    def qkv(tensor):
        groups = tensor.view(kv, n // kv + 2, d, *tensor.shape[1:])
        q, k, v = (part.reshape(-1, *tensor.shape[1:]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1]))
        if kv == n:
            return shard(tensor)
        q, k, v = shard(q), shard(k), shard(v)
        if rows == "new":
            return torch.cat([q, k, v])
        heads = n // tp
        per_head = zip(q.chunk(heads), k.chunk(heads), v.chunk(heads), strict=True)
        return torch.cat([piece for pieces in per_head for piece in pieces])

    def norm(ours_name, their_name):
        keys = {"layernorm": [("weight", "weight"), ("bias", "bias")], "rmsnorm": [("weight", "scale")]}[model.norm]
        return {f"{their_name}.{their_key}": ours[f"{ours_name}.{key}"].clone() for key, their_key in keys}

    result = {"0.word_embeddings.weight": shard(ours["embed.weight"])}
    if model.position == "learned":
        result["0.position_embeddings.weight"] = ours["positions.weight"].clone()
    for i in range(layers):
        b, t = f"blocks.{i}", f"{i + 2}"
        block = norm(f"{b}.norm1", f"{t}.input_layernorm")
        kinds = ["weight", "bias"] if model.attention_bias else ["weight"]
        block |= {f"{t}.attention.query_key_value.{kind}": qkv(ours[f"{b}.attn.qkv.{kind}"]) for kind in kinds}
        block[f"{t}.attention.dense.weight"] = shard(ours[f"{b}.attn.out.weight"], 1)
        if model.attention_bias:
            block[f"{t}.attention.dense.bias"] = added(ours[f"{b}.attn.out.bias"])
        block |= norm(f"{b}.norm2", f"{t}.post_attention_layernorm")
        up, down = ("linear1", "linear2") if era == "head" else ("dense_h_to_4h", "dense_4h_to_h")
        kinds = ["weight", "bias"] if model.mlp_bias else ["weight"]
        for kind in kinds:
            first, gate = shard(ours[f"{b}.mlp.up.{kind}"]), ours.get(f"{b}.mlp.gate.{kind}")
            if era == "w1-w3":
                block[f"{t}.mlp.w1.{kind}"], block[f"{t}.mlp.w3.{kind}"] = shard(gate), first
            else:
                block[f"{t}.mlp.{up}.{kind}"] = first if gate is None else torch.cat([first, shard(gate)])
        down = "w2" if era == "w1-w3" else down
        block[f"{t}.mlp.{down}.weight"] = shard(ours[f"{b}.mlp.down.weight"], 1)
        if model.mlp_bias:
            block[f"{t}.mlp.{down}.bias"] = added(ours[f"{b}.mlp.down.bias"])
        result |= block
    result |= norm("norm", f"{layers + 3}.norm")
    if not model.tie_embeddings:
        result[f"{layers + 4}.final_linear.weight"] = shard(ours["head.weight"])
    return result


def stage_names(model: ModelConfig, names: list[str], pp: int) -> list[list[str]]:
    """Each stage's parameters under the optimizer's names; uneven on purpose: the last stage gets the most blocks."""
    cuts = [0] + [2 + stage for stage in range(1, pp)] + [10**9]
    stages = [
        [n for n in names if low <= int(n.split(".")[0]) < high] for low, high in zip(cuts, cuts[1:], strict=False)
    ]
    if model.tie_embeddings:
        tied = [name for name in names if name.startswith("0.")]
        stages[0] = [f"tied_modules.embed.{n[2:]}" if n in tied else n for n in stages[0]]
        if pp > 1:
            stages[-1] = [f"tied_modules.embed.{n[2:]}" for n in tied] + stages[-1]
    return stages


def plain(name: str) -> str:
    return name.replace("tied_modules.embed.", "0.")


def groups_of(names, no_decay: bool) -> list[list[str]]:
    if not no_decay:
        return [list(names)]
    second = [n for n in names if n.endswith(".bias") or "norm." in n]
    return [[n for n in names if n not in second], second]


def write_rank(path, model, xx, parts, half, tp, pp, dp, kind, era, pipeline, no_decay, dtype) -> None:
    names = list(parts["master"])
    groups = groups_of(names, no_decay)
    prefix = "" if pipeline else "sequential."
    shapes = [OrderedDict((prefix + n, parts["master"][n].shape) for n in group) for group in groups]
    args = {
        "num_layers": model.num_layers, "hidden_size": model.hidden_size, "num_attention_heads": model.num_heads,
        "make_vocab_size_divisible_by": 1, "model_parallel_size": tp,
    }  # fmt: skip
    state = {
        "module": None if pipeline else OrderedDict(("sequential." + n, t) for n, t in half.items()),
        "optimizer": None, "param_shapes": shapes, "skipped_steps": SKIPPED, "iteration": ITERATION, "args": args,
        "dp_world_size": dp, "mp_world_size": pp * tp, "lr_scheduler": {"num_iters": STEP},
    }  # fmt: skip
    if era != "v1":
        state["ds_version"] = "0.16.5+unknown" if era == "head" else "0.8.2"
    if kind in ("plain", "flat"):
        state["param_shapes"] = None
        state["optimizer"] = (plain_optimizer if kind == "plain" else flat_optimizer)(parts, groups)
    elif kind == "universal":
        write_universal(path, parts, prefix)
    elif kind != "none":
        old = kind.startswith("old")
        if old:
            del state["param_shapes"]
            order = OrderedDict((n, parts["master"][n].shape) for n in names)
        with stand_in("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler") as scaler_class:
            for rank in range(dp):
                scaler = scaler_class()
                scaler.__dict__ |= {
                    "cur_scale": 2.0**12,
                    "cur_iter": ITERATION,
                    "last_overflow_iter": 3,
                    "cur_hysteresis": 2,
                }
                inner = SHARDS[kind](parts, groups, rank, dp) | {"loss_scaler": scaler}
                file = {"optimizer_state_dict": inner} | ({"param_shapes": order} if old else {})
                bf16 = "bf16_" if kind == "bf16" else ""
                torch.save(file, path / f"{bf16}zero_pp_rank_{rank}_mp_rank_{xx:02d}_optim_states.pt")
    if kind == "stage3":
        state["module"] = OrderedDict(("sequential." + n, torch.empty(0, dtype=dtype)) for n in half)
        for rank in range(dp):
            torch.save(state, path / f"zero_pp_rank_{rank}_mp_rank_{xx:02d}_model_states.pt")
    else:
        torch.save(state, path / f"mp_rank_{xx:02d}_model_states.pt")


def plain_optimizer(parts, groups) -> dict:
    state, index, numbered = {}, 0, []
    for group in groups:
        for name in group:
            step = STEP if name == group[-1] else 0
            state[index] = {"step": step, "exp_avg": parts["exp_avg"][name], "exp_avg_sq": parts["exp_avg_sq"][name]}
            index += 1
        numbered.append({"params": list(range(index - len(group), index))})
    return {"state": state, "param_groups": numbered}


def flat_optimizer(parts, groups) -> dict:
    state = {
        g: {"step": STEP + 1, "exp_avg": flat(parts["exp_avg"], group), "exp_avg_sq": flat(parts["exp_avg_sq"], group)}
        for g, group in enumerate(groups)
    }
    inner = {"state": state, "param_groups": [{"params": [g], "step": 0} for g in range(len(groups))]}
    masters = [flat(parts["master"], group) for group in groups]
    return {"cur_scale": 1024, "cur_iter": ITERATION, "last_overflow_iter": -1, "fp32_groups_flat": masters,
            "optimizer_state_dict": inner}  # fmt: skip


def flat(tensors, group) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in group])


def shares(vector, dp, alignment, rank) -> tuple[torch.Tensor, int]:
    """A rank's part of the padded vector, and how much of it is padding."""
    size = -(-vector.numel() // (alignment * dp)) * alignment
    padded = torch.cat([vector, torch.full((size * dp - vector.numel(),), 99.0)])
    part = padded[rank * size : (rank + 1) * size].clone()
    return part, min(size, max(0, (rank + 1) * size - vector.numel()))


def current(parts, groups, rank, dp, strip_master=True, elastic=False, alignment=2) -> dict:
    state, masters = {}, []
    for g, group in enumerate(groups):
        cut = {role: shares(flat(parts[role], group), dp, alignment, rank) for role in ROLES}
        padding = cut["master"][1]
        stripped = {role: part[: len(part) - padding] if padding else part for role, (part, _) in cut.items()}
        masters.append(stripped["master"] if strip_master else cut["master"][0])
        chosen = stripped if elastic else {role: part for role, (part, _) in cut.items()}
        state[g] = {"exp_avg": chosen["exp_avg"], "exp_avg_sq": chosen["exp_avg_sq"]} | (
            {} if elastic else {"step": STEP}
        )
    result = {"single_partition_of_fp32_groups": masters, "partition_count": [dp] * len(groups), "zero_stage": 1}
    if elastic:
        return result | {"base_optimizer_state": list(state.values()), "base_optimizer_state_step": STEP}
    return result | {"base_optimizer_state": {"state": state, "param_groups": [{"step": 0}] * len(groups)}}


def stage2_old(parts, groups, rank, dp) -> dict:
    result = current(parts, groups, rank, dp, elastic=True, alignment=1)
    del result["base_optimizer_state_step"]
    return result | {"partition_count": dp, "zero_stage": 2}


def stage1_old(parts, groups, rank, dp, elastic=True) -> dict:
    """Intervals of at most 50 elements a rank."""
    masters, base, index, state = [], [], 0, {}
    for group in groups:
        vectors = {role: flat(parts[role], group) for role in ROLES}
        total = vectors["master"].numel()
        size = min(50, -(-total // dp))
        intervals = -(-total // (size * dp))
        starts = [(c * dp + rank) * size for c in range(intervals)]
        masters.append([vectors["master"][s : s + size].clone() for s in starts])
        moments = [{m: vectors[m][s : s + size].clone() for m in ROLES[1:]} for s in starts]
        base.append(moments)
        for entry in moments:
            padded = {m: torch.cat([v, torch.full((size - v.numel(),), 99.0)]) for m, v in entry.items()}
            state[index] = padded | {"step": STEP}
            index += 1
    return {
        "local_sub_partitions_of_fp32_groups": masters, "zero_stage": 1, "partition_count": dp,
        "num_comm_intervals_per_group": [len(group) for group in masters],
        "base_optimizer_state": base if elastic else {"state": state, "param_groups": []},
    }  # fmt: skip


def stage3(parts, groups, rank, dp) -> dict:
    """Every parameter cut for itself; sub-groups of five parameters."""
    names = [name for group in groups for name in group]
    subgroups = [names[i : i + 5] for i in range(0, len(names), 5)]

    def mine(role, group):
        return torch.cat([shares(parts[role][name].flatten(), dp, 1, rank)[0] for name in group])

    state = {i: {"step": STEP} | {role: mine(role, g) for role in ROLES[1:]} for i, g in enumerate(subgroups)}
    return {
        "zero_stage": 3, "partition_count": dp, "fp32_flat_groups": [mine("master", g) for g in subgroups],
        "optimizer_state_dict": {"state": state, "param_groups": []},
    }  # fmt: skip


SHARDS = {
    "zero": current,
    "elastic": lambda *a: current(*a, elastic=True),
    "bf16": lambda *a: current(*a, strip_master=False),
    "old1": stage1_old,
    "old1_plain": lambda *a: stage1_old(*a, elastic=False),
    "old2": stage2_old,
    "stage3": stage3,
}


def write_universal(path, parts, prefix) -> None:
    for name, tensor in parts["master"].items():
        folder = path / "zero" / (prefix + name)
        folder.mkdir(parents=True)
        for file, value in (
            ("fp32", tensor),
            ("exp_avg", parts["exp_avg"][name]),
            ("exp_avg_sq", parts["exp_avg_sq"][name]),
        ):
            torch.save({"param": value, "cat_dim": 0}, folder / f"{file}.pt")
        torch.save(STEP, folder / "step.pt")
