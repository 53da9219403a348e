import os

import pytest
import torch

from finetune.base.files import (
    TRAILER_BYTES,
    BadFile,
    link_or_copy,
    remove_leftovers,
    sha256_of_file,
    verify_trailer,
    write_atomically,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda stream: stream.write(b"old"))

    def fail(stream):
        stream.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_torch_file_with_a_trailer_loads_and_its_trailer_verifies(tmp_path):
    path = tmp_path / "file.pt"
    tensor = torch.arange(1000.0)
    write_atomically(path, lambda stream: torch.save({"a": tensor}, stream), trailer=True)
    verify_trailer(path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], tensor)


def test_every_flipped_bit_truncation_and_missing_trailer_is_found(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda stream: stream.write(os.urandom(300)), trailer=True)
    good = path.read_bytes()
    assert len(good) == 300 + TRAILER_BYTES
    for position in range(0, len(good) * 8, 7):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(BadFile):
            verify_trailer(path)
    for length in (0, 1, TRAILER_BYTES, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(BadFile):
            verify_trailer(path)


def test_the_returned_checksum_is_that_of_the_payload(tmp_path):
    path = tmp_path / "file"
    assert write_atomically(path, lambda stream: stream.write(b"abc")) == sha256_of_file(path)


def test_a_link_replaces_what_was_there_and_survives_the_loss_of_its_source(tmp_path, monkeypatch):
    source, path = tmp_path / "source", tmp_path / "path"
    source.write_bytes(b"new")
    path.write_bytes(b"old")
    link_or_copy(source, path)
    link_or_copy(source, path)  # onto itself: changes nothing, leaves nothing behind
    assert path.samefile(source) and sorted(os.listdir(tmp_path)) == ["path", "source"]

    def no_links(*_):
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    copy = tmp_path / "copy"
    link_or_copy(source, copy)
    source.unlink()
    assert path.read_bytes() == copy.read_bytes() == b"new"


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".latest.pt.1234.tmp", "latest.pt", "notes.tmp"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["latest.pt", "notes.tmp"]
