"""Training steps side by side: ours against transformers' GPTNeoXForCausalLM with fused AdamW.

    python benchmarks/train.py [--model pythia-14m] [--batch 4] [--seq 512] [--rounds 7] [--quick]

Each side runs in a process of its own, and the two take turns step by step, so that both meet the same machine. Both
start from the same weights, see the same batches, clip at 1.0 and must report the same losses. Allocator `default` is
what a user of each side gets; `same` gives both sides the setting that `castalia train` makes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from castalia.config.batch import BatchPlan
from castalia.config.load import load_config
from castalia.config.schema import Model
from castalia.data.loader import Batch
from castalia.plan.flops import training_flops

# Largest relative difference of losses: fp32 sums in another order; bf16 rounds every activation.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Work:
    model: Model
    batch: int
    seq: int
    precision: str
    allocator: str


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
    from castalia.config.schema import Optimizer
    from castalia.parallel.engine import Engine
    from castalia.train.hardware import DTYPES, keep_freed_memory
    from castalia.train.optimizer import make_optimizer
    from castalia.train.schedule import LearningRate
    from castalia.train.step import TrainStep

    keep_freed_memory()
    model = our_model(work, compute_dtype=DTYPES[work.precision]).train()
    optimizer = make_optimizer(dict(model.named_parameters()), Optimizer(lr=1e-3, weight_decay=0.1))
    rate = LearningRate(peak=1e-3, minimum=0.0, warmup=0.0, end=1, style="constant")
    step = TrainStep(Engine(model), optimizer, rate, BatchPlan(work.batch, work.batch, 1), seed=1, clip_norm=1.0)
    return lambda number: step(number, batch_of(number, work)).loss


def theirs(work: Work) -> Callable[[int], float]:
    """The loop that a user of transformers writes: autocast for bf16, fused AdamW, clipping."""
    import torch
    from transformers import GPTNeoXForCausalLM

    from castalia.train.hardware import DTYPES, keep_freed_memory

    if work.allocator == "same":
        keep_freed_memory()
    model = GPTNeoXForCausalLM(their_config(work.model, work.seq)).train()
    weights = our_model(work).state_dict()
    model.get_output_embeddings().load_state_dict({"weight": weights.pop("head.weight")})
    model.gpt_neox.load_state_dict(renamed(weights))
    step = their_step(model, DTYPES[work.precision])
    return lambda number: step(torch.from_numpy(batch_of(number, work).tokens))


def their_config(shape: Model, positions: int, **options):
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


def their_step(model, dtype, accumulation: int = 1) -> Callable:
    """Takes tokens [batch, time] on the model's device; returns the loss."""
    import torch

    device = next(model.parameters()).device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens: torch.Tensor) -> float:
        total = 0.0
        for part in tokens.chunk(accumulation):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(input_ids=part, labels=part).loss / accumulation
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


def renamed(state: dict) -> dict:
    """Canonical names -> transformers' names inside `gpt_neox`; the rows are in the same order."""
    names = {
        "embed.": "embed_in.",
        "blocks.": "layers.",
        ".norm1.": ".input_layernorm.",
        ".norm2.": ".post_attention_layernorm.",
        ".attn.qkv.": ".attention.query_key_value.",
        ".attn.out.": ".attention.dense.",
        ".mlp.up.": ".mlp.dense_h_to_4h.",
        ".mlp.down.": ".mlp.dense_4h_to_h.",
    }

    def rename(name: str) -> str:
        if name.startswith("norm."):
            return name.replace("norm.", "final_layer_norm.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


def side(connection: Connection, build: Callable[[Work], Callable[[int], float]], work: Work) -> None:
    """A side's process: answers each step number with (seconds, loss), None with the end."""
    step = build(work)
    connection.send("ready")
    while (number := connection.recv()) is not None:
        start = time.perf_counter()
        loss = step(number)
        connection.send((time.perf_counter() - start, loss))


def race(work: Work, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each timed step of ours and of theirs. Raises AssertionError where the losses differ."""
    context = multiprocessing.get_context("spawn")
    connections, seconds = [], ([], [])
    for build in (ours, theirs):
        here, there = context.Pipe()
        context.Process(target=side, args=(there, build, work), daemon=True).start()
        there.close()  # so that a side that dies ends our wait for it
        here.recv()
        connections.append(here)
    for number in range(WARMUP_STEPS + rounds):
        losses = []
        for connection, taken in zip(connections, seconds, strict=True):
            connection.send(number)
            second, loss = connection.recv()
            losses.append(loss)
            if number >= WARMUP_STEPS:
                taken.append(second)
        if not math.isclose(*losses, rel_tol=TOLERANCE[work.precision]):
            raise AssertionError(f"{work.precision}, step {number}: our loss is {losses[0]}, theirs {losses[1]}")
    for connection in connections:
        connection.send(None)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pythia-14m", help="a preset of the GPT-NeoX family")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--quick", action="store_true", help="1 x 64 tokens, 3 rounds: does it run and agree?")
    args = parser.parse_args()
    if args.quick:
        args.batch, args.seq, args.rounds = 1, 64, 3

    import torch

    from castalia.train.hardware import DTYPES, measured_flops

    model = load_config(args.model).model
    tokens = args.batch * args.seq
    flops = tokens * training_flops(model, args.seq)
    print(
        f"{args.model}, {args.batch} x {args.seq} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"median (fastest) of {args.rounds} interleaved steps; share: of the machine's matmul rate\n")
    print("| precision | allocator | ours ms | transformers ms | ratio | ours tokens/s | share | matmul TFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        peak = measured_flops(DTYPES[precision])
        for allocator in ("default", "same"):
            mine, peers = race(Work(model, args.batch, args.seq, precision, allocator), args.rounds)
            median = statistics.median(mine)
            cells = [
                precision,
                allocator,
                *(f"{statistics.median(taken) * 1e3:.0f} ({min(taken) * 1e3:.0f})" for taken in (mine, peers)),
                f"{statistics.median(peers) / median:.2f}",
                f"{tokens / median:.0f}",
                f"{flops / median / peak:.0%}",
                f"{peak / 1e12:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
