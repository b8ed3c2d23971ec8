"""Repositories in the local Hugging Face cache. The network is never used."""

from __future__ import annotations

import os
import re
from pathlib import Path

from castalia.errors import CheckpointError
from castalia.storage.safetensors import safe_join

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+(/[\w.-]+)*)?")


def cached_revisions(name: str) -> dict[str, Path]:
    """The revisions of a hub's repository, owner/name, whose snapshots are in the local Hugging Face cache, by name."""
    repository = _cached_repository(name)
    snapshots = {}
    for reference in sorted((repository / "refs").rglob("*")):
        if reference.is_file():
            snapshot = safe_join(repository / "snapshots", reference.read_text(errors="replace").strip())
            if snapshot.is_dir():
                snapshots[str(reference.relative_to(repository / "refs"))] = snapshot
    return snapshots


def _cached_repository(name: str) -> Path:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    return cache / f"models--{name.replace('/', '--')}"


def cached_snapshot(hub_id: str) -> Path:
    """The folder of a repository's snapshot in the local Hugging Face cache. The network is never used.

    `hub_id`: owner/name, or owner/name@revision.
    """
    name, _, revision = hub_id.partition("@")
    revision = revision or "main"
    repository = _cached_repository(name)
    reference = safe_join(repository / "refs", revision)
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = safe_join(repository / "snapshots", commit)
    if not snapshot.is_dir():
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor in the local cache {repository.parent}. Fetch it first: "
            f"hf download {name} --revision {revision}"
        )
    return snapshot
