"""The checkpoints that are in memory: loaded when somebody asks for them, dropped by least use."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from castalia.checkpoint.opener import open_checkpoint
from castalia.checkpoint.restore import load_tokenizer_for
from castalia.checkpoint.tensors import Checkpoint
from castalia.data.tokenizer import Tokenizer
from castalia.loading import build_model
from castalia.model.transformer import Transformer
from castalia.serve.catalogue import ModelEntry


@dataclass
class LoadedModel:
    """A checkpoint in memory."""

    entry: ModelEntry
    checkpoint: Checkpoint
    model: Transformer
    tokenizer: Tokenizer
    users: int = 0  # leases that are out


class Library:
    """The loaded checkpoints."""

    def __init__(self, memory: int | None = None) -> None:
        """`memory`: bytes for weights, keys and values; None: what is free."""
        self.memory = memory
        self.loaded: dict[str, LoadedModel] = {}  # by the path; the latest used comes last
        self.lock = threading.Lock()

    @asynccontextmanager
    async def lease(self, entry: ModelEntry) -> AsyncIterator[LoadedModel]:
        """A checkpoint, loaded if it is not, which stays in memory until the block ends."""
        loaded = await anyio.to_thread.run_sync(self._load, entry)
        loaded.users += 1
        try:
            yield loaded
        finally:
            loaded.users -= 1

    def _load(self, entry: ModelEntry) -> LoadedModel:
        with self.lock:
            key = str(entry.path)
            if key not in self.loaded:
                checkpoint = open_checkpoint(key)
                self.loaded[key] = LoadedModel(
                    entry, checkpoint, build_model(checkpoint), load_tokenizer_for(checkpoint)
                )
            self.loaded[key] = self.loaded.pop(key)
            return self.loaded[key]
