"""What a user can be told: each error is one line that says what, the value, what is allowed and what to do."""


class FinetuneError(Exception):
    """A failure the user can act on. `exit_code` is what the command returns."""

    exit_code = 1


class UsageError(FinetuneError):
    """A wrong command line or a wrong recipe: nothing was started."""

    exit_code = 2


class RunError(FinetuneError):
    """A run, checkpoint or export that cannot be used or continued."""

    exit_code = 1


def one_line(error: BaseException, length: int = 200) -> str:
    """What another library's error says, on one line."""
    return " ".join(str(error).split())[:length] or type(error).__name__


class StoppedEarly(FinetuneError):
    """The run was asked to stop, saved its state and is worth calling again."""

    exit_code = 75
