"""Compilation, block by block: all blocks share one graph, and communication around a block stays outside of it."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from castalia.config.schema import RunConfig
from castalia.errors import ConfigError


def compile_blocks(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Replaces every block's forward by a compiled one, if the config says so. The first steps then take minutes."""
    if not config.train.compile:
        return
    if device.type == "cpu" and not has_compiler():
        raise ConfigError(
            "train.compile needs a C++ compiler on a CPU: install g++, or name another in CXX; or set it to false"
        )
    if config.parallel.pipeline == "zero-bubble":  # it goes through a graph twice: for the inputs, for the weights
        torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
    blocks: Any = model.blocks
    for block in blocks.values():
        block.forward = torch.compile(block.forward, fullgraph=True)
        block.register_forward_pre_hook(_arrived)


def has_compiler() -> bool:
    """Whether inductor finds what it needs for a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _arrived(block: nn.Module, args: tuple) -> tuple:
    """A tensor that a collective is still to deliver would lose its gradient in a compiled graph; its copy does not."""
    x, *rest = args
    return (x if type(x) is Tensor else x.clone(), *rest)
