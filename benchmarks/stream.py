"""Models larger than memory: reading beside the raw rate of the same bytes, passes beside those of a model in memory.

    python benchmarks/stream.py [--hidden 1024] [--memory 1GB] [--tokens 16,512,2048] [--folder .] [--rounds 3]
    python benchmarks/stream.py --source HF_FOLDER

A model of GPT-NeoX-20B's shape is written as a Hugging Face folder in fp16, and is computed in fp32. Every figure is
measured in a process of its own, whose anonymous memory is sampled; before each, the files leave the page cache, except
where "warm" says otherwise. transformers' disk offload runs beside, where accelerate is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results

WINDOW, READERS = 8 << 20, 4
DECODED = 4  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--tokens", default="16,512,2048")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("."))
    parser.add_argument("--only", help="one measurement, in this process")
    results.option(parser)
    options = parser.parse_args()
    if options.only:
        measured(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        options.source = options.source or make_source(Path(place), options.hidden)
        report(options, Path(place))


def make_source(place: Path, hidden: int) -> Path:
    from tests.checkpoint.synthetic import shape_of_20b, write_20b

    write_20b(place / "neox", shape_of_20b(hidden, num_heads=16), optimizer=False)
    words = ["convert", str(place / "neox"), str(place / "hf"), "--to", "hf"]
    subprocess.run([sys.executable, "-m", "castalia", *words], check=True)
    shutil.rmtree(place / "neox")
    return place / "hf"


def report(options: argparse.Namespace, place: Path) -> None:
    size = sum(path.stat().st_size for path in files_of(options.source))
    print(f"{options.source}: {size / 1e9:.3f} GB, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for what in ("raw direct", "raw cold", "raw warm", "reader first", "reader again"):
        rates = [one(options, what, place)["rate"] / 1e9 for _ in range(options.rounds)]
        print(f"{what:<16} {statistics.median(rates):6.2f} GB/s   ({', '.join(f'{rate:.2f}' for rate in rates)})")
    for tokens in options.tokens.split(","):
        for what in ("pass memory", "pass streamed"):
            show(f"{what} {tokens}", one(options, f"{what} {tokens}", place))
    for what in ("token memory", "token streamed", "token transformers"):
        show(what, one(options, what, place))


def show(what: str, found: dict[str, float]) -> None:
    others = "  ".join(f"{name} {value:.9g}" for name, value in found.items() if name not in ("seconds", "peak"))
    if "seconds" in found:
        results.record(what, [found["seconds"]])
    print(f"{what:<24} {found.get('seconds', float('nan')):8.2f} s   anonymous {found['peak'] / 1e9:.2f} GB   {others}")


def one(options: argparse.Namespace, what: str, place: Path) -> dict[str, float]:
    if not what.endswith("warm"):
        forget(options.source)
    words = ["--source", options.source, "--memory", options.memory, "--folder", place, "--only", what]
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Out of the page cache; whatever is not written yet stays in it, so write it first."""
    os.sync()
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def sampled(found: dict[str, float]) -> Iterator[None]:
    """Notes the peak of this process's anonymous memory."""
    done, found["peak"] = threading.Event(), 0.0

    def watch() -> None:
        while not done.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            found["peak"] = max(found["peak"], kilobytes * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def measured(options: argparse.Namespace) -> None:
    what, *rest = options.only.rsplit(" ", 1) if options.only[-1].isdigit() else (options.only,)
    found: dict[str, float] = {}
    with sampled(found):
        if what.startswith("raw"):
            found["rate"] = raw(files_of(options.source), what)
        elif what.startswith("reader"):
            found["rate"] = reader(options, again=what.endswith("again"))
        elif what.startswith("pass"):
            found |= passes(options, int(rest[0]), streamed="streamed" in what)
        elif what == "token transformers":
            found |= transformers_token(options)
        else:
            found |= token(options, streamed="streamed" in what)
    print(json.dumps(found))


def raw(files: list[Path], what: str) -> float:
    """Bytes per second of plain large reads by as many threads as the streamed reader has."""
    import mmap

    flags = os.O_RDONLY | (os.O_DIRECT if what.endswith("direct") else 0)
    parts = [(path, at) for path in files for at in range(0, path.stat().st_size, WINDOW)]
    buffers = [memoryview(mmap.mmap(-1, WINDOW)) for _ in range(READERS)]

    def read(number: int) -> int:
        total = 0
        for path, at in parts[number::READERS]:
            descriptor = os.open(path, flags)
            total += os.preadv(descriptor, [buffers[number]], at)
            os.close(descriptor)
        return total

    with ThreadPoolExecutor(READERS) as pool:
        if what.endswith("warm"):
            list(pool.map(read, range(READERS)))
        begin = time.perf_counter()
        return sum(pool.map(read, range(READERS))) / (time.perf_counter() - begin)


def opened(options: argparse.Namespace, tokens: int = 16, past_cache: bool = True) -> Any:
    """The streamed model within the budget."""
    import torch

    from castalia.checkpoint.opener import open_checkpoint
    from castalia.checkpoint.restore import architecture
    from castalia.plan.stream_plan import EvaluationShape, evaluation_work, plan_stream
    from castalia.streaming.stream_units import units_of
    from castalia.streaming.streamed_model import StreamedTransformer
    from castalia.units import parse_size

    checkpoint = open_checkpoint(options.source)
    cfg = architecture(checkpoint)
    units = units_of(checkpoint, cfg, torch.float32)
    work = evaluation_work(cfg, EvaluationShape(tokens, 1, 1, False), 4)
    plan = plan_stream(units.sizes(), work, parse_size(options.memory, "--memory"))
    return StreamedTransformer(cfg, units, plan, checkpoint.path, past_cache=past_cache)


def reader(options: argparse.Namespace, again: bool) -> float:
    """Bytes per second of the reader alone, in its first pass, which checks values, or in its second."""
    model = opened(options)
    streamed = [number for number in range(model.cfg.num_layers) if number not in model.plan.resident]
    for number in range(model.cfg.num_layers if again else 0):
        model.reader.take(number)
    begin = time.perf_counter()
    for number in streamed:
        model.reader.take(number)
    seconds = time.perf_counter() - begin
    total = sum(model.reader.units[number].num_bytes for number in streamed)
    model.reader.close()
    return total / seconds


def timed(work: Callable[[], Any], rounds: int = 2) -> float:
    """Seconds of the last of a few rounds, the first of which warms up."""
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
    return seconds


def whole_model(options: argparse.Namespace) -> Any:
    import castalia

    return castalia.load_model(options.source)


def passes(options: argparse.Namespace, tokens: int, streamed: bool) -> dict[str, float]:
    """A forward pass with the loss of so many tokens."""
    import torch

    model = opened(options, tokens) if streamed else whole_model(options)
    ids = torch.randint(50000, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seconds = timed(lambda: model(ids, ids))
    found = {"seconds": seconds, "loss": float(model(ids, ids)[0]) / tokens}
    return found | ({"gb_per_pass": model.plan.bytes_per_pass / 1e9} if streamed else {})


def token(options: argparse.Namespace, streamed: bool) -> dict[str, float]:
    """Seconds of one more token of one text, in plain forward passes with a cache."""
    import torch

    from castalia.generate.kv_cache import KVCache

    model = opened(options) if streamed else whole_model(options)
    cache = KVCache(1, 64, torch.device("cpu"))

    def step(ids: Any) -> Any:
        return model.logits(model.hidden(ids, cache=cache)[:, -1]).argmax(-1)[:, None]

    with torch.inference_mode():
        state = [step(torch.arange(16)[None])]
        seconds = timed(lambda: state.append(step(state[-1])), DECODED)
    return {"seconds": seconds, "last": float(state[-1])}


def transformers_token(options: argparse.Namespace) -> dict[str, float]:
    """The same with all of the model offloaded to disk."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        import accelerate  # noqa: F401
    except ImportError:
        return {"missing": 1.0}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        model = AutoModelForCausalLM.from_pretrained(
            options.source, dtype=torch.float32, device_map={"": "disk"}, offload_folder=place
        )
        with torch.inference_mode():
            out = model(torch.arange(16)[None], use_cache=True)
            state = [out.past_key_values, out.logits[:, -1].argmax(-1)[:, None]]

            def step() -> None:
                out = model(state[1], past_key_values=state[0], use_cache=True)
                state[1] = out.logits[:, -1].argmax(-1)[:, None]

            return {"seconds": timed(step, DECODED), "last": float(state[1])}


if __name__ == "__main__":
    main()
