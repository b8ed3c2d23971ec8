"""Compilation, block by block: all blocks share one graph, and communication around a block stays outside of it."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from castalia.config.schema import RunConfig
from castalia.errors import ConfigError


def compile_blocks(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Replaces every block's forward by a compiled one, if the config says so (`auto` is for training to settle)."""
    if config.train.compile is not True:
        return
    if missing := missing_compiler(device.type):
        raise ConfigError(f"train.compile=true needs {missing}; install it, or set train.compile=auto")
    if config.parallel.pipeline == "zero-bubble":  # it goes through a graph twice: for the inputs, for the weights
        torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = code_folder()
    blocks: Any = model.blocks
    for block in blocks.values():
        block.forward = torch.compile(block.forward, fullgraph=True)
        block.register_forward_pre_hook(_arrived)


def missing_compiler(device: str) -> str | None:
    """What compiling for this kind of device lacks here."""
    if device == "cpu":
        return None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler: g++, or one that CXX names"
    if find_spec("triton") is None:
        return "Triton"
    found = any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
    return None if found else "a C compiler (for Triton): gcc, or one that CC names"


def code_folder() -> str:
    """Where compiled code is kept: torch's own choice, which torch 2.11 cannot make for a user without a name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id that no passwd file knows
        user = f"uid_{os.getuid()}"
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{user}"


def eager_before(first: int, step: int) -> AbstractContextManager:
    """In the steps before the first compiled one, compiled blocks run as they are written."""
    return torch.compiler.set_stance("force_eager") if step < first else nullcontext()


def _arrived(block: nn.Module, args: tuple) -> tuple:
    """A tensor that a collective is still to deliver would lose its gradient in a compiled graph; its copy does not."""
    x, *rest = args
    return (x if type(x) is Tensor else x.clone(), *rest)
