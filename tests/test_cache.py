"""The folder of kept features: sizes, locks, `finetune cache`."""

import os
import subprocess
import sys

import pytest

from finetune.base.formatting import parse_size, size_text
from finetune.cli import main
from finetune.errors import UsageError
from finetune.features.cache import Entry, disk_limit, entries, entry


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("500 mb", 5 * 10**8), ("1.5TB", 15 * 10**11), ("20", 20 * 10**9)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1 PB", "GB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"is no size; give one like 20GB"):
        parse_size(text)


def test_sizes_are_shown():
    assert [size_text(size) for size in (0, 3_700, 3_700_000, 4.1e9, 2e12)] == [
        "0.0 KB", "3.7 KB", "3.7 MB", "4.1 GB", "2,000.0 GB",
    ]  # fmt: skip


def test_the_limit_is_a_quarter_of_what_is_free_also_where_there_is_no_folder_yet(folder):
    free = os.statvfs(folder.parent).f_bavail * os.statvfs(folder.parent).f_frsize
    assert disk_limit(folder / "deep") == pytest.approx(free / 4, rel=0.05)


def make(name: str) -> Entry:
    made = entry(name)
    made.path.parent.mkdir(parents=True, exist_ok=True)
    made.path.write_bytes(b"x" * 5_000)
    return made


HOLD = """
import sys, time
from finetune.features.cache import entry
kind, name = sys.argv[1:]
one = entry(name)
with one.in_use() if kind == "use" else one.filling(lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["use", "fill"])
def test_an_entry_that_a_live_process_uses_or_fills_stays_and_goes_when_that_is_killed(kind, capsys):
    used, other = make("abc"), make("def")
    with subprocess.Popen([sys.executable, "-c", HOLD, kind, "abc"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert main(["cache", "clear"]) == 0
        assert "abc is in use by a run: kept" in capsys.readouterr().out
        assert used.path.exists() and not other.path.exists()
        if kind == "use":
            main(["cache"])
            assert "in use" in capsys.readouterr().out
        process.kill()
    assert main(["cache", "clear"]) == 0 and not used.path.exists()
    assert "kept" not in capsys.readouterr().out and entries() == []


def test_an_entry_is_cleared_by_the_beginning_of_its_name(capsys):
    make("abc"), make("abd"), make("xyz")
    assert main(["cache", "clear", "ab"]) == 0
    assert [one.key for one in entries()] == ["xyz"]
    assert main(["cache", "clear", "ab"]) == 2
    assert "no entry begins with 'ab'" in capsys.readouterr().err


def test_an_empty_or_damaged_cache_is_listed(capsys, folder):
    assert main(["cache"]) == 0
    assert f"0 entries, 0.0 KB in {folder}" in capsys.readouterr().out.replace("\n", "")
    make("abc")
    assert main(["cache", "list"]) == 0
    assert "damaged" in capsys.readouterr().out


def test_a_process_waits_while_another_fills(capsys):
    class Waited(Exception):
        pass

    def waits():
        raise Waited

    with entry("abc").in_use(), entry("abc").filling(waits), pytest.raises(Waited), entry("abc").filling(waits):
        pass


def test_the_command_imports_no_torch():
    code = "import sys; from finetune.cli import main; main(['cache']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
