"""A mixture of experts: a router chooses a few of many MLPs for each token, and no token is left out.

Tokens are sorted by expert, so that each expert computes one product of all its tokens, however many they are. Shapes:
m tokens, e experts, k chosen experts of a token, f width of an expert, h hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.model.layers import ACTIVATIONS, is_slow_half

SINKHORN_STEPS, SINKHORN_TOLERANCE, SINKHORN_EPSILON = 3, 1e-4, 1e-8
# torch has grouped products since 2.10; their kernel for GPUs takes bf16 alone.
grouped_mm: Any = getattr(F, "grouped_mm", None)


class Router(nn.Module):
    """Chooses the experts of each token and their shares. It computes in fp32, whatever the activations are."""

    def __init__(self, cfg: ModelConfig, exact: bool) -> None:
        super().__init__()
        assert cfg.experts is not None
        self.cfg, self.stop = cfg.experts, sinkhorn_stop(cfg.experts, exact)
        self.weight = nn.Parameter(torch.empty(cfg.experts.count, cfg.hidden_size))

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [m, h] and the weight [e, h] -> shares [m, k] in fp32, and the numbers of the chosen experts [m, k].

        Shares are the router's scores as they are: those of one token do not add up to 1.
        """
        # As in GPT-NeoX, the model has a 16-bit weight, and computes in fp32 with it; so do models that hold it so.
        wide, weight, k = x.float(), weight.to(x.dtype).float(), self.cfg.top_k
        if self.training and self.cfg.jitter:
            noise = torch.empty_like(wide).uniform_(1 - self.cfg.jitter, 1 + self.cfg.jitter)
            wide = wide * noise
        logits = F.linear(wide, weight)  # [m, e]
        one = self.cfg.router == "sinkhorn" and k == 1
        scores = logits.sigmoid() if one else logits.softmax(dim=-1)
        if not (self.training and self.cfg.router == "sinkhorn"):
            shares, chosen = scores.topk(k, dim=-1)
            return shares, chosen
        chosen = balanced(logits, self.stop).topk(k, dim=-1).indices
        return scores.gather(1, chosen), chosen


def sinkhorn_stop(cfg: ExpertsConfig, exact: bool) -> str:
    """When Sinkhorn's iterations end, where `experts.sinkhorn_stop` may be None."""
    return cfg.sinkhorn_stop or ("absolute" if exact else "relative")


@torch.no_grad()
def balanced(logits: Tensor, stop: str) -> Tensor:
    """The exponentials [m, e] of the logits, rows and columns scaled towards equal sums (Sinkhorn, 1967); no gradients.

    As in GPT-NeoX's `megatron/model/router.py`, with at most three iterations and without waiting for the device. They
    end when the columns' factors change little: by less than the tolerance of their own size (`relative`), of 1, though
    they are about 1 / (e m) (`absolute`), or, with the test the wrong way round, by more than it (`inverted`).
    """
    costs = logits.exp()
    m, e = costs.shape
    columns = 1 / (e * costs.sum(dim=0))  # [e]
    rows = torch.ones_like(costs[:, 0])  # [m]
    ended = torch.zeros_like(rows[0], dtype=torch.bool)
    for _ in range(SINKHORN_STEPS):
        new_rows = 1 / m / (costs @ columns + SINKHORN_EPSILON)
        new_columns = 1 / e / (costs.T @ new_rows + SINKHORN_EPSILON)
        change = (columns - new_columns).abs().mean()
        rows, columns = rows.where(ended, new_rows), columns.where(ended, new_columns)
        match stop:
            case "relative":
                ends = change < SINKHORN_TOLERANCE * new_columns.mean()
            case "absolute":
                ends = change < SINKHORN_TOLERANCE
            case _:
                ends = change > SINKHORN_TOLERANCE
        ended = ended | ends
    return rows[:, None] * costs * columns


class Experts(nn.Module):
    """The matrices of all experts of a block, [e, f, h] each: `up` and `gate` map from h to f, `down` from f to h."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        assert cfg.experts is not None
        shape = (cfg.experts.count, cfg.expert_width, cfg.hidden_size)
        self.up = nn.Parameter(torch.empty(shape))
        self.gate = nn.Parameter(torch.empty(shape)) if cfg.experts.gated else None
        self.down = nn.Parameter(torch.empty(shape))
        self.activation = ACTIVATIONS[cfg.activation]

    @property
    def held(self) -> Held:
        """The matrices, of which a tensor rank holds those of some experts."""
        return Held(0, self.up, self.gate, self.down)

    def forward(self, x: Tensor, counts: Tensor, held: Held) -> Tensor:
        """Rows [r, h] that are sorted by expert, `counts` of them for each of those held -> their outputs [r, h]."""
        inner = grouped(x, held.up.transpose(1, 2), counts)  # [r, f]
        if held.gate is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(grouped(x, held.gate.transpose(1, 2), counts)) * inner
        return grouped(inner, held.down, counts)


class Held(NamedTuple):
    """The matrices of consecutive experts, the first of which has the number `first`."""

    first: int
    up: Tensor
    gate: Tensor | None
    down: Tensor


def grouped(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times its own matrix, in the dtype of x: [r, in], [e, in, out], counts [e] -> [r, out]."""
    matrices = matrices.to(x.dtype)
    aligned = x.shape[-1] % 8 == 0 and matrices.shape[-1] % 8 == 0  # the kernel takes rows of whole 16 bytes
    if grouped_mm is not None and x.is_cuda and x.dtype == torch.bfloat16 and aligned:
        return grouped_mm(x, matrices, offs=counts.cumsum(0).int())
    if is_slow_half(x):
        return grouped(x.float(), matrices.float(), counts).half()
    sizes = counts.tolist()  # a GPU is waited for here
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(sizes), matrices, strict=True)])


class ExpertMLP(nn.Module):
    """Router and experts in place of a block's MLP: the sum of the chosen experts' outputs times their shares.

    `load` [e] counts the tokens of each expert in the training passes since someone set it to None; where activations
    are computed again in the backward pass, it counts them again.
    """

    load: Tensor | None = None
    apart = False  # of several rows with one token each, each by itself: together, products of an expert add otherwise

    def __init__(self, cfg: ModelConfig, exact: bool = False) -> None:
        super().__init__()
        self.router, self.experts = Router(cfg, exact), Experts(cfg)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> the same shape."""
        if self.apart and len(x) > 1 and x.shape[1] == 1:  # [rows, 1, h]
            return torch.cat([self(row) for row in x.split(1)])
        return self.mixed(x, self.router.weight, self.experts.held)

    def mixed(self, x: Tensor, router: Tensor, held: Held) -> Tensor:
        """The part of the output [..., h] that comes from the experts that are held; `router` is its weight [e, h]."""
        rows = x.reshape(-1, x.shape[-1])  # [m, h]
        shares, chosen = self.router(rows, router)  # [m, k]
        k, chosen = chosen.shape[1], chosen.flatten()
        by_expert = chosen.argsort(stable=True)  # [m k]: places in `chosen`, sorted by expert
        counts = chosen.bincount(minlength=len(router))  # [e]
        if self.training:
            self.load = counts if self.load is None else self.load + counts
        if len(held.up) < len(router):
            begin, stop = counts[: held.first].sum(), counts[: held.first + len(held.up)].sum()
            by_expert, counts = by_expert[int(begin) : int(stop)], counts[held.first :][: len(held.up)]
        out = self.experts(rows[by_expert // k], counts, held)
        # As in GPT-NeoX the product with the share is rounded, and the sum over experts is one of rounded values.
        out = (out.float() * shares.flatten()[by_expert, None]).to(x.dtype)
        whole = out.new_zeros(len(chosen), x.shape[-1]).index_copy(0, by_expert, out)  # [m k, h], by token again
        return whole.view(-1, k, x.shape[-1]).sum(dim=1).view(x.shape)
