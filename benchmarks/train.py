"""Training steps side by side: ours against transformers' GPTNeoXForCausalLM and litgpt's GPT with fused AdamW.

    python benchmarks/train.py [--model pythia-14m] [--batch 4] [--seq 512] [--precision bf16 ...]
                               [--allocator same ...] [--peers "transformers, compiled" ...] [--rounds 7]
                               [--recompute] [--cpu-time] [--quick]

Each side runs in a process of its own, and they take turns step by step, so that all meet the same machine. All start
from the same weights, see the same batches, clip at 1.0 and must report the same losses. litgpt takes part where it can
be imported. Allocator `default` is what a user of each side gets; `same` gives all sides the setting that `castalia
train` makes. "castalia, auto" and its like are ours with that policy of recomputation; `auto` lacks half of the memory
that `full` frees. The floor is the model's operations over the machine's matmul rate; memory is what tensors hold at
most, parameters and optimizer state included, beside the sum of `castalia plan`. On a machine that is busy with other
work `--cpu-time` takes one thread for each side and counts the seconds that it computes instead of those that pass.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import results

from castalia.config.batch import BatchPlan
from castalia.config.load import load_config
from castalia.config.schema import ModelConfig
from castalia.data.loader import Batch
from castalia.plan.count import count
from castalia.plan.flops import training_flops
from castalia.plan.layout import Layout
from castalia.plan.memory import Compute, Rank
from castalia.plan.recompute import choose_blocks, ranks_of

# Largest relative difference of losses: fp32 sums in another order; bf16 rounds every activation.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
ALLOCATORS = ("default", "same")
POLICIES = ("selective", "full", "auto")  # of recomputation
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Work:
    model: ModelConfig
    batch: int
    seq: int
    precision: str
    allocator: str
    recompute: str = "none"  # peers know "full" alone: blocks keep their inputs
    compiled: bool = False  # the peers' model
    cpu_time: bool = False  # of one thread, instead of wall clock

    def rank(self) -> Rank:
        """What is planned of our side. With "auto", half of what "full" frees is missing."""
        compute, layout = Compute(self.precision, "cpu"), Layout(micro_batch=self.batch, recompute=self.recompute)
        (rank,) = ranks_of(self.model, layout, self.seq, compute)
        ends = [choose_blocks(rank, usable).memory().total for usable in (0, 10**18)]
        return choose_blocks(rank, sum(ends) // 2)


def batch_of(step: int, work: Work) -> Batch:
    """Random tokens; the last of each row predicts nothing, as transformers has it."""
    tokens = np.random.default_rng(step).integers(0, work.model.vocab_size, (work.batch, work.seq))
    labels = np.concatenate([tokens[:, 1:], np.full((work.batch, 1), -100)], axis=1)
    return Batch(tokens, labels, labels != -100)


def our_model(work: Work, **options):
    from castalia.model.init import initialize
    from castalia.model.transformer import Transformer

    model = Transformer(work.model, **options)
    initialize(model, work.model, seed=1)
    return model


def ours(work: Work) -> Callable[[int], float]:
    """A step as `castalia train` takes it."""
    from castalia.config.schema import OptimizerConfig
    from castalia.machine import keep_freed_memory
    from castalia.parallel.activation_checkpointing import apply_activation_checkpointing, compute_again
    from castalia.parallel.executor import Executor
    from castalia.train.hardware import DTYPES
    from castalia.train.optimizer import make_optimizer
    from castalia.train.schedule import LearningRate
    from castalia.train.step import TrainStep

    keep_freed_memory()
    model = our_model(work, compute_dtype=DTYPES[work.precision]).train()
    apply_activation_checkpointing(model, work.recompute, dropout=False)
    if work.recompute == "auto":
        compute_again([model], work.rank().again)
    optimizer = make_optimizer(dict(model.named_parameters()), OptimizerConfig(lr=1e-3, weight_decay=0.1))
    rate = LearningRate(peak=1e-3, minimum=0.0, warmup=0.0, end=1, style="constant")
    step = TrainStep(Executor(model), optimizer, rate, BatchPlan(work.batch, work.batch, 1), seed=1, clip_norm=1.0)
    return lambda number: step(number, batch_of(number, work)).loss


def theirs(work: Work) -> Callable[[int], float]:
    """The loop that a user of transformers writes: autocast for bf16, fused AdamW, clipping."""
    import torch
    from transformers import GPTNeoXForCausalLM

    prepare(work)
    model = GPTNeoXForCausalLM(their_config(work.model, work.seq)).train()
    weights = our_model(work).state_dict()
    model.get_output_embeddings().load_state_dict({"weight": weights.pop("head.weight")})
    model.gpt_neox.load_state_dict(renamed(weights))
    if work.recompute != "none":
        model.gradient_checkpointing_enable()
    if work.compiled:
        model.compile(dynamic=False)
    step = their_step(model, dtype_of(work))
    return lambda number: step(torch.from_numpy(batch_of(number, work).tokens))


def litgpts(work: Work) -> Callable[[int], float]:
    """The same loop around litgpt's model and the loss that its pretraining takes."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy
    from torch.utils.checkpoint import checkpoint

    prepare(work)
    shape = work.model
    model = GPT(
        Config(
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.padded_vocab_size,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            intermediate_size=shape.mlp_width,
            rotary_percentage=shape.rotary_pct,
            parallel_residual=shape.parallel_residual,
            block_size=work.seq,
            gelu_approximate="tanh",
        )
    ).train()
    weights = our_model(work).state_dict()
    for name, tensor in weights.items():
        if ".qkv." in name:  # ours: head by head; theirs: all queries, all keys, all values
            weights[name] = tensor.unflatten(0, (shape.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    model.load_state_dict(renamed(weights, LITGPT))
    if work.recompute != "none":
        for block in model.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if work.compiled:
        model.compile(dynamic=False)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])

    step = their_step(model, dtype_of(work), loss=loss)
    return lambda number: step(torch.from_numpy(batch_of(number, work).tokens))


def prepare(work: Work) -> None:
    from castalia.machine import keep_freed_memory

    if work.allocator == "same":
        keep_freed_memory()


def dtype_of(work: Work):
    from castalia.train.hardware import DTYPES

    return DTYPES[work.precision]


def their_config(shape: ModelConfig, positions: int, **options):
    """transformers' description of a model of ours."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=shape.padded_vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.mlp_width,
        rotary_pct=shape.rotary_pct,
        max_position_embeddings=positions,
        hidden_act="gelu_new",
        use_parallel_residual=shape.parallel_residual,
        attn_implementation="sdpa",
        **{"use_cache": False} | options,
    )


def their_step(model, dtype, accumulation: int = 1, loss: Callable | None = None) -> Callable:
    """Takes tokens [batch, time] on the model's device; returns the loss. `loss`: of tokens, None for transformers'."""
    import torch

    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss = loss or (lambda part: model(input_ids=part, labels=part).loss)

    def step(tokens: torch.Tensor) -> float:
        total = 0.0
        for part in tokens.chunk(accumulation):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                found = loss(part) / accumulation
            found.backward()
            total += found.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


TRANSFORMERS = {
    "embed.": "embed_in.",
    "blocks.": "layers.",
    ".norm1.": ".input_layernorm.",
    ".norm2.": ".post_attention_layernorm.",
    ".attn.qkv.": ".attention.query_key_value.",
    ".attn.out.": ".attention.dense.",
    ".mlp.up.": ".mlp.dense_h_to_4h.",
    ".mlp.down.": ".mlp.dense_4h_to_h.",
    "norm.": "final_layer_norm.",
}
LITGPT = {
    "embed.": "transformer.wte.",
    "blocks.": "transformer.h.",
    ".norm1.": ".norm_1.",
    ".norm2.": ".norm_2.",
    ".attn.out.": ".attn.proj.",
    ".mlp.up.": ".mlp.fc.",
    ".mlp.down.": ".mlp.proj.",
    "norm.": "transformer.ln_f.",
    "head.": "lm_head.",
}


def renamed(state: dict, names: dict[str, str] = TRANSFORMERS) -> dict:
    """Canonical names -> another library's; the rows are in the same order. A part without a dot begins the name."""

    def rename(name: str) -> str:
        for ours, theirs in names.items():
            if ours.startswith("."):
                name = name.replace(ours, theirs)
            elif name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


SIDES: dict[str, Callable[[Work], Callable[[int], float]]] = {
    "castalia": ours,
    "transformers": theirs,
    "litgpt": litgpts,
}


class Timed(NamedTuple):
    seconds: list[float]  # of each timed step
    peak_bytes: int


def variant_of(work: Work, name: str) -> Work:
    """A side's own work: "castalia, auto" is ours with this policy of recomputation, "litgpt, compiled" is theirs."""
    library, _, variant = name.partition(", ")
    if not variant:
        return work
    return replace(work, recompute=variant) if library == "castalia" else replace(work, compiled=True)


def side(connection: Connection, name: str, work: Work) -> None:
    """A side's process: answers each step number with (seconds, loss), None with the most bytes that a step holds."""
    import torch

    from castalia.train.step_memory import PeakMemory

    clock = use_clock(work.cpu_time)
    step = SIDES[name.partition(", ")[0]](variant_of(work, name))
    connection.send("ready")
    while (number := connection.recv()) is not None:
        start = clock()
        loss = step(number)
        connection.send((clock() - start, loss))
    with PeakMemory(torch.device("cpu")) as memory:
        step(0)
    connection.send(memory.bytes)


def use_clock(cpu_time: bool) -> Callable[[], float]:
    import torch

    if cpu_time:
        torch.set_num_threads(1)
    return time.process_time if cpu_time else time.perf_counter


def matmul_rate(dtype, clock: Callable[[], float], size: int = 1024) -> float:
    """Operations a second: the best of some products."""
    import torch

    a, b = torch.randn(2, size, size).to(dtype).unbind()
    a @ b
    taken = []
    for _ in range(20):
        start = clock()
        a @ b
        taken.append(clock() - start)
    return 2 * size**3 / min(taken)


def race(work: Work, rounds: int, names: Sequence[str]) -> dict[str, Timed]:
    """All sides' steps. Raises AssertionError where the losses differ."""
    context = multiprocessing.get_context("spawn")
    processes, connections, seconds = [], {}, {name: [] for name in names}
    for name in names:
        here, there = context.Pipe()
        processes.append(context.Process(target=side, args=(there, name, work), daemon=True))
        processes[-1].start()
        there.close()  # so that a side that dies ends our wait for it
        here.recv()
        connections[name] = here
    for number in range(WARMUP_STEPS + rounds):
        losses = {}
        for name, connection in connections.items():
            connection.send(number)
            second, losses[name] = connection.recv()
            if number >= WARMUP_STEPS:
                seconds[name].append(second)
        for name, loss in losses.items():
            if not math.isclose(loss, losses[names[0]], rel_tol=TOLERANCE[work.precision]):
                raise AssertionError(f"{work.precision}, step {number}: the loss of {name} among {losses}")
    state = 12 * count(work.model).total  # parameters and AdamW's moments
    found = {}
    for name, connection in connections.items():
        connection.send(None)
        found[name] = Timed(seconds[name], state + connection.recv())
    for process in processes:
        process.join()  # what is measured next is to be alone
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-14m", help="a preset of the GPT-NeoX family")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--precision", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--allocator", nargs="+", choices=ALLOCATORS, default=ALLOCATORS)
    eager = [name for name in SIDES if name != "castalia" and find_spec(name)]
    peers = [*eager, *(f"{name}, compiled" for name in eager), *(f"castalia, {policy}" for policy in POLICIES)]
    parser.add_argument("--peers", nargs="+", choices=peers, default=eager)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--recompute", action="store_true", help="all sides forget the activations inside of blocks")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, for a machine that others share")
    parser.add_argument("--quick", action="store_true", help="1 x 64 tokens, 3 rounds: does it run and agree?")
    results.option(parser)
    args = parser.parse_args()
    if args.quick:
        args.batch, args.seq, args.rounds = 1, 64, 3

    import torch

    from castalia.train.hardware import DTYPES

    clock = use_clock(args.cpu_time)
    names = ["castalia", *args.peers]
    model = load_config(args.model).model
    tokens = args.batch * args.seq
    flops = tokens * training_flops(model, args.seq)
    print(f"{args.model}, {args.batch} x {args.seq}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"median (fastest) of {args.rounds} interleaved steps, {'CPU time' if args.cpu_time else 'wall clock'}\n")
    print("| precision | allocator | side | ms | over ours | tokens/s | floor ms | floor / ms | peak MiB | plan MiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for precision in args.precision:
        peak = matmul_rate(DTYPES[precision], clock)
        for allocator in args.allocator:
            policy = "full" if args.recompute else "none"
            work = Work(model, args.batch, args.seq, precision, allocator, policy, cpu_time=args.cpu_time)
            found = race(work, args.rounds, names)
            medians = {name: statistics.median(timed.seconds) for name, timed in found.items()}
            shape = f"{args.model}, {args.batch} x {args.seq}, {precision}, {allocator}"
            results.record(shape, found[names[0]].seconds, "cpu" if args.cpu_time else "wall")
            for name, timed in found.items():
                cells = [
                    *(precision, allocator, name),
                    f"{medians[name] * 1e3:.0f} ({min(timed.seconds) * 1e3:.0f})",
                    f"{medians[name] / medians[names[0]]:.2f}",
                    f"{tokens / medians[name]:,.0f}",
                    f"{flops / peak * 1e3:.0f}",
                    f"{flops / peak / medians[name]:.0%}",
                    f"{timed.peak_bytes / 2**20:.0f}",
                    f"{variant_of(work, name).rank().memory().total / 2**20:.0f}" if "castalia" in name else "",
                ]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
