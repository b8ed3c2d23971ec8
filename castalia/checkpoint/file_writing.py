"""Writes the planned files of a checkpoint in a few threads, and keeps a journal of those that are complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import IO, Any

from castalia.bars import Tally
from castalia.checkpoint.file_plan import OutputFile
from castalia.errors import CheckpointError
from castalia.files import (
    MARK,
    UNFINISHED,
    clear,
    lock,
    sync,
    workplace,
)
from castalia.machine import usable_cores
from castalia.storage.derived import Narrowed
from castalia.storage.extent import verifying
from castalia.storage.lazy import TensorRef, everything
from castalia.units import memory_size

FLUSH_BYTES = 128 << 20  # written to a file before the disk is told to begin
MAX_WRITERS = 4  # threads, each with a piece of a file in memory


def write_files(
    outputs: Sequence[OutputFile], folder: Path, journal: IO[str], advance: Tally, allow_inf: bool
) -> dict[str, dict]:
    """Write several files at a time. Returns each file's entry in the journal. On an error or Ctrl-C all stop at once.

    Writer threads read and write; one more thread waits for the disk, so that syncing overlaps with the next file.
    """
    stopped = Event()

    def write_file(output: OutputFile, disk: ThreadPoolExecutor) -> Future[dict[str, Any]]:
        """Write one file under a temporary name. The result arrives when it is on disk and renamed."""
        final = folder / output.name
        part = final.with_name(final.name + ".part")
        final.parent.mkdir(parents=True, exist_ok=True)
        syncs: list[Future[None]] = []
        unflushed = 0

        def more(count: int) -> None:
            """Count bytes, and let the disk begin with what is written while the rest is read."""
            nonlocal unflushed
            if stopped.is_set():
                raise CancelledError
            unflushed += count
            if unflushed >= FLUSH_BYTES:
                unflushed = 0
                syncs.append(disk.submit(sync, part))
            advance(count)

        def complete(entry: dict[str, Any]) -> dict[str, Any]:
            """Bring the rest to disk, rename the file, and note it in the journal."""
            for pending in syncs:
                pending.result()  # the system reports a write error once: the last sync would not see it again
            sync(part)
            os.replace(part, final)
            note_done(journal, entry)
            return entry

        with verifying(output.tensors):
            result = output.write(part, more)
        if not allow_inf:
            refuse_infinite(output)
        return disk.submit(complete, {"name": output.name, "result": result})

    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(min(MAX_WRITERS, usable_cores())) as writers:
        futures = [writers.submit(write_file, output, disk) for output in outputs]
        try:
            entries = [future.result().result() for future in as_completed(futures)]
        except BaseException:
            stopped.set()
            writers.shutdown(cancel_futures=True)
            raise
    return {entry["name"]: entry for entry in entries}


def open_journal(target: Path) -> IO[str]:
    """The journal of an unfinished conversion, locked; a new one if there is none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = workplace(target, UNFINISHED) / MARK
        journal = open(path, "a+")  # noqa: SIM115 - the caller closes it
        if not lock(journal):
            journal.close()
            raise CheckpointError(f"{target} is being written by another conversion; wait for it, or stop it")
        if path.exists() and os.path.samefile(path, journal.fileno()):
            return journal
        journal.close()  # the other conversion has just finished and removed its workplace: try again


def completed(journal: IO[str], place: Path, mark: str) -> dict[str, dict]:
    """The files that an interrupted run of the same conversion completed. Removes leftovers of another conversion."""
    journal.seek(0)
    entries = []
    for line in journal.read().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the last line was cut off when the program died
            break
    if entries[:1] != [{"mark": mark}]:
        entries = [{"mark": mark}]
        clear(place)
    journal.truncate(0)
    for entry in entries:
        note_done(journal, entry)
    return {entry["name"]: entry for entry in entries[1:]}


def note_done(journal: IO[str], entry: dict[str, Any]) -> None:
    """Add a line to the journal: a file is complete, or the folder, or what all of it is made from."""
    journal.write(json.dumps(entry) + "\n")
    journal.flush()


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError unless the disk of the folder has so many bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: {memory_size(needed)} are needed, {memory_size(free)} are free; nothing is written. "
            "Make room, or leave out the optimizer state with --no-optimizer"
        )


def overflowed(tensors: Iterable[TensorRef]) -> list[Narrowed]:
    """The casts below these tensors in which values became infinite."""
    return [ref for ref in everything(tensors) if isinstance(ref, Narrowed) and ref.infinite]


def refuse_infinite(output: OutputFile) -> None:
    """Raise CheckpointError if values of a file that was written are too large for its dtype."""
    if casts := overflowed(output.tensors):
        count = sum(sum(cast.infinite.values()) for cast in casts)
        raise CheckpointError(
            f"{output.name}: {count} values, in {', '.join(cast.name for cast in casts[:3])}"
            f"{' and others' if len(casts) > 3 else ''}, are too large for {casts[0].dtype_name} and would become "
            "infinite. Choose bf16 or fp32 (--dtype), or let `castalia convert` write them so with --allow-inf"
        )
