"""One GPU: training, memory, saving, decoding and correctness, beside transformers on the same work. Under 8 minutes.

    python benchmarks/gpu.py [--seconds 450] [--only train|save|decode|stream|check|attention] [--quick]

Every row has a process of its own, so that one that fails or runs out of memory costs itself alone: its error stands
in the row, and the program ends with exit status 1. Rows for which there is no time left say so. MFU counts 6N + causal
attention, without recomputation, over 989 TFLOP/s (H100 and H200, dense bf16). Micro-batch and recomputation of each
model are the first that fit by `castalia plan`'s arithmetic. transformers trains as its users do: fp32 parameters,
autocast, fused AdamW, clipping, SDPA, `torch.compile` over the whole model. Each timed round of decoding has lengths
that no round before it had, as texts do. `--quick` goes through all of it on the CPU with tiny models.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from generate import Numbers
from train import Work, batch_of, their_config, their_step

from castalia.checkpoint.formats.native.save import CheckpointSaver
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import optimizer_state
from castalia.checkpoint.tensors import Progress
from castalia.config.batch import BatchPlan
from castalia.config.float8_matrices import activation_type, float8_matrices
from castalia.config.load import load_config
from castalia.config.schema import (
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from castalia.config.tensor_table import constant_value
from castalia.generate.generation import generate
from castalia.model.float8 import set_float8
from castalia.model.init import initialize
from castalia.model.layers import hold_in
from castalia.model.transformer import Transformer
from castalia.parallel.compile import compile_blocks
from castalia.parallel.executor import Executor, one_process
from castalia.plan.count import count
from castalia.plan.devices import USABLE
from castalia.plan.flops import kv_cache_bytes, state_bytes, training_flops
from castalia.plan.layout import Layout
from castalia.plan.memory import Compute, memory_by_stage
from castalia.plan.stream_plan import EvaluationShape, StreamPlan, evaluation_work
from castalia.streaming.stream_units import units_of
from castalia.streaming.streamed_model import StreamedTransformer
from castalia.train.hardware import DTYPES
from castalia.train.loss_scale import LossScaler
from castalia.train.optimizer import make_optimizer
from castalia.train.schedule import LearningRate
from castalia.train.step import TrainStep
from castalia.train.step_memory import PeakMemory

PEAK_FLOPS = 989e12
WARMUP_STEPS, STEPS = 2, 5
ROW_SECONDS = 100.0  # of one row, compilation included
# Of losses and gradient norms, relative.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2, "bf16, compiled": 1e-2, "fp8": 2e-2}
FP16_SCALE = 2.0**16
HEADS = {
    "machine": "what | measured",
    "check": "what | CPU, fp32 | device | difference",
    "train": "model | side | sequences x micro-batches | recompute | ms a step | tokens/s | TFLOP/s | MFU | peak GiB "
    "| plan GiB | peak / plan",
    "save": "model | save | training waits ms | a plain copy to the host ms | on disk after s | GB | host memory GB",
    "decode": "model | side | rows | prefill ms | decode tokens/s | ms a token | of the bandwidth",
    "stream": "model | tokens of a pass | in memory ms | streamed ms | streamed GB/s | one copy GB/s | reads GB",
    "attention": "shape of q | back end | forward ms | with backward ms | TFLOP/s",
}
# Other kinds of layers, as GPT-NeoX's configs of about this size have them, and what a tiny model of each has.
MAMBA = {"pattern": ("mamba",), "position": "none", "norm": "rmsnorm", "num_layers": 24}
KINDS: dict[str, dict[str, Any]] = {
    "moe, 8 experts, 2 a token": {"experts": ExpertsConfig(count=8, top_k=2, width=3072), "mlp_bias": False},
    "mamba-130m": MAMBA,
    "rwkv-170m": {"pattern": ("rwkv",), "position": "none"},
}
TINY = {"moe, 8 experts, 2 a token": {"experts": ExpertsConfig(count=8, top_k=2, width=32)}}
Row = Mapping[str, Any]
Write = Callable[[list[list[int]], int], object]  # prompts, and how many tokens follow each


class Bench:
    """Sizes and device of a run of this program."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.device = torch.device("cpu" if quick else "cuda")
        self.seq, self.sequences = (32, 4) if quick else (2048, 16)
        self.prompt, self.new = (8, 4) if quick else (1024, 64)

    def model(self, name: str) -> ModelConfig:
        shape = load_config("pythia-160m" if name in KINDS else name).model
        assert shape is not None
        tiny = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 256, "mlp_size": None}
        own = KINDS.get(name, {}) | (tiny | TINY.get(name, {}) if self.quick else {})
        return shape.with_({"max_positions": self.seq} | own)

    def rows(self) -> list[Row]:
        big = ("pythia-1.4b", "pythia-410m", "pythia-160m", "pythia-2.8b", "pythia-6.9b")
        sides = ("eager", "compiled", "transformers")
        trained = [{"kind": "train", "model": m, "side": s} for m in (big[:1] if self.quick else big) for s in sides]
        ours = sides[: 1 if self.quick else 2]
        grouped = {"num_kv_heads": 1 if self.quick else 4, "sliding_window": self.seq // 4}
        for variant in ({"shape": grouped}, {"precision": "fp16"}):
            trained += [{"kind": "train", "model": big[1], "side": side} | variant for side in ours]
        trained += [{"kind": "train", "model": kind, "side": "eager"} for kind in KINDS]
        # Beside bf16's rows: the matrices of a model this wide should gain, and nothing is known of narrower ones.
        eight = [
            {"kind": "train", "model": m, "side": side, "precision": "fp8"} for m in big[: len(ours)] for side in ours
        ]
        trained[3:3] = eight
        saved = [{"kind": "save", "model": big[1]}]
        decoded = [
            {"kind": "decode", "model": model, "side": side, "rows": rows}
            for model in (big[:1] if self.quick else ("pythia-1.4b", "pythia-160m"))
            for rows in (1, 2 if self.quick else 64)
            for side in ("ours", "transformers")
        ]
        decoded += [{"kind": "decode", "model": "gpt-neox-20b", "side": "ours", "rows": 1}]
        each = (1, 2 if self.quick else 64)
        decoded += [{"kind": "decode", "model": kind, "side": "ours", "rows": rows} for kind in KINDS for rows in each]
        streamed = [{"kind": "stream", "model": "pythia-1.4b", "tokens": number} for number in (16, self.seq)]
        attention = [{"kind": "attention", "backend": name} for name in ("flash", "cudnn", "efficient", "math")]
        checks = [{"kind": "check", "what": what} for what in ("losses", "tokens")]
        last = attention[-1:] if self.quick else attention
        return [{"kind": "machine"}, *checks, *trained, *saved, *decoded, *streamed, *last]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int = STEPS, warmup: int = WARMUP_STEPS) -> float:
        """Median of the rounds."""
        taken = []
        for number in range(warmup + rounds):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            if number >= warmup:
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Most bytes that tensors hold while the work is done; on the CPU, a dry run, beyond those of before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated()
        with PeakMemory(self.device) as memory:
            work()
        return memory.bytes


def machine_row(bench: Bench, row: Row) -> list[list[str]]:
    """The two floors: matrix products of random numbers, and copying."""
    size, count = (256, 1 << 20) if bench.quick else (8192, 1 << 30)
    a, b = torch.randn(2, size, size, device=bench.device).bfloat16().unbind()
    rate = 2 * size**3 / bench.seconds(lambda: a @ b, rounds=20)
    seconds = copy_seconds(bench, count)
    name = "CPU" if bench.quick else torch.cuda.get_device_name()
    return [
        ["device", f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"],
        [f"bf16 product of {size}^2", f"{rate / 1e12:.1f} TFLOP/s, {rate / PEAK_FLOPS:.0%} of {PEAK_FLOPS / 1e12:.0f}"],
        ["copying, read and written", f"{8 * count / seconds / 1e9:.0f} GB/s"],
    ]


def copy_seconds(bench: Bench, count: int) -> float:
    source, target = torch.ones(2, count, device=bench.device).unbind()
    return bench.seconds(lambda: target.copy_(source), rounds=10)


def check_row(bench: Bench, row: Row) -> list[list[str]]:
    """Raises AssertionError where the device computes something else than the CPU."""
    shape = bench.model("pythia-160m")
    host = Transformer(shape).eval()
    initialize(host, shape, seed=1)
    tokens = torch.randint(0, shape.vocab_size, (2, min(256, bench.seq)), generator=torch.Generator().manual_seed(0))
    return (check_tokens if row["what"] == "tokens" else check_losses)(bench, shape, host, tokens)


def check_losses(bench: Bench, shape: ModelConfig, host: Transformer, tokens: torch.Tensor) -> list[list[str]]:
    wanted = loss_and_norm(host, tokens)
    cells = []
    for name, tolerance in TOLERANCE.items():
        precision = name.split(",")[0]
        model = Transformer(shape, compute_dtype=DTYPES[activation_type(precision)]).to(bench.device).eval()
        model.load_state_dict(host.state_dict())
        if precision == "fp8":  # which multiplies so in training mode alone; nothing here has dropout
            set_float8(model.train(), float8_matrices(shape, tp=1)[0])
        compile_blocks(model, RunConfig(train=TrainConfig(compile="compiled" in name)), bench.device)
        found = loss_and_norm(model, tokens.to(bench.device), FP16_SCALE if name == "fp16" else 1.0)
        for what, expected, value in zip(("loss", "gradient norm"), wanted, found, strict=True):
            apart = abs(value / expected - 1)
            # rounding to bf16 adds up in gradients
            assert apart < tolerance * (5 if what != "loss" else 1), f"{name}: {what} {value}, on the CPU {expected}"
            cells.append([f"{what}, {name}", f"{expected:.5f}", f"{value:.5f}", f"{apart:.1e}"])
    return cells


def loss_and_norm(model: Transformer, tokens: torch.Tensor, scale: float = 1.0) -> tuple[float, float]:
    loss_sum, count = model(tokens[:, :-1], tokens[:, 1:])
    loss = loss_sum / count
    (loss * scale).backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() / scale


def check_tokens(bench: Bench, shape: ModelConfig, host: Transformer, tokens: torch.Tensor) -> list[list[str]]:
    prompts, count = tokens[:, :16].tolist(), 2 * bench.new if bench.quick else 32
    wanted = written(host, prompts, count)
    cells = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = Transformer(shape).eval()
        model.load_state_dict(host.state_dict())
        found = written(model.to(bench.device, dtype), prompts, count)
        same = sum(a == b for mine, its in zip(wanted, found, strict=True) for a, b in zip(mine, its, strict=True))
        total = sum(map(len, wanted))
        assert same == total or name == "bf16", f"{name}: {same} of {total} greedy tokens are those of the CPU"
        cells.append([f"greedy tokens, {name}", f"{total}", f"{same} alike", f"{1 - same / total:.0%}"])
    return cells


def written(model: Transformer, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    numbers = Numbers(model.cfg.padded_vocab_size)
    return [
        numbers.encode(text) for text in generate(model, numbers, prompts, max_tokens=count, batch_size=len(prompts))
    ]


def train_row(bench: Bench, row: Row) -> list[list[str]]:
    shape = bench.model(row["model"]).model_copy(update=row.get("shape", {}))
    precision = row.get("precision", "bf16")
    layout = fitting(bench, shape, precision)
    if row["side"] == "transformers":
        step, micro = their_training(bench, shape, layout)
    else:
        step, micro = our_training(bench, shape, layout, row["side"] == "compiled", precision)
    seconds = bench.seconds(step)
    peak = bench.peak_bytes(step)
    tokens = bench.sequences * bench.seq
    rate = tokens * training_flops(shape, bench.seq) / seconds
    plan = planned(bench, shape, layout, precision) if row["side"] != "transformers" else None
    split = f"{micro} x {bench.sequences // micro}"
    return [
        [
            *(variant_name(row), row["side"], split, layout.recompute if plan else "none"),
            *(f"{seconds * 1e3:.1f}", f"{tokens / seconds:,.0f}", f"{rate / 1e12:.1f}", f"{rate / PEAK_FLOPS:.1%}"),
            *(f"{peak / 2**30:.2f}", f"{plan / 2**30:.2f}" if plan else "", f"{peak / plan:.2f}" if plan else ""),
        ]
    ]


def variant_name(row: Row) -> str:
    shape = row.get("shape", {})
    parts = [row["model"], *(f"{key}={value}" for key, value in shape.items())]
    return ", ".join([*parts, row["precision"]] if "precision" in row else parts)


def fitting(bench: Bench, shape: ModelConfig, precision: str = "bf16") -> Layout:
    """The first way to take the step's sequences that fits into memory."""
    memory = torch.cuda.get_device_properties(0).total_memory if bench.device.type == "cuda" else 2**30
    for recompute in ("none", "selective", "full"):
        for micro in (16, 8, 4, 2, 1):
            if bench.sequences % micro == 0:
                layout = Layout(micro_batch=micro, accumulation=bench.sequences // micro, recompute=recompute)
                if planned(bench, shape, layout, precision) < USABLE * memory:
                    return layout
    raise SystemExit("does not fit into this device, whatever is recomputed")


def planned(bench: Bench, shape: ModelConfig, layout: Layout, precision: str) -> int:
    compute = Compute("bf16", bench.device.type, float8=precision == "fp8")  # fp16 takes what bf16 takes
    return memory_by_stage(shape, layout, bench.seq, compute)[0].total


def our_training(
    bench: Bench, shape: ModelConfig, layout: Layout, compiled: bool, precision: str
) -> tuple[Callable[[], object], int]:
    """A step as `castalia train` takes it, and its micro-batch."""
    step = our_step(bench, shape, layout, compiled, precision)
    batch = batch_of(0, Work(shape, bench.sequences, bench.seq, precision, "same"))
    return lambda: step(0, batch), layout.micro_batch


def our_step(bench: Bench, shape: ModelConfig, layout: Layout, compiled: bool, precision: str) -> TrainStep:
    plan = BatchPlan(bench.sequences, layout.micro_batch, layout.accumulation)
    config = RunConfig(
        model=shape,
        train=TrainConfig(recompute=layout.recompute, compile=compiled),
        precision=PrecisionConfig(compute=precision),
    )
    executor = one_process(config, DTYPES[activation_type(precision)], bench.device, plan)
    fill(executor)
    executor.model.train()
    optimizer = make_optimizer(executor.parameters, OptimizerConfig(lr=1e-4, weight_decay=0.1))
    rate = LearningRate(peak=1e-4, minimum=0.0, warmup=0.0, end=1, style="constant")
    scaler = LossScaler(config.precision.loss_scale, "stage0") if precision == "fp16" else None
    return TrainStep(executor, optimizer, rate, plan, seed=1, clip_norm=1.0, scaler=scaler)


@torch.no_grad()
def fill(executor: Executor) -> None:
    """Random weights, drawn on the device: those of a seed take minutes at this size."""
    for name, parameter in executor.parameters.items():
        constant = constant_value(executor.model.cfg, name)
        parameter.normal_(0.0, 0.02) if constant is None else parameter.fill_(constant)


def their_training(bench: Bench, shape: ModelConfig, layout: Layout) -> tuple[Callable[[], object], int]:
    """transformers' step with the largest micro-batch, from ours downwards, that does not run out of memory."""
    from transformers import GPTNeoXForCausalLM

    with bench.device:
        model = GPTNeoXForCausalLM(their_config(shape, bench.seq)).train()
    model.compile(backend="aot_eager" if bench.quick else "inductor", dynamic=False)
    tokens = torch.from_numpy(batch_of(0, Work(shape, bench.sequences, bench.seq, "bf16", "same")).tokens)
    tokens, micro = tokens.to(bench.device), layout.micro_batch
    while True:
        step = partial(their_step(model, torch.bfloat16, bench.sequences // micro), tokens)
        try:
            step()
            return step, micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
            micro //= 2
            model.zero_grad(set_to_none=True)


def save_row(bench: Bench, row: Row) -> list[list[str]]:
    """What a run waits for when it saves, the first time and later; beside it one plain copy of as many bytes."""
    shape = bench.model(row["model"])
    layout = fitting(bench, shape)
    step = our_step(bench, shape, layout, compiled=False, precision="bf16")
    batch = batch_of(0, Work(shape, bench.sequences, bench.seq, "bf16", "same"))
    step(0, batch)
    config, parameters = RunConfig(model=shape), step.executor.parameters
    states = optimizer_state(step.optimizer, parameters)
    tensors = [*parameters.values(), *(t for state in states.values() for k, t in state.items() if k != "step")]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    before, cells = host_bytes(), []
    with tempfile.TemporaryDirectory() as folder, CheckpointSaver(folder, keep_last=1) as writer:
        for number, name in enumerate(("first", "second", "third"), 1):
            bench.synchronize()
            start = time.perf_counter()
            writer.save(parameters, states, Progress(step=number), config)
            waited = time.perf_counter() - start
            step(number, batch)
            writer.join()
            written = time.perf_counter() - start
            held = (host_bytes() - before) / 1e9
            figures = f"{waited * 1e3:.0f}", f"{written:.1f}", f"{size / 1e9:.2f}", f"{held:.1f}"
            cells.append([row["model"], name, *figures])
    copied = bench.seconds(lambda: [tensor.detach().to("cpu", copy=True) for tensor in tensors], rounds=2, warmup=1)
    return [[*cell[:3], f"{copied * 1e3:.0f}", *cell[3:]] for cell in cells]


def host_bytes() -> int:
    """This process's memory on the host, page-locked memory included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def decode_row(bench: Bench, row: Row) -> list[list[str]]:
    shape, rows = bench.model(row["model"]), row["rows"]
    write = (their_writer if row["side"] == "transformers" else our_writer)(bench, shape)
    rounds = [decode_round(bench, shape, write, rows, bench.prompt + number * (bench.new + 2)) for number in range(4)]
    first, each = (statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True))
    needed = 2 * values_read(shape, rows) + rows * (bench.prompt + bench.new / 2) * kv_cache_bytes(shape)
    needed += 2 * rows * state_bytes(shape)  # read and written
    size = 1 << (20 if bench.quick else 28)
    share = needed / each / (8 * size / copy_seconds(bench, size))
    cells = f"{first * 1e3:.1f}", f"{rows / each:,.0f}", f"{each * 1e3:.2f}", f"{share:.0%}"
    return [[row["model"], row["side"], str(rows), *cells]]


def values_read(shape: ModelConfig, rows: int) -> float:
    """Of the model's parameters, for a token of each row: no embedding, and of experts those that are likely taken."""
    parameters = count(shape)
    read = parameters.total - shape.padded_vocab_size * shape.hidden_size
    if shape.experts is None:
        return read
    idle = 1 - shape.experts.top_k / shape.experts.count  # of the experts, those that one token does not take
    return read - (parameters.total - parameters.active) / idle * idle**rows


def decode_round(bench: Bench, shape: ModelConfig, write: Write, rows: int, length: int) -> tuple[float, float]:
    """Seconds until the first token, and for each further one: the first time that keys are so many."""
    prompts = torch.randint(0, shape.vocab_size, (rows, length)).tolist()
    first = bench.seconds(lambda: write(prompts, 1), rounds=1, warmup=1)
    whole = bench.seconds(lambda: write(prompts, 1 + bench.new), rounds=1, warmup=0)
    return first, (whole - first) / bench.new


def our_writer(bench: Bench, shape: ModelConfig) -> Write:
    with torch.device("meta"):
        model = Transformer(shape)
    hold_in(model, torch.bfloat16)
    model = model.to_empty(device=bench.device).eval()
    fill(Executor(model))
    return lambda prompts, count: written(model, prompts, count)


def their_writer(bench: Bench, shape: ModelConfig) -> Write:
    from transformers import GPTNeoXForCausalLM

    with bench.device:
        model = GPTNeoXForCausalLM(their_config(shape, bench.seq, use_cache=True)).to(torch.bfloat16).eval()
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    @torch.inference_mode()
    def write(prompts: list[list[int]], count: int) -> object:
        tokens = torch.tensor(prompts, device=bench.device)
        settings["attention_mask"] = torch.ones_like(tokens)
        return model.generate(tokens, max_new_tokens=count, **settings).tolist()

    return write


def stream_row(bench: Bench, row: Row) -> list[list[str]]:
    """A pass in bf16 whose blocks come from disk each time, beside the model in memory and one plain copy."""
    shape, tokens = bench.model(row["model"]), row["tokens"]
    with torch.device("meta"):
        whole = Transformer(shape)
    whole = whole.to(torch.bfloat16).to_empty(device=bench.device).eval()
    fill(Executor(whole))
    ids = torch.randint(0, shape.vocab_size, (1, tokens), device=bench.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with CheckpointSaver(folder, keep_last=1) as writer:
            writer.save(dict(whole.named_parameters()), {}, Progress(step=1), RunConfig(model=shape))
        in_memory, logits = bench.seconds(lambda: whole.hidden(ids)), whole.hidden(ids)
        checkpoint = open_checkpoint(folder)
        units = units_of(checkpoint, shape, torch.bfloat16)
        plan = StreamPlan(
            units.sizes(), evaluation_work(shape, EvaluationShape(tokens, 1, 1, False), 2), 0, 1, (), True
        )
        model = StreamedTransformer(shape, units, plan, folder, past_cache=False, device=bench.device)
        streamed = bench.seconds(lambda: model.hidden(ids))
        if not torch.equal(model.hidden(ids), logits):
            raise AssertionError("the streamed model computes something else")
        model.close()
    host = torch.empty(1 << (20 if bench.quick else 30), dtype=torch.uint8, pin_memory=not bench.quick)
    copying = host.numel() / bench.seconds(lambda: host.to(bench.device, copy=True)) / 1e9
    times = f"{in_memory * 1e3:.2f}", f"{streamed * 1e3:.2f}", f"{plan.bytes_per_pass / streamed / 1e9:.2f}"
    return [[row["model"], str(tokens), *times, f"{copying:.2f}", f"{plan.bytes_per_pass / 1e9:.2f}"]]


def attention_row(bench: Bench, row: Row) -> list[list[str]]:
    """SDPA's back ends on the 1.4B's heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    shape = (1, 2, bench.seq, 16) if bench.quick else (8, 16, bench.seq, 128)
    q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with sdpa_kernel(getattr(SDPBackend, names[row["backend"]])):
        gradient = torch.randn_like(forward())
        once, both = bench.seconds(forward), bench.seconds(lambda: forward().backward(gradient))
    flops = 3 * 2 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]  # half of the scores
    return [[str(list(shape)), row["backend"], f"{once * 1e3:.2f}", f"{both * 1e3:.2f}", f"{flops / both / 1e12:.1f}"]]


WORK = {
    "machine": machine_row, "check": check_row, "train": train_row, "save": save_row, "decode": decode_row,
    "stream": stream_row, "attention": attention_row,
}  # fmt: skip


def child(connection: Connection, errors: str, quick: bool, row: Row) -> None:
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
    connection.send(WORK[row["kind"]](Bench(quick), row))


def run_row(quick: bool, row: Row, limit_s: float) -> tuple[list[list[str]], str | None]:
    """Lines of the table, or none and the reason. This process never touches the GPU, so its children can fork."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        process = context.Process(target=child, args=(there, str(errors), quick, row))
        process.start()
        there.close()
        answered = here.poll(limit_s)
        try:
            found = here.recv() if answered else []
        except EOFError:  # it died without a word
            found = []
        if not answered:
            process.kill()
        process.join()
        if found:
            return found, None
        lines = errors.read_text().strip().splitlines()
    print("\n".join(lines[-30:]), file=sys.stderr)
    if not answered:
        return [], f"not done after {limit_s:.0f} s"
    return [], lines[-1] if lines else f"exit status {process.exitcode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="what is not done by then is left out")
    parser.add_argument("--only", choices=HEADS, help="one of the tables")
    parser.add_argument("--quick", action="store_true", help="tiny models on the CPU: does it run?")
    args = parser.parse_args()
    end, failed, table = time.monotonic() + args.seconds, 0, ""
    for row in Bench(args.quick).rows():
        if args.only not in (None, row["kind"]):
            continue
        if row["kind"] != table:
            table = row["kind"]
            print(f"\n| {HEADS[table]} |\n|{'---|' * len(HEADS[table].split('|'))}", flush=True)
        left = end - time.monotonic()
        found, problem = run_row(args.quick, row, min(ROW_SECONDS, left)) if left > 0 else ([], "no time was left")
        failed += problem is not None
        for cells in found or [[*(str(value) for key, value in row.items() if key != "kind"), f"failed: {problem}"]]:
            print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(f"{failed} rows failed" if failed else 0)


if __name__ == "__main__":
    main()
