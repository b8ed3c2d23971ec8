"""The errors that users meet. The command line prints them as one message and exits with code 2."""


class CastaliaError(Exception):
    """Something the user can mend: the message says what, where, why, and the way out."""


class ConfigError(CastaliaError):
    """A config that cannot be used. Its message has one line for each problem found."""


class DataError(CastaliaError):
    """A corpus, index or tokenizer file that cannot be used."""


class CheckpointError(CastaliaError):
    """A checkpoint that is missing, damaged, unsafe, or of another model than asked for."""


class Stopped(CastaliaError):
    """A run that a signal ended, saved. Its message says how to go on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class TrainingError(CastaliaError):
    """A run that cannot go on, such as a loss that is no longer finite."""


def refuse_pointer(path: object, start: bytes, kind: type[Exception]) -> None:
    """Raises `kind` where a file holds the few lines that Git LFS puts in the place of a large one."""
    if start.startswith(b"version https://git-lfs"):
        raise kind(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
