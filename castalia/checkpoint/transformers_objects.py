"""Model and tokenizer objects of the library transformers, which Python code hands over in place of a path.

They are written by their own `save_pretrained` and read as any other folder, and filled again by `from_pretrained`: so
what counts is what their files say, whatever version of the library made the object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from castalia.bars import unseen
from castalia.checkpoint import convert
from castalia.checkpoint.file_plan import WriteOptions
from castalia.checkpoint.opener import open_checkpoint
from castalia.errors import CastaliaError, CheckpointError


class Savable(Protocol):
    """A model or a tokenizer of transformers: it writes itself into a folder."""

    @property
    def save_pretrained(self) -> Callable[..., Any]:
        """Writes files into the folder that is its first argument."""


@contextmanager
def written(given: Savable) -> Iterator[Path]:
    """A temporary folder with the object's files. Errors about them name its class in place of the folder."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "object"
        try:
            save(given, folder)
            yield folder
        except CastaliaError as error:
            raise type(error)(str(error).replace(str(folder), f"the {type(given).__name__}")) from error


def save(given: Savable, folder: Path) -> None:
    """Write the object's files into a folder, without the library's progress bar."""
    with redirect_stderr(StringIO()):
        given.save_pretrained(folder)


def fill(given: Any, path: str | Path) -> None:
    """Give a model object the weights of a checkpoint of its architecture, in the dtypes and on the devices it has.

    Raises CheckpointError where the checkpoint holds another model; the object is then as it was.
    """
    checkpoint = convert.prepare(open_checkpoint(path), optimizer=False)
    plan = convert.plan_files("hf", checkpoint, WriteOptions())
    with TemporaryDirectory() as place, redirect_stderr(StringIO()):
        folder = Path(place) / "model"
        convert.write(plan, folder, "", unseen)
        values = type(given).from_pretrained(folder).state_dict()
    holds = {name: tuple(value.shape) for name, value in given.state_dict().items()}
    if other := [name for name in holds.keys() | values.keys() if holds.get(name) != _shape(values.get(name))]:
        raise CheckpointError(
            f"{path} does not fit the {type(given).__name__} any more: {', '.join(sorted(other)[:4])} differ; open it "
            f"with `castalia convert {path} DST --to hf` and from_pretrained"
        )
    with torch.no_grad():
        for name, value in given.state_dict().items():
            value.copy_(values[name])


def _shape(value: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)
