"""torch.compile, block by block: all blocks share one graph, and communication around a block stays outside of it."""

from __future__ import annotations

import getpass
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from castalia.config.schema import RunConfig
from castalia.errors import ConfigError, TrainingError
from castalia.model.experts import ExpertMLP


def compile_blocks(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Compiles the forward pass of every block where `train.compile` is true; training has settled `auto` by now.

    Raises ConfigError where this machine cannot compile for the device.
    """
    if config.train.compile is not True:
        return
    if missing := missing_compiler(device.type):
        raise ConfigError(f"train.compile=true needs {missing}; install it, or set train.compile=auto")
    if config.precision.compute == "fp8" and device.type == "cpu":
        raise ConfigError(
            "train.compile=true: the code that torch's compiler writes for CPUs does not build with "
            "precision.compute=fp8; set train.compile=false"
        )
    if config.parallel.pipeline == "zero-bubble":  # its backward runs a graph twice: for inputs, for weights
        torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = code_folder()
    blocks: Any = model.blocks
    for block in blocks.values():
        block.eager = block.forward
        mixture = isinstance(getattr(block, "mlp", None), ExpertMLP)
        if mixture:  # how many rows an expert gets is known only while it computes: the graph ends before, and goes on
            block.mlp.forward = torch.compiler.disable(block.mlp.forward)
        block.forward = torch.compile(block.forward, fullgraph=not mixture)
        block.register_forward_pre_hook(_clone_async_tensor)


def fall_back_to_eager(models: Iterable[Sequence[nn.Module]], required: bool = False) -> None:
    """Lets all blocks run eagerly once compiling one of them has failed; a line on stderr says why.

    Where compiling is `required` that is a TrainingError.

    Each rank decides for itself, because a block communicates in the same order either way. Where only the backward
    pass cannot be compiled, half of the step is done already, and the error is raised.
    """
    from torch._dynamo.exc import TorchDynamoException  # the base class of inductor's errors, too

    every: Any = chain.from_iterable(models)
    blocks: list[Any] = [block for model in every for block in model.blocks.values()]

    def attempted(block: Any, compiled: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                reason = " ".join(str(error).strip().split("\n\n")[0].split())
                if required:
                    raise TrainingError(
                        f"blocks cannot be compiled here: {reason}; mend that, or set train.compile=false"
                    ) from error
                print(
                    f"note: blocks cannot be compiled here and stay eager (train.compile=auto): {reason}",
                    file=sys.stderr,
                    flush=True,
                )
            for other in blocks:
                other.forward = other.eager
            return block.eager(*args, **kwargs)

        return forward

    for block in blocks:
        block.forward = attempted(block, block.forward)


def missing_compiler(device: str) -> str | None:
    """The program or file that compiling for this type of device needs and this machine lacks; None if nothing is."""
    if device == "cpu":
        return None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler: g++, or one that CXX names"
    if device == "mps":
        return "another device: compiled blocks have not been tried on Apple's GPUs"
    if find_spec("triton") is None:
        return "Triton"
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "a C compiler (for Triton): gcc, or one that CC names"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Python's headers (for Triton): {header}, from python3-dev or the like"


def code_folder() -> str:
    """The folder of compiled code: torch's own choice, which torch 2.11 cannot make for a user without a name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id may be in no passwd file
        user = f"uid_{os.getuid()}"
    return os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{user}"


def eager_before(first: int, step: int) -> AbstractContextManager:
    """A context manager in which blocks run eagerly if `step` comes before the `first` compiled step."""
    return torch.compiler.set_stance("force_eager") if step < first else nullcontext()


def _clone_async_tensor(block: nn.Module, args: tuple) -> tuple:
    """Clones a pending async-collective tensor: inside a compiled graph its gradient would be dropped."""
    x, *rest = args
    return (x if type(x) is Tensor else x.clone(), *rest)
