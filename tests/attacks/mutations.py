"""Every kind of file that is read, changed at random, through every verb that reads it.

    python -m tests.attacks.mutations [--cases 1000] [--seed 0] [--kinds "native manifest,corpus"]

Each case is a process of its own, with limits on its memory and on its processor time, that runs the verbs on a copy
with one change. A verb may refuse it with one of our errors, or give what it gives without the change; where the format
has no checksum it may give something else. Anything else is a failure: an exception, a result that is wrong although a
checksum could tell, a process that dies of a signal, that takes too long, or that wants too much memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import yaml
from typer.testing import CliRunner

from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import TargetLayout, WriteOptions
from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.cli.main import build
from castalia.config.load import load_config
from castalia.data.config_corpora import open_data
from castalia.data.dataset_writer import DatasetWriter
from castalia.errors import CastaliaError
from castalia.language_model import load_model
from castalia.storage.checksum import crc32
from castalia.storage.lazy import as_bytes

MEMORY_BYTES = 2 << 30  # more than the process has at its start
CPU_SECONDS = 30  # a case takes less than two; the limit is one of work, not of a busy machine's clock
WALL_SECONDS = 600  # of a process that waits for something

Verb = Callable[[Path], "str | None"]  # gives a digest of what it found, or None where nothing depends on it


def digest(*values: object) -> str:
    found = blake2b(digest_size=8)
    for value in values:
        found.update(value if isinstance(value, (bytes, memoryview)) else repr(value).encode())
    return found.hexdigest()


def cli(*words: object) -> None:
    """A verb as the command line runs it. Raises what it raises."""
    arguments = [str(word) for word in words]
    result = CliRunner().invoke(build(arguments[0]), arguments)
    if result.exit_code:
        raise CastaliaError(result.output) if isinstance(result.exception, SystemExit) else result.exception or OSError


def tensors_of(checkpoint: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = dict(checkpoint.model)
    for name, state in (checkpoint.optimizer or {}).items():
        found |= {f"{name}.{kind}": ref for kind, ref in state.items() if kind != "step"}
    return found


def load(path: Path) -> str:
    checkpoint = open_checkpoint(path)
    values = [(name, bytes(as_bytes(ref.read().contiguous()))) for name, ref in tensors_of(checkpoint).items()]
    return digest(sorted(values), checkpoint.progress, checkpoint.config)


def load_parts(path: Path) -> str:
    """As tensor ranks and those of ZeRO do: halves of rows, then halves of columns."""
    values = []
    for name, ref in sorted(tensors_of(open_checkpoint(path)).items()):
        for dim, size in enumerate(ref.shape):
            for start, stop in ((0, size // 2), (size // 2, size)):
                box = [slice(None)] * dim + [slice(start, stop)]
                values.append((name, bytes(as_bytes(ref.read(box).contiguous()))))
    return digest(values)


def convert_to(form: str) -> Verb:
    def work(path: Path) -> str:
        checkpoint = convert.prepare(open_checkpoint(path))
        plan = convert.plan_files(form, checkpoint, WriteOptions())
        target = path.parent / "out"
        convert.write(plan, target, "mark", lambda count: None)
        files = sorted(each for each in target.rglob("*") if each.is_file())
        found = digest(*(part for each in files for part in (each.name, each.read_bytes())))
        shutil.rmtree(target)
        return found

    return work


def run_model(path: Path) -> str:
    model = load_model(path)
    with torch.no_grad():
        return digest(bytes(as_bytes(model(torch.arange(8)[None]))))


def encode(path: Path) -> str:
    return digest(load_tokenizer_for(open_checkpoint(path)).encode("the light was good"))


def inspect_all(path: Path) -> None:
    cli("inspect", path)
    cli("inspect", path, "--tensors", "--json")


def read_corpus(path: Path) -> None:
    cli("data", "inspect", path / "words")
    cli("data", "stats", path / "words")
    cli("data", "batch", *batch_config(path))


def batch_config(path: Path) -> list[str]:
    return [
        f"data.path={path}/words",
        "data.seq_length=16",
        "train.steps=20",
        "train.batch_size=8",
    ]


def batches(path: Path) -> str:
    data = open_data(load_config([], batch_config(path)))
    return digest(*(data.batch(step).tokens.tobytes() for step in range(20)))


def train_on(path: Path) -> None:
    cli("train", path, "train.steps=5", "checkpoint.schedule_from=checkpoint")


VERBS: dict[str, Verb] = {
    "load": load,
    "parts": load_parts,
    "to hf": convert_to("hf"),
    "to native": convert_to("native"),
    "model": run_model,
    "tokenizer": encode,
    "inspect": inspect_all,
    "diff": lambda path: cli("diff", path, path),
    "status": lambda path: cli("status", path, "--json"),
    "plot": lambda path: cli("plot", path),
    "eval": lambda path: cli("eval", path),
    "generate": lambda path: cli("generate", path, "--prompt", "the", "--max-tokens", "2"),
    "train": train_on,
    "config show": lambda path: cli("config", "show", path / "config.yml"),
    "corpus": read_corpus,
    "batches": batches,
}
CHECKPOINT = ("load", "parts", "inspect", "diff", "model")


@dataclass(frozen=True)
class Kind:
    """Files of one kind: a pattern below a source folder, the path that the verbs get, and the verbs."""

    folder: str
    pattern: str
    verbs: tuple[str, ...]
    sums: bool = False  # whether checksums cover it: then results are those of the file as it was, or there are none
    path: str = "."


KINDS = {
    "native manifest": Kind("step", "manifest.json", (*CHECKPOINT, "to hf"), True),
    "native manifest, signed": Kind("step", "manifest.json", (*CHECKPOINT, "to hf")),  # with a checksum that fits
    "native files": Kind("step", "*.safetensors", (*CHECKPOINT, "to hf"), True),
    "older native manifest": Kind("old", "manifest.json", CHECKPOINT, True),
    "older native files": Kind("old", "*.safetensors", (*CHECKPOINT, "to hf"), False),  # not of their headers
    "torch.save": Kind("neox", "*/*.pt", (*CHECKPOINT, "to native"), True),
    "NeoX config": Kind("neox", "*/configs/*.yml", CHECKPOINT),
    "NeoX latest": Kind("neox", "latest", ("load", "inspect")),
    "torch.save, legacy": Kind("legacy", "*/layer_*.pt", (*CHECKPOINT, "to native")),
    ".bin": Kind("bin", "*.bin", CHECKPOINT),
    "safetensors": Kind("hf", "*.safetensors", (*CHECKPOINT, "to native")),
    "index json": Kind("hf", "*.index.json", CHECKPOINT),
    "castalia.json": Kind("hf", "castalia.json", (*CHECKPOINT, "to native")),
    "config.json": Kind("hf", "config.json", (*CHECKPOINT, "to native")),
    "tokenizer files": Kind("hf", "*token*", ("tokenizer", "inspect", "generate")),
    "adapters": Kind("peft", "adapter/*", (*CHECKPOINT, "to native"), path="adapter"),
    "corpus": Kind("corpus", "words.*", ("corpus", "batches")),
    "index caches": Kind("corpus", "words_train*", ("corpus", "batches"), True),
    "config.yml": Kind("run", "config.yml", ("config show", "inspect", "status", "eval", "train")),
    "metrics.jsonl": Kind("run", "metrics.jsonl", ("status", "plot", "train")),
    "events.jsonl": Kind("run", "events.jsonl", ("status", "plot", "train")),
    "latest": Kind("run", "checkpoints/latest", ("load", "inspect", "status", "train")),
}


def make_sources(root: Path) -> None:
    """A folder for each of the `KINDS`."""
    corpus = root / "corpus"
    corpus.mkdir()
    draw = random.Random(1)
    words = ["the", "light", "was", "good", "and", "there", "evening", "morning", "day", "waters"]
    with DatasetWriter(corpus / "words", "uint16") as writer:
        for _ in range(40):
            writer.add([*" ".join(draw.choices(words, k=draw.randint(8, 20))).encode(), 256])
    (root / "words.jsonl").write_text("\n".join(json.dumps({"text": " ".join(words)}) for _ in range(9)))
    cli("tokenizer", "train", root / "words.jsonl", "--vocab-size", 300, "--output", root / "tokenizer.json")
    run = root / "run"
    sizes = ["model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.vocab_size=320"]
    config = [f"data.path={corpus}/words", "data.split=90,10,0", "data.seq_length=16", "eval.batches=1", "eval.every=2"]
    config += [f"tokenizer.path={root}/tokenizer.json", "train.steps=4", "train.batch_size=4", "checkpoint.every=2"]
    cli("train", *sizes, *config, "precision.compute=fp32", f"checkpoint.dir={run}")
    batches(corpus)  # makes the index caches
    shutil.copytree(run / "checkpoints" / "step_000004", root / "step")
    _make_old(root / "step", root / "old")
    checkpoint = convert.prepare(open_checkpoint(run))
    for form, options in (
        ("hf", WriteOptions(shard_bytes=8000)),
        ("neox", WriteOptions(TargetLayout(tp=2, dp=2, zero=1))),
    ):
        plan, nested = convert.plan_files(form, checkpoint, options), form == "neox"
        convert.write(plan, root / form, "mark", lambda count: None, inside="global_step4" if nested else "")
    shutil.copytree(root / "neox", root / "legacy")
    for path in (root / "legacy").glob("*/layer_*.pt"):
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    plan = convert.plan_files("hf", convert.prepare(open_checkpoint(run), optimizer=False), WriteOptions())
    for form in ("bin", "peft/base"):
        (root / form).parent.mkdir(exist_ok=True)
        convert.write(plan, root / form, "mark", lambda count: None)
    from safetensors.torch import load_file, save_file

    torch.save(load_file(root / "bin" / "model.safetensors"), root / "bin" / "pytorch_model.bin")
    for name in ("model.safetensors", "castalia.json"):
        (root / "bin" / name).unlink()
    adapter = root / "peft" / "adapter"
    adapter.mkdir()
    place = "base_model.model.gpt_neox.layers.0.attention.dense.lora"
    save_file(
        {f"{place}_A.weight": torch.ones(2, 16), f"{place}_B.weight": torch.ones(16, 2)},
        adapter / "adapter_model.safetensors",
    )
    facts = {"peft_type": "LORA", "base_model_name_or_path": str(root / "peft" / "base"), "r": 2, "lora_alpha": 4}
    facts |= {"target_modules": ["attention.dense"], "task_type": "CAUSAL_LM", "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(facts))


def _make_old(step: Path, old: Path) -> None:
    """The same as an older release wrote it: with one checksum for each extent."""
    shutil.copytree(step, old)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["crc32"], manifest["block_bytes"]
    manifest["version"] = 1
    manifest["files"] = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    for entry in [*manifest["model"].values(), *manifest["optimizer"].values()]:
        for extent in entry["extents"]:
            (extent["crc32"],) = extent["crc32"]  # tensors of less than a block
    _sign(manifest)
    (old / "manifest.json").write_text(json.dumps(manifest))


def _sign(manifest: dict) -> None:
    manifest.pop("crc32", None)
    manifest["crc32"] = crc32(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())


# Mutations


def flip(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 4])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def overwrite(content: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(content)), draw.choice([1, 4, 8, 64])
    filler = draw.choice([b"\0" * length, b"\xff" * length, draw.randbytes(length)])
    return content[:start] + filler[: len(content) - start] + content[start + length :]


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice([0, len(content) - 1, draw.randrange(len(content))])]


def remove_part(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.choice([1, 8, 100]) :]


def repeat_part(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[: start + draw.choice([1, 8, 100])] + content[start:]


def swap_parts(content: bytes, draw: random.Random) -> bytes:
    length = min(draw.choice([1, 4, 16]), len(content) // 2)
    first, second = sorted(draw.randrange(len(content) - length + 1) for _ in range(2))
    if first + length > second:
        return flip(content, draw)
    return b"".join((content[:first], content[second : second + length], content[first + length : second],
                     content[first : first + length], content[second + length :]))  # fmt: skip


STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 10**12, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"), "", "x", "../x", "\0",
    "é" * 9, "9" * 5000, [], {}, [[]], [1, "x", None], {"x": 1}, ["("], ["*"], "(a+)+$", "step_000002",
)  # fmt: skip


def change_value(value: Any, draw: random.Random) -> Any:
    """One value somewhere in it becomes another, often of another type; or a key is lost, added or doubled."""
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, (dict, list)) and each:
            keys = list(each) if isinstance(each, dict) else list(range(len(each)))
            places += [(each, key) for key in keys]
            todo += [each[key] for key in keys]
    if not places:
        return draw.choice(STRANGE)
    holder, key = draw.choice(places)
    what = draw.choice(["strange"] * 5 + ["lost", "swapped", "near", "nested", "root"])
    if what == "lost":
        del holder[key]
    elif what == "swapped":
        other, there = draw.choice(places)
        holder[key], other[there] = other[there], holder[key]
    elif what == "near" and type(holder[key]) in (int, float):
        holder[key] += draw.choice([-1, 1, 1000])
    elif what == "nested":
        for _ in range(draw.choice([50, 300])):
            holder[key] = [holder[key]]
    elif what == "root":
        return draw.choice(STRANGE)
    else:
        holder[key] = draw.choice(STRANGE)
    return value


def change_json(content: bytes, draw: random.Random) -> bytes:
    try:
        return json.dumps(change_value(json.loads(content), draw)).encode()
    except (RecursionError, ValueError):  # a value was put into itself
        return b"[" * 100_000


def change_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    index = draw.randrange(len(lines))
    lines[index] = change_json(lines[index], draw) + b"\n"
    return b"".join(lines)


def change_yaml(content: bytes, draw: random.Random) -> bytes:
    bombs = (b"a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n", b"seed: 1:1:1\n", b"model: &m\n  x: *m\n", b"[" * 10_000)
    if draw.random() < 0.1:
        return content + draw.choice(bombs)
    return yaml.safe_dump(change_value(yaml.safe_load(content), draw)).encode()


def change_header(content: bytes, draw: random.Random) -> bytes:
    """Of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = change_json(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


BYTES = (flip, flip, flip, overwrite, truncate, remove_part, repeat_part, swap_parts)
STRUCTURED = {
    ".json": change_json,
    ".jsonl": change_lines,
    ".yml": change_yaml,
    ".safetensors": change_header,
}


def mutate(path: Path, kind: str, draw: random.Random) -> str:
    """Change a file. Returns what was done, in words."""
    content = path.read_bytes()
    where = f"{path.name} {len(content)}"
    if kind == "native manifest, signed":
        manifest = change_value(json.loads(content), draw)
        if isinstance(manifest, dict):
            _sign(manifest)
        path.write_text(json.dumps(manifest))
        return f"changed and signed {where}"
    if draw.random() < 0.04:
        path.unlink()
        if draw.random() < 0.5:
            path.mkdir()
            return f"a folder in place of {where}"
        return f"deleted {where}"
    change = draw.choice(BYTES)
    if path.suffix in STRUCTURED and draw.random() < 0.6:
        change = STRUCTURED[path.suffix]
    elif not content:
        return f"nothing in {where}"
    path.write_bytes(change(content, draw))
    return f"{change.__name__} {where}"


# Cases


def in_child(work: Callable[[], Any], limited: bool = True) -> tuple[str, Any]:
    """("done", what it gives), or how the process ended: "signal", "hang", "memory"."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2) if limited else (0, 1):
                os.dup2(null, descriptor)
            if limited:
                held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES,) * 2)
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS,) * 2)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            found = json.dumps(work()).encode()
        except BaseException:
            found = json.dumps({"failed": traceback.format_exc()}).encode()
        with open(writing, "wb") as pipe:
            pipe.write(found)
        os._exit(0)
    os.close(writing)
    found, end = b"", time.monotonic() + WALL_SECONDS
    with open(reading, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            part = pipe.read(1 << 16)
            if not part:
                break
            found += part
        else:
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang", "") if number in (signal.SIGXCPU, signal.SIGKILL) else ("signal", signal.Signals(number).name)
    return "done", json.loads(found)


def results(path: Path, verbs: tuple[str, ...]) -> dict[str, tuple[str, str | None]]:
    """For each verb ("gave", digest), ("refused", message) or ("failed", how)."""
    found: dict[str, tuple[str, str | None]] = {}
    for verb in verbs:
        try:
            found[verb] = ("gave", VERBS[verb](path))
        except (CastaliaError, OSError) as error:  # which the command line makes one line of
            found[verb] = ("refused", str(error)[:500])
        except MemoryError:
            found[verb] = ("failed", f"{verb}: too much memory")
        except BaseException:
            found[verb] = ("failed", f"{verb}: {traceback.format_exc()[-1500:]}")
    return found


def judge(before: Mapping, after: tuple[str, Any], sums: bool) -> tuple[str, str]:
    """("refused" | "same" | "other", "") or, as a failure, ("silent" | "traceback" | "hang" | "signal", how)."""
    end, found = after
    if end != "done":
        return end, str(found)
    if "failed" in found and isinstance(found["failed"], str):
        return "traceback", found["failed"]
    if failed := [how for outcome, how in found.values() if outcome == "failed"]:
        return "traceback", failed[0]
    changed = [verb for verb, (outcome, value) in found.items() if outcome == "gave" and before[verb][1] != value]
    if changed and sums:
        return "silent", f"{', '.join(changed)} gave another result"
    if any(outcome == "refused" for outcome, _ in found.values()):
        return "refused", ""
    return ("other", "") if changed else ("same", "")


FAILURES = ("silent", "traceback", "hang", "signal")


def campaign(cases: int, seed: int, kinds: list[str], root: Path) -> tuple[dict[str, Counter], list[str]]:
    """Outcomes of each kind, and a description of every failure."""
    sources, work = root / "sources", root / "case"
    sources.mkdir()
    end, problem = in_child(lambda: make_sources(sources), limited=False)
    assert (end, problem) == ("done", None), (end, problem)
    table: dict[str, Counter] = {name: Counter() for name in kinds}
    problems = []
    before: dict[str, Any] = {}
    for number in range(cases):
        name = kinds[number % len(kinds)]
        kind, draw = KINDS[name], random.Random(f"{seed} {number}")

        def fresh(kind: Kind = kind) -> Path:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(sources / kind.folder, work / kind.folder)
            if kind.folder == "run":  # which names them
                shutil.copytree(sources / "corpus", work / "corpus")
            return work / kind.folder / kind.path

        if name not in before:
            path = fresh()
            end, before[name] = in_child(lambda: results(path, kind.verbs))  # noqa: B023 - called at once
            wrong = {verb: each for verb, each in before[name].items() if each[0] != "gave"} if end == "done" else end
            assert not wrong, f"{name} as it is: {wrong}"
        path = fresh()
        files = sorted(each for each in (work / kind.folder).glob(kind.pattern) if each.is_file())
        what = mutate(draw.choice(files), name, draw)
        after = in_child(lambda: results(path, kind.verbs))  # noqa: B023 - called at once
        sums = kind.sums and not (what.startswith(("deleted", "a folder")) and kind.folder == "neox")
        outcome, how = judge(before[name], after, sums)
        table[name][outcome] += 1
        if outcome in FAILURES:
            problems.append(f"case {number} of seed {seed}, {name}, {what}: {outcome}: {how}")
            print(problems[-1], file=sys.stderr, flush=True)
    return table, problems


def show(table: Mapping[str, Counter]) -> str:
    columns = ("refused", "same", "other", *FAILURES)
    rows = [["file", "cases", *columns]]
    rows += [
        [name, str(sum(found.values())), *(str(found[column]) for column in columns)] for name, found in table.items()
    ]
    total: Counter = sum(table.values(), Counter())
    rows.append(["all", str(sum(total.values())), *(str(total[column]) for column in columns)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="only these, separated by semicolons")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        table, problems = campaign(
            args.cases, args.seed, args.kinds.split(";") if args.kinds else list(KINDS), Path(folder)
        )
    print(show(table))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
