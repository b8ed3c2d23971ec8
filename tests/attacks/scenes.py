"""What is attacked: commands that write, the state that each begins in, and what must stand there in the end."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from castalia.checkpoint.opener import open_checkpoint
from castalia.errors import CastaliaError
from tests.attacks.disk import ERRORS
from tests.attacks.stage import Done, Stage

OURS = re.compile(r"\.castalia-|\.part(ial)?$")
# What an error's line must name: a path below these, or the folder that they are in.
WRITTEN = re.compile(r"\b(run|tuned|out|made|cache)|/work/\.:")
GROWS = ("latest", ".jsonl", ".csv")  # what stands there may be of any step
BEST = "/checkpoints/best/"  # as may what is in here, if it is whole
NOT_COMPARED = {"seconds", "tokens_per_second"}
TINY = [
    "model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "model.vocab_multiple=2", "data.path=words",
    "data.split=90,10,0", "data.seq_length=16", "data.cache_dir=cache", "tokenizer.kind=bytes",
    "precision.compute=fp32", "optimizer.lr=0.01", "train.compile=false", "train.steps=6", "train.batch_size=4",
    "train.micro_batch_size=2", "eval.every=3", "eval.batches=1", "log.peak_tflops=0.1", "checkpoint.every=2",
]  # fmt: skip
TRAIN = ["train", *TINY, "checkpoint.dir=run"]
FINETUNE = [
    "finetune", "run", "data.train=texts.jsonl", "checkpoint.dir=tuned", "train.steps=4", "train.epochs=null",
    "precision.compute=fp32",  # bf16 ends in a segmentation fault of oneDNN where memory is short
    "train.batch_size=2", "checkpoint.every=2", "train.compile=false", "log.peak_tflops=0.1", "--lora", "2",
    "--max-tokens", "2", "--prompt", "the",
]  # fmt: skip
PREPARE = ["data", "prepare", "texts.jsonl", "--tokenizer-kind", "bytes", "--append-eod", "--output", "made"]


@dataclass(frozen=True)
class Scene:
    """`before`: commands that lead to the state in which `words` begins. `again`: what a user types after it died."""

    words: Sequence[str]
    before: Sequence[Sequence[str]] = ()
    again: Callable[[Path], Sequence[str] | None] | None = None
    ranks: int = 1
    old: Callable[[Path], Any] | None = None  # changes the state after `before`
    job: str = ""  # the scheduler's, which knows its commands again


def go_on(run: str, first: Sequence[str]) -> Callable[[Path], Sequence[str]]:
    """`train RUN` where there is one."""
    return lambda folder: ["train", run] if (folder / run / "config.yml").exists() else first


def ranks(*layout: str, count: int = 2) -> Scene:
    words = [*TRAIN, "train.micro_batch_size=null", *layout]
    return Scene(words, again=go_on("run", words), ranks=count)


def without_run(folder: Path) -> None:
    for path in (folder / "tuned").iterdir():
        if path.name not in ("data", "finetune.yml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def other_texts(folder: Path) -> None:
    write_texts(folder / "texts.jsonl", 2)


SCENES: dict[str, Scene] = {
    "train": Scene([*TRAIN, "log.csv=true"], again=go_on("run", [*TRAIN, "log.csv=true"])),
    "train, keep_last": Scene(
        [*TRAIN, "checkpoint.keep_last=1"], again=go_on("run", [*TRAIN, "checkpoint.keep_last=1"])
    ),
    "train, a save each step": Scene(
        [*TRAIN, "checkpoint.every=1", "train.steps=3"],
        again=go_on("run", [*TRAIN, "checkpoint.every=1", "train.steps=3"]),
    ),
    "train, saved by time": Scene(
        [*TRAIN, "checkpoint.save_minutes=1e-9"], again=go_on("run", [*TRAIN, "checkpoint.save_minutes=1e-9"])
    ),
    "train CONFIG that resumes its folder": Scene([*TRAIN, "checkpoint.resume=run"]),
    "train RUN": Scene(["train", "run"], [[*TRAIN, "train.exit_interval=3"]], again=lambda folder: ["train", "run"]),
    "train RUN from an earlier step": Scene(["train", "run", "checkpoint.step=2"], [TRAIN]),
    "train RUN from an earlier step, keep_last": Scene(
        ["train", "run", "checkpoint.step=4"], [[*TRAIN, "checkpoint.keep_last=2"]]
    ),
    "finetune": Scene(FINETUNE, [TRAIN], job="4711"),
    "train CONFIG that fine-tunes": Scene(
        ["train", "tuned/finetune.yml"],
        [TRAIN, FINETUNE],
        again=go_on("tuned", ["train", "tuned/finetune.yml"]),
        old=without_run,
    ),
    "convert to hf": Scene(["convert", "run", "out", "--to", "hf"], [TRAIN]),
    "convert to neox": Scene(["convert", "run", "out", "--to", "neox", "--layout", "tp=2,dp=2,zero=1"], [TRAIN]),
    "convert to native": Scene(
        ["convert", "neox", "out", "--to", "native"], [TRAIN, ["convert", "run", "neox", "--to", "neox"]]
    ),
    "convert --force": Scene(
        ["convert", "run", "out", "--to", "hf", "--force"],
        [TRAIN, ["convert", "run", "out", "--to", "hf", "--step", "2"]],
    ),
    "convert to neox --force": Scene(
        ["convert", "run", "out", "--to", "neox", "--force"],
        [TRAIN, ["convert", "run", "out", "--to", "neox", "--step", "2"]],
    ),
    "convert --all-steps": Scene(["convert", "run", "out", "--to", "neox", "--all-steps"], [TRAIN]),
    "convert --all-steps --force": Scene(
        ["convert", "run", "out", "--to", "native", "--all-steps", "--force"],
        [TRAIN, ["convert", "run", "out", "--to", "native", "--all-steps", "--steps", "2,4", "--no-optimizer"]],
    ),
    "convert to peft": Scene(["convert", "tuned", "out", "--to", "peft"], [TRAIN, FINETUNE]),
    "merge-lora": Scene(["merge-lora", "tuned", "out"], [TRAIN, FINETUNE]),
    "data prepare": Scene(PREPARE),
    "data prepare over a corpus": Scene(PREPARE, [PREPARE], old=other_texts),
    "data merge": Scene(["data", "merge", "words", "words", "--output", "made"]),
    "data merge over a corpus": Scene(
        ["data", "merge", "words", "words", "--output", "made"], [["data", "merge", "words", "--output", "made"]]
    ),
    "data split": Scene(["data", "split", "words", "--output", "made", "--weights", "80,10,10"]),
    "tokenizer train": Scene(["tokenizer", "train", "texts.jsonl", "--output", "made/tokenizer.json"]),
    "tokenizer train over one": Scene(
        ["tokenizer", "train", "texts.jsonl", "--output", "made.json", "--vocab-size", "300"],
        [["tokenizer", "train", "texts.jsonl", "--output", "made.json"]],
    ),
    "diff --plot": Scene(["diff", "run/checkpoints/step_000002", "run", "--plot", "made/change.png"], [TRAIN]),
    "plot": Scene(
        ["plot", "run"], [TRAIN], old=lambda folder: (folder / "run" / "loss.png").write_bytes(b"an older one")
    ),
    "launch": Scene(["launch", "torchrun", *TINY, "--gpus-per-node", "2", "--output", "made.sh"]),
    "train on 2 ranks, dp": ranks(),
    "train on 2 ranks, ZeRO 1": ranks("parallel.zero=1"),
    "train on 2 ranks, tp": ranks("parallel.tp=2"),
    "train RUN from an earlier step on 2 ranks": Scene(
        ["train", "run", "checkpoint.step=2"], [[*TRAIN, "train.micro_batch_size=null", "parallel.tp=2"]], ranks=2
    ),
}


def write_texts(path: Path, seed: int = 1) -> None:
    draw = random.Random(seed)
    words = ["the", "light", "was", "good", "and", "there", "evening", "morning", "day", "waters"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(5, 30)))}) for _ in range(30)]
    path.write_text("\n".join(lines) + "\n")


class Theatre:
    """One folder in which all scenes are played, so that the paths in files are the same."""

    def __init__(self, home: Path, stage: Stage) -> None:
        self.home, self.stage = home, stage
        self.work = home / "work"
        self.ready: dict[str, tuple[dict[str, str], dict[str, str], list[list[tuple[str, str]]]]] = {}
        self.work.mkdir()
        write_texts(self.work / "texts.jsonl")
        self.play(["data", "prepare", "texts.jsonl", "--tokenizer-kind", "bytes", "--append-eod", "--output", "w"])
        for end in ("bin", "idx"):
            os.rename(self.work / f"w_text_document.{end}", self.work / f"words.{end}")
        self.keep(())

    def play(self, words: Sequence[str], ranks: int = 1) -> Done:
        done = self.stage.run(words, self.work, ranks=ranks)
        assert done.code == 0, f"castalia {' '.join(words)}\n{done.said}"
        return done

    def kept(self, key: Sequence[Any]) -> Path:
        return self.home / hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest()

    def keep(self, key: Sequence[Any]) -> None:
        shutil.copytree(self.work, self.kept(key), symlinks=True)

    def set_up(self, key: Sequence[Any]) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self.kept(key), self.work, symlinks=True)

    def open(self, name: str) -> tuple[dict[str, str], dict[str, str], list[list[tuple[str, str]]]]:
        """What a scene begins with, what it ends with undisturbed, and each rank's operations."""
        if name in self.ready:
            return self.ready[name]
        scene = SCENES[name]
        done: tuple[Any, ...] = ()
        for words in scene.before:
            longer = (*done, (tuple(words), scene.ranks))
            if not self.kept(longer).exists():
                self.set_up(done)
                self.play(words, scene.ranks)
                self.keep(longer)
            done = longer
        self.set_up(done)
        if scene.old:
            scene.old(self.work)
        self.keep([name])
        first = snapshot(self.work)
        operations = []
        for rank in range(scene.ranks):
            self.set_up([name])
            played = self.stage.run(scene.words, self.work, ranks=scene.ranks, rank=rank, job=scene.job)
            assert played.code == 0, f"{name}\n{played.said}"
            operations.append(played.operations)
        last = snapshot(self.work)
        assert not [path for path in last if OURS.search(path)]
        self.ready[name] = first, last, operations
        return self.ready[name]

    def attack(self, name: str, how: str, number: int, rank: int = 0) -> list[str]:
        """What is wrong after it, in words; nothing, mostly."""
        self.open(name)
        scene = SCENES[name]
        self.set_up([name])
        done = self.stage.run(scene.words, self.work, how, number, scene.ranks, rank, scene.job)
        if how not in ("kill", "torn", "power"):
            wrong = [f"told badly: {line}" for line in told_badly(done, scene.ranks)]
        else:
            wrong = [] if done.code in (0, -9) else [f"ended with {done.code}: {done.said[-600:]}"]
        return wrong + self.make_up(name, done.code != 0)

    def states(self, name: str, rank: int) -> Iterator[list[tuple[str, int]]]:
        """Puts the folder into each state in which `kill`, `torn` and `power` would leave it, and says which of them.

        The command runs once. What several attacks would leave is one state.
        """
        self.open(name)
        scene = SCENES[name]
        self.set_up([name])
        with tempfile.TemporaryDirectory(dir=self.home) as keep:
            done = self.stage.run(scene.words, self.work, "", None, scene.ranks, rank, scene.job, keep)
            assert done.code == 0, done.said
            found = json.loads(Path(keep, "states.json").read_text())
            for key, state in found["states"].items():
                self._put(state, Path(keep))
                yield [(how, n) for how, n, left in found["moments"] if left == key]

    def _put(self, state: dict[str, tuple[str, int, int]], contents: Path) -> None:
        """Make the folder what it was. `contents` has the files by the names of their contents."""
        shutil.rmtree(self.work)
        self.work.mkdir()
        for path, (name, mode, time_ns) in sorted(state.items()):
            target = self.work / path
            if name.startswith("-> "):
                target.symlink_to(name.removeprefix("-> "))
                continue
            if name:
                shutil.copyfile(contents / name, target)
                os.utime(target, ns=(time_ns, time_ns))
            else:
                target.mkdir()
            target.chmod(stat.S_IMODE(mode))

    def make_up(self, name: str, broken: bool) -> list[str]:
        """What is wrong with what an attack left, and with what the same command then makes of it if it was broken."""
        scene, (first, last, _) = SCENES[name], self.open(name)
        wrong = []
        for path, digest in snapshot(self.work).items():
            known = {first.get(path), last.get(path)} - {None}
            if known and digest not in known and not path.endswith(GROWS) and BEST not in path:
                wrong.append(f"neither old nor new: {path}")
        wrong += [told for best in self.work.glob("*/checkpoints/best") for told in damage(best)]
        if broken:
            words = scene.again(self.work) if scene.again else scene.words
            done = self.stage.run(words or (), self.work, ranks=scene.ranks, job=scene.job)
            if done.code != 0 and "exists already" not in done.said:  # then it must be complete
                return [*wrong, f"does not go on ({done.code}): {done.said[-700:]}"]
        return wrong + differences(last, snapshot(self.work))


def damage(checkpoint: Path) -> list[str]:
    """What of a checkpoint cannot be read."""
    try:
        found = open_checkpoint(checkpoint)
        for tensor in found.model.values():
            tensor.read()
    except CastaliaError as error:
        return [f"not whole: {error}"]
    return []


def told_badly(done: Done, ranks: int) -> list[str]:
    if done.code == 0:
        return []
    errors = [line for line in done.said.splitlines() if line.startswith("error: ")]
    found = [f"exit code {done.code}"] if done.code not in (1, 2) else []  # 1: of a rank that lost another
    found += [done.said[-1500:]] if "Traceback" in done.said else []
    others = ("is lost", "did not come to", "another rank did not")  # said of other ranks
    own = [line for line in errors if not any(words in line for words in others)]
    found += [f"{len(own)} errors: {done.said[-300:]}"] if not 1 <= len(own) <= ranks else []
    causes = ("No space left", "Read-only file system", "No such file")
    return found + [line for line in own if not (any(cause in line for cause in causes) and WRITTEN.search(line))]


def places(operations: Sequence[tuple[str, str]]) -> list[int]:
    """Numbers of operations, from 1: of those of one kind on files of one name, but for numbers, the first and last."""
    first: dict[tuple[str, str], int] = {}
    last: dict[tuple[str, str], int] = {}
    for number, (kind, path) in enumerate(operations, 1):
        key = kind, re.sub(r"[0-9a-f]{32}|\d+", "0", path)
        first.setdefault(key, number)
        last[key] = number
    return sorted({*first.values(), *last.values()})


def points(operations: Sequence[tuple[str, str]]) -> list[int]:
    """Numbers of operations, from 1. Of a run of writes to one file the first and the last."""
    found = []
    for number, here in enumerate(operations):
        beside = operations[max(0, number - 1)], operations[min(len(operations) - 1, number + 1)]
        if here[0] != "write" or beside != (here, here):
            found.append(number + 1)
    return found


def attacks(operations: Sequence[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    """All of one rank."""
    for number in points(operations):
        yield "kill", number
        yield "power", number
        if operations[number - 1][0] == "write":
            yield "torn", number
    yield "power", len(operations) + 1  # when all is done


def faults(operations: Sequence[tuple[str, str]], in_turn: bool = False) -> Iterator[tuple[str, int]]:
    """Of the disk, before whatever operation: each error at each place, or `in_turn` one error a place."""
    if in_turn:
        return zip(cycle(ERRORS), places(operations), strict=False)
    return ((how, number) for number in places(operations) for how in ERRORS)


def snapshot(folder: Path) -> dict[str, str]:
    """A digest of each file, without what tells times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name == ".lock":
            if OURS.search(path.name):
                found[name] = "a folder"
            continue
        found[name] = hashlib.blake2b(content(path), digest_size=8).hexdigest()
    return found


def content(path: Path) -> bytes:
    if path.name in ("events.jsonl", "header.txt"):  # of the last start
        return b""
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
        return repr([sorted((k, v) for k, v in line.items() if k not in NOT_COMPARED) for line in lines]).encode()
    if path.name == "metrics.csv":
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return repr([[(k, v) for k, v in row.items() if k not in NOT_COMPARED] for row in rows]).encode()
    return path.read_bytes()


def differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    left = [f"left: {path}" for path in found if path not in wanted]
    missing = [f"missing: {path}" for path in wanted if path not in found]
    return left + missing + [f"differs: {path}" for path in wanted if found.get(path, wanted[path]) != wanted[path]]
