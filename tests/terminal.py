"""A real pseudo-terminal, and what a program writes to it."""

import os
import re
import select
import struct
import subprocess
import time

import pytest

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_in_terminal(
    command: list[str], columns: int, *, environment: dict[str, str] | None = None, code: int = 0
) -> str:
    """What a program writes to a terminal that is so wide, with its escape sequences.

    The program has two minutes and must end with the exit code `code`.
    """
    if os.name != "posix":
        pytest.skip("pseudo-terminals are of POSIX")
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    variables = os.environ | {"TERM": "xterm-256color"} | (environment or {})
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    written, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                block = os.read(ours, 65536)
            except OSError:  # so Linux says that nobody is there any more
                break
            if not block:
                break
            written += block
    else:
        process.kill()
    os.close(ours)
    assert process.wait() == code, written
    return written.decode()
