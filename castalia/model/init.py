"""Initial weights: a function of (seed, tensor name, position), or GPT-NeoX's stream of random numbers.

A matrix is cut into tiles of 64 x 256. Each tile is drawn whole, in fp64, from a CPU generator of its own. So a rank
draws only the tiles that its slice touches, all cores of the CPU draw at once, and weights are bit-equal in every
layout and on every machine. (fp32 draws differ between instruction sets.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import torch
from torch import Tensor

from castalia.config.schema import ModelConfig
from castalia.config.tensor_table import SIZES, constant_value, row_of
from castalia.errors import ConfigError
from castalia.machine import usable_cores
from castalia.model.init_kinds import (
    TINY,
    depth_gain,
    first_decays,
    first_steps,
    neox_draw,
    neox_gmlp,
    neox_mamba,
    neox_rwkv,
    rwkv_values,
)
from castalia.model.init_std import mup_scale, standard_deviation
from castalia.model.transformer import Transformer

TILE_ROWS, TILE_COLUMNS = 64, 256


@torch.no_grad()
def initialize(model: Transformer, cfg: ModelConfig, seed: int) -> None:
    """Fill all parameters in place, by the method that `cfg.init` names."""
    if (cfg.init or ("neox" if model.exact else "seeded")) == "neox":
        for name, parameter in model.named_parameters():
            if (value := constant_value(cfg, name)) is not None:
                parameter.fill_(value)
        for name, matrix in neox_matrices(cfg, seed):
            model.get_parameter(name).copy_(matrix)
    else:
        for name, parameter in model.named_parameters():
            parameter.copy_(seeded_tensor(cfg, seed, name, parameter.shape))


def seeded_tensor(
    cfg: ModelConfig, seed: int, name: str, shape: Sequence[int], slices: Sequence[slice] | None = None
) -> Tensor:
    """The initial value of a tensor in fp32, or the part of it that `slices`, one for each dimension, select.

    `shape` is that of the whole tensor. Rows that pad the vocabulary are drawn like the others and change none of them.
    """
    if (value := constant_value(cfg, name)) is not None:
        sizes = shape if slices is None else [len(range(*s.indices(n))) for s, n in zip(slices, shape, strict=True)]
        return torch.full(tuple(sizes), value)
    if row_of(name).init in ("decays", "steps"):
        return _mamba_values(cfg, seed, name, shape, slices)
    if row_of(name).init == "by depth":
        whole = rwkv_values(cfg, name)
        return whole if slices is None else whole[tuple(slices)].clone()
    if row_of(name).init == "fan_in":
        bound = 1 / math.sqrt(SIZES[row_of(name).fan_in](cfg))
        rows, columns = (*(slices or [slice(None)] * len(shape)), slice(None))[:2]
        wide = (shape[0], shape[1] if len(shape) > 1 else 1)  # a vector is drawn as a matrix with one column
        part = _drawn(seed, name, wide, rows, columns, lambda tile: tile * (bound / math.sqrt(3)), uniform=True)
        return part.view(-1) if len(shape) == 1 else part
    if len(shape) == 3:  # of experts, for example: each is drawn as a matrix of its own
        chosen, inner = (slice(None), None) if slices is None else (slices[0], slices[1:])
        drawn = [_matrix(cfg, seed, name, f"{name}.{e}", shape[1:], inner) for e in range(*chosen.indices(shape[0]))]
        return torch.stack(drawn) if drawn else torch.empty(0, *shape[1:])
    return _matrix(cfg, seed, name, name, shape, slices)


def _mamba_values(
    cfg: ModelConfig, seed: int, name: str, shape: Sequence[int], slices: Sequence[slice] | None
) -> Tensor:
    """Initial decays log(1), ..., log(n) of each channel; or steps between 0.001 and 0.1, before softplus."""
    rows, columns = (*(slices or [slice(None)] * len(shape)), slice(None))[:2]
    if row_of(name).init == "decays":
        return first_decays(shape[0], shape[1])[rows, columns].clone()
    drawn = _drawn(seed, name, (shape[0], 1), rows, columns, lambda tile: (tile / math.sqrt(3) + 1) / 2, uniform=True)
    return first_steps(drawn.view(-1))


def _matrix(
    cfg: ModelConfig, seed: int, name: str, drawn_as: str, shape: Sequence[int], slices: Sequence[slice] | None
) -> Tensor:
    """`seeded_tensor` of a random matrix; `drawn_as` chooses its random numbers."""
    logical = _logical_shape(cfg, name, shape)
    method = _method(cfg, name)
    rows, columns = slices if slices is not None else (slice(None), slice(None))
    if row_of(name).init == "adapter":  # within +-1 / sqrt(columns), as the library PEFT draws them
        return _drawn(seed, drawn_as, shape, rows, columns, lambda tile: tile / math.sqrt(3 * shape[1]), uniform=True)
    if row_of(name).init == "tiny":
        return _drawn(seed, drawn_as, shape, rows, columns, lambda tile: tile * (TINY / math.sqrt(3)), uniform=True)
    if method.endswith("orthogonal"):
        whole = torch.zeros(*shape)  # padding rows are zero: an orthogonal matrix cannot be continued
        whole[: logical[0]] = _orthogonal(seed, drawn_as, logical) * (
            1.0 if method == "orthogonal" else depth_gain(cfg)
        )
        return whole[rows, columns].clone()
    scale = standard_deviation(cfg, method, logical) * mup_scale(cfg, method, name)
    return _drawn(seed, drawn_as, shape, rows, columns, lambda tile: tile * scale, uniform=method == "xavier_uniform")


def _method(cfg: ModelConfig, name: str) -> str:
    return cfg.output_init_method if row_of(name).init == "residual" else cfg.init_method


def _logical_shape(cfg: ModelConfig, name: str, shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a matrix without the rows that pad the vocabulary, so that padding changes no scale."""
    rows = cfg.vocab_size if row_of(name).has_token_rows and cfg.vocab_size else shape[0]
    return rows, shape[1]


def _drawn(
    seed: int,
    name: str,
    shape: Sequence[int],
    rows: slice,
    columns: slice,
    scaled: Callable[[Tensor], Tensor],
    uniform: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A part of a matrix, from the tiles that it touches: fp64 draws of variance 1, given to `scaled`, as `dtype`."""
    top, bottom, _ = rows.indices(shape[0])
    left, right, _ = columns.indices(shape[1])
    part = torch.empty(bottom - top, right - left, dtype=dtype)
    bands = range(top // TILE_ROWS, -(-bottom // TILE_ROWS))
    tiles = [(i, j) for i in bands for j in range(left // TILE_COLUMNS, -(-right // TILE_COLUMNS))]
    rest = iter(tiles)

    inference = torch.is_inference_mode_enabled()  # the mode is per thread

    @torch.inference_mode(inference)
    def draw_some(_: int) -> None:
        tile = torch.empty(TILE_ROWS, TILE_COLUMNS, dtype=torch.float64)
        for i, j in rest:  # each thread takes the next one
            r0, r1 = max(top, i * TILE_ROWS), min(bottom, (i + 1) * TILE_ROWS)
            c0, c1 = max(left, j * TILE_COLUMNS), min(right, (j + 1) * TILE_COLUMNS)
            generator = _generator(seed, name, i, j)
            if uniform:
                tile.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
            else:
                tile.normal_(generator=generator)
            # The overlap of tile and part, in coordinates of the tile and of the part.
            cut = tile[r0 - i * TILE_ROWS : r1 - i * TILE_ROWS, c0 - j * TILE_COLUMNS : c1 - j * TILE_COLUMNS]
            part[r0 - top : r1 - top, c0 - left : c1 - left] = scaled(cut)

    threads = min(_cores(), len(tiles))
    if threads < 2:
        draw_some(0)
        return part
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw_some, range(threads)))  # raises what went wrong
    return part


def _cores() -> int:
    """This process's share of the CPU cores, which it shares with the other ranks of its machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _orthogonal(seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """A matrix with orthonormal rows or columns, whichever are fewer."""
    drawn = _drawn(seed, name, shape, slice(None), slice(None), lambda tile: tile, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn if shape[0] >= shape[1] else drawn.T)
    q = q * r.diagonal().sign()  # makes the distribution uniform
    return (q if shape[0] >= shape[1] else q.T).float()


def _generator(seed: int, name: str, i: int, j: int) -> torch.Generator:
    digest = blake2b(f"{seed}:{name}:{i}:{j}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def neox_matrices(cfg: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """All random tensors as GPT-NeoX draws them in one process on the CPU: one fp32 stream, in construction order.

    With pipe_parallel_size 0, GPT-NeoX builds its layers twice, and the weights come from the second pass.
    """
    generator = torch.Generator().manual_seed(seed + 2718)
    default = torch.Generator().manual_seed(seed)  # torch's own, which modules without tensor parallelism draw from
    for _ in range(cfg.init_passes - 1):
        for _ in _neox_pass(cfg, generator, default):
            pass
    yield from _neox_pass(cfg, generator, default)


def _neox_pass(cfg: ModelConfig, generator: torch.Generator, default: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    h, d, n, kv, f = cfg.hidden_size, cfg.head_size, cfg.num_heads, cfg.kv_heads, cfg.mlp_width

    def draw(name: str, rows: int, columns: int) -> Tensor:
        return neox_draw(cfg, _method(cfg, name), torch.empty(rows, columns), generator)

    yield "embed.weight", draw("embed.weight", cfg.padded_vocab_size, h)
    if cfg.position == "learned":
        assert cfg.max_positions is not None
        places = cfg.max_positions + cfg.position_offset
        positions = torch.empty(places, h).normal_(generator=default)  # which is drawn over
        yield "positions.weight", neox_draw(cfg, cfg.init_method, positions, default)
    for i, kind in enumerate(cfg.layer_kinds):
        block = f"blocks.{i}"
        if kind in ("gmlp", "amlp"):
            yield from neox_gmlp(cfg, f"{block}.gmlp", kind, generator, default)
            continue
        if kind == "mamba":
            yield from neox_mamba(cfg, f"{block}.mamba", generator, default)
            continue
        if kind == "rwkv":
            yield from neox_rwkv(cfg, f"{block}.rwkv", default)
            continue
        qkv = draw(f"{block}.attn.qkv.weight", (n + 2 * kv) * d, h)
        if kv != n:  # GPT-NeoX's rows are all queries, all keys, all values; ours lie by key/value head
            q, k, v = (part.view(kv, -1, h) for part in qkv.split([n * d, kv * d, kv * d]))
            qkv = torch.cat((q, k, v), dim=1).reshape(-1, h)
        yield f"{block}.attn.qkv.weight", qkv
        yield f"{block}.attn.out.weight", draw(f"{block}.attn.out.weight", h, n * d)
        if kind == "moe":
            yield from _neox_experts(cfg, f"{block}.mlp", generator, default)
            continue
        inner = draw(f"{block}.mlp.up.weight", 2 * f if cfg.gated_mlp else f, h)
        yield f"{block}.mlp.up.weight", inner[:f]
        if cfg.gated_mlp:
            yield f"{block}.mlp.gate.weight", inner[f:]
        yield f"{block}.mlp.down.weight", draw(f"{block}.mlp.down.weight", h, f)
    if not cfg.tie_embeddings:
        yield "head.weight", draw("head.weight", cfg.padded_vocab_size, h)


def _neox_experts(
    cfg: ModelConfig, name: str, generator: torch.Generator, default: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """The router from the default stream, after the draw of `nn.Linear` that it overwrites; the experts, which
    GPT-NeoX fills as one matrix [e f, h], from the common one."""
    assert cfg.experts is not None
    if cfg.experts.gated or cfg.experts.shared_width:
        which = "gated=true" if cfg.experts.gated else f"shared_width={cfg.experts.shared_width}"
        raise ConfigError(
            f"model.init=neox cannot draw model.experts.{which}, which GPT-NeoX does not have; use seeded"
        )
    e, f, h = cfg.experts.count, cfg.expert_width, cfg.hidden_size
    router = torch.empty(e, h)
    router.uniform_(generator=default)
    yield f"{name}.router.weight", neox_draw(cfg, cfg.init_method, router, default)
    for part, method in (("up", cfg.init_method), ("down", cfg.output_init_method)):
        flat = neox_draw(cfg, method, torch.empty(e * f, h), generator)
        yield f"{name}.experts.{part}", flat.view(e, f, h)
