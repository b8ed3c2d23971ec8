"""The architecture of NeoX's and Megatron-DeepSpeed's checkpoints: what tensors show counts before any config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from castalia.checkpoint.formats.deepspeed.folder import ScannedFolder, global_name, layer_file, refuse_missing
from castalia.checkpoint.formats.neox.names import NORM_PARAMETERS, Names
from castalia.checkpoint.rwkv_tensors import rwkv_settings
from castalia.config.schema import LayerKind, MambaConfig, ModelConfig, shortest
from castalia.errors import CheckpointError
from castalia.storage.lazy import TensorRef

RankTensors = Mapping[str, Sequence[TensorRef]]  # position.name -> the tensor on each tensor rank
# Settings in which a config of the same model must agree with the tensors; others are just taken from the tensors.
MUST_AGREE = (
    "num_layers", "hidden_size", "num_heads", "kv_heads", "norm", "position", "rotary_size", "tie_embeddings",
    "gated_mlp",
)  # fmt: skip


ROUTER = "mlp.router.layer.weight"
EXPERTS = (ROUTER, "mlp.experts.mlp.w1", "mlp.experts.mlp.w2")
# Tensors by which a layer without attention is known -> what it is.
MARKS: dict[str, LayerKind] = {
    "sgu.attn.proj_qkv.weight": "amlp",
    "sgu.proj.weight": "gmlp",
    "mixer.A_log": "mamba",
    "att.time_faaaa": "rwkv",
}


def observed(held: RankTensors, names: Names, folder: ScannedFolder, config: ModelConfig | None) -> dict[str, Any]:
    """What tensors and stored arguments say about the model, as settings of `ModelConfig`.

    `held`: the weights by `position.name`. `config`: the model of the training config, which is asked for the number of
    heads where the files do not store it. Raises CheckpointError for missing layers, for an unknown number of heads,
    and for tensors of the Transformer Engine.
    """
    path, args = folder.path, folder.args
    if foreign := [name for name in held if "fc1_weight" in name or ".attention.qkv." in name]:
        raise CheckpointError(
            f"{path}: {foreign[0]} was written through the Transformer Engine, which is not supported"
        )
    fused = f"{names.attention}.query_key_value.weight"
    num_layers = _count_layers(held, names, fused, folder)
    others = _other_kinds(held, names, num_layers)
    attending = [i for i in range(num_layers) if i not in others]
    first = names.first_block + (attending[0] if attending else 0)  # a layer that has attention, if one has
    routers = [i for i in attending if f"{names.first_block + i}.{ROUTER}" in held]
    dense = [i for i in attending if i not in routers]
    width_of = names.first_block + (dense[0] if dense else 0)  # a layer that has an MLP, if one has
    needed = [f"{names.embedding}.word_embeddings.weight", *([f"{first}.{fused}"] if attending else [])]
    needed += [f"{width_of}.{name}.weight" for name in (names.up, names.down)] if dense else []
    needed += [f"{names.first_block + i}.{name}" for i in routers for name in EXPERTS]
    for name in needed:
        if name not in held:
            raise CheckpointError(f"{path}: {name} is missing: this is not a model of this family, or files are mixed")
        if len(held[name][0].shape) != 2:
            raise CheckpointError(f"{path}: {name} has shape {list(held[name][0].shape)}, where a matrix is expected")
    embedding = held[f"{names.embedding}.word_embeddings.weight"]
    hidden, tp = embedding[0].shape[1], len(embedding)
    if others and tp > 1:
        raise CheckpointError(
            f"{path}: {' and '.join(dict.fromkeys(others.values()))} layers of {tp} tensor ranks are {tp} layers side "
            "by side, of which none is a part of one layer: they cannot be joined; train with model_parallel_size: 1"
        )
    heads = args.get("num_attention_heads") or (config.num_heads if config else None)
    settings: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": hidden,
        "norm": _norm(held, f"{names.norm_position(num_layers)}.{names.final_norm}"),
        "tie_embeddings": names.head(num_layers) not in held,
        "vocab_size": embedding[0].shape[0] * tp,
        "vocab_multiple": _vocab_multiple(embedding[0].shape[0] * tp, args, tp),
    }
    if others:
        settings |= _other_settings(held, names, num_layers, others, folder)
    if attending:
        settings |= _attention(held, f"{first}.{names.attention}", hidden, heads, tp, folder)
    elif heads or config is None:
        settings.setdefault("num_heads", heads or 1)  # which no layer has
    if dense:
        up, down = held[f"{width_of}.{names.up}.weight"][0], held[f"{width_of}.{names.down}.weight"][0]
        settings["mlp_size"] = down.shape[1] * tp
        settings["gated_mlp"] = names.gate is not None or up.shape[0] == 2 * down.shape[1]
        settings["mlp_bias"] = f"{width_of}.{names.up}.bias" in held
    elif config is None:  # no layer has an MLP, so nothing depends on it
        settings["gated_mlp"] = False
    if routers:
        settings["experts"] = _experts(held, names, routers, num_layers, folder, config)
    head_size = hidden // (settings.get("num_heads") or hidden)
    settings = _position(held, names, first, head_size, args, config) | settings
    if not attending and config is None and settings["position"] == "rotary":  # which acts in attention alone
        settings["position"] = "none"
    return settings


def _other_kinds(held: RankTensors, names: Names, num_layers: int) -> dict[int, LayerKind]:
    """The kinds of those layers that have no attention."""
    marks = [(i, f"{names.first_block + i}.", mark) for i in range(num_layers) for mark in reversed(MARKS)]
    return {i: MARKS[mark] for i, layer, mark in marks if layer + mark in held}


def _other_settings(
    held: RankTensors, names: Names, num_layers: int, others: Mapping[int, LayerKind], folder: ScannedFolder
) -> dict[str, Any]:
    """What layers without attention say about the model."""
    settings: dict[str, Any] = {"hidden_size": held[f"{names.embedding}.word_embeddings.weight"][0].shape[1]}
    settings["pattern"] = shortest([others.get(i, "attention") for i in range(num_layers)])
    for i, kind in others.items():
        layer = names.first_block + i
        if kind == "mamba":
            settings["mamba"] = _mamba(held, f"{layer}.mixer.", settings["hidden_size"], folder)
            continue
        if kind == "rwkv":
            settings |= rwkv_settings(
                {name: refs[0].shape for name, refs in held.items()}, f"{layer}.", str(folder.path)
            )
            continue
        if kind == "amlp":
            settings["amlp_size"] = held[f"{layer}.sgu.attn.proj_qkv.weight"][0].shape[0] // 3
        settings["max_positions"] = held[f"{layer}.sgu.proj.weight"][0].shape[0]
    return settings


def _mamba(held: RankTensors, mixer: str, hidden: int, folder: ScannedFolder) -> dict[str, Any] | None:
    """The sizes of a Mamba layer, whose tensors' names begin with `mixer`; None for those that our default has."""
    needed = [f"{mixer}{name}" for name in ("A_log", "conv1d.weight", "dt_proj.weight")]
    if missing := [name for name in needed if name not in held]:
        raise CheckpointError(f"{folder.path}: {missing[0]} is missing: files are mixed, or from elsewhere")
    (width, states), taps, rank = (held[name][0].shape for name in needed)
    sizes = MambaConfig(
        width=None if width == 2 * hidden else width,
        states=states,
        taps=taps[-1],
        rank=None if rank[-1] == -(-hidden // 16) else rank[-1],
        conv_bias=f"{mixer}conv1d.bias" in held,
        linear_bias=f"{mixer}in_proj.bias" in held,
    )
    return None if sizes == MambaConfig() else sizes.model_dump()


def _attention(
    held: RankTensors, attention: str, hidden: int, heads: int | None, tp: int, folder: ScannedFolder
) -> dict[str, Any]:
    """The heads of a layer, whose tensors' names begin with `attention`. Raises CheckpointError if they do not fit."""
    path, fused = folder.path, f"{attention}.query_key_value.weight"
    if heads is None:
        raise CheckpointError(
            f"{path} does not say how many attention heads the model has; give its config with --config"
        )
    if hidden % heads or heads % tp:
        raise CheckpointError(f"{path}: {heads} heads divide neither hidden size {hidden} nor {tp} tensor ranks")
    head_size = hidden // heads
    # rows of the fused matrix, on all ranks: (heads + 2 * kv_heads) * head_size
    kv_heads, rest = divmod(held[fused][0].shape[0] * tp // head_size - heads, 2)
    if rest or kv_heads < 1 or heads % kv_heads or kv_heads % tp:
        rows, name = held[fused][0].shape[0] * tp, fused.partition(".")[2]
        raise CheckpointError(f"{path}: {rows} rows of {name} do not fit {heads} heads of {head_size} on {tp} ranks")
    return {
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "attention_bias": f"{attention}.query_key_value.bias" in held,
        "qk_norm": f"{attention}.qk_layernorm.weight" in held,
    }


def _experts(
    held: RankTensors,
    names: Names,
    routers: Sequence[int],
    num_layers: int,
    folder: ScannedFolder,
    config: ModelConfig | None,
) -> dict[str, Any]:
    """The mixture of experts, as settings of `ExpertsConfig`. Raises CheckpointError where the files do not say it."""
    first = f"{names.first_block + routers[0]}"
    count, up = held[f"{first}.{ROUTER}"][0].shape[0], held[f"{first}.{EXPERTS[1]}"]
    every = routers[1] - routers[0] if len(routers) > 1 else num_layers - routers[0]
    if config is None or config.experts is None:
        raise CheckpointError(
            f"{folder.path} does not say how its router chooses among {count} experts; give its config with --config"
        )
    given = config.experts
    if list(routers) == [i for i in range(num_layers) if i % given.every == 0]:
        every = given.every
    elif list(routers) != list(range(0, num_layers, every)):
        raise CheckpointError(
            f"{folder.path}: layers {', '.join(map(str, routers))} have experts; these are not every nth"
        )
    rows = up[0].shape[0] * len(up)
    if rows % count:
        raise CheckpointError(f"{folder.path}: {rows} rows of {first}.{EXPERTS[1]} do not divide into {count} experts")
    return given.model_dump() | {"count": count, "every": every, "width": rows // count, "gated": False}


def merge(config: ModelConfig | None, observations: Mapping[str, Any], defaults: Mapping[str, Any]) -> ModelConfig:
    """The config's model, or the defaults, with the settings that the tensors show."""
    return ModelConfig(**{**(defaults if config is None else config.model_dump()), **observations})


def compare(
    config: ModelConfig | None, model: ModelConfig, folder: ScannedFolder, names: Names, source: str, tolerant: bool
) -> tuple[str, ...]:
    """A line for each setting in which a config contradicts the tensors' model, so that it must be of another model.

    `source` names the config. Raises CheckpointError if there are any, unless `tolerant`.
    """
    if config is None:
        return ()
    settings = [*MUST_AGREE, "layer_kinds"]
    if not model.gated_mlp and "dense" in model.layer_kinds:
        settings.append("mlp_width")  # NeoX derives the width of gated models in several ways
    lines = [
        f"{name}: {getattr(model, name)} in the tensors, {getattr(config, name)} in the config {source}"
        for name in settings
        if getattr(model, name) != getattr(config, name)
    ]
    # A head that is missing would look like tied embeddings; the config says whether there should be one.
    if model.tie_embeddings and not config.tie_embeddings:
        head, tied = names.head(model.num_layers), [line for line in lines if line.startswith("tie_embeddings")]
        lost = f"the head, {head}, is in no file" + (f": {_file_of(head)} is missing" if folder.layers else "")
        if lines == tied and not tolerant:
            raise CheckpointError(
                f"{folder.path}: {lost}. Copy it; if the model has no head of its own, its config should say so "
                "(no_weight_tying: false)"
            )
        lines = [lost, *(line for line in lines if line not in tied)]
    if lines and not tolerant:
        raise CheckpointError(
            f"{folder.path}: the config is of another model:"
            + "".join(f"\n  {'' if line.startswith('the head') else 'model.'}{line}" for line in lines)
            + "\nName the right one with --config, or move the wrong one out of the folder"
        )
    if lines:
        lines.append(f"what tensors do not show is still taken from {source}, and may be wrong")
    return tuple(lines)


def _file_of(name: str) -> str:
    return layer_file(int(name.split(".")[0]), 0)


def _count_layers(held: RankTensors, names: Names, fused: str, folder: ScannedFolder) -> int:
    """The number of blocks. Raises CheckpointError unless the tensors of all of them, and of both ends, are there."""
    positions = {int(name.split(".")[0]) for name in held}
    blocks = [p for p in positions for mark in (fused, *MARKS) if f"{p}.{mark}" in held]
    ends = [p for p in positions if p not in blocks]  # blocks of some kinds have a norm of the same name
    norms = [p for p in ends for end in ("weight", "scale", "g") if f"{p}.{names.final_norm}{end}" in held]
    heads = [number for number in range(1, max(positions, default=0)) if names.head(number) in held]
    # The stored arguments know; otherwise the position of the final norm or of the head, or the last block's.
    if folder.args.get("num_layers"):
        count = folder.args["num_layers"]
    elif norms:
        count = norms[0] - names.first_block - 1
    elif heads:
        count = heads[0]
    else:
        count = max(blocks, default=names.first_block) - names.first_block + 1
    listed = {global_name(name, names.embedding) for name in folder.listed}
    expected = {names.embedding, *range(names.first_block, names.first_block + count)}
    expected |= {int(name.split(".")[0]) for name in listed}
    first = f"{min(blocks, default=0)}."
    if norms or _norm(held, f"{first}input_layernorm.", f"{first}norm.") != "layernorm_no_params":
        expected.add(names.norm_position(count))
    if (missing := sorted(expected - positions)) and folder.layers:
        there = [layer_file(position, rank) for position in positions for rank in range(folder.tp)]
        refuse_missing(folder.path, [layer_file(p, rank) for p in missing for rank in range(folder.tp)], there)
    if lacking := [f"{position}.*" for position in missing] or sorted(listed - held.keys()):
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise CheckpointError(
            f"{folder.path}: the files lack tensors of a model of {count} blocks: {', '.join(lacking[:8])}{more}. "
            "Copy the right files; nothing is loaded in part"
        )
    return count


def _norm(held: RankTensors, *starts: str) -> str:
    """The kind of the norm whose tensors' names begin so."""
    suffixes = {name.rsplit(".", 1)[1] for name in held if name.startswith(starts)}
    return next(kind for kind, names in NORM_PARAMETERS.items() if set(names.values()) == suffixes or not names)


def _position(
    held: RankTensors, names: Names, first: int, head_size: int, args: Mapping[str, Any], config: ModelConfig | None
) -> dict[str, Any]:
    learned = held.get(f"{names.embedding}.position_embeddings.weight")
    longest = args.get("max_position_embeddings")
    if learned is not None:
        return {"position": "learned", "max_positions": learned[0].shape[0]}
    settings: dict[str, Any] = {"max_positions": longest} if longest else {}
    if f"{first}.{names.attention}.alibi_embed.slopes" in held:
        return settings | {"position": "alibi"}
    if config is not None and config.position != "learned":
        settings["position"] = config.position
    else:
        settings["position"] = "rotary"
    frequencies = held.get(f"{first}.{names.attention}.rotary_emb.inv_freq")
    if frequencies is not None:
        rotating = 2 * frequencies[0].shape[0]  # dimensions of a head; each frequency turns a pair
        if config is None or config.rotary_size // 2 != frequencies[0].shape[0]:
            settings["rotary_pct"] = rotating / head_size
    return settings


def _vocab_multiple(rows: int, args: Mapping[str, Any], tp: int) -> int:
    multiple = (args.get("make_vocab_size_divisible_by") or 1) * tp  # as NeoX pads
    return multiple if rows % multiple == 0 else 1


def config_files(folder: Path) -> list[Path]:
    """The config files of a checkpoint: those in `configs/`, or else those in its folder."""
    for place in (folder / "configs", folder):
        files = sorted(
            path for path in place.glob("*") if re.fullmatch(r".*\.(yml|yaml)", path.name) and path.is_file()
        )
        if files:
            return files
    return []
