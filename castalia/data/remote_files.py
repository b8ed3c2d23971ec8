"""Files that lie elsewhere, such as s3://bucket/texts.jsonl.gz or hf://datasets/owner/name/data: read by fsspec."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from castalia.errors import CastaliaError, DataError

PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")
QUERY = re.compile(r"(https?://[^\s?#'\"]+)[?#][^\s'\"]*")  # may hold a signature


class RemoteStatus(NamedTuple):
    """What of `os.stat_result` is asked of an input file."""

    st_size: int  # 0 where the place does not tell
    st_mtime_ns: str  # whatever changes with the content, as far as the place tells


@dataclass(frozen=True)
class RemoteFile:
    """A file in one of fsspec's file systems, with the part of `Path` that reading a file of text needs."""

    system: Any
    path: str  # in the system
    status: RemoteStatus

    def __str__(self) -> str:
        """The URL without passwords and signatures, for messages."""
        return without_secrets(self.system.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return PurePosixPath(str(self)).name

    @property
    def suffix(self) -> str:
        """The ending of the name."""
        return PurePosixPath(str(self)).suffix

    def absolute(self) -> RemoteFile:
        """Itself: a URL says all."""
        return self

    def stat(self) -> RemoteStatus:
        """Its size and age, as they were when it was found."""
        return self.status

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The open file. Raises DataError, as each reading from it does."""
        with told(str(self)):
            return io.BufferedReader(Reading(self.system.open(self.path, mode), str(self)))


class Reading(io.RawIOBase):
    """An open file of fsspec, whose errors are told by its URL."""

    def __init__(self, file: Any, url: str) -> None:
        super().__init__()
        self.file, self.url = file, url

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Whether the place sends parts of files."""
        return self.file.seekable()

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        with told(self.url):
            content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        with told(self.url):
            return self.file.seek(offset, whence)

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self.file.tell()

    def close(self) -> None:
        """See `io.RawIOBase`."""
        self.file.close()
        super().close()


def is_remote(given: object) -> bool:
    """Whether an input is a URL."""
    return "://" in str(given)


def without_secrets(text: str) -> str:
    """A text whose URLs have neither passwords nor queries."""
    return QUERY.sub(r"\1", PASSWORD.sub("", text))


@contextmanager
def told(url: str) -> Iterator[None]:
    """Errors of fsspec and of the packages that it needs for a protocol, as a DataError that names the URL."""
    place = without_secrets(url)
    try:
        yield
    except CastaliaError:
        raise
    except ImportError as error:
        raise DataError(
            f"{place}: reading it needs a package: {error}; pip install 'castalia[data]', and the one for its "
            "protocol, such as s3fs or gcsfs"
        ) from None
    except FileNotFoundError as error:  # which fsspec's HTTP makes of all that servers answer
        reason = f"cannot be read: {without_secrets(str(error.__cause__))}" if error.__cause__ else "does not exist"
        raise DataError(f"input {place} {reason}") from error
    except Exception as error:  # packages for protocols have kinds of their own
        raise DataError(f"{place}: {without_secrets(str(error)) or type(error).__name__}") from error


def find_remote(url: str) -> tuple[list[RemoteFile], bool]:
    """The files at a URL, and whether it is that of a single file.

    Else it is a folder, whose subfolders count, or a pattern with `*`; files are then in the order of their names.
    Raises DataError where there is nothing, and where fsspec or a package that it needs is missing.
    """
    with told(url):
        system, path = import_module("fsspec").core.url_to_fs(url)
        # The folders of HTTP are pages for people, whose links may lead anywhere.
        pages = "http" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,))
        if "*" in path and not pages:
            return _files(system, system.glob(path, detail=True), url), False
        about = system.info(path)
        if about["type"] == "file":
            return [RemoteFile(system, path, _status(about))], True
        return _files(system, system.find(path, detail=True), url), False


def _files(system: Any, found: dict[str, Any], url: str) -> list[RemoteFile]:
    files = {path: about for path, about in sorted(found.items()) if about["type"] == "file"}
    if not files:
        raise DataError(f"input {without_secrets(url)} does not exist")
    return [RemoteFile(system, path, _status(about)) for path, about in files.items()]


def _status(about: dict[str, Any]) -> RemoteStatus:
    version = next((about[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in about), "")
    return RemoteStatus(int(about["size"] or 0), str(version))
