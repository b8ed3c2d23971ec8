"""gMLP (2105.08050) and aMLP: a block in which a learned matrix mixes the tokens, in place of attention and MLP.

The gate of a token is a sum over all tokens up to it, weighted by a row of the spatial matrix, so that a sequence can
be no longer than that matrix. As in GPT-NeoX there is no residual: the output replaces the stream. Shapes: b rows, t
tokens, h hidden size, f = 4 h width of a gate, a width of the small attention, S longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.model.attention import Context
from castalia.model.layers import ACTIVATIONS, Linear, is_slow_half
from castalia.model.norms import build_norm


class Spatial(nn.Module):
    """The matrix [S, S], of which the lower triangle is used, and the bias [S], that mix the tokens of a gate."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, length))
        self.bias = nn.Parameter(torch.empty(length))

    def forward(self, v: Tensor, nothing: Tensor) -> Tensor:
        """The gates [b, t, f] of whole sequences v [b, t, f]; `nothing` is a 0 that is added to the bias."""
        t = v.shape[1]
        return _mixed(self.weight[:t, :t].tril(), v) + (self.bias[:t] + nothing)[:, None].to(v.dtype)

    def at(self, places: Tensor, v: Tensor) -> Tensor:
        """The gates [b, t, f] at `places` [b, t] of sequences v [b, S', f] that are 0 after their last token."""
        weights = self.weight[places, : v.shape[1]]  # [b, t, S']
        seen = places[..., None] >= torch.arange(v.shape[1], device=v.device)
        return _mixed(weights * seen, v) + self.bias[places][..., None].to(v.dtype)


def _mixed(weights: Tensor, v: Tensor) -> Tensor:
    """weights v in the dtype of v: [..., t, S], [b, S, f] -> [b, t, f]."""
    return (weights.float() @ v.float()).half() if is_slow_half(v) else weights.to(v.dtype) @ v


class SmallAttention(nn.Module):
    """Causal attention with one narrow head, which aMLP adds to the gate."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.qkv = Linear(8 * cfg.hidden_size, 3 * cfg.amlp_size)
        self.out = Linear(cfg.amlp_size, 4 * cfg.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """[b, t, 2 f] -> [b, t, f]."""
        q, k, v = self.qkv(y).chunk(3, dim=-1)  # [b, t, a] each
        return self.out(_attended(q, k, v, None))


def _attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of one head [b, t, a]; `seen` [b, t, k] says which keys, None is causal."""
    dtype = q.dtype
    if is_slow_half(q):
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None).to(dtype)


class GatedMLP(nn.Module):
    """down(u * gate(norm(v))), where u and v are the halves of activation(up x)."""

    def __init__(self, cfg: ModelConfig, attends: bool) -> None:
        super().__init__()
        if cfg.max_positions is None:
            raise ConfigError("gmlp blocks need model.max_positions, the longest sequence, for their spatial matrix")
        h = cfg.hidden_size
        self.up, self.down = Linear(h, 8 * h), Linear(4 * h, h)
        self.norm, self.spatial = build_norm(cfg, 4 * h), Spatial(cfg.max_positions)
        self.attn = SmallAttention(cfg) if attends else None
        self.activation, self.longest = ACTIVATIONS[cfg.activation], cfg.max_positions

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences [b, t, h] -> the same shape. Raises ConfigError where they are longer than the matrix."""
        self.check(x.shape[1])
        y, u, v = self.halves(x)
        # GPT-NeoX has biases of both matrices, adds neither, and so gives them gradients of 0.
        gate = self.spatial(v, 0.0 * (self.up.bias.sum() + self.down.bias.sum()))
        if self.attn is not None:
            gate = gate + self.attn(y)
        return self.down.product(u * gate)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both halves [b, t, 2 f], what is gated [b, t, f], and the normed other half [b, t, f]."""
        y = self.activation(self.up.product(x))
        u, v = y.chunk(2, dim=-1)
        return y, u, self.norm(v)

    def check(self, length: int) -> None:
        """Raises ConfigError for sequences that are too long."""
        if length > self.longest:
            raise ConfigError(f"a sequence of {length} tokens is longer than model.max_positions={self.longest}")

    def new_state(self, rows: int, capacity: int, x: Tensor) -> list[Tensor]:
        """What the next tokens need of those before them, for so many rows: nothing so far.

        The number of tokens [rows], normed halves [rows, capacity, f], and in aMLP keys and values, all of it 0 where
        there is no token yet.
        """
        gates, heads, capacity = 4 * x.shape[-1], 0 if self.attn is None else 2, min(capacity, self.longest)
        state = [x.new_zeros(rows, dtype=torch.long), x.new_zeros(rows, capacity, gates)]
        return state + [x.new_zeros(rows, capacity, self.attn.out.in_features) for _ in range(heads) if self.attn]

    def advance(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """The next tokens [rows, t, h] of each row -> the same shape. `state` takes them in, in place."""
        count, gates = state[0], state[1]
        y, u, v = self.halves(x)
        places = count[:, None] + torch.arange(x.shape[1], device=x.device)  # [rows, t]
        self.check(int(places.max()) + 1)
        rows = torch.arange(len(x), device=x.device)[:, None]
        gates[rows, places] = v
        gate = self.spatial.at(places, gates)
        if self.attn is not None:
            q, *kv = self.attn.qkv(y).chunk(3, dim=-1)
            for stored, new in zip(state[2:], kv, strict=True):
                stored[rows, places] = new
            seen = places[..., None] >= torch.arange(gates.shape[1], device=x.device)
            gate = gate + self.attn.out(_attended(q, state[2], state[3], seen))
        count += x.shape[1]
        return self.down.product(u * gate)


class GatedBlock(nn.Module):
    """A gMLP or aMLP block: the norm and what replaces the stream."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.norm1 = layer, build_norm(cfg)
        self.gmlp = GatedMLP(cfg, cfg.layer_kinds[layer] == "amlp")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Stream [b, t, h] -> the same shape, without what came in."""
        normed = self.norm1(x)
        return self.gmlp(normed) if context.cache is None else context.cache.recur(self.layer, self.gmlp, normed)
