"""How long commands take from the shell's prompt: median of some runs, beside what Python and torch take by themselves.

    python benchmarks/start.py [--rounds 10] [--quick] [--values] [--cold] [--ranks N]

With --values instead: how many initial values are drawn in a second, from a seed by one core and by all, and as one
stream as GPT-NeoX does it; by the fastest of the rounds, and by the processor's time, which other processes take no
part of; and how long that takes for models of three sizes on as many cores as plans assume.

The checkpoint of many files is a Hugging Face folder of 1,000 safetensors files with 250 KB of weights each; that for
the first token is a random Pythia 14M in fp32. The first step is one of 4 x 512 tokens from random weights, ours with
everything that `castalia train` does before it. Files are in the page cache; with --cold, which root alone may ask for,
the system forgets them before each command. Python keeps the modules that it has compiled, as it does of what is
installed.

With --ranks N instead: N processes of that run over gloo, which share the batch, a thread each, until each one's first
collective of tensors, by when its model has its initial values. CPU seconds of all ranks and of the slowest, and of
what: `import torch`; what else of torch ranks import, its sharding and its compiler; all other imports; the rest.
"""

from __future__ import annotations

import argparse
import builtins
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

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


def seconds(command: list[str], cold: bool) -> tuple[float, float]:
    """By the clock, and of the processor."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    start, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    spent = os.times()
    cpu = spent.children_user - before.children_user + spent.children_system - before.children_system
    return time.perf_counter() - start, cpu


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


class Imports:
    """CPU seconds within `import` statements by kind, each import without those of other kinds in it.

    `then`: what is done once torch has been imported.
    """

    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then
        self.seconds = dict.fromkeys(("import torch", "more of torch", "other imports"), 0.0)
        self.open: list[str] = []  # kinds of the imports that have not ended, each in the one before
        self.since, self.importing = 0.0, builtins.__import__
        builtins.__import__ = self

    def __call__(self, name: str, *args: Any, **options: Any) -> ModuleType:
        """As `__import__`."""
        kind = self.kind(name)
        if self.open and self.open[-1] == kind:
            return self.importing(name, *args, **options)
        self.turn()
        self.open.append(kind)
        try:
            return self.importing(name, *args, **options)
        finally:
            self.turn()
            self.open.pop()
            if kind == "import torch":
                self.then()

    def kind(self, name: str) -> str:
        """The kind of an import; what torch imports belongs to torch."""
        if self.open and self.open[-1] != "other imports":
            return self.open[-1]
        if name.partition(".")[0] != "torch":
            return "other imports"
        return "more of torch" if "torch" in sys.modules else "import torch"

    def turn(self) -> None:
        """Another kind of import begins or ends here."""
        now = time.process_time()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now


def one_rank(words: list[str]) -> NoReturn:
    """This process is a rank of `castalia WORDS`, until its first collective of tensors, when it prints its seconds."""

    def end_at_first_collective() -> None:
        import torch.distributed as dist

        def reached(tensor: Any, *args: Any, **options: Any) -> NoReturn:
            spent = time.process_time()
            rest = spent - sum(imports.seconds.values())
            os.write(1, (json.dumps({"all": spent, **imports.seconds, "the rest": rest}) + "\n").encode())
            summed(tensor, *args, **options)  # until here all ranks come
            os._exit(0)

        summed, dist.all_reduce = dist.all_reduce, reached

    imports = Imports(then=end_at_first_collective)
    from castalia.cli.main import main

    sys.argv[1:] = words
    main()
    sys.exit("this rank came to no collective")


def start_of_ranks(ranks: int, rounds: int, words: list[str]) -> None:
    """Prints the CPU seconds of that many ranks until their first collective."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, __file__, "--rank", json.dumps(words)]
    sums: dict[str, list[float]] = {}
    slowest: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(found) != ranks:
            sys.exit(done.stderr or done.stdout)
        for part in found[0] if number else ():  # the first round fills the page cache
            sums.setdefault(part, []).append(sum(rank[part] for rank in found))
            slowest.setdefault(part, []).append(max(rank[part] for rank in found))
    print(f"| {ranks} ranks until their first collective | CPU s | a rank | the slowest |\n|---|---|---|---|")
    for part, found in sums.items():
        whole, most = statistics.median(found), statistics.median(slowest[part])
        print(f"| {part} | {whole:.2f} | {whole / ranks:.2f} | {most:.2f} |")
    results.record(f"a rank of {ranks} until its first collective", [each / ranks for each in sums["all"]], "cpu")


def main() -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one round, 10 files: does it run?")
    parser.add_argument("--values", action="store_true", help="initial values alone")
    parser.add_argument("--cold", action="store_true", help="nothing is in the page cache")
    parser.add_argument("--ranks", type=int, metavar="N", help="the start of N ranks of a training run instead")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    results.option(parser)
    args = parser.parse_args()
    if args.rank:
        one_rank(json.loads(args.rank))
    if args.values:
        initial_values(1 if args.quick else args.rounds)
        return
    with tempfile.TemporaryDirectory() as name:
        run = [f"data.path={small_corpus(Path(name))}", "data.split=1,0,0", "data.seq_length=512", "train.steps=10"]
        run += [f"checkpoint.dir={name}/run"]
        if args.ranks:
            run += [f"train.batch_size={max(4, args.ranks)}", "train.micro_batch_size=1", "train.device=cpu"]
            start_of_ranks(args.ranks, 1 if args.quick else args.rounds, ["train", "pythia-14m", *run, "--dry-run"])
            return
        folders = [Path(name) / "many", Path(name) / "small"]
        for folder in folders:
            folder.mkdir()
        many, small = many_files(folders[0], 10 if args.quick else FILES), small_model(folders[1])
        castalia = [sys.executable, "-m", "castalia"]
        first = [str(small), "--tokenizer", str(small / "tokenizer"), "--prompt", "a", "--max-tokens", "1"]
        run += ["train.batch_size=4", "train.micro_batch_size=4"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "castalia --help": [*castalia, "--help"],
            "castalia plan pythia-160m": [*castalia, "plan", "pythia-160m"],
            "castalia plan neox-175b --gpus 8xH100": [*castalia, "plan", "neox-175b", "--gpus", "8xH100"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            f"castalia inspect, {len(list(many.glob('*.safetensors')))} files": [*castalia, "inspect", str(many)],
            "castalia generate, first token of a 14M": [*castalia, "generate", *first],
            "castalia train --dry-run, first step of a 14M": [*castalia, "train", "pythia-14m", *run, "--dry-run"],
            "transformers, first step of a 14M": [sys.executable, "-c", THEIR_FIRST_STEP],
        }
        taken: dict[str, list[tuple[float, float]]] = {label: [] for label in commands}
        for number in range(1 if args.quick else args.rounds + 1):
            for label, command in commands.items():
                second = seconds(command, args.cold)
                if number or args.quick:  # the first fills the page cache
                    taken[label].append(second)
    print("| command | median s | fastest s | CPU s, median |\n|---|---|---|---|")
    for label, found in taken.items():
        walls, spent = zip(*found, strict=True)
        print(f"| {label} | {statistics.median(walls):.2f} | {min(walls):.2f} | {statistics.median(spent):.2f} |")
        results.record(f"{label}, cold" if args.cold else label, walls)


if __name__ == "__main__":
    main()
