"""A mixture of experts beside a loop over masks of tokens, and beside the dense MLP that computes as much for a token.

    OMP_NUM_THREADS=1 python benchmarks/kinds.py [--rounds 5] [--tokens 2048] [--hidden 256] [--width 512] [--top-k 2]

Forward and backward pass of one layer in fp32 on the CPU, in CPU seconds of this process; all sides take turns with the
same tokens, and the median of the rounds counts. The loop picks each expert's tokens by a mask and adds its outputs up,
as programs without sorting do. The floor is an MLP of `top_k` times the width: the same products for each token,
without a router, and all in one. Outputs of both mixtures must agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.model.experts import ExpertMLP
from castalia.model.layers import MLP

COUNTS = (4, 8, 16, 32, 64)


def by_masks(mlp: ExpertMLP, x: Tensor) -> Tensor:
    """Each expert in turn: its tokens by a mask, its output added to theirs."""
    shares, chosen = mlp.router(x, mlp.router.weight)
    experts, out = mlp.experts, torch.zeros_like(x)
    for number in range(len(experts.up)):
        rows, places = (chosen == number).nonzero(as_tuple=True)
        inner = experts.activation(x[rows] @ experts.up[number].T) @ experts.down[number]
        out = out.index_add(0, rows, inner * shares[rows, places, None])
    return out


def seconds(compute: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """CPU seconds of one forward and backward pass."""
    rows, begin = x.clone().requires_grad_(), time.process_time()
    compute(rows).square().mean().backward()
    return time.process_time() - begin


def main() -> None:
    """Prints a line for each number of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rounds": 5, "tokens": 2048, "hidden": 256, "width": 512, "top-k": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(given.tokens, given.hidden)
    print("experts  sorted, ms  by masks, ms  dense of equal work, ms  of the floor")
    for count in COUNTS:
        shape = {"num_layers": 1, "hidden_size": given.hidden, "num_heads": 1, "mlp_bias": False}
        experts = ExpertsConfig(count=count, top_k=given.top_k, width=given.width)
        mixture = ExpertMLP(ModelConfig(**shape, experts=experts))
        dense = MLP(ModelConfig(**shape, mlp_size=given.top_k * given.width))
        for parameter in (*mixture.parameters(), *dense.parameters()):
            parameter.data.normal_(std=0.05)
        assert (mixture(x) - by_masks(mixture, x)).abs().max() < 1e-4
        sides = {"sorted": mixture, "masks": lambda rows, mlp=mixture: by_masks(mlp, rows), "dense": dense}
        for compute in sides.values():
            seconds(compute, x)
        rounds = [{name: seconds(compute, x) for name, compute in sides.items()} for _ in range(given.rounds)]
        ours, masks, floor = (1000 * median(each[name] for each in rounds) for name in sides)
        print(f"{count:7}  {ours:10.1f}  {masks:12.1f}  {floor:23.1f}  {floor / ours:12.0%}")


if __name__ == "__main__":
    main()
