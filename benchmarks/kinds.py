"""Other kinds of layers beside plain ways to compute them.

    OMP_NUM_THREADS=1 python benchmarks/kinds.py [--rounds 5] [--tokens 2048] [--hidden 256] [--width 512] [--top-k 2]
    OMP_NUM_THREADS=1 python benchmarks/kinds.py --kind mamba [--rounds 5] [--tokens 2048] [--mamba-ssm FOLDER]
    OMP_NUM_THREADS=1 python benchmarks/kinds.py --kind rwkv [--rounds 5] [--tokens 2048] [--hidden 256]
    python benchmarks/kinds.py --json RESULTS.json --draw PICTURE.png

The last one draws what the others have added to a file by `--json`. Forward and backward pass of one layer in fp32 on
the CPU, in CPU seconds of this process; all sides take turns with the same tokens, and the median of the rounds counts.

Experts beside a loop over masks of tokens, and beside the dense MLP that computes as much for a token. The loop picks
each expert's tokens by a mask and adds its outputs up, as programs without sorting do. "One product each" is ours where
torch has no grouped product: sorted all the same, one expert after another. The floor is an MLP of `top_k` times the
width: the same products for each token, without a router, and all in one. Outputs of both mixtures must
agree.

Mamba, 4 sequences of different lengths, beside transformers' mixer with the same weights, which computes one token
after another and lets autograd keep all states, where its kernels for GPUs are not there. The floor is the mixer
without its scan. Memory is the most that tensors hold during both passes, weights and input aside. Outputs must agree.
`--mamba-ssm` is the folder of that package's source (`pip download --no-deps --no-binary :all: mamba-ssm`, unpacked):
another side is ours with its `selective_scan_ref`, which is plain torch, while the rest needs a compiler for GPUs.

RWKV-6, 4 sequences of different lengths in heads of 64, beside the same block whose scan computes one token after
another and lets autograd keep all states. The floor is the block without its scan.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import results
import torch
from torch import Tensor
from torch.nn import functional as F

from castalia.checkpoint.mamba_tensors import mamba_rules
from castalia.checkpoint.rules import to_theirs
from castalia.config.schema import ExpertsConfig, ModelConfig
from castalia.figures import panels, plain, write_picture
from castalia.model import experts
from castalia.model.experts import ExpertMLP
from castalia.model.init import seeded_tensor
from castalia.model.layers import MLP
from castalia.model.mamba import MambaMixer
from castalia.model.rwkv import MatrixScan, RWKVMixer
from castalia.storage.lazy import InMemory
from castalia.train.step_memory import PeakMemory

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


def ungrouped(mlp: ExpertMLP, x: Tensor) -> Tensor:
    """Ours without torch's grouped product."""
    held, experts.grouped_mm = experts.grouped_mm, None
    try:
        return mlp(x)
    finally:
        experts.grouped_mm = held


def turns(row: str, sides: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> list[float]:
    """Milliseconds of each side, which take turns. Those of the first one, ours, are the row of the results."""
    for compute in sides.values():
        seconds(compute, x)
    each = [[seconds(compute, x) for compute in sides.values()] for _ in range(rounds)]
    taken = list(zip(*each, strict=True))
    for number, (name, values) in enumerate(zip(sides, taken, strict=True)):
        results.record(row if number == 0 else f"{row}, {name}", values, "cpu")
    return [1000 * median(values) for values in taken]


def draw(picture: Path) -> None:
    """A panel for each kind: milliseconds over the number of experts, or over the length of 4 sequences."""
    from matplotlib.ticker import LogFormatter

    assert results.file is not None, "--draw takes the file of --json"
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for line in map(json.loads, results.file.read_text().splitlines()):
        if found := re.fullmatch(r"(?:(mamba|rwkv), )?(\d+) (experts|tokens)(?:, (.*))?", line["row"]):
            kind, size, _, side = found.groups()
            place = lines.setdefault((kind or "experts", side or "ours"), {})
            place[int(size)] = 1000 * median(line["seconds"])
    kinds = [kind for kind in ("experts", "mamba", "rwkv") if any(kind == of for of, _ in lines)]
    figure, every = panels(1, len(kinds), size=(3.4 * len(kinds), 3))
    plain(every)
    for axes, kind in zip(every, kinds, strict=True):
        for (of, side), points in lines.items():
            if of == kind:
                axes.plot(*zip(*sorted(points.items()), strict=True), marker=".", label=side)
        axes.set_xscale("log", base=2)
        sizes = sorted({size for (of, _), points in lines.items() if of == kind for size in points})
        axes.set_xticks(sizes, list(map(str, sizes)))
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_title({"experts": "experts", "mamba": "Mamba", "rwkv": "RWKV-6"}[kind])
        axes.set_xlabel("number of experts" if kind == "experts" else "tokens of each of 4 sequences")
        axes.legend(frameon=False, fontsize="small")
    every[0].set_ylabel("ms, forward and backward")
    write_picture(figure, picture)


def main() -> None:
    """Prints a line for each number of experts, or for each length of a sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("experts", "mamba", "rwkv"), default="experts")
    for name, default in {"rounds": 5, "tokens": 2048, "hidden": 256, "width": 512, "top-k": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mamba-ssm", type=Path, metavar="FOLDER")
    parser.add_argument("--draw", type=Path, metavar="PICTURE")
    results.option(parser)
    given = parser.parse_args()
    if given.draw:
        draw(given.draw)
        return
    torch.manual_seed(0)
    {"mamba": mamba, "rwkv": rwkv, "experts": experts_beside_masks}[given.kind](given)


def without_scan(mixer: MambaMixer, x: Tensor) -> Tensor:
    """All of a mixer but its scan: what else a token costs."""
    u = F.silu(mixer.conv(F.pad(mixer.in_x(x), (0, 0, mixer.conv.taps - 1, 0))))
    step = mixer.dt_proj(mixer.x_proj(u)[..., : mixer.rank])
    return mixer.out((u + step) * F.silu(mixer.in_z(x)))


def reference_scan(source: Path) -> Callable[..., Tensor]:
    """`selective_scan_ref` of mamba-ssm's source. The module that it stands in wants kernels that were compiled."""
    import einops

    path = source / "mamba_ssm" / "ops" / "selective_scan_interface.py"
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    wanted = next(node for node in functions if node.name == "selective_scan_ref")
    names: dict[str, Any] = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    exec(compile(ast.Module([wanted], []), str(path), "exec"), names)
    return names[wanted.name]


def scanned_by(scan: Callable[..., Tensor], mixer: MambaMixer, x: Tensor) -> Tensor:
    """The mixer with another scan, which also applies the gate."""
    u = F.silu(mixer.conv(F.pad(mixer.in_x(x), (0, 0, mixer.conv.taps - 1, 0))))
    rank, own = mixer.rank, mixer.scan
    mixed, states = mixer.x_proj(u), own.a_log.shape[1]
    step, inputs, outputs = mixer.dt_proj(mixed[..., :rank]), *mixed[..., rank:].split(states, dim=-1)
    given = (part.transpose(1, 2) for part in (inputs, outputs))
    gate = mixer.in_z(x).transpose(1, 2)
    options = {"D": own.d, "z": gate, "delta_bias": own.dt_bias, "delta_softplus": True}
    y = scan(u.transpose(1, 2), step.transpose(1, 2), -own.a_log.exp(), *given, **options)
    return mixer.out(y.transpose(1, 2))


def peak_bytes(compute: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The most bytes that tensors hold beside what there was, in one forward and backward pass."""
    rows = x.clone().requires_grad_()
    with PeakMemory(torch.device("cpu")) as peak:
        compute(rows).square().mean().backward()
    return peak.bytes


def mamba(given: argparse.Namespace) -> None:
    """Prints a line for each length of 4 sequences, up to `tokens` in all."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as TheirMixer

    cfg = ModelConfig(num_layers=1, hidden_size=given.hidden, num_heads=1, pattern=("mamba",), init_std=0.05)
    mixer = MambaMixer(cfg)
    for name, parameter in mixer.named_parameters():
        parameter.data.copy_(seeded_tensor(cfg, 0, f"blocks.0.mamba.{name}", parameter.shape))
    theirs = TheirMixer(MambaConfig(hidden_size=given.hidden, num_hidden_layers=1), layer_idx=0)
    ours = {f"blocks.0.mamba.{name}": InMemory(value.data) for name, value in mixer.named_parameters()}
    rules = [rule.at(i=0) for rule in mamba_rules(cfg, "")]
    theirs.load_state_dict({name: refs[0].read() for name, refs in to_theirs(rules, ours).items()})
    others: dict[str, Callable[[Tensor], Tensor]] = {"transformers": theirs}
    if given.mamba_ssm:
        others["mamba-ssm's reference"] = partial(scanned_by, reference_scan(given.mamba_ssm), mixer)
    sides = {"ours": mixer, **others, "floor": partial(without_scan, mixer)}
    print("| length | " + " | ".join(f"{name}, ms" for name in sides) + " | of the floor | ", end="")
    print(" | ".join(f"{name}, MB" for name in ("ours", *others)) + " |\n|" + "---|" * (2 * len(sides) + 1))
    length = 64
    while 4 * length <= given.tokens:
        x = torch.randn(4, length, given.hidden)
        with torch.no_grad():
            for other in others.values():
                assert (mixer(x) - other(x)).abs().max() < 1e-4
        taken = turns(f"mamba, {length} tokens", sides, x, given.rounds)
        memory = [peak_bytes(sides[name], x) / 1e6 for name in ("ours", *others)]
        cells = [
            *(f"{value:.1f}" for value in taken),
            f"{taken[-1] / taken[0]:.0%}",
            *(f"{size:.1f}" for size in memory),
        ]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)
        length *= 2


def one_by_one(r: Tensor, k: Tensor, v: Tensor, logs: Tensor, bonus: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV's recurrence, one token after another."""
    outs = []
    for t in range(r.shape[1]):
        product = k[:, t, :, :, None] * v[:, t, :, None]
        outs.append((r[:, t, :, None] @ (state + bonus[..., None] * product))[:, :, 0])
        state = logs[:, t].exp()[..., None] * state + product
    return torch.stack(outs, dim=1), state


def rwkv(given: argparse.Namespace) -> None:
    """Prints a line for each length of 4 sequences, up to `tokens` in all."""
    cfg = ModelConfig(num_layers=2, hidden_size=given.hidden, num_heads=given.hidden // 64, pattern=("rwkv",))
    mixer = RWKVMixer(cfg, 1)
    for name, parameter in mixer.named_parameters():
        parameter.data.copy_(seeded_tensor(cfg, 0, f"blocks.1.rwkv.{name}", parameter.shape))
    scan = MatrixScan.apply

    def by(recurrence: Callable, rows: Tensor) -> Tensor:
        """The block with another recurrence."""
        MatrixScan.apply = recurrence
        try:
            return mixer(rows)
        finally:
            MatrixScan.apply = scan

    sides = {
        "ours": mixer,
        "one by one": lambda rows: by(one_by_one, rows),
        "floor": lambda rows: by(lambda r, k, v, logs, bonus, state: (r + k + v + logs, state), rows),
    }
    print("length  ours, ms  one by one, ms  floor, ms  of the floor  ours, MB  one by one, MB")
    length = 64
    while 4 * length <= given.tokens:
        x = torch.randn(4, length, given.hidden)
        with torch.no_grad():
            assert (mixer(x) - sides["one by one"](x)).abs().max() < 1e-4
        taken, slow, floor = turns(f"rwkv, {length} tokens", sides, x, given.rounds)
        mine, others = (peak_bytes(sides[name], x) / 1e6 for name in ("ours", "one by one"))
        print(
            f"{length:6}  {taken:8.1f}  {slow:14.1f}  {floor:9.1f}  {floor / taken:12.0%}  {mine:8.1f}  {others:14.1f}"
        )
        length *= 2


def experts_beside_masks(given: argparse.Namespace) -> None:
    """Prints a line for each number of experts."""
    x = torch.randn(given.tokens, given.hidden)
    print("experts  sorted, ms  by masks, ms  one product each, ms  dense of equal work, ms  of the floor")
    for count in COUNTS:
        shape = {"num_layers": 1, "hidden_size": given.hidden, "num_heads": 1, "mlp_bias": False}
        wanted = ExpertsConfig(count=count, top_k=given.top_k, width=given.width)
        mixture = ExpertMLP(ModelConfig(**shape, experts=wanted))
        dense = MLP(ModelConfig(**shape, mlp_size=given.top_k * given.width))
        for parameter in (*mixture.parameters(), *dense.parameters()):
            parameter.data.normal_(std=0.05)
        assert (mixture(x) - by_masks(mixture, x)).abs().max() < 1e-4
        sides = {
            "sorted": mixture,
            "by masks": lambda rows, mlp=mixture: by_masks(mlp, rows),
            "one product each": lambda rows, mlp=mixture: ungrouped(mlp, rows),
            "floor": dense,
        }
        ours, masks, loop, floor = turns(f"{count} experts", sides, x, given.rounds)
        print(f"{count:7}  {ours:10.1f}  {masks:12.1f}  {loop:20.1f}  {floor:23.1f}  {floor / ours:12.0%}")


if __name__ == "__main__":
    main()
