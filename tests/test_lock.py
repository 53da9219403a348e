"""One run, one writer; with real second processes."""

import os
import subprocess
import sys

import pytest

from finetune.base.lock import OWNER_FILE, Owner, hold_lock, owner_from_text, owner_to_text, this_process
from finetune.errors import RunError


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path):
    code = (
        "import sys, pathlib\nfrom finetune.base.lock import hold_lock\n"
        "with hold_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid}, since 20"), hold_lock(tmp_path):
            pass
        holder.kill()  # no clean-up: the lock is stale now
        holder.wait()
        with hold_lock(tmp_path):
            assert owner_from_text((tmp_path / OWNER_FILE).read_text()).pid == os.getpid()
    assert not (tmp_path / OWNER_FILE).exists()


def test_what_is_known_of_an_owner_survives_as_text_and_other_text_says_nothing():
    owner = this_process()
    assert owner_from_text(owner_to_text(owner)) == owner and not owner.is_dead()
    for text in ("", "123", "[]", "{}", '{"pid": "x", "host": "h", "since": ""}', "\0"):
        assert owner_from_text(text) is None


def test_a_process_of_another_machine_is_never_taken_for_dead():
    ours = this_process()
    assert Owner(2**22 + 1, ours.host, ours.boot, "").is_dead()
    assert not Owner(2**22 + 1, ours.host, "another start", "").is_dead()
    elsewhere = Owner(2**22 + 1, "elsewhere", ours.boot, "2026-01-01 00:00:00")
    assert not elsewhere.is_dead() and str(elsewhere) == f"process {2**22 + 1} on elsewhere, since 2026-01-01 00:00:00"
