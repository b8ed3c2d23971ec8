"""Causal self-attention on PyTorch's fused kernels, with as many heads as the weights at hand hold."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.schema import Model
from castalia.errors import ConfigError
from castalia.model.layers import Linear, is_slow_half
from castalia.model.positions import Rotation, alibi_slopes, rotate


class Cache(Protocol):
    """What attention sees besides the tokens at hand: earlier ones, or those of other ranks."""

    keys: Tensor  # places of all tokens that attention sees, [b, k], or [1, k] where all rows are alike
    gaps: bool  # keys at or before a query's place may be out of its sight, so that a mask has to say it
    end: int  # all places lie before it

    def reserve(self, count: int) -> Tensor:
        """The places of the next `count` tokens, like `keys`, which has to be read after this."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """One layer's scaled dot-product attention with these and all other tokens, each [b, heads, t, d]."""
        ...

    def advance(self, count: int) -> None:
        """All layers have stored the reserved tokens."""
        ...


class Context(NamedTuple):
    """What all blocks share in one forward pass."""

    rotary: Rotation | None = None
    mask: Tensor | None = None  # bool [rows, 1, t, k]; None: see `causal`
    distance: Tensor | None = None  # ALiBi: fp32 [rows, 1, t, k], key's place minus query's
    causal: bool = True  # without a mask: the lower triangle; False: everything
    cache: Cache | None = None


class Attention(nn.Module):
    """Rows of `qkv` are grouped by key/value head: its query heads, then its key, then its value."""

    def __init__(self, cfg: Model, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.group = layer, cfg.head_size, cfg.num_heads // cfg.kv_heads
        self.dropout = cfg.attention_dropout
        # muP: products of correlated vectors grow like their size, so they are divided by all of it, not by its root.
        self.scale = 1 / (cfg.head_size * cfg.mup.attention_temperature) if cfg.mup else None
        rows = (cfg.num_heads + 2 * cfg.kv_heads) * cfg.head_size
        self.qkv = Linear(cfg.hidden_size, rows, cfg.attention_bias)
        self.out = Linear(cfg.num_heads * cfg.head_size, cfg.hidden_size, cfg.attention_bias)
        self.qk_norm = HeadsNorm(cfg) if cfg.qk_norm else None
        # One slope for each query head at hand: a shard of the heads keeps its own part.
        self.slopes = alibi_slopes(cfg.num_heads) if cfg.position == "alibi" else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.out(self.mix(self.qkv(x), context))

    def mix(self, qkv: Tensor, context: Context) -> Tensor:
        """What the heads find, [b, t, n d], from queries, keys and values [b, t, (n + 2 kv) d]."""
        b, t, _ = qkv.shape
        dtype = qkv.dtype
        qkv = qkv.view(b, t, -1, self.group + 2, self.head_size)  # batch, time, kv heads, group + k + v, d
        qk, v = qkv[..., :-1, :], qkv[..., -1, :]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if context.rotary is not None:
            qk = rotate(qk, context.rotary)
        q, k, v = qk[..., :-1, :].flatten(2, 3).transpose(1, 2), qk[..., -1, :].transpose(1, 2), v.transpose(1, 2)
        if is_slow_half(q):
            q, k, v = q.float(), k.float(), v.float()
        cache = context.cache
        attend = F.scaled_dot_product_attention if cache is None else partial(cache.attend, self.layer)
        mixed = attend(
            q,
            k,
            v,
            attn_mask=self.mask(context, q),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=context.causal and context.mask is None,
            scale=self.scale,
            enable_gqa=self.group > 1,
        )
        return mixed.transpose(1, 2).reshape(b, t, -1).to(dtype)

    def mask(self, context: Context, q: Tensor) -> Tensor | None:
        if self.slopes is None or context.distance is None:
            return context.mask
        slopes = torch.tensor(self.slopes, device=q.device)[:, None, None]
        bias = slopes * context.distance
        return (bias if context.mask is None else bias.masked_fill(~context.mask, -torch.inf)).to(q.dtype)


class HeadsNorm(nn.Module):
    """One LayerNorm over all heads and dimensions together, used for the queries and for the keys."""

    def __init__(self, cfg: Model) -> None:
        super().__init__()
        if cfg.kv_heads != cfg.num_heads:
            raise ConfigError(
                f"model.qk_norm has one weight for queries and keys: model.num_kv_heads={cfg.kv_heads} must equal "
                f"model.num_heads={cfg.num_heads}; set num_kv_heads to {cfg.num_heads} or qk_norm to false"
            )
        self.weight = nn.Parameter(torch.ones(cfg.num_heads, cfg.head_size))
        self.bias = nn.Parameter(torch.zeros(cfg.num_heads, cfg.head_size))
        self.eps = cfg.norm_eps

    def forward(self, qk: Tensor) -> Tensor:
        """[b, t, heads, 2, d] -> the same."""
        weight, bias = self.weight.to(qk.dtype), self.bias.to(qk.dtype)
        normed = [F.layer_norm(part, weight.shape, weight, bias, self.eps) for part in qk.unbind(-2)]
        return torch.stack(normed, dim=-2)
