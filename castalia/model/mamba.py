"""Mamba (2312.00752): a block whose tokens meet in a state that is kept, forgotten and read as each token chooses.

Shapes: b rows, t tokens, h hidden size, d inner width, n states of a channel, r rank of the steps, k taps of the
convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from castalia.config.scan_chunks import CHUNK_VALUES
from castalia.config.schema import ModelConfig
from castalia.model.attention import Context
from castalia.model.layers import Linear
from castalia.model.norms import build_norm


class MambaMixer(nn.Module):
    """out(scan(silu(conv(in_x x))) * silu(in_z x)); the scan's steps, inputs and outputs follow from its input."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        sizes, h, d, self.rank = cfg.mamba_sizes, cfg.hidden_size, cfg.mamba_width, cfg.mamba_rank
        self.width = d  # on this rank
        self.in_x, self.in_z = Linear(h, d, sizes.linear_bias), Linear(h, d, sizes.linear_bias)
        self.conv = Convolution(d, sizes.taps, sizes.conv_bias)
        self.x_proj = Linear(d, self.rank + 2 * sizes.states, sizes.linear_bias)
        self.dt_proj = Linear(self.rank, d, bias=False)  # its bias is the scan's, in fp32
        self.scan = SelectiveScan(d, sizes.states)
        self.out = Linear(d, h, sizes.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Whole sequences [b, t, h] -> the same shape."""
        inner = self.in_x(x)  # [b, t, d]
        return self.mixed(F.pad(inner, (0, 0, self.conv.taps - 1, 0)), self.in_z(x), None)[0]

    def mixed(self, padded: Tensor, z: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output [b, t, h], and the state [b, d, n] after it.

        `padded` [b, k - 1 + t, d] are the tokens with those before them, `state` is None at the beginning.
        """
        u = F.silu(self.conv(padded)).to(z.dtype)  # [b, t, d]
        step, inputs, outputs = self.x_proj(u).split([self.rank, *2 * [self.scan.a_log.shape[1]]], dim=-1)
        y, state = self.scan(self.dt_proj(step), u, inputs, outputs, state)
        return self.out(y * F.silu(z)), state

    def new_state(self, rows: int, capacity: int, x: Tensor) -> list[Tensor]:
        """What the next tokens need of those before them: the convolution's last inputs [rows, k - 1, d], and the
        scan's state [rows, d, n] in fp32. It has one size, whatever the capacity."""
        last = x.new_zeros(rows, self.conv.taps - 1, self.width)
        states = self.scan.a_log.shape[1]
        return [last, torch.zeros(rows, self.width, states, dtype=torch.float32, device=x.device)]

    def advance(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """The next tokens [rows, t, h] of each row -> the same shape. `state` takes them in, in place."""
        last, values = state
        padded = torch.cat((last, self.in_x(x)), dim=1)
        out, after = self.mixed(padded, self.in_z(x), values)
        last.copy_(padded[:, padded.shape[1] - last.shape[1] :])
        values.copy_(after)
        return out


class Convolution(nn.Module):
    """A causal convolution of each channel by itself, computed in fp32."""

    def __init__(self, width: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(width, taps))  # the last tap is the token's own
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, padded: Tensor) -> Tensor:
        """[b, k - 1 + t, d] -> [b, t, d] in fp32."""
        length = padded.shape[1] - self.taps + 1
        weight = self.weight.to(padded.dtype).float()  # [d, k]
        parts = (padded[:, tap : tap + length] * weight[:, tap] for tap in range(self.taps))
        total = sum(parts, start=next(parts))
        return total if self.bias is None else total + self.bias.to(padded.dtype).float()


class SelectiveScan(nn.Module):
    """y_t = S_t c_t + d x_t with S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t, a = -exp(a_log), dt = softplus(step + bias).

    Parameters and states are fp32, whatever the activations are: small steps and slow decays have no room in 16 bits.
    """

    stays_fp32 = True

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.a_log = nn.Parameter(torch.empty(width, states))
        self.d = nn.Parameter(torch.empty(width))
        self.dt_bias = nn.Parameter(torch.empty(width))

    def forward(
        self, step: Tensor, x: Tensor, inputs: Tensor, outputs: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Steps and x [b, t, d], inputs b and outputs c [b, t, n] -> y [b, t, d] like x, the last state [b, d, n]."""
        if state is None:
            state = x.new_zeros(len(x), *self.a_log.shape, dtype=torch.float32)
        wide = step.float() + self.dt_bias.float()
        y, state = Scan.apply(wide, x.float(), -self.a_log.float().exp(), inputs.float(), outputs.float(), state)
        return (y + x * self.d.float()).to(x.dtype), state


class Scan(torch.autograd.Function):
    """The recurrence in chunks of the sequence. For the backward pass it keeps its inputs and the state before each
    chunk, and computes the states of one chunk at a time again."""

    @staticmethod
    def forward(
        ctx: Any, step: Tensor, x: Tensor, a: Tensor, inputs: Tensor, outputs: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Steps before softplus and x [b, t, d], a [d, n], inputs and outputs [b, t, n], first state [b, d, n]; all
        fp32 -> y [b, t, d], last state [b, d, n], which has no gradient."""
        b, t, d = x.shape
        size = max(1, CHUNK_VALUES.get(x.device.type, CHUNK_VALUES["cuda"]) // (b * d * a.shape[1]))
        firsts, ys = [], []
        for begin in range(0, t, size):
            firsts.append(state)
            part = slice(begin, begin + size)
            dt = softplus(step[:, part]).transpose(0, 1)  # [c, b, d]
            states = chunk_states(dt, x[:, part].transpose(0, 1), a, inputs[:, part].transpose(0, 1), state)[1]
            ys.append(states @ outputs[:, part].transpose(0, 1)[..., None])  # [c, b, d, 1]
            state = states[-1].clone()
            del states  # before the next chunk makes its own
        ctx.size = size
        ctx.save_for_backward(step, x, a, inputs, outputs, *firsts)
        ctx.mark_non_differentiable(state)
        return torch.cat(ys)[..., 0].transpose(0, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs but the first state."""
        step, x, a, inputs, outputs, *firsts = ctx.saved_tensors
        d_step, d_x, d_a = torch.empty_like(step), torch.empty_like(x), torch.zeros_like(a)
        d_inputs, d_outputs = torch.empty_like(inputs), torch.empty_like(outputs)
        from_later = torch.zeros_like(firsts[0])  # what later chunks say of the gradient of the last state
        for number in reversed(range(len(firsts))):
            part = slice(number * ctx.size, (number + 1) * ctx.size)
            first, raw = firsts[number], step[:, part].transpose(0, 1)
            xs, bs, cs, gradient = (v[:, part].transpose(0, 1) for v in (x, inputs, outputs, d_y))
            dt = softplus(raw)
            decay, states = chunk_states(dt, xs, a, bs, first)
            d_outputs[:, part] = (gradient[:, :, None] @ states)[:, :, 0].transpose(0, 1)
            d_states = gradient[..., None] * cs[:, :, None]  # [c, b, d, n]
            d_states[-1] += from_later
            backward_through(decay, d_states)
            from_later = decay[0] * d_states[0]
            # What enters the state is dt x b; what stays of it is decay = exp(dt a) times the state before.
            d_entering = (d_states @ bs[..., None])[..., 0]  # [c, b, d]
            d_inputs[:, part] = ((dt * xs)[:, :, None] @ d_states)[:, :, 0].transpose(0, 1)
            d_exponent = d_states.mul_(decay)
            d_exponent[1:] *= states[:-1]
            d_exponent[0] *= first
            d_a += (d_exponent * dt[..., None]).sum(dim=(0, 1))
            d_dt = d_entering * xs + (d_exponent * a).sum(dim=-1)
            d_step[:, part] = (d_dt * raw.sigmoid()).transpose(0, 1)
            d_x[:, part] = (d_entering * dt).transpose(0, 1)
            del decay, states, d_states, d_exponent  # before the next chunk makes its own
        return d_step, d_x, d_a, d_inputs, d_outputs, None


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x)."""
    return -F.logsigmoid(-x)


def chunk_states(dt: Tensor, x: Tensor, a: Tensor, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of a chunk, [c, b, d, n] each: dt and x [c, b, d], a [d, n], inputs [c, b, n], the state
    before [b, d, n]."""
    decay = (dt[..., None] * a).exp_()
    states = (dt * x)[..., None] * inputs[:, :, None]
    states[0] += decay[0] * state
    if one_by_one(states):
        for i in range(1, len(states)):
            states[i].addcmul_(decay[i], states[i - 1])
    else:
        doubled(decay.clone(), states)
    return decay, states


def one_by_one(states: Tensor) -> bool:
    """Whether the tokens of a chunk follow one another in a loop: it computes least, but starts a kernel for each."""
    return states.device.type == "cpu"


def backward_through(decay: Tensor, d_states: Tensor) -> None:
    """Adds to the gradient of each state of a chunk what later states say of it, in place: [c, b, d, n] each."""
    if not one_by_one(d_states):
        # State i takes from state i + 1, so the chunk is run from its end, with the decays one place on.
        turned = d_states.flip(0)
        doubled(torch.cat((torch.zeros_like(decay[:1]), decay[1:].flip(0))), turned)
        d_states.copy_(turned.flip(0))
        return
    for i in reversed(range(len(d_states) - 1)):
        d_states[i].addcmul_(decay[i + 1], d_states[i + 1])


def doubled(decay: Tensor, values: Tensor) -> None:
    """values[i] += decay[i] values[i - 1], in place and in a logarithm of the steps (Hillis and Steele, 1986), each of
    which takes what lies twice as far away as before. It uses `decay` up."""
    reach = 1
    while reach < len(values):
        values[reach:] += decay[reach:] * values[:-reach]
        decay[reach:] = decay[reach:] * decay[:-reach]
        reach *= 2


class MambaBlock(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.norm1, self.mamba = layer, build_norm(cfg), MambaMixer(cfg)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Residual stream [b, t, h] -> the same shape."""
        normed = self.norm1(x)
        mixed = self.mamba(normed) if context.cache is None else context.cache.recur(self.layer, self.mamba, normed)
        return x + mixed
