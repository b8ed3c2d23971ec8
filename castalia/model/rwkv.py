"""RWKV-6 (2404.05892): a block whose tokens meet in a matrix for each head, and choose what of it is forgotten.

Shapes: b rows, t tokens, h hidden size, n heads, m head size, f inner width of the channel mix, r and d ranks of the
mixes and of the decays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from castalia.config.scan_chunks import SCAN_TOKENS, scan_chunk
from castalia.config.schema import ModelConfig
from castalia.errors import ConfigError
from castalia.model.attention import Context
from castalia.model.layers import Linear, linear
from castalia.model.norms import LayerNorm

NORM_EPS, HEAD_EPS = 1e-5, 64e-5  # whatever `model.norm` and `model.norm_eps` say
FASTEST = 10.0  # decays beyond exp(-exp(10)) are 0 in fp32 as it is


class TimeMix(nn.Module):
    """out(norm(scan(r, k, v)) * silu(gate)). Each input mixes a token with the one before it, as the token chooses."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        sizes, h = cfg.rwkv_sizes, cfg.hidden_size
        self.mix_x, self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g = (
            nn.Parameter(torch.empty(h)) for _ in range(6)
        )
        self.mix_down = nn.Parameter(torch.empty(h, 5 * sizes.mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, sizes.mix_rank, h))
        self.decay_down = nn.Parameter(torch.empty(h, sizes.decay_rank))
        self.decay_up = nn.Parameter(torch.empty(sizes.decay_rank, h))
        self.receptance, self.key, self.value, self.gate, self.out = (Linear(h, h, bias=False) for _ in range(5))
        self.heads = cfg.num_heads  # on this rank
        self.scan = DecayScan(cfg.num_heads, cfg.head_size)
        self.norm = HeadNorm(cfg.head_size, h)

    def forward(self, x: Tensor, before: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [b, t, h] after the one `before` them [b, h] and the state [b, n, m, m] (None: the beginning) -> the
        same shape, and the state after them."""
        change = torch.cat((before[:, None], x[:, :-1]), dim=1) - x
        chosen = torch.tanh(linear(x + change * self.mix_x.to(x.dtype), self.mix_down.T))  # [b, t, 5 r]
        fixed = (self.mix_w, self.mix_k, self.mix_v, self.mix_r, self.mix_g)
        w, k, v, r, g = (
            x + change * (own.to(x.dtype) + linear(part, up.T))
            for own, part, up in zip(fixed, chosen.chunk(5, dim=-1), self.mix_up, strict=True)
        )
        decay = linear(torch.tanh(linear(w, self.decay_down.T)), self.decay_up.T)
        out, state = self.scan(self.receptance(r), self.key(k), self.value(v), decay, state)
        return self.out(self.norm(out).to(x.dtype) * F.silu(self.gate(g))), state


class HeadNorm(nn.Module):
    """LayerNorm of each head's output by itself, with a weight and a bias for each channel."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size  # of a head
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, h] in fp32 -> the same."""
        heads = x.shape[-1] // self.size
        return F.group_norm(x.flatten(0, 1), heads, self.weight.float(), self.bias.float(), HEAD_EPS).view_as(x)


class DecayScan(nn.Module):
    """o_t = r_t (S_{t-1} + bonus k_t v_t^T), S_t = w_t S_{t-1} + k_t v_t^T, w_t = exp(-exp(decay + d_t)), per head.

    Bonus and w act on the rows of S, which belong to keys. Parameters and states are fp32, whatever the activations
    are: slow decays have no room in 16 bits.
    """

    stays_fp32 = True

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.empty(heads * size))
        self.bonus = nn.Parameter(torch.empty(heads, size))

    def forward(self, r: Tensor, k: Tensor, v: Tensor, d: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """r, k, v, d [b, t, h], the state before [b, n, m, m] -> o [b, t, h] in fp32, the state after."""
        heads, size = self.bonus.shape
        logs = -(self.decay.float() + d.float()).clamp(max=FASTEST).exp()  # of the decays
        if state is None:
            state = r.new_zeros(len(r), heads, size, size, dtype=torch.float32)
        given = (part.float().unflatten(-1, (heads, size)) for part in (r, k, v, logs))
        out, state = MatrixScan.apply(*given, self.bonus.float(), state)
        return out.flatten(-2), state


class MatrixScan(torch.autograd.Function):
    """The recurrence in chunks of the sequence. For the backward pass it keeps its inputs and the state before each
    chunk, and computes one chunk at a time again."""

    @staticmethod
    def forward(
        ctx: Any, r: Tensor, k: Tensor, v: Tensor, logs: Tensor, bonus: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """r, k, v and logarithms of decays [b, t, n, m], bonus [n, m], first state [b, n, m, m]; all fp32 -> o
        [b, t, n, m], last state, which has no gradient."""
        size, firsts, outs = scan_chunk(r.device.type, len(r) * r[0, 0].numel()), [], []
        for begin in range(0, r.shape[1], size):
            firsts.append(state)
            part = slice(begin, begin + size)
            out, state = chunk(r[:, part], k[:, part], v[:, part], logs[:, part], bonus, state)
            outs.append(out)
        ctx.size = size
        ctx.save_for_backward(r, k, v, logs, bonus, *firsts)
        ctx.mark_non_differentiable(state)
        return torch.cat(outs, dim=1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs but the first state."""
        r, k, v, logs, bonus, *firsts = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in (r, k, v, logs)]
        d_bonus, d_state = torch.zeros_like(bonus), torch.zeros_like(firsts[0])
        for number in reversed(range(len(firsts))):
            part = slice(number * ctx.size, (number + 1) * ctx.size)
            inputs = [*(x[:, part] for x in (r, k, v, logs)), bonus, firsts[number]]
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in inputs]
                outputs = chunk(*inputs)
            *own, of_bonus, d_state = torch.autograd.grad(outputs, inputs, (d_out[:, part], d_state))
            d_bonus += of_bonus
            for whole, some in zip(gradients, own, strict=True):
                whole[:, part] = some
        return *gradients, d_bonus, None


def chunk(r: Tensor, k: Tensor, v: Tensor, logs: Tensor, bonus: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over the tokens of a chunk, shapes as in `MatrixScan`, in groups that are computed side by side.

    Between two tokens of a group all that was kept of the first is the product of the decays in between, which is at
    most 1: the sums of their logarithms are taken one by one, not as differences, which would lose slow decays behind
    fast ones. Only the states between groups follow one another.
    """
    b, t, n, m = r.shape
    size = min(t, SCAN_TOKENS)
    rest = -t % size  # tokens that change nothing
    if rest:
        r, k, v, logs = (F.pad(x, (0, 0, 0, 0, 0, rest)) for x in (r, k, v, logs))
    r, k, v, logs = (x.view(b, -1, size, n, m).permute(0, 3, 1, 2, 4) for x in (r, k, v, logs))  # [b, n, g, s, m]
    # What is left after i tokens of the group of what token j added, j = 0 being the state before: [.., i, j, m].
    places = torch.arange(size + 1, device=r.device)
    later = (places[1:, None] > places)[..., None]  # [s, s + 1, 1]
    sums = F.pad((logs[..., None, :] * later).cumsum(dim=-3), (0, 0, 0, 0, 1, 0))
    left = sums.exp() * (places[:, None] >= places)[..., None]
    scores = (r[..., None, :] * left[..., :-1, 1:, :] * k[..., None, :, :]).sum(dim=-1)  # [b, n, g, s, s]
    scores = scores + torch.diag_embed((r * bonus[:, None, None] * k).sum(dim=-1))
    added = (k * left[..., -1, 1:, :]).mT @ v  # [b, n, g, m, m]
    states = [state]
    for fading, new in zip(left[..., -1, 0, :].unbind(2), added.unbind(2), strict=True):
        states.append(fading[..., None] * states[-1] + new)
    out = scores @ v + (r * left[..., :-1, 0, :]) @ torch.stack(states[:-1], dim=2)
    return out.permute(0, 2, 3, 1, 4).reshape(b, t + rest, n, m)[:, :t], states[-1]


class ChannelMix(nn.Module):
    """sigmoid(receptance) * value(relu(key)^2), where receptance and key see the token before, too."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        h, f = cfg.hidden_size, cfg.rwkv_width
        self.mix_k, self.mix_r = nn.Parameter(torch.empty(h)), nn.Parameter(torch.empty(h))
        self.key, self.receptance, self.value = (Linear(*sizes, bias=False) for sizes in ((h, f), (h, h), (f, h)))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Tokens [b, t, h] after the one `before` them [b, h] -> the same shape."""
        change = torch.cat((before[:, None], x[:, :-1]), dim=1) - x
        k, r = (x + change * own.to(x.dtype) for own in (self.mix_k, self.mix_r))
        return torch.sigmoid(self.receptance(r)) * self.value(F.relu(self.key(k)).square())


class RWKVMixer(nn.Module):
    """The residual stream with time mix and channel mix added, both of which remember the token before."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (LayerNorm(cfg.hidden_size, NORM_EPS) for _ in range(2))
        self.time, self.channels = TimeMix(cfg), ChannelMix(cfg)
        # GPT-NeoX has no norm for the embedding, and takes the first one twice.
        self.enters = layer == 0 and not cfg.embedding_norm
        self.dropouts = cfg.attention_dropout, cfg.hidden_dropout

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences [b, t, h] -> the same shape."""
        nothing = x.new_zeros(len(x), x.shape[-1])
        return self.mixed(x, nothing, nothing, None)[0]

    def mixed(
        self, x: Tensor, before1: Tensor, before2: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream [b, t, h], the last outputs of both norms [b, h], and the time mix's state after it. `before1`,
        `before2` and `state` are the same of the tokens before, 0 at the beginning."""
        x = self.norm1(x) if self.enters else x
        first = self.norm1(x)
        mixed, state = self.time(first, before1, state)
        x = F.dropout(x + mixed, self.dropouts[0], self.training)
        second = self.norm2(x)
        x = F.dropout(x + self.channels(second, before2), self.dropouts[1], self.training)
        return x, first[:, -1], second[:, -1], state

    def new_state(self, rows: int, capacity: int, x: Tensor) -> list[Tensor]:
        """What the next tokens need of those before them: the last outputs of both norms [rows, h], and the time mix's
        state [rows, n, m, m] in fp32. It has one size, whatever the capacity."""
        heads, size = self.time.heads, self.time.norm.size
        state = torch.zeros(rows, heads, size, size, dtype=torch.float32, device=x.device)
        return [x.new_zeros(rows, x.shape[-1]), x.new_zeros(rows, x.shape[-1]), state]

    def advance(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """The next tokens [rows, t, h] of each row -> the same shape. `state` takes them in, in place."""
        x, *after = self.mixed(x, *state)
        for old, new in zip(state, after, strict=True):
            old.copy_(new)
        return x


class RWKVBlock(nn.Module):
    """The stream with time mix and channel mix added.

    Over the batch a token sees those in its place of the rows before, and none of its own row, as in GPT-NeoX, which
    takes one for the other.
    """

    def __init__(self, cfg: ModelConfig, layer: int, exact: bool) -> None:
        super().__init__()
        self.layer, self.rwkv = layer, RWKVMixer(cfg, layer)
        self.over = cfg.rwkv_over or ("batch" if exact else "time")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Residual stream [b, t, h] -> the same shape."""
        if self.over == "batch":
            if context.cache is not None:
                raise ConfigError(
                    "these rwkv blocks mix the rows of a batch and not the tokens of a text (model.rwkv_over, or "
                    "neox_exact), so that no text can be continued"
                )
            return self.rwkv(x.transpose(0, 1)).transpose(0, 1)
        return self.rwkv(x) if context.cache is None else context.cache.recur(self.layer, self.rwkv, x)
