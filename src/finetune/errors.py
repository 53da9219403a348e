"""What a user can be told: each error is one line that says what, the value, what is allowed and what to do."""

import errno
import warnings
from collections.abc import Sequence


class FinetuneError(Exception):
    """A failure the user can act on, told in one line.

    Attributes:
        exit_code: what the command returns.
        details: lines below that one, where one says too little.
    """

    exit_code = 1

    def __init__(self, text: str, details: Sequence[str] = ()):
        super().__init__(text)
        self.details = details

    def __str__(self) -> str:
        return "\n".join([self.args[0], *self.details])

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UsageError(FinetuneError):
    """A wrong command line or a wrong recipe: nothing was started."""

    exit_code = 2


class RunError(FinetuneError):
    """A run, checkpoint or export that cannot be used or continued."""

    exit_code = 1


# How torch's allocators say it, oneDNN, and CUDA's libraries, which need memory of their own.
OUT_OF_MEMORY_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
    "could not create a primitive",
    "ALLOC_FAILED",
    "unable to find an engine",
    "Unable to find a valid cuDNN algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once might have worked."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def say_nothing_of_large_images() -> None:
    """In a process of our own: PIL's warning of a large photo is none; it still refuses what would fill the memory."""
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")


def one_line(error: BaseException, length: int = 200) -> str:
    """What another library's error says, on one line."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def os_error_text(error: OSError) -> str:
    """What a person is told of a file or folder that cannot be read or written, wherever it was met."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path and its rights"


def in_words(error: BaseException) -> str:
    """What a person is told of any error, on one line: what we say ourselves as it is, of others the kind as well."""
    return error.args[0] if isinstance(error, FinetuneError) else f"{type(error).__name__}: {one_line(error)}"


class StoppedEarly(FinetuneError):
    """The run was asked to stop, saved its state and is worth calling again."""

    exit_code = 75


def reader_is_gone(error: OSError) -> bool:
    """Of an error while writing to standard output: whether a pipe's reader, or the terminal, is there no more."""
    return error.errno in (errno.EPIPE, errno.EIO)
