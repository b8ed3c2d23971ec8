"""Files that lie elsewhere, such as s3://bucket/texts.jsonl.gz or hf://datasets/owner/name/data: read by fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from castalia.errors import DataError


class RemoteStatus(NamedTuple):
    """What of `os.stat_result` is asked of an input file."""

    st_size: int
    st_mtime_ns: str  # whatever changes with the content, as far as the place tells


@dataclass(frozen=True)
class RemoteFile:
    """A file by its URL, with the part of `Path` that reading a file of text needs."""

    url: str
    status: RemoteStatus

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        """The ending of the name."""
        return PurePosixPath(self.url).suffix

    def absolute(self) -> RemoteFile:
        """Itself: a URL says all."""
        return self

    def stat(self) -> RemoteStatus:
        """Its size and age, as they were when it was found."""
        return self.status

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The open file, which can be sought in. Raises OSError as a local one does."""
        with told(self.url):
            return import_module("fsspec").core.url_to_fs(self.url)[0].open(self.url, mode)


def is_remote(given: object) -> bool:
    """Whether an input is a URL."""
    return "://" in str(given)


@contextmanager
def told(url: str) -> Iterator[None]:
    """Errors of fsspec and of the packages that it needs for a protocol, as a DataError that names the URL."""
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"{url}: reading it needs a package: {error}; pip install 'castalia[data]', and the one for its protocol, "
            "such as s3fs or gcsfs"
        ) from None
    except ValueError as error:  # an unknown protocol
        raise DataError(f"{url}: {error}") from None


def files_below(url: str) -> list[RemoteFile]:
    """The file at a URL, or those of a folder and its subfolders or of a pattern with `*`, in the order of their names.

    Raises DataError where there is nothing, and where fsspec or a package that it needs is missing.
    """
    with told(url):
        system, path = import_module("fsspec").core.url_to_fs(url)
        if "*" in path:
            found: dict[str, Any] = system.glob(path, detail=True)
        else:
            found = system.find(path, detail=True)
    files = {name: about for name, about in sorted(found.items()) if about["type"] == "file"}
    if not files:
        raise DataError(f"input {url} does not exist")
    return [RemoteFile(system.unstrip_protocol(name), _status(about)) for name, about in files.items()]


def _status(about: dict[str, Any]) -> RemoteStatus:
    version = next((about[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in about), "")
    return RemoteStatus(int(about["size"]), str(version))
