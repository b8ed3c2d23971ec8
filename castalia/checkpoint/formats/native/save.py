"""Save the checkpoints of a run: `save` copies and returns, a thread writes. `read.py` describes the files."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from errno import EDQUOT, ENOSPC, ETIMEDOUT
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import castalia
from castalia.bars import Tally
from castalia.checkpoint.formats.native.read import LATEST, MANIFEST, VERSIONS, canonical, detect, read, saved_steps
from castalia.checkpoint.tensors import Progress, Shard
from castalia.config.schema import RunConfig
from castalia.errors import CastaliaError, CheckpointError
from castalia.files import NEW, beside, clean, delete, lock, put_in_place, remove, standing, sync, workplace, write_text
from castalia.storage.checksum import BLOCK_BYTES, crc32
from castalia.storage.lazy import InMemory, TensorRef
from castalia.storage.safetensors import DTYPE_CODES, write_safetensors

if TYPE_CHECKING:
    import torch

SYNC_BYTES = 32 << 20  # written to a file before the disk is told to begin
RANKS_TIMEOUT_S = 1800.0  # how long the ranks of a run wait for each other's parts
LOCK_TRIES = 10
BEST = "best"  # the folder of the checkpoint with the lowest validation loss, beside those of steps
REPLACEABLE = "replaceable"  # a file in a checkpoint's folder: the next save takes its place


class CheckpointSaver:
    """Saves the checkpoints of one run, which locks their folder. `save` copies and returns; a thread writes.

    Errors of the thread are raised by the next `save`, `join` or `close`. With several ranks each writes its own part
    and the first writes the manifest. Ranks wait for each other through files in the folder, so that saving needs no
    collectives, which could get between those of training. The first rank's saver must exist before the others save.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.folder = Path(folder)
        self.keep_last, self.keep_every = keep_last, keep_every
        self.rank, self.num_ranks = rank, num_ranks
        self._lock = None
        try:
            if rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(self.folder)
                clean(self.folder)
                if (steps := saved_steps(self.folder)) and not (self.folder / LATEST).exists():
                    write_text(self.folder / LATEST, steps[max(steps)].name)  # the first save was cut off before it
        except OSError as error:
            raise CheckpointError(
                f"cannot save checkpoints in {folder}: {error.strerror} ({error.filename})"
            ) from error
        from castalia.checkpoint.host_copies import HostCopies  # here, as reading goes without torch

        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._abandoned = Event()

    def save(
        self,
        model: Mapping[str, torch.Tensor | Shard],
        optimizer: Mapping[str, Mapping] | None,
        progress: Progress,
        config: RunConfig,
        data_fingerprint: str = "",
        held_out: str | None = None,
        *,
        replaceable: bool = False,
        best: bool = False,
    ) -> None:
        """Copy everything now and write it later.

        `model`: parameters by name, which are the fp32 masters. `optimizer`: name -> {exp_avg, ..., step}; None: no
        state is saved. Raises what went wrong with the last save.

        `replaceable`: the next one that is saved takes its place. `best`: it becomes the best one, not the latest.
        """
        self.join()
        about = describe(progress, config, data_fingerprint, held_out)
        # All tensors go into one set of copies, by (kind, name).
        given = {("model", name): _shard(tensor) for name, tensor in model.items()}
        steps: dict[str, int] | None = None
        tensors: dict[str, dict[str, Shard]] = {"model": {}}
        if optimizer is not None:
            for name, state in optimizer.items():
                kinds = (kind for kind in state if kind != "step")
                given |= {("optimizer", f"{name}.{kind}"): _shard(state[kind]) for kind in kinds}
            steps = {name: int(state.get("step", 0)) for name, state in optimizer.items()}
            tensors["optimizer"] = {}
        copies = self._copies.take({key: shard.tensor for key, shard in given.items()})
        for (part, name), shard in given.items():
            tensors[part][name] = replace(shard, tensor=copies[part, name])
        name = BEST if best else f"step_{progress.step:06d}"
        self._pending = self._thread.submit(self._write, name, tensors, steps, about, replaceable)

    @property
    def is_writing(self) -> bool:
        """Whether the last save is still being written."""
        return self._pending is not None and not self._pending.done()

    @property
    def has_failed(self) -> bool:
        """Whether the last save could not be written; `join` raises why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def abandon(self) -> None:
        """Stop waiting for other ranks' parts, since one of them has failed."""
        self._abandoned.set()

    def join(self) -> None:
        """Wait until the last save is on disk. Raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last save, and release the folder. Raises what went wrong."""
        try:
            self.join()
        finally:
            self._thread.shutdown()
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, CastaliaError):
            self.close()
            return
        self._abandoned.set()  # another rank died, most likely: its part will not come
        with suppress(CheckpointError):
            self.close()

    def keep_as_best(self, step: int) -> None:
        """Make a checkpoint that is on disk the best one, too. It takes no room while both stay."""
        self.join()
        if self.rank == 0:
            copy_as_best(self.folder, step)

    def _write(
        self, name: str, tensors: dict[str, dict[str, Shard]], steps: dict | None, about: dict, replaceable: bool
    ) -> None:
        target = self.folder / name
        temporary = beside(target, NEW) / target.name
        try:
            if self.rank == 0:
                workplace(target, NEW)
                temporary.mkdir()
            _wait_for(temporary, self._abandoned)
            parts = {kind: write_part(temporary, kind, self.rank, shards) for kind, shards in tensors.items()}
            if self.num_ranks > 1:
                write_text(temporary / f"rank-{self.rank:05d}.json", json.dumps({"parts": parts, "steps": steps}))
            if self.rank > 0:
                return
            everyone, steps = (
                _gather(temporary, self.num_ranks, self._abandoned) if self.num_ranks > 1 else ([parts], steps)
            )
            if replaceable:
                (temporary / REPLACEABLE).touch()
            write_manifest(temporary, about | {"optimizer_steps": steps}, everyone)
            commit(temporary, target)
            prune(self.folder, self.keep_last, self.keep_every)
        except OSError as error:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # gives the space back; the rest goes at the next start
            full = " To keep fewer: checkpoint.keep_last=2." if error.errno in (ENOSPC, EDQUOT) else ""
            raise CheckpointError(
                f"step {about['progress']['step']} could not be saved in {self.folder}: {error.strerror} "
                f"({error.filename or target.name}). Older checkpoints are as they were.{full}"
            ) from error


def _wait_for(path: Path, abandoned: Event) -> None:
    """Wait until another rank has made a file or folder. Raises TimeoutError, an OSError, if it does not."""
    end = time.monotonic() + RANKS_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end or abandoned.is_set():
            raise TimeoutError(ETIMEDOUT, "another rank did not write its part", str(path))
        time.sleep(0.01)


def _gather(folder: Path, num_ranks: int, abandoned: Event) -> tuple[list[dict], dict | None]:
    """The manifest entries of all ranks, and Adam's steps of all tensors, from the ranks' notes, which are deleted."""
    everyone: list[dict] = []
    steps: dict | None = {}
    for rank in range(num_ranks):
        note = folder / f"rank-{rank:05d}.json"
        _wait_for(note, abandoned)
        written = json.loads(note.read_text())
        everyone.append(written["parts"])
        steps = None if written["steps"] is None else (steps or {}) | written["steps"]
        note.unlink()
    return everyone, steps


def write_part(folder: Path, kind: str, rank: int, shards: Mapping[str, Shard]) -> dict:
    """Write one rank's file of one kind, bring it to disk, and return its manifest entries by tensor."""
    name = f"{kind}-{rank:05d}.safetensors"
    with ThreadPoolExecutor(1) as beside_writing:
        unsynced, syncs = 0, []

        def more(count: int) -> None:
            """Count bytes, and let the disk begin with what is written while the rest is copied."""
            nonlocal unsynced
            unsynced += count
            if unsynced >= SYNC_BYTES:
                unsynced = 0
                syncs.append(beside_writing.submit(sync, folder / name))

        entries = write_chunk(folder / name, name, {key: InMemory(shard.tensor) for key, shard in shards.items()}, more)
        for pending in syncs:
            pending.result()  # the system reports a write error once: the last sync would not see it again
    sync(folder / name)
    for key, shard in shards.items():
        if tuple(shard.tensor.shape) != shard.shape:
            place = {"start": list(shard.start), "shape": list(shard.tensor.shape)}
            entries[key] |= {"shape": list(shard.shape), "extents": [entries[key]["extents"][0] | place]}
    return entries


def write_chunk(path: Path, name: str, tensors: Mapping[str, TensorRef], advance: Tally) -> dict[str, dict]:
    """Write a file and return its manifest entries by tensor. `name`: the file's final name."""
    written = write_safetensors(path, tensors, advance)
    return {
        key: {
            "shape": list(ref.shape),
            "dtype": DTYPE_CODES[ref.dtype_name],
            "extents": [{"file": name, "offset": written.offsets[key], "crc32": written.sums[key]}],
        }
        for key, ref in tensors.items()
    }


def write_manifest(folder: Path, about: Mapping, ranks: list[dict[str, dict]]) -> None:
    """Write the manifest, with a checksum of its own, from the entries of all ranks."""
    files = {path.name: _file_entry(path) for path in sorted(folder.glob("*.safetensors"))}
    manifest: dict = {**about, "block_bytes": BLOCK_BYTES, "files": files, "model": {}, "optimizer": {}, "weights": {}}
    for parts in ranks:
        for kind in parts:
            for name, entry in parts[kind].items():
                known = manifest[kind].setdefault(name, entry)
                if known is not entry:
                    known["extents"] += entry["extents"]
    manifest["crc32"] = crc32(canonical(manifest))
    write_text(folder / MANIFEST, json.dumps(manifest))


def _file_entry(path: Path) -> dict[str, int]:
    """A file's size and the checksum of its header, which other programs trust."""
    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
    return {"bytes": path.stat().st_size, "head_bytes": len(head), "head_crc32": crc32(head)}


def commit(temporary: Path, target: Path) -> None:
    """Turn a complete temporary folder into a checkpoint, the latest one unless it is the best."""
    sync(temporary)
    old = put_in_place(temporary, target)  # an older one exists if the run was rewound and has reached this step again
    if target.name != BEST:
        write_text(target.parent / LATEST, target.name)
    for folder in (old, temporary.parent):
        if folder:
            remove(folder)


def copy_as_best(folder: Path, step: int) -> None:
    """Give a saved step's files a second name in the folder BEST, or copy them where the disk knows no second names."""
    source, target = folder / f"step_{step:06d}", folder / BEST
    temporary = workplace(target, NEW) / BEST
    temporary.mkdir()
    for file in source.iterdir():
        if file.name != REPLACEABLE:
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copyfile(file, temporary / file.name)
                sync(temporary / file.name)
    commit(temporary, target)


def best_step(folder: str | Path) -> int | None:
    """The step of the best checkpoint; None where there is none that can be read.

    Raises CheckpointError where the name is taken by what is not a checkpoint of ours, which would be replaced.
    """
    place = standing(Path(folder) / BEST)
    if place.is_symlink() or (place.exists() and not detect(place)):
        raise CheckpointError(
            f"{place} has the name of the best checkpoint and is none that castalia saved: rename it, or set "
            "checkpoint.keep_best=false"
        )
    try:
        return read(place).progress.step if place.exists() else None
    except CheckpointError:
        return None


def prune(folder: str | Path, keep_last: int | None, keep_every: int | None = None) -> None:
    """Delete what later saves replace, and all but the newest `keep_last` checkpoints and multiples of `keep_every`.

    The one that `latest` names stays; one that is to be replaced is none of the newest.
    """
    saved = saved_steps(folder)
    if not (Path(folder) / LATEST).is_file():
        return
    named = (Path(folder) / LATEST).read_text().strip()
    current = next((step for step, path in saved.items() if path.name == named), 0)
    replaced = {step for step, path in saved.items() if (path / REPLACEABLE).exists()}
    for step in replaced - {current}:
        delete(saved[step])
    if keep_last is None:
        return
    # Steps after `latest` were abandoned by a rewind.
    oldest_first = sorted(saved.keys() - replaced, key=lambda step: (step <= current, step))
    for step in oldest_first[:-keep_last]:
        path = saved[step]
        if step != current and not (keep_every and step % keep_every == 0):
            delete(path)


def describe(progress: Progress, config: RunConfig | None, data_fingerprint: str, held_out: str | None = None) -> dict:
    """The part of the manifest that is not about tensors."""
    import torch

    versions = {"castalia": castalia.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {
        "version": VERSIONS[-1],
        "progress": asdict(progress),
        "config": None if config is None else config.model_dump(mode="json"),
        "data_fingerprint": data_fingerprint,
        **({"held_out": held_out} if held_out else {}),
        "versions": versions,
    }


def _shard(given: torch.Tensor | Shard) -> Shard:
    return given if isinstance(given, Shard) else Shard.whole(given)


def refuse_if_in_use(folder: str | Path) -> None:
    """Raises CheckpointError if a run of any process holds the folder now."""
    if holder := in_use(folder):
        raise _in_use(Path(folder), holder)


def in_use(folder: str | Path) -> str | None:
    """The process that holds the folder now, as "process 12 on host"; None: no process does."""
    try:
        with open(Path(folder) / ".lock") as file:
            return None if lock(file, shared=True) else file.read().strip()
    except FileNotFoundError:
        return None


def _lock(folder: Path):  # noqa: ANN202 - an open file
    """Lock the folder until the returned file is closed; the system releases the lock if the process dies."""
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - stays open as long as the writer lives
    for _ in range(LOCK_TRIES):
        if lock(file):
            break
        time.sleep(0.05)  # `in_use` takes the lock for a moment
    else:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise _in_use(folder, holder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _in_use(folder: Path, holder: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} is in use by another run ({holder}). Wait for it or stop it, or set another checkpoint.dir."
    )
