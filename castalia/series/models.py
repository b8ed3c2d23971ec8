"""The models of a series one after the other: the next one loads while one computes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch

from castalia.checkpoint.restore import require_finite
from castalia.loading import build_model
from castalia.model.transformer import Transformer
from castalia.series.members import Member
from castalia.storage.lazy import as_bytes


class ModelsAhead:
    """Loads the model of a member when it is asked for, and then the one after it. A context manager."""

    def __init__(self, members: Sequence[Member], device: torch.device, dtype: torch.dtype) -> None:
        self.members, self.device, self.dtype = list(members), device, dtype
        self.pool, self.lock = ThreadPoolExecutor(1), Lock()
        self.loading: dict[int, Future[Transformer]] = {}

    def __enter__(self) -> ModelsAhead:
        return self

    def __exit__(self, *raised: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def model(self, number: int) -> Transformer:
        """The model of the member of this number. Raises CheckpointError where it cannot be loaded."""
        with self.lock:
            pending = self.loading.pop(number, None) or self.pool.submit(self._load, number)
            if number + 1 < len(self.members) and number + 1 not in self.loading:
                self.loading = {number + 1: self.pool.submit(self._load, number + 1)}
        return pending.result()

    def _load(self, number: int) -> Transformer:
        checkpoint = self.members[number].open()
        model = build_model(checkpoint, self.device, self.dtype)
        require_finite(dict(model.named_parameters()), checkpoint.path)
        return model


def digest_of(model: Transformer) -> str:
    """A digest of all parameters as they are loaded: of equal weights in one dtype it is equal."""
    mark = hashlib.sha256()
    for name, parameter in model.named_parameters():
        mark.update(name.encode())
        mark.update(as_bytes(parameter.detach().cpu()))
    return mark.hexdigest()[:32]
