"""Tensors in files that nobody else sees, and that are gone with the process, however it ends."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DISK = "/var/tmp"  # unlike /tmp, it is never in memory


def zeros_on_disk(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a file without a name, in TMPDIR or else in /var/tmp. The system writes and reads its pages.

    Raises OSError where the disk is full.
    """
    folder = os.environ.get("TMPDIR") or (DISK if Path(DISK).is_dir() else tempfile.gettempdir())
    size = max(1, prod(shape) * dtype.itemsize)  # an empty file cannot be mapped
    with tempfile.TemporaryFile(dir=folder) as file, torch.inference_mode(False):
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a signal later
        values = torch.from_numpy(np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8))
        return values[: prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
