"""The tensors of blocks without attention, for `tensor_table.py`."""

from __future__ import annotations

from castalia.config.tensor_row import Init, Kind, TensorRow, layer_norm_rows, norm_rows


def _whole(
    module: str,
    shape: str,
    needs: str,
    kind: Kind,
    init: Init = "random",
    bias: Init = "zeros",
    adds: bool = True,
    adaptable: bool = True,
) -> list[TensorRow]:
    """A matrix of a block, of which every tensor rank has a copy, and its bias, which it `adds` or not."""
    rows, fan_in = shape.split()
    name = f"blocks.{{i}}.{module}"
    return [
        TensorRow(f"{name}.weight", shape, needs, kind, init, fan_in=fan_in, adaptable=adaptable),
        TensorRow(f"{name}.bias", rows, needs, "biases", bias, decays=False, used=adds, fan_in=fan_in),
    ]


def _mamba(module: str, shape: str, kind: Kind, tp_dim: int, init: Init = "random") -> list[TensorRow]:
    """A matrix of a mamba block, split by rows (0) or columns (1), and its bias."""
    name, split_bias = f"blocks.{{i}}.mamba.{module}", 0 if tp_dim == 0 else None
    return [
        TensorRow(f"{name}.weight", shape, "mamba", kind, init, tp_dim, adaptable=True),
        TensorRow(f"{name}.bias", shape.split()[0], "mamba linear_bias", "biases", "zeros", split_bias, False),
    ]


def _rwkv(module: str, shape: str, kind: Kind, tp_dim: int = 0) -> TensorRow:
    """A matrix of an rwkv block, split by rows (0) or columns (1)."""
    name, fan_in = f"blocks.{{i}}.rwkv.{module}.weight", shape.split()[1]
    return TensorRow(name, shape, "rwkv", kind, "fan_in", tp_dim, fan_in=fan_in, adaptable=True)


OTHER_KINDS = (
    *_whole("gmlp.up", "both hidden", "gmlp", "gmlp up", adds=False),
    *norm_rows("blocks.{i}.gmlp.norm", "gmlp", "gate_norm", "gate"),
    *_whole("gmlp.spatial", "positions positions", "gmlp", "gmlp spatial", "zeros", "ones", adaptable=False),
    *_whole("gmlp.attn.qkv", "amlp_qkv both", "amlp", "gmlp attention", "fan_in", "fan_in"),
    *_whole("gmlp.attn.out", "gate amlp", "amlp", "gmlp attention", "fan_in", "fan_in"),
    *_whole("gmlp.down", "hidden gate", "gmlp", "gmlp down", "residual", adds=False),
    TensorRow("blocks.{i}.mamba.scan.a_log", "channels states", "mamba", "mamba scan", "decays", 0, False),
    TensorRow("blocks.{i}.mamba.scan.d", "channels", "mamba", "mamba scan", "ones", 0, False),
    *_mamba("in_x", "channels hidden", "mamba in", 0),
    *_mamba("in_z", "channels hidden", "mamba in", 0),
    TensorRow("blocks.{i}.mamba.conv.weight", "channels taps", "mamba", "mamba conv", "fan_in", 0, fan_in="taps"),
    TensorRow("blocks.{i}.mamba.conv.bias", "channels", "mamba conv_bias", "biases", "fan_in", 0, False, fan_in="taps"),
    *_mamba("x_proj", "selection channels", "mamba selection", 1),
    TensorRow(
        "blocks.{i}.mamba.dt_proj.weight",
        "channels dt_rank",
        "mamba",
        "mamba selection",
        "fan_in",
        0,
        fan_in="dt_rank",
        adaptable=True,
    ),
    TensorRow("blocks.{i}.mamba.scan.dt_bias", "channels", "mamba", "mamba scan", "steps", 0, False),
    *_mamba("out", "hidden channels", "mamba out", 1, "residual"),
    *layer_norm_rows("blocks.{i}.rwkv.norm1", "rwkv"),
    *layer_norm_rows("blocks.{i}.rwkv.norm2", "rwkv"),
    *(TensorRow(f"blocks.{{i}}.rwkv.time.mix_{own}", "hidden", "rwkv", "rwkv mix", "by depth") for own in "xwkvrg"),
    TensorRow("blocks.{i}.rwkv.time.mix_down", "hidden mix_ranks", "rwkv", "rwkv mix", "tiny"),
    TensorRow("blocks.{i}.rwkv.time.mix_up", "5 mix_rank hidden", "rwkv", "rwkv mix", "tiny"),
    TensorRow("blocks.{i}.rwkv.time.scan.decay", "hidden", "rwkv", "rwkv scan", "by depth", 0),
    TensorRow("blocks.{i}.rwkv.time.decay_down", "hidden decay_rank", "rwkv", "rwkv decay", "tiny"),
    TensorRow("blocks.{i}.rwkv.time.decay_up", "decay_rank hidden", "rwkv", "rwkv decay", "tiny", 1),
    TensorRow("blocks.{i}.rwkv.time.scan.bonus", "heads head_size", "rwkv", "rwkv scan", "by depth", 0),
    *(_rwkv(f"time.{own}", "hidden hidden", "rwkv in") for own in ("receptance", "key", "value", "gate")),
    _rwkv("time.out", "hidden hidden", "rwkv out", 1),
    *layer_norm_rows("blocks.{i}.rwkv.time.norm", "rwkv", weight_decays=True, tp_dim=0),
    *(TensorRow(f"blocks.{{i}}.rwkv.channels.mix_{own}", "hidden", "rwkv", "rwkv mix", "by depth") for own in "kr"),
    _rwkv("channels.key", "wide hidden", "rwkv channels"),
    _rwkv("channels.receptance", "hidden hidden", "rwkv channels"),
    _rwkv("channels.value", "hidden wide", "rwkv channels", 1),
)
