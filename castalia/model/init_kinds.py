"""Initial values of blocks without attention, and GPT-NeoX's draws of their tensors and of all matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from castalia.config.schema import LayerKind, ModelConfig
from castalia.config.tensor_table import BLOCK, block_of, row_of, shapes_of
from castalia.model.init_std import standard_deviation

TINY = 1e-4  # of RWKV's low ranks, which begin with next to no effect


def depth_gain(cfg: ModelConfig) -> float:
    """What scaled orthogonal matrices are multiplied by."""
    return math.sqrt(2 / cfg.num_layers)


def first_decays(channels: int, states: int) -> Tensor:
    """a_log [channels, states]."""
    return torch.arange(1, states + 1, dtype=torch.float32).log().expand(channels, states)


def first_steps(drawn: Tensor) -> Tensor:
    """Biases whose softplus lies between 0.001 and 0.1, evenly in the logarithm, from random numbers within 0 and 1."""
    dt = (drawn * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).exp().clamp(min=1e-4)
    return dt + (-(-dt).expm1()).log()


def rwkv_values(cfg: ModelConfig, name: str) -> Tensor:
    """Initial mixes [h], decays [h] and bonuses [n, m] of an rwkv block, which follow from the depth of the layer and
    the place of the channel alone: fast and slow heads, and deep layers that look back more."""
    layer, part, h = block_of(name), name.rpartition(".")[2], cfg.hidden_size
    deep = layer / max(1, cfg.num_layers - 1)  # 0 to 1; GPT-NeoX, which divides by L - 1, has no model of one layer
    places = [channel / max(1, h - 1) for channel in range(h)]
    if part == "decay":
        return torch.tensor([-6 + 5 * place ** (0.7 + 1.3 * deep) for place in places])
    if part == "bonus":
        zigzag = [((channel + 1) % 3 - 1) * 0.1 for channel in range(h)]
        bonus = [deep * (1 - place) + own for place, own in zip(places, zigzag, strict=True)]
        return torch.tensor(bonus).view(cfg.num_heads, cfg.head_size)
    power = (0.5 if part in ("mix_r", "mix_g") and ".time." in name else 1.0) * (1.0 - layer / cfg.num_layers)
    share = torch.tensor([channel / h for channel in range(h)]).pow(power)
    return 1.0 - (share + 0.3 * deep if part == "mix_v" else share)


def neox_gmlp(
    cfg: ModelConfig, name: str, kind: LayerKind, generator: torch.Generator, default: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """The outer matrices from the common stream. The default one draws the small attention's matrices and biases, and
    before them the spatial matrix and its bias, which begin with constants all the same."""
    h, a, length = cfg.hidden_size, cfg.amlp_size, cfg.max_positions or 0
    yield f"{name}.up.weight", neox_draw(cfg, cfg.init_method, torch.empty(8 * h, h), generator)
    torch_linear(length, length, default)
    if kind == "amlp":
        for part, rows, columns in (("qkv", 3 * a, 8 * h), ("out", 4 * h, a)):
            weight, bias = torch_linear(rows, columns, default)
            assert bias is not None
            yield f"{name}.attn.{part}.weight", weight
            yield f"{name}.attn.{part}.bias", bias
    yield f"{name}.down.weight", neox_draw(cfg, cfg.output_init_method, torch.empty(h, 4 * h), generator)


def neox_mamba(
    cfg: ModelConfig, name: str, generator: torch.Generator, default: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Convolution and steps from the default stream, the latter after the draws of `nn.Linear` that they overwrite."""
    sizes, h, d, r = cfg.mamba_sizes, cfg.hidden_size, cfg.mamba_width, cfg.mamba_rank
    both = neox_draw(cfg, cfg.init_method, torch.empty(2 * d, h), generator)
    yield f"{name}.in_x.weight", both[:d]
    yield f"{name}.in_z.weight", both[d:]
    conv, bias = torch_linear(d, sizes.taps, default, bias=sizes.conv_bias)
    yield f"{name}.conv.weight", conv
    if bias is not None:
        yield f"{name}.conv.bias", bias
    selection = torch.empty(r + 2 * sizes.states, d)
    yield f"{name}.x_proj.weight", neox_draw(cfg, cfg.init_method, selection, generator)
    torch_linear(d, r, default)
    yield f"{name}.dt_proj.weight", torch.empty(d, r).uniform_(-(r**-0.5), r**-0.5, generator=default)
    yield f"{name}.scan.dt_bias", first_steps(torch.empty(d).uniform_(generator=default))
    yield f"{name}.scan.a_log", first_decays(d, sizes.states)
    yield f"{name}.out.weight", neox_draw(cfg, cfg.output_init_method, torch.empty(h, d), generator)


def neox_rwkv(cfg: ModelConfig, name: str, default: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """All from the default stream, but for what follows from the depth."""
    shapes = {key.removeprefix("blocks.{i}.rwkv."): shape for key, shape in shapes_of(BLOCK, cfg, "rwkv").items()}
    for part in ("time.mix_down", "time.mix_up", "time.decay_down", "time.decay_up"):
        yield f"{name}.{part}", torch.empty(shapes[part]).uniform_(-TINY, TINY, generator=default)
    matrices = [f"time.{part}" for part in ("receptance", "key", "value", "out", "gate")]
    for part in (*matrices, "channels.key", "channels.receptance", "channels.value"):
        rows, columns = shapes[f"{part}.weight"]
        yield f"{name}.{part}.weight", torch_linear(rows, columns, default, bias=False)[0]
    for part in shapes:
        if row_of(f"{name}.{part}").init == "by depth":
            yield f"{name}.{part}", rwkv_values(cfg, f"{name}.{part}")


def torch_linear(
    rows: int, columns: int, generator: torch.Generator, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `nn.Linear` as torch draws them, bit for bit; both lie within +-1 / sqrt(columns)."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(columns))  # as torch computes it
    weight = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    bound = 1 / math.sqrt(columns)
    return weight, torch.empty(rows).uniform_(-bound, bound, generator=generator) if bias else None


def neox_draw(cfg: ModelConfig, method: str, matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Fill by the same calls as GPT-NeoX, whose fans are those of the padded matrix."""
    if method == "xavier_uniform":
        return nn.init.xavier_uniform_(matrix, generator=generator)
    if method.endswith("orthogonal"):
        gain = 1.0 if method == "orthogonal" else depth_gain(cfg)
        return nn.init.orthogonal_(matrix, gain, generator=generator)
    return matrix.normal_(0.0, standard_deviation(cfg, method, matrix.shape), generator=generator)
