"""The number format of long sums."""

from __future__ import annotations

import torch


def sum_dtype(device: torch.device) -> torch.dtype:
    """fp64, in which the sum of a million losses keeps its digits; fp32 on Apple's GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64
