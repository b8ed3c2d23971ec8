"""The errors that users see. The command line prints the message alone and exits with code 2."""

import re

OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|can't start new thread|failed to map segment"
    "|resource temporarily unavailable"  # the stack of a new thread has no room
    "|could not create a primitive",  # oneDNN's words for it
    re.I,
)


class CastaliaError(Exception):
    """Something the user can fix: the message says what is wrong, where, why, and what to do."""


class ConfigError(CastaliaError):
    """A config that cannot be used. Its message has one line for each problem found."""


class DataError(CastaliaError):
    """A corpus, index or tokenizer file that cannot be used."""


class CheckpointError(CastaliaError):
    """A checkpoint that is missing, damaged, unsafe to read, or of another model than expected."""


class Stopped(CastaliaError):
    """A run that was saved and stopped because of a signal. Its message says how to resume it."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class TrainingError(CastaliaError):
    """A run that cannot continue, for example because its loss is not finite."""


def refuse_pointer(path: object, start: bytes, kind: type[Exception]) -> None:
    """Raise `kind` if a file that begins with `start` is a Git LFS pointer in place of the real file."""
    if start.startswith(b"version https://git-lfs"):
        raise kind(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def out_of_memory(error: BaseException) -> str | None:
    """The message where an error, of whatever library, says that memory is used up; None for any other error."""
    line = next(filter(OUT_OF_MEMORY.search, str(error).splitlines()), "")
    if not (line or isinstance(error, MemoryError)):
        return None
    reason = f" ({line.strip()[:300]})" if line else ""
    return (
        f"out of memory{reason}; nothing is half-written. Allow this process more, ask for less at a time, or let "
        "`castalia plan CONFIG` say what a run needs and which layout fits"
    )
