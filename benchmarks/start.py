"""How long commands take from the shell's prompt: median of some runs, beside what Python and torch take by themselves.

    python benchmarks/start.py [--rounds 10] [--quick] [--values] [--cold]

With --values instead: how many initial values are drawn in a second, from a seed by one core and by all, and as one
stream as GPT-NeoX does it; by the fastest of the rounds, and by the processor's time, which other processes take no
part of; and how long that takes for models of three sizes on as many cores as plans assume.

The checkpoint of many files is a Hugging Face folder of 1,000 safetensors files with 250 KB of weights each; that for
the first token is a random Pythia 14M in fp32. The first step is one of 4 x 512 tokens from random weights, ours with
everything that `castalia train` does before it. Files are in the page cache; with --cold, which root alone may ask for,
the system forgets them before each command.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results

FILES = 1000
THEIR_FIRST_STEP = """
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
shape = dict(num_hidden_layers=6, hidden_size=128, num_attention_heads=4, intermediate_size=512, vocab_size=50304)
model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape)).train()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(0, 50304, (4, 512))
with torch.autocast("cpu", torch.bfloat16):
    loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print(loss.item())
"""


def seconds(command: list[str], cold: bool) -> float:
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def many_files(folder: Path, count: int) -> Path:
    """A checkpoint of GPT-NeoX's architecture with one tensor, or a few, in each of `count` files."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    layers = -(-count // 12)
    config = GPTNeoXConfig(
        num_hidden_layers=layers, hidden_size=128, num_attention_heads=4, intermediate_size=512, vocab_size=512
    )
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
        names = {name.replace("lm_head", "embed_out"): p.shape for name, p in model.named_parameters()}
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    parts: list[dict[str, torch.Tensor]] = [{} for _ in files]
    for i, (name, shape) in enumerate(names.items()):
        parts[i % count][name] = torch.randn(shape)
    for file, tensors in zip(files, parts, strict=True):
        save_file(tensors, folder / file)
    index = {name: files[i % count] for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(folder)
    return folder


def small_model(folder: Path) -> Path:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from castalia.data.tokenizer import ByteTokenizer

    shape = {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    GPTNeoXForCausalLM(GPTNeoXConfig(**shape, vocab_size=50304)).save_pretrained(folder)
    ByteTokenizer("bytes").save(folder / "tokenizer")
    return folder


def small_corpus(folder: Path) -> Path:
    """Random tokens, 100 documents of 1,000."""
    import numpy as np

    from castalia.data.dataset_writer import DatasetWriter

    with DatasetWriter(folder / "corpus", np.uint16) as corpus:
        for number in range(100):
            corpus.add(np.random.default_rng(number).integers(0, 50277, 1000))
    return folder / "corpus"


def initial_values(rounds: int) -> None:
    """Prints the rates in millions of values, and seconds for known models."""
    import torch

    from castalia.config.load import load_config
    from castalia.model import init
    from castalia.plan.count import count
    from castalia.plan.host import CORES, SEEDED_RATE

    torch.set_num_threads(1)
    shape, cores = (2048, 1024), init._cores()
    config = load_config("pythia-410m").model
    matrix, generator = torch.empty(shape), torch.Generator().manual_seed(1)

    def seeded(threads: int) -> None:
        init._cores = lambda: threads
        init.seeded_tensor(config, 1, "blocks.0.mlp.up.weight", shape)

    ways = {"one core": lambda: seeded(1), f"all {cores} cores": lambda: seeded(cores)}
    ways["GPT-NeoX's stream"] = lambda: matrix.normal_(0, 0.02, generator=generator)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, draw in ways.items():
            before, spent = time.perf_counter(), time.process_time()
            draw()
            taken[name].append((time.perf_counter() - before, time.process_time() - spent))
    print("| millions of values a second | fastest | median | of the processor's time |\n|---|---|---|---|")
    for name, found in taken.items():
        walls, spent_s = zip(*found, strict=True)
        numbers = (min(walls), statistics.median(walls), statistics.median(spent_s))
        print(f"| {name} | {' | '.join(f'{matrix.numel() / s / 1e6:.1f}' for s in numbers)} |")
    for name in ("pythia-1.4b", "pythia-6.9b", "gpt-neox-20b"):
        model = load_config(name).model
        assert model is not None
        s = count(model.model_copy(update={"vocab_size": model.vocab_size or 50277})).total / SEEDED_RATE
        print(f"{name}: {s:.0f} core-seconds, so {s / CORES:.0f} s on {CORES} cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one round, 10 files: does it run?")
    parser.add_argument("--values", action="store_true", help="initial values alone")
    parser.add_argument("--cold", action="store_true", help="nothing is in the page cache")
    results.option(parser)
    args = parser.parse_args()
    if args.values:
        initial_values(1 if args.quick else args.rounds)
        return
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / "many", Path(name) / "small"]
        for folder in folders:
            folder.mkdir()
        many, small = many_files(folders[0], 10 if args.quick else FILES), small_model(folders[1])
        castalia = [sys.executable, "-m", "castalia"]
        first = [str(small), "--tokenizer", str(small / "tokenizer"), "--prompt", "a", "--max-tokens", "1"]
        run = [f"data.path={small_corpus(Path(name))}", "data.split=1,0,0", "data.seq_length=512", "train.steps=10"]
        run += ["train.batch_size=4", "train.micro_batch_size=4", f"checkpoint.dir={name}/run"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "castalia --help": [*castalia, "--help"],
            "castalia plan pythia-160m": [*castalia, "plan", "pythia-160m"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            f"castalia inspect, {len(list(many.glob('*.safetensors')))} files": [*castalia, "inspect", str(many)],
            "castalia generate, first token of a 14M": [*castalia, "generate", *first],
            "castalia train --dry-run, first step of a 14M": [*castalia, "train", "pythia-14m", *run, "--dry-run"],
            "transformers, first step of a 14M": [sys.executable, "-c", THEIR_FIRST_STEP],
        }
        taken: dict[str, list[float]] = {label: [] for label in commands}
        for number in range(1 if args.quick else args.rounds + 1):
            for label, command in commands.items():
                second = seconds(command, args.cold)
                if number or args.quick:  # the first fills the page cache
                    taken[label].append(second)
    print("| command | median s | fastest s |\n|---|---|---|")
    for label, found in taken.items():
        print(f"| {label} | {statistics.median(found):.2f} | {min(found):.2f} |")
        results.record(f"{label}, cold" if args.cold else label, found)


if __name__ == "__main__":
    main()
