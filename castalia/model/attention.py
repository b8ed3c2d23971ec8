"""Causal self-attention on PyTorch's fused kernels.

The number of heads follows from the shape of the weights, so that a tensor rank with its share of the heads runs the
same code. Shapes: b rows, t new tokens, k keys, n query heads, kv key/value heads, d head size, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.attention_kernels import Capability, KernelChoice
from castalia.config.schema import ModelConfig
from castalia.model.kept_tokens import Kept, spread, taken
from castalia.model.layers import Linear, is_slow_half
from castalia.model.norms import JointHeadsNorm, build_heads_norm, normed_heads
from castalia.model.positions import Rotation, rotate, rotate_in_place

aten: Any = torch.ops.aten
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FIRST_PREFERRED_CUDNN = 91501  # from this version on torch tries cuDNN first, on devices that it suits


class Recurrent(Protocol):
    """A layer that mixes tokens without attention, and knows those before the new ones by a state."""

    def new_state(self, rows: int, capacity: int, x: Tensor) -> list[Tensor]:
        """The state [rows, ...] of rows without tokens, for input like x [..., h] and at most `capacity` tokens."""
        ...

    def advance(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """The next tokens [rows, t, h] of each row -> the same shape. `state` takes them in, in place."""
        ...


class Cache(Protocol):
    """Keys and values from outside of this forward pass, with which a layer attends.

    A KV cache supplies those of earlier calls, a context-parallel shard those of other ranks. Either way the model
    holds only some tokens of each sequence, and asks the cache to attend in its place:

        KV cache, token 6 is new                 context parallelism, rank 1 of 2
        keys     0 1 2 3 4 5 [6]                 keys     0 1 2 3 [4 5 6 7]
        queries               6                  queries           4 5 6 7
        keys 0 to 5 are from earlier calls       keys 0 to 3 are from rank 0

    In each forward pass the model calls `reserve` once, `attend` or `recur` once in each layer, and `advance` once.
    The number of a token within its sequence is called its place; it decides which keys a query sees.
    """

    keys: Tensor  # places of all tokens that attention sees, [b, k], or [1, k] where all rows are alike
    gaps: bool  # some keys before a query may be hidden from it, so that a bias must mask them
    grows: bool  # text is being generated: every call has a new number of keys
    end: int  # larger than every place

    def reserve(self, count: int) -> Tensor:
        """The places of the next `count` tokens, [b or 1, count]. It updates `keys`, `gaps` and `end`."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`attend` of one layer, for the new tokens' q [b, n, t, d], k and v [b, kv, t, d] -> [b, n, t, d]."""
        ...

    def recur(self, layer: int, module: Recurrent, x: Tensor) -> Tensor:
        """`attend` of a layer that has a state in place of keys and values: new tokens [b, t, h] -> the same shape."""
        ...

    def advance(self, count: int) -> None:
        """Note that all layers have seen the reserved tokens."""
        ...


class Context(NamedTuple):
    """What all blocks of the model share in one forward pass."""

    rotary: Rotation | None = None
    choice: KernelChoice = KernelChoice("flash", "causal")
    bias: Tensor | None = None  # [rows, 1 or heads, t, k] in the dtype of the queries; -inf hides a key
    whole: tuple[KernelChoice, Tensor | None] | None = None  # both for blocks without the window that others have
    cache: Cache | None = None
    kept: Kept | None = None  # the tokens that are computed; None: all
    last: bool = False  # whether the last block gets it, after whose attention tokens without a label are left out


def capability(device: torch.device) -> Capability | None:
    """Compute capability of a GPU, such as (8, 0); None for CPUs. Apple's GPUs have none of CUDA's kernels: (0, 0)."""
    if device.type == "mps":
        return 0, 0
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def prefers_cudnn(device: torch.device) -> bool:
    """Whether torch tries cuDNN's kernel first on GPUs that it suits. Deterministic algorithms rule it out.

    cuDNN is asked for its version only if the device is a GPU, because loading it takes time and memory.
    """
    if device.type != "cuda":
        return False
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    known = torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= FIRST_PREFERRED_CUDNN
    return known and torch.backends.cuda.cudnn_sdp_enabled() and not strict


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Keep torch from choosing cuDNN's attention, which `choose_kernel` rules out while text is generated.

    It costs no more than two Python calls.
    """
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
    choice: KernelChoice,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention by the chosen kernel: q [b, n, t, d], k and v [b, kv, k, d] -> [b, n, t, d].

    `bias` [b or 1, n or 1, t, k] is added to the scores; `scale` None means 1 / sqrt(d). `softcap`: see
    `ModelConfig.attention_softcap`.
    """
    bias = None if bias is None else bias.to(q.dtype)  # FSDP casts the arguments of a block
    if softcap is not None:
        return capped_attention(q, k, v, softcap, bias, dropout_p, scale)
    b, n, t, d = q.shape
    group_size = n // k.shape[1]  # query heads per key/value head
    if group_size > 1 and choice.repeats:
        if t == 1:  # the queries of a group see the same keys, so they can pass for several queries of one head
            if bias is not None and bias.shape[1] > 1:
                bias = bias.reshape(len(bias), n // group_size, group_size, -1)  # [b, n, 1, k] -> [b, kv, group, k]
            grouped = q.view(b, -1, group_size, d)  # [b, n, 1, d] -> [b, kv, group, d]
            return _kernel(grouped, k, v, choice, bias, dropout_p, scale).reshape(q.shape)
        k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)  # [b, n, k, d]
    return _kernel(q, k, v, choice, bias, dropout_p, scale)


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, softcap: float, bias: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    """`attend` with scores that are capped before the bias is added; without a bias, queries are the last of the keys.

    All scores are made, since no fused kernel has a cap.
    """
    b, n, t, d = q.shape
    kv, keys = k.shape[1], k.shape[2]
    grouped = (q * (d**-0.5 if scale is None else scale)).reshape(b, kv, n // kv * t, d)
    scores = (grouped @ k.mT / softcap).tanh() * softcap  # [b, kv, group t, k]
    scores = scores.view(b, n, t, keys)
    if bias is None and t > 1:
        hidden = torch.ones(t, keys, dtype=torch.bool, device=q.device).triu(keys - t + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropout_p)
    return (weights.view(b, kv, -1, keys) @ v).view(b, n, t, d)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: KernelChoice,
    bias: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    if choice.sight == "last causal":
        return _last_causal(q, k, v, dropout_p, scale)
    if bias is not None and choice.kernel == "memory-efficient":  # called directly, as torch would prefer cuDNN
        bias = bias.expand(*q.shape[:3], k.shape[2])
        backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))  # keep what it needs
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, backward, dropout_p, False, scale=scale)[0]
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
    """Causal attention of the last t of k tokens, by the flash kernel of GPUs, which aligns the mask at the end.

        t = 2, k = 4     x x x .
                         x x x x

    `torch.nn.attention.bias.causal_lower_right` does the same, but cannot be compiled.
    """
    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if d % 8:  # the kernel takes multiples of 8 only
        q, k, v = (F.pad(x, (0, -d % 8)) for x in (q, k, v))
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=scale)[0][..., :d]


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention.

    The rows of the fused matrix `qkv` lie by key/value head: its query heads, then its key, then its value. So a
    tensor rank's share of the rows is whole heads. With 4 query and 2 key/value heads: q0 q1 k0 v0  q2 q3 k1 v1.
    """

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_size = layer, cfg.head_size
        self.group_size = cfg.num_heads // cfg.kv_heads  # query heads per key/value head
        self.dropout, self.softcap = cfg.attention_dropout, cfg.attention_softcap
        # muP: products of correlated vectors grow with d, so scores are divided by d, not by sqrt(d).
        self.scale = 1 / (cfg.head_size * cfg.mup.attention_temperature) if cfg.mup else cfg.attention_scale
        self.rotates, self.windowed, self.clip = cfg.rotates(layer), cfg.window_of(layer) is not None, cfg.clip_qkv
        rows = (cfg.num_heads + 2 * cfg.kv_heads) * cfg.head_size
        self.qkv = Linear(cfg.hidden_size, rows, cfg.attention_bias)
        self.out = Linear(cfg.num_heads * cfg.head_size, cfg.hidden_size, cfg.out_bias)
        self.qk_norm = JointHeadsNorm(cfg) if cfg.qk_norm is True else None
        self.by_head, apart = cfg.qk_norm == "head", isinstance(cfg.qk_norm, str)
        self.q_norm = build_heads_norm(cfg, cfg.num_heads) if apart else None
        self.k_norm = build_heads_norm(cfg, cfg.kv_heads) if apart else None
        # Packed for writing, rows lie by kind: all queries, all keys, all values. Rotating then needs no copy.
        self.by_kind = False

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[b, t, h] -> [b, t, h]; of kept tokens [1, m, h] -> [1, m, h], in the last block [1, k, h]."""
        qkv, kept = self.qkv(x), context.kept
        if kept is None:
            return self.out(self.attend_heads(qkv, context))
        heads = self.attend_heads(spread(qkv, kept.tokens, kept.shape), context)
        return self.out(taken(heads, kept.labelled if context.last else kept.tokens))

    def attend_heads(self, qkv: Tensor, context: Context) -> Tensor:
        """Attention output of all heads, before the output projection: [b, t, (n + 2 kv) d] -> [b, t, n d]."""
        b, t, _ = qkv.shape
        dtype = qkv.dtype
        q, k, v = self.split(qkv, context.rotary if self.rotates else None)
        if is_slow_half(q):
            q, k, v = q.float(), k.float(), v.float()
        choice, bias = context.whole if context.whole and not self.windowed else (context.choice, context.bias)
        y = (attend if context.cache is None else partial(context.cache.attend, self.layer))(
            q,
            k,
            v,
            choice=choice,
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            softcap=self.softcap,
        )
        return y.transpose(1, 2).reshape(b, t, -1).to(dtype)  # [b, n, t, d] -> [b, t, n d]

    def split(self, qkv: Tensor, rotary: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """[b, t, (n + 2 kv) d] -> queries [b, n, t, d], keys and values [b, kv, t, d], turned to their positions."""
        b, t, _ = qkv.shape
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        if self.by_kind:
            heads = qkv.view(b, t, -1, self.head_size)  # [b, t, n + 2 kv, d]
            kv = heads.shape[2] // (self.group_size + 2)
            n = heads.shape[2] - 2 * kv
            if rotary is not None:
                rotate_in_place(heads.narrow(2, 0, n + kv).unsqueeze(2), rotary)
            q, k, v = heads.transpose(1, 2).split((n, kv, kv), dim=1)
            return q, k, v
        qkv = qkv.view(b, t, -1, self.group_size + 2, self.head_size)  # [b, t, kv, group + key + value, d]
        qk, v = qkv[..., :-1, :], qkv[..., -1, :]  # [b, t, kv, group + key, d], [b, t, kv, d]
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if self.q_norm is not None and self.k_norm is not None:
            qk = normed_heads(qk, self.q_norm, self.k_norm, self.by_head)
        if rotary is not None:
            qk = rotate(qk, rotary).to(qkv.dtype)  # queries and keys together, in one kernel
        q, k = qk[..., :-1, :], qk[..., -1, :]  # [b, t, kv, group, d], [b, t, kv, d]
        return q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
