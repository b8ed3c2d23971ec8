"""Read Castalia's own checkpoints: safetensors files and a manifest.

    checkpoints/
      latest                          "step_000200"
      step_000200/
        manifest.json                 every tensor's shape, dtype, extents and checksums; config; progress; versions
        model-00000.safetensors       parameters in fp32, which are their own masters; a file for each writing rank
        optimizer-00000.safetensors   the optimizer's other state; a file for each writing rank

A folder with such a name is complete; until it is, it lies in a workplace (see `castalia.files`). Older steps are not
touched before a newer one is on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from castalia.checkpoint.neox_defects import take_inherited
from castalia.checkpoint.tensors import AdamState, Checkpoint, CheckpointFacts, Progress
from castalia.config.load import as_it_was
from castalia.config.schema import RunConfig
from castalia.errors import CheckpointError
from castalia.reading import keys, plain_json, read_json, typed
from castalia.storage.checksum import crc32
from castalia.storage.derived import Cast
from castalia.storage.extent import Extent, FileTensor, Tile, tiled
from castalia.storage.lazy import ITEM_BYTES, TensorRef
from castalia.storage.safetensors import DTYPES, safe_join

MANIFEST = "manifest.json"
WITH_CHECKSUM = keys({"crc32": int}, ["crc32"])  # a manifest
OURS = re.compile(rb'\{"version": \d+, "progress": ')  # how `write_manifest` begins
LATEST = "latest"
# Of manifests that are read; the last is written. 1 had one checksum for each extent, none of headers.
VERSIONS = (1, 2)


def saved_steps(folder: str | Path) -> dict[int, Path]:
    """The complete checkpoints in a folder by step, in order."""
    steps = {}
    for path in Path(folder).glob("step_*/" + MANIFEST):
        if match := re.fullmatch(r"step_(\d+)", path.parent.name):
            steps[int(match[1])] = path.parent
    return dict(sorted(steps.items()))


def detect(path: Path) -> bool:
    """Whether there is a manifest of ours, or one that cannot be read. Other programs use this file name, too."""
    return (path / MANIFEST).is_file() and not has_foreign_manifest(path)


def has_foreign_manifest(path: Path) -> bool:
    """Whether a folder has a readable manifest.json that another program wrote."""
    try:
        content = (path / MANIFEST).read_bytes()
        if OURS.match(content):
            return False  # one that we wrote begins so, and `read` parses it
        manifest = plain_json(content)
    except (OSError, ValueError):  # missing, or damaged: `read` then says what is wrong
        return False
    return not isinstance(manifest, dict) or not {"progress", "optimizer_steps", "crc32"} & manifest.keys()


def read(path: Path) -> Checkpoint:
    """Open a step's folder. Only the manifest is read; files are checked for presence and size.

    Raises CheckpointError for a damaged manifest, and for files that are missing or have another size.
    """
    manifest = _read_manifest(path)
    try:
        chunks = Chunks(path, manifest)
        stored = {name: chunks.tensor(name, entry) for name, entry in manifest["model"].items()}
        optimizer = _optimizer(chunks, manifest, stored)
        model: dict[str, TensorRef] = {**stored, **_weights(chunks, manifest, stored)}
        chunks.require_disjoint()
        progress = typed(manifest["progress"], f"{path / MANIFEST}: progress", CheckpointError, Progress)
        stored_config, where = manifest["config"], f"{path / MANIFEST}: the config in it"
        if isinstance(stored_config, dict):
            as_it_was(stored_config)
        config = None if stored_config is None else typed(stored_config, where, CheckpointError, RunConfig)
        facts = CheckpointFacts(
            versions=manifest["versions"],
            data_fingerprint=manifest["data_fingerprint"],
            held_out=manifest.get("held_out"),  # None: an older run's, or one without `data.path`
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is malformed: {error!r}") from error
    progress, inherited = take_inherited(progress, manifest, config)
    return Checkpoint(str(path), "native", model, optimizer, progress, config, facts=facts, **inherited)


class Chunks:
    """The files of a step's folder as its manifest describes them, checked before any tensor is read."""

    def __init__(self, folder: Path, manifest: Mapping) -> None:
        """Raises CheckpointError for files that are missing or have another size than was written."""
        self.folder, self.manifest = folder, folder / MANIFEST
        self.block = manifest.get("block_bytes")  # None: version 1, with one checksum for each extent
        self.files: dict[str, tuple[Path, int]] = {}  # name -> path, bytes
        self.heads: dict[str, Extent | None] = {}
        self.taken: dict[str, list[tuple[int, int, str]]] = {}  # by file: (first byte, end, name) of each part
        for name, entry in manifest["files"].items():
            plain = isinstance(entry, int)  # version 1: the size alone
            path, size = safe_join(folder, name), _whole(entry if plain else entry["bytes"])
            self.files[name] = path, size
            _check_file(folder, name, size)
            if not plain:
                head = _whole(entry["head_bytes"])
                self.heads[name] = Extent(path, 0, head, (entry["head_crc32"],), max(head, 1), "its header")
                self.taken[name] = [(0, head, "the header")]

    def tensor(self, name: str, entry: Mapping) -> TensorRef:
        """A tensor of the manifest. Raises CheckpointError unless its extents lie in the files and fill its shape."""
        shape, dtype = tuple(map(_whole, entry["shape"])), DTYPES[entry["dtype"]]
        parts = [self._part(name, extent, shape, dtype) for extent in entry["extents"]]
        return tiled(f"{self.manifest}: {name}", parts, shape, dtype)

    def _part(self, name: str, entry: Mapping, whole: tuple[int, ...], dtype: str) -> Tile:
        """One extent: a rectangular part of a tensor of shape `whole`, as one rank wrote it."""
        start = tuple(map(_whole, entry.get("start", (0,) * len(whole))))
        shape = tuple(map(_whole, entry.get("shape", whole)))
        file, offset, size = entry["file"], _whole(entry["offset"]), prod(shape) * ITEM_BYTES[dtype]
        if file not in self.files:
            problem = f"{name} is to lie in {file!r}, which is not one of its files"
            raise CheckpointError(f"{self.manifest}: {problem}; refused")
        path, end = self.files[file]
        if offset + size > end:
            raise CheckpointError(
                f"{self.manifest}: {name} is to end at byte {offset + size} of {file}, which has {end}; refused"
            )
        if self.block is None:
            sums, block = [entry["crc32"]] if size else [], max(size, 1)
        else:
            sums, block = entry["crc32"], max(_whole(self.block), 1)
        if len(sums) != -(-size // block):
            raise CheckpointError(f"{self.manifest}: {name} has {len(sums)} checksums for {size} bytes; refused")
        sums = list(map(_whole, sums))
        self.taken.setdefault(file, []).append((offset, offset + size, name))
        extent = Extent(path, offset, size, sums, block, name, self.heads.get(file))
        return Tile(start, FileTensor.of(extent, dtype, shape))

    def require_disjoint(self) -> None:
        """Raises CheckpointError where two tensors, or a tensor and a file's header, claim the same bytes."""
        for file, taken in self.taken.items():
            ordered = sorted(taken)
            for (_, end, before), (start, _, name) in zip(ordered, ordered[1:], strict=False):
                if start < end:
                    raise CheckpointError(f"{self.manifest}: {name} is to lie in bytes of {before} in {file}; refused")


def _whole(value: Any) -> int:
    """The value of the manifest, which must be a whole number. Raises ValueError if it is not."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a whole number is expected")
    return value


def _check_file(path: Path, name: str, size: int) -> None:
    file = safe_join(path, name)
    if not file.is_file():
        raise CheckpointError(f"{path} is incomplete: {name} is missing. Use another step, or copy the folder again.")
    if (actual := file.stat().st_size) != size:
        raise CheckpointError(f"{file} is truncated: {actual} bytes, {size} were written. Use another step, or a copy.")


def _read_manifest(path: Path) -> dict:
    file = path / MANIFEST
    manifest = read_json(file, CheckpointError, WITH_CHECKSUM)
    written = manifest.pop("crc32")
    if crc32(canonical(manifest)) != written:
        raise CheckpointError(
            f"{file} is damaged: its content does not have the checksum {written} in it. Use another step."
        )
    if manifest.get("version") not in VERSIONS:
        raise CheckpointError(
            f"{file} has version {manifest.get('version')}, this program reads {' and '.join(map(str, VERSIONS))}; "
            "update castalia"
        )
    return manifest


def _optimizer(chunks: Chunks, manifest: Mapping, model: Mapping[str, TensorRef]) -> dict[str, AdamState] | None:
    """The state of AdamW, or of another optimizer, which has other tensors in place of the two moments."""
    if manifest["optimizer_steps"] is None:
        return None
    states: dict = {name: {"master": model[name], "step": step} for name, step in manifest["optimizer_steps"].items()}
    for key, entry in manifest["optimizer"].items():
        name, _, kind = key.rpartition(".")
        states[name][kind] = chunks.tensor(key, entry)
    return states


def _weights(chunks: Chunks, manifest: Mapping, masters: Mapping[str, TensorRef]) -> Mapping[str, TensorRef]:
    """The 16-bit weights of a converted checkpoint: masters rounded, or stored weights where these differ from that."""
    rounded = manifest.get("rounded_weights", {})
    stored = {name: chunks.tensor(name, entry) for name, entry in manifest.get("weights", {}).items()}
    return stored | {
        name: Cast(masters[name], DTYPES[dtype])
        for name, dtype in rounded.items()
        if name not in stored and DTYPES[dtype] != masters[name].dtype_name
    }


def canonical(manifest: Mapping) -> bytes:
    """The bytes that the manifest's own checksum is of."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
