"""Causal self-attention on PyTorch's fused kernels, with as many heads as the weights at hand hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.attention_kernels import Capability, Choice
from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.model.layers import Linear, is_slow_half
from castalia.model.positions import Rotation, rotate

aten: Any = torch.ops.aten
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FIRST_PREFERRED_CUDNN = 91501  # from this version on torch tries cuDNN first, on devices that it suits


class Cache(Protocol):
    """What attention sees besides the tokens at hand: earlier ones, or those of other ranks."""

    keys: Tensor  # places of all tokens that attention sees, [b, k], or [1, k] where all rows are alike
    gaps: bool  # keys at or before a query's place may be out of its sight, so that a bias has to say it
    grows: bool  # text is being written: every call brings a new number of keys
    end: int  # all places lie before it

    def reserve(self, count: int) -> Tensor:
        """The places of the next `count` tokens, like `keys`, which has to be read after this."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """One layer's `attend` with these and all other tokens, each [b, heads, t, d]."""
        ...

    def advance(self, count: int) -> None:
        """All layers have stored the reserved tokens."""
        ...


class Context(NamedTuple):
    """What all blocks share in one forward pass."""

    rotary: Rotation | None = None
    choice: Choice = Choice("flash", "causal")
    bias: Tensor | None = None  # [rows, 1 or heads, t, k] in the dtype of the queries; -inf hides a key
    cache: Cache | None = None


def capability(device: torch.device) -> Capability | None:
    """Of a GPU; None for CPUs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def prefers_cudnn() -> bool:
    """Whether torch tries cuDNN's kernel first on GPUs that it suits. Deterministic algorithms rule it out."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    known = torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= FIRST_PREFERRED_CUDNN
    return known and torch.backends.cuda.cudnn_sdp_enabled() and not strict


@contextmanager
def without_cudnn() -> Iterator[None]:
    """What `choose_kernel` leaves out where text is written, told to torch. Costs as much as two calls in Python."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    choice: Choice,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention by the chosen kernel: q [b, n, t, d], k and v [b, kv, k, d] -> [b, n, t, d]."""
    b, n, t, d = q.shape
    groups = n // k.shape[1]
    if groups > 1 and choice.repeats:
        if t == 1:  # the queries of a group are as good as queries of one head, which sees the same keys
            if bias is not None and bias.shape[1] > 1:
                bias = bias.reshape(len(bias), n // groups, groups, -1)
            return _kernel(q.view(b, -1, groups, d), k, v, choice, bias, dropout_p, scale).reshape(q.shape)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return _kernel(q, k, v, choice, bias, dropout_p, scale)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Choice,
    bias: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    if choice.sight == "last causal":
        return _last_causal(q, k, v, dropout_p, scale)
    if bias is not None and choice.kernel == "memory-efficient":  # which torch prefers cuDNN to, where it can
        bias = bias.expand(*q.shape[:3], k.shape[2])
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))  # what the backward pass needs
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, keeps, dropout_p, False, scale=scale)[0]
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        dropout_p=dropout_p,
        is_causal=choice.sight == "causal",
        scale=scale,
        enable_gqa=q.shape[1] > k.shape[1],
    )


def _last_causal(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None) -> Tensor:
    """Of queries that are the last of the keys, by GPUs' flash kernel, whose triangle ends with the last row.

    As `torch.nn.attention.bias.causal_lower_right` does it, which cannot be compiled.
    """
    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if d % 8:
        q, k, v = (F.pad(x, (0, -d % 8)) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=scale)[0][..., :d]


class Attention(nn.Module):
    """Rows of `qkv` are grouped by key/value head: its query heads, then its key, then its value."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size, self.group = layer, cfg.head_size, cfg.num_heads // cfg.kv_heads
        self.dropout = cfg.attention_dropout
        # muP: products of correlated vectors grow like their size, so they are divided by all of it, not by its root.
        self.scale = 1 / (cfg.head_size * cfg.mup.attention_temperature) if cfg.mup else None
        rows = (cfg.num_heads + 2 * cfg.kv_heads) * cfg.head_size
        self.qkv = Linear(cfg.hidden_size, rows, cfg.attention_bias)
        self.out = Linear(cfg.num_heads * cfg.head_size, cfg.hidden_size, cfg.attention_bias)
        self.qk_norm = HeadsNorm(cfg) if cfg.qk_norm else None

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
        mixed = (attend if context.cache is None else partial(context.cache.attend, self.layer))(
            q,
            k,
            v,
            choice=context.choice,
            bias=None if context.bias is None else context.bias.to(q.dtype),  # sharding casts what blocks are given
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        return mixed.transpose(1, 2).reshape(b, t, -1).to(dtype)


class HeadsNorm(nn.Module):
    """One LayerNorm over all heads and dimensions together, used for the queries and for the keys."""

    def __init__(self, cfg: ModelConfig) -> None:
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
