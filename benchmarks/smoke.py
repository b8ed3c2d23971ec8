"""The first minutes on a machine: each path of the program once, on a small model, in one table of pass and fail.

    python benchmarks/smoke.py [--jobs 6] [--only NAME ...] [--logs FOLDER] [--quick]

Every row is a command as users type it, or a measurement in a process of its own. A training row passes when the
command succeeds and the loss has fallen. The measurements show what GPUs may get wrong silently: attention that falls
back to a kernel which stores all scores, and decoding that prepares a kernel anew for each length. Takes about four
minutes and no network. `--quick` is a dry run for a CPU: some rows run with a tiny model, for the others only the
settings are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import results
import yaml

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "examples" / "kjv" / "kjv.jsonl"
PROGRAM = (sys.executable, "-m", "castalia")
ROW_SECONDS = 150.0
KEYS, HEAD_SIZE = 4096, 128  # of the attention that is measured


@dataclass(frozen=True)
class Row:
    """A command in the work folder. `trains`: the run whose loss has to fall."""

    name: str
    command: tuple[str, ...]
    trains: str | None = None
    quick: bool = False  # runs in a dry run too
    stop: bool = False  # gets SIGTERM once it trains, and has to save and to exit as a stopped process does


def castalia(name: str, *words: str, trains: str | None = None, quick: bool = False) -> Row:
    return Row(name, (*PROGRAM, *words), trains, quick)


def train(name: str, *settings: str, quick: bool = False, stop: bool = False) -> Row:
    command = (*PROGRAM, "train", "small.yml", f"checkpoint.dir=runs/{name}", *settings)
    return Row(name, command, None if "--dry-run" in settings else f"runs/{name}", quick, stop)


def small_config(quick: bool) -> dict:
    """Of 25 million parameters, which learn something in 40 steps; the dry run's are 60 thousand."""
    shape = {"num_layers": 2, "hidden_size": 64, "num_heads": 2} if quick else {}
    return {
        "model": {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "rotary_pct": 0.25} | shape,
        "data": {"path": "kjv_text_document", "split": "97, 3, 0", "seq_length": 64 if quick else 512},
        "tokenizer": {"path": "tokenizer.json"},
        "optimizer": {"lr": 0.001},
        "train": {"steps": 8 if quick else 40, "batch_size": 4 if quick else 32, "accumulation": 2},
        "eval": {"every": 4 if quick else 20, "batches": 2},
        "checkpoint": {"every": 4 if quick else 20},
        "log": {"every": 1 if quick else 5},
    }


def stages(quick: bool) -> list[list[Row]]:
    """Rows of one stage run beside each other; the later stages use what the earlier ones have made."""
    half = 4 if quick else 20
    vocabulary = ("tokenizer", "train", str(TEXT), "--vocab-size", "2048", "--output", "tokenizer.json")
    prepare = ("data", "prepare", str(TEXT), "--tokenizer", "tokenizer.json", "--output", "kjv", "--append-eod")
    sample = ("--num-samples", "8", "--temperature", "0.8", "--max-tokens", "20" if quick else "200")
    prompts = ("--prompt", "In the", "--prompt", "And")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "castalia")
    return [
        [castalia("vocabulary", *vocabulary, quick=True)],
        [castalia("prepare", *prepare, quick=True)],
        [
            train("auto", quick=True),
            train("half", f"train.exit_interval={half}", quick=True),
            train("repeatable", "train.deterministic=true"),
            train("repeatable-half", "train.deterministic=true", f"train.exit_interval={half}"),
            train("fp32", "precision.compute=fp32"),
            train("fp16", "precision.compute=fp16"),
            train("compiled", "train.compile=true"),
            train("compiled-selective", "train.compile=true", "train.recompute=selective"),
            train("full-recompute", "train.recompute=full"),
            train("grouped-window", "model.num_kv_heads=2", "model.sliding_window=128"),
            train("alibi", "model.position=alibi"),
            train("grouped-alibi", "model.position=alibi", "model.num_kv_heads=2"),
            train("documents", "data.mask_documents=true", "model.num_kv_heads=2"),
            train("dropout", "model.hidden_dropout=0.1", "model.attention_dropout=0.1", "train.compile=true"),
            train("llama", "model.norm=rmsnorm", "model.gated_mlp=true", "model.activation=silu"),
            train("muon", "optimizer.name=muon"),
            train("profile", "log.profile.start=5", "log.profile.stop=6", "log.layers_every=10"),
            train("dry-run", "--dry-run"),
            train("stopped", "train.steps=100000", quick=True, stop=True),
        ],
        [
            castalia("resume", "train", "runs/half", trains="runs/half", quick=True),
            castalia("repeatable-resume", "train", "runs/repeatable-half", trains="runs/repeatable-half"),
            castalia("eval", "eval", "runs/auto", quick=True),
            castalia("eval-streamed", "eval", "runs/auto", "--memory", "2GB"),
            castalia("generate-streamed", "generate", "runs/auto", *prompts, *sample, "--memory", "2GB"),
            castalia("generate", "generate", "runs/auto", *prompts, *sample, quick=True),
            castalia("generate-alibi", "generate", "runs/grouped-alibi", *prompts, "--max-tokens", "100"),
            castalia("replay", "replay", "runs/auto", "--step", str(half + 2), quick=True),
            train("lora", "checkpoint.init_from=runs/auto", "finetune.lora.rank=8", "finetune.lora.dropout=0.05"),
            castalia("lr-find", "lr-find", "small.yml", "--steps", "30"),
            Row("torchrun", (*torchrun, "train", "small.yml", "checkpoint.dir=runs/torchrun"), "runs/torchrun"),
            train("nproc-1", "--nproc", "1"),
            castalia("doctor", "doctor", quick=True),
        ],
        [
            castalia("resumed-differs", "diff", "runs/auto", "runs/half", quick=True),
            castalia("repeatable-differs", "diff", "runs/repeatable", "runs/repeatable-half"),
            castalia("convert", "convert", "runs/auto", "hf", "--to", "hf", "--verify", quick=True),
        ],
    ]


def run(row: Row, folder: Path, logs: Path) -> tuple[bool, str]:
    """Whether the row passes, and what was seen: the losses, or the last line printed."""
    with open(logs / f"{row.name}.log", "w+") as log:
        process = subprocess.Popen(row.command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment())
        try:
            if row.stop and row.trains:
                stop_once_training(process, folder / row.trains)
            status = process.wait(ROW_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return False, f"not done after {ROW_SECONDS:.0f} s"
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    last = lines[-1][:100] if lines else ""
    if status != (128 + signal.SIGTERM if row.stop else 0):
        return False, f"exit status {status}: {last}"
    if not row.trains or row.stop:
        return True, last
    losses = [json.loads(line)["loss"] for line in (folder / row.trains / "metrics.jsonl").read_text().splitlines()]
    return losses[-1] < losses[0], f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def stop_once_training(process: subprocess.Popen, run_folder: Path) -> None:
    end = time.monotonic() + ROW_SECONDS
    metrics = run_folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)


def check_settings(row: Row, folder: Path) -> tuple[bool, str]:
    """A dry run's stand-in for training."""
    from castalia.config.load import load_config
    from castalia.errors import ConfigError

    settings = [word for word in row.command if "=" in word and not word.startswith("-")]
    try:
        load_config(folder / "small.yml", settings)
    except ConfigError as error:
        return False, str(error)
    return True, "settings checked"


def attention_memory(num_kv_heads: int, dtype: str, quick: bool) -> tuple[bool, str]:
    """A windowed block's forward and backward pass, whose scores alone would take [32, 4096, 4096] numbers."""
    import torch

    from castalia.config.schema import ModelConfig
    from castalia.model.init import initialize
    from castalia.model.transformer import Transformer
    from castalia.train.step_memory import PeakMemory

    keys, heads, size = (64, 4, 8) if quick else (KEYS, 32, HEAD_SIZE)
    device, kind = torch.device("cpu" if quick else "cuda"), getattr(torch, dtype)
    shape = ModelConfig(num_layers=1, hidden_size=heads * size, num_heads=heads, num_kv_heads=min(num_kv_heads, heads),
                  vocab_size=512, max_positions=keys, sliding_window=keys // 4)  # fmt: skip
    model = Transformer(shape, compute_dtype=kind).to(device)
    if quick:
        initialize(model, shape, seed=1)
    else:
        torch.nn.init.normal_(model.embed.weight)
    tokens = torch.randint(512, (1, keys + 1), device=device)
    with PeakMemory(device) as memory:
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    scores = heads * keys * keys * kind.itemsize
    # Gradients and activations of 16 widths each are far below one copy of the scores.
    return quick or memory.bytes < 2 * scores, f"{memory.bytes / 2**20:,.0f} MiB; all scores {scores / 2**20:,.0f} MiB"


def decode_new_lengths(quick: bool) -> tuple[bool, str]:
    """Seconds a token where each length of the keys is met for the first time, and met again."""
    import torch

    from castalia.config.schema import ModelConfig
    from castalia.generate.kv_cache import KVCache
    from castalia.model.transformer import Transformer

    heads, size, start, count = (2, 8, 16, 4) if quick else (16, HEAD_SIZE, 1000, 48)
    device, dtype = (torch.device("cpu"), torch.float32) if quick else (torch.device("cuda"), torch.bfloat16)
    shape = ModelConfig(
        num_layers=4, hidden_size=heads * size, num_heads=heads, vocab_size=512, max_positions=start + count
    )
    model = Transformer(shape, compute_dtype=dtype).to(device, dtype).eval()

    @torch.inference_mode()
    def write() -> float:
        """Median seconds of a token."""
        cache, taken = KVCache(1, start + count, device), []
        model(torch.zeros(1, start, dtype=torch.long, device=device), cache=cache)
        for _ in range(count):
            begin = time.perf_counter()
            model(torch.zeros(1, 1, dtype=torch.long, device=device), cache=cache)[0, -1, 0].item()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    new, again = write(), write()
    return quick or new < 2 * again, f"{new * 1e3:.2f} ms a token at new lengths, {again * 1e3:.2f} ms again"


MEASUREMENTS: dict[str, Callable[[bool], tuple[bool, str]]] = {
    **{
        f"memory, window, {heads} kv heads, {dtype}": partial(attention_memory, heads, dtype)
        for heads in (32, 8, 1)
        for dtype in ("bfloat16", "float16", "float32")
    },
    "decoding at new lengths": decode_new_lengths,
}


def measure(name: str, quick: bool, logs: Path) -> tuple[bool, str]:
    """In a process of its own, so that none finds the memory or the kernels of another."""
    command = (sys.executable, __file__, "--measure", name, *(["--quick"] if quick else []))
    with open(logs / f"{name.replace(' ', '_').replace(',', '')}.log", "w") as log:
        done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    lines = done.stdout.splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=6, help="rows at a time")
    parser.add_argument("--only", nargs="+", help="rows, by name; those that make what they need are not added")
    parser.add_argument("--logs", type=Path, help="a folder for what each row prints")
    parser.add_argument("--quick", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    results.option(parser)
    args = parser.parse_args()
    if args.measure:
        passed, seen = MEASUREMENTS[args.measure](args.quick)
        print(seen)
        sys.exit(not passed)
    failed = 0
    print("| path | result | seconds | what was seen |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(name)
        logs = args.logs or folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        (folder / "small.yml").write_text(yaml.safe_dump(small_config(args.quick)))
        for stage in work(args.quick, folder, logs):
            chosen = [(row, task) for row, task in stage if not args.only or row in args.only]
            for row, (passed, seconds, seen) in zip(
                [row for row, _ in chosen], pool.map(timed, [task for _, task in chosen]), strict=True
            ):
                failed += not passed
                print(f"| {row} | {'pass' if passed else 'FAIL'} | {seconds:.1f} | {seen} |", flush=True)
                if passed:
                    results.record(row, [seconds])
    sys.exit(f"{failed} rows failed" if failed else 0)


Task = Callable[[], tuple[bool, str]]


def work(quick: bool, folder: Path, logs: Path) -> Sequence[list[tuple[str, Task]]]:
    """Stages of named rows. A dry run leaves out what needs a run that it does not make."""

    def task(row: Row) -> Task:
        return partial(check_settings, row, folder) if quick and not row.quick else partial(run, row, folder, logs)

    commands = [
        [(row.name, task(row)) for row in stage if row.quick or not quick or "small.yml" in row.command]
        for stage in stages(quick)
    ]
    measured = list(MEASUREMENTS)[-2:] if quick else list(MEASUREMENTS)
    return [*commands, [(name, partial(measure, name, quick, logs)) for name in measured]]


def timed(task: Task) -> tuple[bool, float, str]:
    start = time.perf_counter()
    passed, seen = task()
    return passed, time.perf_counter() - start, seen.replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    main()
