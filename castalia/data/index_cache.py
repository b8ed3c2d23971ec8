"""Index files with the names and arrays of GPT-NeoX, and beside them a fingerprint of what they were built from.

GPT-NeoX goes by the name alone, and silently reuses files of another split or of data that have changed. Here files
without a fingerprint are compared with a new index, and adopted if they are equal.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tokenize import TokenError

import numpy as np

from castalia.bars import Advance, unseen
from castalia.files import appearing, write_text
from castalia.machine import cache_folder

log = logging.getLogger(__name__)
Arrays = tuple[np.ndarray, ...]


def digest_of(*values: object) -> str:
    """A digest of arrays and of plain values."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(np.ascontiguousarray(value).data if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def index_names(
    prefix: str, split: str, num_samples: int | None, seq_length: int, seed: int, packing: str, allow_chopped: bool
) -> list[str]:
    """How names of index files begin: in GPT-NeoX today, and with plain packing also in its older releases."""
    old = f"{Path(prefix).name}_{split}_indexmap_{num_samples}ns_{seq_length}sl_{seed}s"
    current = f"{old}_{packing}pi{'_ac' if allow_chopped else ''}"
    return [current, old] if packing == "packed" and allow_chopped else [current]


def cached(
    prefix: str,
    cache_dir: str | None,
    names: list[str],
    parts: tuple[str, ...],
    fingerprint: str,
    build: Callable[[], Arrays],
    advance: Advance = unseen,
) -> Arrays:
    """The arrays `parts` from the files `{name}_{part}.npy`, memory-mapped, or if none of those fit from `build`.

    `names` are the possible names, the first of which is written. Files lie in `cache_dir`, else beside the corpus, or
    in the user's cache folder if that is not writable. `advance`: of a bar whose text says what is done.
    """
    near = Path(cache_dir) if cache_dir else Path(prefix).absolute().parent
    home = near if _writable(near) else _fallback(near)
    stems = [folder / name for folder in dict.fromkeys((home, near)) for name in names]
    advance(0, "looking for index files")
    for stem in stems:
        if (arrays := _load_known(stem, parts, fingerprint)) is not None:
            return arrays
    built = build()
    for stem in stems:
        stored = _load(stem, parts)
        if stored is None:
            continue
        if all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(stored, built, strict=True)):
            if stem.parent == home:
                _write_fingerprint(stem, fingerprint, built)
                return stored
        else:
            log.warning("index files %s_*.npy are of other data or another split: built anew", stem)
    if home != near:
        _warn_once(f"{near} is not writable: index files go to {home}; data.cache_dir chooses another folder")
    home.mkdir(parents=True, exist_ok=True)
    _fingerprint_file(home / names[0]).unlink(missing_ok=True)  # while files are replaced, none vouches for them
    advance(0, f"writing {sum(array.nbytes for array in built) / 1e6:,.0f} MB of index files")
    for part, array in zip(parts, built, strict=True):
        with appearing(home / f"{names[0]}_{part}.npy") as file:
            np.save(file, array)
    _write_fingerprint(home / names[0], fingerprint, built)
    return _load(home / names[0], parts) or built


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _fingerprint_file(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}_fingerprint.txt")


def _write_fingerprint(stem: Path, fingerprint: str, arrays: Arrays) -> None:
    """Write the digests of what the arrays were built from and of the arrays themselves."""
    write_text(_fingerprint_file(stem), f"{fingerprint}\n{_content(arrays)}\n")


def _content(arrays: Arrays) -> str:
    return digest_of(*(value for array in arrays for value in (str(array.dtype), array.shape, array)))


def _load_known(stem: Path, parts: tuple[str, ...], fingerprint: str) -> Arrays | None:
    """The arrays, if they were built from the same data and are as they were written. Damaged ones cause a warning."""
    try:
        known = _fingerprint_file(stem).read_bytes().decode("ascii", "replace").split("\n")
    except OSError:
        return None
    if known[0] != fingerprint or len(known) < 3:  # of other data; or an older release's, without the second line
        return None
    arrays = _load(stem, parts)
    if arrays is None or _content(arrays) != known[1]:
        log.warning("index files %s_*.npy are damaged: built anew", stem)
        return None
    return arrays


def _load(stem: Path, parts: tuple[str, ...]) -> Arrays | None:
    """The arrays, or None if a file is missing or does not hold one."""
    try:
        return tuple(np.asarray(np.lib.format.open_memmap(f"{stem}_{part}.npy", mode="r")) for part in parts)
    except (OSError, ValueError, TypeError, OverflowError, SyntaxError, TokenError, RecursionError, MemoryError):
        return None  # a damaged header can lead to any of these


def _writable(folder: Path) -> bool:
    """Whether files may be created in a folder. One that is marked read-only is respected even as root."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return os.access(existing, os.W_OK) and bool(existing.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def _fallback(folder: Path) -> Path:
    return cache_folder() / "index" / digest_of(str(folder))
