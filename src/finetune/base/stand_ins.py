"""Files that are not what their name says, because something else was fetched in their place."""

from contextlib import suppress
from pathlib import Path

# By how they begin, in small letters: what they are, and what to do.
STAND_INS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; fetch that: git lfs pull",
    b"<!doctype html": "is a web page, not the file itself; download it anew",
    b"<html": "is a web page, not the file itself; download it anew",
}
LOOKED_AT_BYTES = 64


def what_stands_in(place: Path | bytes) -> str:
    """What a file, or what it begins with, is instead, and what to do; "" = nothing of that."""
    start = b""
    if isinstance(place, bytes):
        start = place[:LOOKED_AT_BYTES]
    else:
        with suppress(OSError), open(place, "rb") as stream:
            start = stream.read(LOOKED_AT_BYTES)
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((said for beginning, said in STAND_INS.items() if start.startswith(beginning)), "")
