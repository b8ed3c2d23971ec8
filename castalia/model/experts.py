"""A mixture of experts: a router chooses a few of many MLPs for each token, and no token is left out.

Tokens are sorted by expert, so that each expert computes one product of all its tokens, however many they are. Shapes:
m tokens, e experts, k chosen experts of a token, f width of an expert, h hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.model.layers import ACTIVATIONS, MLP, Linear, is_slow_half

SINKHORN_STEPS, SINKHORN_TOLERANCE, SINKHORN_EPSILON = 3, 1e-4, 1e-8
# Since torch 2.10.
grouped_mm: Any = getattr(F, "grouped_mm", None)


class Router(nn.Module):
    """Chooses the experts of each token and their shares. It computes in fp32, whatever the activations are."""

    def __init__(self, cfg: ModelConfig, exact: bool) -> None:
        super().__init__()
        assert cfg.experts is not None
        self.cfg, self.stop = cfg.experts, sinkhorn_stop(cfg.experts, exact)
        self.weight = nn.Parameter(torch.empty(cfg.experts.count, cfg.hidden_size))
        self.balance = Balance(cfg.experts.count) if cfg.experts.router == "balanced" else None

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [m, h] and the weight [e, h] -> shares [m, k] in fp32, and the numbers of the chosen experts [m, k].

        Shares are the router's scores, which add up to 1 only where they are divided by their sum.
        """
        # As in GPT-NeoX, the model has a 16-bit weight, and computes in fp32 with it; so do models that hold it so.
        wide, weight, k = x.float(), weight.to(x.dtype).float(), self.cfg.top_k
        if self.training and self.cfg.jitter and self.cfg.router == "topk":
            noise = torch.empty_like(wide).uniform_(1 - self.cfg.jitter, 1 + self.cfg.jitter)
            wide = wide * noise
        logits = F.linear(wide, weight)  # [m, e]
        one = self.cfg.router == "sinkhorn" and k == 1
        scores = logits.sigmoid() if one or self.balance is not None else logits.softmax(dim=-1)
        wanted = scores  # by which experts are chosen; no gradient comes from the choice
        if self.balance is not None:
            wanted = self.balance(scores.detach())
        elif self.training and self.cfg.router == "sinkhorn":
            wanted = balanced(logits, self.stop)
        chosen = wanted.topk(k, dim=-1).indices
        shares = scores.gather(1, chosen)
        if self.cfg.divides_shares:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        return shares * self.cfg.routed_scale, chosen


class Balance(nn.Module):
    """What is added to each expert's score where experts are chosen, but not to its share (2408.15664).

    No gradient changes it: after each step it grows a little for experts that had fewer tokens than the mean, and
    shrinks for the others.
    """

    stays_fp32 = True

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(count), requires_grad=False)

    def forward(self, scores: Tensor) -> Tensor:
        """[m, e] -> [m, e]."""
        return scores + self.bias


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

    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """up, gate and down of the experts that this rank holds."""
        return self.up, self.gate, self.down

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows [r, h] that are sorted by expert, `counts` of them for each of those held -> their outputs [r, h]."""
        up, gate, down = self.matrices()
        inner = grouped(x, up.transpose(1, 2), counts)  # [r, f]
        if gate is None:
            inner = self.activation(inner)
        else:
            inner = self.activation(grouped(x, gate.transpose(1, 2), counts)) * inner
        return grouped(inner, down, counts)


def grouped(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times its own matrix, in the dtype of x: [r, in], [e, in, out], counts [e] -> [r, out]."""
    if is_slow_half(x):
        return grouped(x.float(), matrices.float(), counts).half()
    matrices = matrices.to(x.dtype)
    # Rows of all operands must be whole 16 bytes; on GPUs there is a kernel for bf16 alone.
    aligned = all(size * x.itemsize % 16 == 0 for size in matrices.shape[1:])
    if grouped_mm is not None and aligned and (x.device.type == "cpu" or (x.is_cuda and x.dtype == torch.bfloat16)):
        return grouped_mm(x, matrices, offs=counts.cumsum(0).int())
    sizes = counts.tolist()  # a GPU is waited for here
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(sizes), matrices, strict=True)])


class ExpertMLP(nn.Module):
    """Router and experts in place of a block's MLP: the sum of the chosen experts' outputs times their shares.

    A shared expert computes every token besides, times a sigmoid of the token where there is a `shared_gate`.

    `load` [e] counts the tokens of each expert in the training passes since someone set it to None; where activations
    are computed again in the backward pass, it counts them again.
    """

    load: Tensor | None = None
    held: slice | None = None  # of several ranks that route the same tokens: which experts this one computes; None: all
    apart = False  # of several rows with one token each, each by itself: together, products of an expert add otherwise

    def __init__(self, cfg: ModelConfig, exact: bool = False) -> None:
        super().__init__()
        assert cfg.experts is not None
        self.router, self.experts = Router(cfg, exact), Experts(cfg)
        self.shared = MLP(cfg.shared_mlp) if cfg.experts.shared_width else None
        gated = self.shared is not None and cfg.experts.shared_gate
        self.shared_gate = Linear(cfg.hidden_size, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> the same shape."""
        if self.apart and len(x) > 1 and x.shape[1] == 1:  # [rows, 1, h]
            return torch.cat([self(row) for row in x.split(1)])
        out = self.mixed(x, self.router.weight)
        return out if self.shared is None else out + self.gated(self.shared(x), x)

    def gated(self, out: Tensor, x: Tensor) -> Tensor:
        """The shared expert's output [..., h] times its gate."""
        return out if self.shared_gate is None else out * self.shared_gate(x).sigmoid()

    def mixed(self, x: Tensor, router: Tensor) -> Tensor:
        """What the chosen experts give of the output [..., h], of those that are held; `router` is its weight [e, h].

        Without a shared expert it is the whole output.
        """
        rows = x.reshape(-1, x.shape[-1])  # [m, h]
        shares, chosen = self.router(rows, router)  # [m, k]
        k, chosen = chosen.shape[1], chosen.flatten()
        by_expert = chosen.argsort(stable=True)  # [m k]: places in `chosen`, sorted by expert
        counts = chosen.bincount(minlength=len(router))  # [e]
        if self.training:
            self.load = counts if self.load is None else self.load + counts
        if self.held is not None:
            begin, stop = counts[: self.held.start].sum(), counts[: self.held.stop].sum()
            by_expert, counts = by_expert[int(begin) : int(stop)], counts[self.held]
        out = self.computed(rows[by_expert // k], counts)
        # As in GPT-NeoX the product with the share is rounded, and the sum over experts is one of rounded values.
        out = (out.float() * shares.flatten()[by_expert, None]).to(x.dtype)
        whole = out.new_zeros(len(chosen), x.shape[-1]).index_copy(0, by_expert, out)  # [m k, h], by token again
        return whole.view(-1, k, x.shape[-1]).sum(dim=1).view(x.shape)

    def computed(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows [r, h] that are sorted by expert, `counts` [e] of them for each -> their experts' outputs [r, h]."""
        return self.experts(rows, counts)
