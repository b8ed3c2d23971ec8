"""Long work in parts that can be interrupted: what is done stands in a journal, and the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from castalia.bars import Advance, unseen
from castalia.files import beside
from castalia.machine import cache_folder
from castalia.series.members import Member, folder_of


def work_through(
    parts: Sequence[str],
    work: Callable[[str], Any],
    identity: str,
    output: Path | None = None,
    *,
    jobs: int = 1,
    advance: Advance = unseen,
) -> dict[str, Any]:
    """What `work` gives for each part, as values of JSON; parts that the journal holds are not done again.

    `jobs`: threads that work at once. `identity` changes with whatever the results depend on: a journal with another
    one is not used. `advance` learns how many parts there are, and of each when it is done. The journal lies
    beside `output`, and the caller removes it once the results are in their place; without an output it lies in the
    user's cache, and is removed here. Errors of `work` are raised; what was done before stays in the journal.
    """
    journal = journal_of(output) if output else _cached_journal(identity)
    advance(0, total=len(parts))
    journal.parent.mkdir(parents=True, exist_ok=True)
    known = _read(journal, identity, set(parts))
    for part in known:
        advance(1, part)
    with open(journal, "a" if known else "w") as file:
        if not known:
            _append(file, {"identity": identity})
        results = dict(known)
        for part, result in _in_threads([part for part in parts if part not in known], work, jobs):
            results[part] = result
            _append(file, {"part": part, "result": result})
            advance(1, part)
    if not output:
        journal.unlink(missing_ok=True)  # the same command at the same time has removed it
    return {part: results[part] for part in parts}


def journal_of(output: Path) -> Path:
    """The journal of the work whose result is a file."""
    return beside(output, "journal")


def _in_threads(parts: Sequence[str], work: Callable[[str], Any], jobs: int) -> Iterator[tuple[str, Any]]:
    """Each part with its result, as they are done. An error or an interruption ends the others that have not begun."""
    if jobs == 1:
        yield from ((part, work(part)) for part in parts)
        return
    pool = ThreadPoolExecutor(jobs)
    try:
        pending = {pool.submit(work, part): part for part in parts}
        for done in as_completed(pending):
            yield pending[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _append(file: IO[str], entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


def _read(journal: Path, identity: str, parts: set[str]) -> dict[str, Any]:
    """The results in a journal of this identity. A last line that a killed process left unfinished is cut off."""
    if not journal.is_file():
        return {}
    found: dict[str, Any] = {}
    with open(journal, "rb+") as file:
        end = 0
        for number, line in enumerate(file):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if number == 0 and entry.get("identity") != identity:
                return {}
            if entry.get("part") in parts:
                found[entry["part"]] = entry["result"]
            end += len(line)
        file.truncate(end)
    return found


def identity_of(members: Sequence[Member], *settings: object) -> str:
    """A digest of the settings and of path, size and time of all files of the members."""
    mark = blake2b(repr(settings).encode(), digest_size=16)
    for member in members:
        mark.update(f"\n{member.step} {member.path.absolute()}".encode())
        with suppress(Exception):  # a member that is no checkpoint has no files to look at
            for path in sorted(folder_of(member.path).iterdir()):
                status = path.stat()
                mark.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return mark.hexdigest()


def _cached_journal(identity: str) -> Path:
    return cache_folder() / "series" / f"{identity}.jsonl"


@contextmanager
def one_thread_each(jobs: int) -> Iterator[None]:
    """While several threads work at once, torch computes each operation in the thread that asks for it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if jobs > 1 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
