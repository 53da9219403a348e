"""Files that were made to do harm: weights that run code, archives that blow up, pictures, names, links."""

import builtins
import io
import json
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import read, resume_run, small_recipe, train_run
from PIL import Image

from finetune import Images, RunError
from finetune.base.files import BadFile, sha256_of_file, write_atomically, write_json
from finetune.base.safe_load import load_plain
from finetune.cli import main
from finetune.data.decode import BrokenImage, read_image
from finetune.models.weight_files import read_weights
from finetune.store.run_folder import RunFolder


class Gadget:
    """Unpickled by a careless reader, it calls something."""

    def __init__(self, function: Callable, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def gadgets(marker: Path) -> dict[str, Gadget]:
    """Each would make the file `marker`."""
    code = f"open({str(marker)!r}, 'w').close()"
    script = marker.with_name("script.py")
    script.write_text(code)
    return {
        "open": Gadget(open, str(marker), "w"),
        "exec": Gadget(exec, code),
        "eval": Gadget(eval, code),
        "os.system": Gadget(os.system, f"touch {marker}"),
        "subprocess": Gadget(subprocess.check_call, ["touch", str(marker)]),
        "runpy": Gadget(runpy.run_path, str(script)),
        "getattr": Gadget(getattr, Gadget(builtins.__import__, "os"), "system"),
        "torch.save": Gadget(torch.save, 1, str(marker)),
        "pathlib": Gadget(Path.touch, marker),
        "io": Gadget(io.FileIO, str(marker), "w"),
    }


NAMES = list(gadgets(Path("/tmp/none")))


def hostile_bytes(gadget: Gadget, kind: str) -> bytes:
    stream = io.BytesIO()
    content = {"classifier.1.weight": torch.zeros(2), "classifier.1.bias": gadget}
    if kind == "bare pickle":
        return pickle.dumps(content, protocol=2)
    torch.save(content, stream, _use_new_zipfile_serialization=kind == "zip")
    return stream.getvalue()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """A folder with an export of a good run. Do not change it."""
    folder = tmp_path_factory.mktemp("exported")
    assert main(["export", str(trained.path), "--output", str(folder / "model.pt")]) == 0
    return folder


@pytest.fixture
def export(exported, tmp_path) -> Path:
    """An export of a good run, in a folder of its own."""
    return Path(shutil.copytree(exported, tmp_path / "export")) / "model.pt"


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_that_would_run_code_is_refused_by_name_and_runs_nothing(tmp_path, export, capsys, name, kind):
    marker = tmp_path / "ran"
    content = hostile_bytes(gadgets(marker)[name], kind)
    for suffix in ("pt", "pth"):
        file = tmp_path / f"hostile.{suffix}"
        file.write_bytes(content)
        with pytest.raises(
            BadFile, match=f"hostile.{suffix} (is refused: it holds more than plain tensors|cannot be read)"
        ):
            read_weights(file)
    # As weights, as an export whose json vouches for it, as a checkpoint with a good checksum.
    capsys.readouterr()
    assert main(["vgg_head", "--weights", str(file), "--run", str(tmp_path / "run"), "--device", "cpu"]) in (1, 2)
    error = capsys.readouterr().err
    assert "hostile.pth" in error and error.count("\n") == 1
    description = json.loads(export.with_suffix(".json").read_text())
    export.write_bytes(content)
    write_json(export.with_suffix(".json"), description | {"sha256": sha256_of_file(export)})
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    assert main(["predict", str(export), str(tmp_path / "picture.png")]) == 1
    error = capsys.readouterr().err
    assert "model.pt" in error and error.count("\n") == 1
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["os.system", "getattr"])
def test_a_checkpoint_that_would_run_code_is_passed_over_though_its_checksum_is_right(tmp_path, name):
    marker = tmp_path / "ran"
    run = train_run(tmp_path / "run", small_recipe(epochs=1))
    content = hostile_bytes(gadgets(marker)[name], "zip")
    for file in ("step-000007.pt", "latest.pt"):
        (run.checkpoints / file).unlink()
        write_atomically(run.checkpoints / file, lambda stream: stream.write(content), trailer=True)
    lines = resume_run(run)
    assert "step-000007.pt is refused" in lines[0] and "latest.pt is refused" in lines[1]
    assert read(run)["step"] == 7 and not marker.exists()


def test_neither_resume_nor_evaluate_nor_predict_run_what_lies_in_a_run_folder(tmp_path, capsys):
    marker = tmp_path / "ran"
    recipe = tmp_path / "mine" / "mine.py"
    recipe.parent.mkdir()
    assert main(["new", "vgg_head", str(recipe)]) == 0
    source = recipe.read_text()
    words = [
        str(recipe),
        "--epochs",
        "1",
        "--train-samples",
        "100",
        "--device",
        "cpu",
        "--run",
        str(tmp_path / "run"),
        "--quiet",
    ]
    assert main(words) == 0
    kept = tmp_path / "run" / "code" / "mine.py"
    assert kept.read_text() == source
    kept.write_text(f"open({str(marker)!r}, 'w')\n")
    assert main(["resume", str(tmp_path / "run"), "--epochs", "2", "--lr", "0.001", "--quiet"]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert main(["export", str(tmp_path / "run")]) == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    assert main(["predict", str(tmp_path / "run" / "model.pt"), str(tmp_path / "picture.png")]) == 0
    assert not marker.exists()


# ---- Archives --------------------------------------------------------------------------------------------------------


def saved(path: Path) -> Path:
    torch.save({"weight": torch.arange(1000.0)}, path)
    return path


def rewritten(
    path: Path, change: Callable[[list[tuple[zipfile.ZipInfo, bytes]]], None], compression=zipfile.ZIP_STORED
):
    """The same archive with other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for info, content in entries:
            archive.writestr(info.filename, content)
    return path


def test_a_compressed_archive_that_would_fill_the_memory_is_refused(tmp_path):
    def inflate(entries):
        number = next(number for number, (info, _) in enumerate(entries) if info.filename.endswith("data/0"))
        entries[number] = (entries[number][0], bytes(500_000_000))

    file = rewritten(saved(tmp_path / "bomb.pt"), inflate, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1_000_000
    with pytest.raises(BadFile, match=r"bomb\.pt is refused: it is compressed, which torch never does"):
        load_plain(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_holds_a_name_twice_is_refused(tmp_path):
    file = rewritten(saved(tmp_path / "twice.pt"), lambda entries: entries.append(entries[0]))
    with pytest.raises(BadFile, match=r"twice\.pt is refused: it holds 1 name\(s\) twice"):
        load_plain(file)


def test_entries_that_lie_over_each_other_are_refused(tmp_path):
    file = saved(tmp_path / "over.pt")
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        start = archive.start_dir
    # The sizes in the archive's directory, of each entry.
    while content[start : start + 4] == b"PK\x01\x02":
        struct.pack_into("<LL", content, start + 20, len(content), len(content))
        start += 46 + sum(struct.unpack_from("<HHH", content, start + 28))
    file.write_bytes(content)
    with pytest.raises(BadFile, match=r"over\.pt (is refused: its entries claim more than its|cannot be read)"):
        load_plain(file)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "archive/data/../../x"])
def test_an_entry_whose_name_leads_elsewhere_writes_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = rewritten(saved(tmp_path / "names.pt"), lambda entries: entries.append((zipfile.ZipInfo(name), b"content")))
    before = sorted(tmp_path.rglob("*"))
    with suppress(BadFile):
        load_plain(file)  # entries that no tensor names are never read
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/outside").exists()


def test_a_tensor_that_claims_more_than_its_bytes_is_refused(tmp_path):
    def shrink(entries):
        number = next(number for number, (info, _) in enumerate(entries) if info.filename.endswith("data/0"))
        entries[number] = (entries[number][0], b"\0" * 8)

    file = rewritten(saved(tmp_path / "short.pt"), shrink)
    with pytest.raises(BadFile, match=r"short\.pt cannot be read"):
        load_plain(file)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def png_of_size(path: Path, width: int, height: int) -> Path:
    """A one-bit PNG of that size, all black, in as few bytes as possible."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">LLBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    bomb = png_of_size(tmp_path / "bomb.png", 30_000, 30_000)
    assert bomb.stat().st_size < 200_000
    with pytest.raises(
        BrokenImage, match=r"bomb\.png cannot be decoded \(Image size \(900000000 pixels\) exceeds limit"
    ):
        read_image(bomb)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as the command does
def test_a_large_photo_is_not_refused(tmp_path):
    assert read_image(png_of_size(tmp_path / "photo.png", 10_000, 10_000)).shape == (3, 10_000, 10_000)


def test_a_picture_whose_camera_data_is_damaged_stays_as_it_is_and_stops_nobody(tmp_path):
    """Such a byte made PIL fail in a way of its own."""
    picture, about = Image.new("RGB", (12, 8), (9, 99, 200)), Image.Exif()
    about[0x0112], about[0x010E], about[0x829A] = 6, "hello", (1, 3)
    picture.save(tmp_path / "photo.webp", exif=about)
    content = bytearray((tmp_path / "photo.webp").read_bytes())
    assert read_image(tmp_path / "photo.webp").shape == (3, 12, 8)  # turned
    upright = read_image(tmp_path / "photo.webp")
    start = content.index(b"II*\0") if b"II*\0" in content else content.index(b"MM\0*")
    seen = set()
    for place in range(start, len(content)):
        for value in (0, 1, 127, 255):
            damaged = bytearray(content)
            damaged[place] = value
            (tmp_path / "damaged.webp").write_bytes(damaged)
            try:
                seen.add(tuple(read_image(tmp_path / "damaged.webp").shape))
            except BrokenImage as error:
                assert "damaged.webp cannot be decoded" in str(error)
    assert seen == {tuple(upright.shape), (3, 8, 12)}


# ---- Names and links -------------------------------------------------------------------------------------------------

ODD = ["a\nb", "\x1b[2J\x1b[31mred", "\x9b31m", "‮gnp", "a\rb", "\x07bell", "=cmd()", "<script>x</script>"]


def photos(folder: Path) -> Path:
    for label, grey in (("cat", 30), ("dog", 220)):
        (folder / label).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (12, 12), (grey + number, grey, grey)).save(folder / label / f"{number}.png")
    return folder


def obeyed(text: str) -> list[str]:
    """Characters that a terminal would obey rather than show."""
    return [one for one in text if not one.isprintable() and one != "\n"]


def test_names_with_newlines_and_escape_codes_are_shown_not_obeyed(tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    for name in ODD:
        shutil.copyfile(folder / "cat" / "0.png", folder / "cat" / f"{name}.png".replace("/", "-"))
    os.rename(folder / "cat", folder / "cat\x1b[31m\x9b\u202e")
    words = ["vgg_head", "--images", str(folder), "--epochs", "1", "--device", "cpu", "--run", str(tmp_path / "run")]
    assert main(words) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert main(["export", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "cat\\x1b[31m\\x9b\\u202e" in shown.out
    (folder / ".cache\x1b[31m").mkdir()  # left aside, and said so
    assert main(["predict", str(tmp_path / "run" / "model.pt"), str(folder)]) == 0
    predicted = capsys.readouterr()
    lines = [json.loads(line) for line in predicted.out.splitlines()]
    assert len(lines) == 16 + len(ODD) and any(name in line["file"] for line in lines for name in ODD[:1])
    assert "left aside: 1 folder(s) (.cache\\x1b[31m)" in predicted.err
    for text in (shown.out, shown.err, predicted.out, predicted.err):
        assert obeyed(text) == [], text[max(0, text.find("\x1b") - 150) :][:300]
    (folder / "dog" / "\x1b[31m\n.png").write_bytes(b"no picture")
    assert main([*words[:-1], str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err
    assert "\\x1b[31m\\n.png cannot be decoded" in error and error.count("\n") == 1 and obeyed(error) == []


def test_what_lies_outside_the_folder_is_read_only_when_allowed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = photos(tmp_path / "photos")
    (tmp_path / "private").mkdir()
    Image.new("RGB", (12, 12)).save(tmp_path / "private" / "secret.png")
    inside = folder / "cat" / "inside.png"
    inside.symlink_to("0.png")  # a link within the folder is no way out
    quick = ["--epochs", "1", "--device", "cpu", "--quiet"]
    assert main(["vgg_head", "--images", "photos", *quick]) == 0
    link = folder / "dog" / "more"
    link.symlink_to(tmp_path / "private", target_is_directory=True)
    absolute = f"image,label\n{tmp_path}/private/secret.png,cat\nphotos/dog/0.png,dog\nphotos/cat/0.png,cat\nphotos/dog/1.png,dog\n"
    Path("photos/list.csv").write_text(absolute.replace("photos/", ""))
    for images, named in (("photos", "dog/more/secret.png"), ("photos/list.csv", "private/secret.png")):
        capsys.readouterr()
        assert main(["vgg_head", "--images", images, *quick]) == 2
        error = capsys.readouterr().err
        assert "1 image(s) lie outside photos" in error and named in error and "give --allow-outside" in error
        assert main(["vgg_head", "--images", images, *quick, "--allow-outside"]) == 0
    assert main(["export", "runs/vgg_head-1"]) == 0
    for given in ("photos", "photos/list.csv"):
        capsys.readouterr()
        assert main(["predict", "runs/vgg_head-1/model.pt", given]) == 2
        assert "--allow-outside" in capsys.readouterr().err
        assert main(["predict", "runs/vgg_head-1/model.pt", given, "--allow-outside"]) == 0


def test_a_folder_that_is_itself_a_link_is_no_way_out(tmp_path):
    photos(tmp_path / "somewhere")
    (tmp_path / "photos").symlink_to(tmp_path / "somewhere", target_is_directory=True)
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(tmp_path / "photos")), batch_size=4, epochs=1))
    assert read(run)["status"] == "finished"


def test_a_record_of_frozen_weights_that_names_another_file_is_refused(tmp_path):
    run = train_run(tmp_path / "run", small_recipe(epochs=1), copy_frozen=True)
    record = json.loads((run.frozen / "frozen.json").read_text())
    for name in ("../recipe.json", "/etc/passwd"):
        write_json(run.frozen / "frozen.json", record | {"file": name})
        with pytest.raises(RunError, match=r"frozen\.json names .* outside"):
            resume_run(RunFolder(run.path), from_file=run.checkpoints / "step-000006.pt")


def test_nothing_is_loaded_in_a_way_that_could_run_code():
    """Each `torch.load` says so; nothing else that unpickles is used."""
    sources = Path(__file__).parent.parent / "src" / "finetune"
    for path in sources.rglob("*.py"):
        text = path.read_text()
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{path}: {line}"
            assert "trust_remote_code=True" not in line and "pickle.load" not in line, f"{path}: {line}"
    assert sys.modules["pickle"] is pickle
