"""Files that changed behind our back: cut, flipped, emptied, of another run. None is taken for good without a word."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Killed, assert_equal_values, comparable, metrics_lines, read, small_recipe, train_run

from finetune.base.files import BadFile
from finetune.cli import main
from finetune.errors import FinetuneError
from finetune.export.load import load_described
from finetune.store import checkpoint
from finetune.store.run_folder import RunFolder

RECIPE = small_recipe(augment="none", dropout=0.0)


def truncate(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def flip_a_bit(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def zero(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    count = chance.randint(1, min(4096, len(content) - start))
    return content[:start] + bytes(count) + content[start + count :]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncate,
    "bit flipped": flip_a_bit,
    "zeroed": zero,
}


class Bench:
    """A run that was killed in the middle, one that was not, another run to swap files with, exports of both."""

    def __init__(self, folder: Path, features: Path):
        self.folder = folder
        self.unbroken = train_run(folder / "unbroken", RECIPE)
        (self.features,) = features.glob("*.safetensors")
        self.other = train_run(folder / "other", RECIPE)
        self.stranger = train_run(folder / "stranger", small_recipe(augment="none", dropout=0.0, seed=4))
        with pytest.raises(Killed):
            train_run(folder / "broken", RECIPE, die_after_steps=10)
        self.broken = RunFolder(folder / "broken")
        for run in (self.unbroken, self.stranger):
            for suffix in ("pt", "safetensors"):
                assert main(["export", str(run.path), "--output", str(run.path / suffix / f"model.{suffix}")]) == 0

    def mutated(self, original: Path, twin: Path, kind: str, chance: random.Random, target: Path) -> None:
        """Put a changed version of `original` at `target`; `twin` is the same file of another run."""
        content = original.read_bytes()
        changed = twin.read_bytes() if kind == "swapped" else content
        # Also where the other run's file is the same. A last line without its end says what it said.
        while changed.rstrip(b"\n") == content.rstrip(b"\n"):
            changed = MUTATIONS.get(kind, flip_a_bit)(content, chance)
        target.unlink(missing_ok=True)
        target.write_bytes(changed)

    def copy(self, run: RunFolder) -> RunFolder:
        """As a copy, hard links and all."""
        place = self.folder / "copy"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(run.path, place)
        return RunFolder(place)

    # ---- One kind of file each; "" = all is well, else what was accepted that should not be -----------------------

    def of_a_run(self, name: str, kind: str, chance: random.Random, capsys) -> str:
        """Resume with one changed file: it must end like the unbroken run, or say what is wrong, or both."""
        run = self.copy(self.broken)
        twin = self.other.path / name
        self.mutated(
            run.path / name, twin if twin.exists() else twin.with_name("latest.pt"), kind, chance, run.path / name
        )
        capsys.readouterr()
        code = main(["resume", str(run.path), "--device", "cpu"])
        said = capsys.readouterr()
        text = said.out + said.err
        if "Traceback" in text or "fault of finetune" in text:
            return f"a traceback: {text[-300:]}"
        if code:
            lines = said.err.splitlines()
            if code != 1 or len(lines) != 1 or Path(name).name not in lines[0]:
                return f"exit {code}: {said.err}"
            return ""
        # Whoever reads a checkpoint now must get a good one, and the same weights as without the damage.
        for file in ("latest.pt", "best.pt"):
            ours, theirs = (read(one, file) for one in (run, self.unbroken))
            if file == "best.pt" and "best starts anew" in text:
                continue
            assert_equal_values(comparable(ours), comparable(theirs), file)
        if (
            metrics_lines(run) != metrics_lines(self.unbroken)
            and "metrics.jsonl is not what this run wrote" not in text
        ):
            return "metrics.jsonl differs, and nothing was said"
        return ""

    def of_an_export(self, name: str, kind: str, chance: random.Random, _capsys) -> str:
        place = self.folder / "export"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.unbroken.path / Path(name).parent, place)
        file = place / Path(name).name
        self.mutated(self.unbroken.path / name, self.stranger.path / name, kind, chance, file)
        try:
            load_described(next(path for path in place.iterdir() if path.suffix != ".json"))
        except FinetuneError as error:
            return "" if "\n" not in str(error) else f"more than one line: {error}"
        return "accepted"

    def of_the_cache(self, _name: str, kind: str, chance: random.Random, capsys) -> str:
        """A new run on damaged features ends like one on good ones."""
        entry = self.features
        good = entry.read_bytes()
        try:
            if kind == "swapped":
                entry.write_bytes(bytes(reversed(good)))
            else:
                self.mutated(entry, entry, kind, chance, entry)
            capsys.readouterr()
            run = RunFolder(self.folder / "copy")
            shutil.rmtree(run.path, ignore_errors=True)
            train_run(run.path, RECIPE)
            ours, theirs = (read(one) for one in (run, self.unbroken))
            assert_equal_values(comparable(ours), comparable(theirs))
            # What was damaged is good again: the next run must not meet it.
            return "" if len(entry.read_bytes()) == len(good) else "not made again"
        finally:
            entry.unlink(missing_ok=True)
            entry.write_bytes(good)


# What is changed, how it is judged, how many of a thousand.
KINDS: dict[str, tuple[str, int]] = {
    "checkpoints/step-000009.pt": ("of_a_run", 150),
    "checkpoints/latest.pt": ("of_a_run", 100),
    "checkpoints/best.pt": ("of_a_run", 50),
    "recipe.json": ("of_a_run", 150),
    "metrics.jsonl": ("of_a_run", 100),
    "frozen/frozen.json": ("of_a_run", 50),
    "cache": ("of_the_cache", 150),
    "pt/model.pt": ("of_an_export", 75),
    "pt/model.json": ("of_an_export", 75),
    "safetensors/model.safetensors": ("of_an_export", 50),
    "safetensors/model.json": ("of_an_export", 50),
}


def damage_everything(folder: Path, features: Path, share: float, capsys) -> tuple[Counter, list[str]]:
    """So many mutations of each kind of file, and what was accepted of them."""
    bench = Bench(folder, features)
    counts: Counter = Counter()
    wrong: list[str] = []
    for name, (judge, count) in KINDS.items():
        chance = random.Random(name)
        for number in range(max(2, round(count * share))):
            kind = [*MUTATIONS, "swapped"][(number + counts.total()) % 4]
            try:
                said = getattr(bench, judge)(name, kind, chance, capsys)
            except BadFile as error:
                said = f"a bad file is left: {error}"
            except AssertionError as error:
                said = f"not the weights of the unbroken run: {error}"
            counts[name] += 1
            if said:
                wrong.append(f"{name}, {kind}, number {number}: {said}")
    return counts, wrong


@pytest.fixture
def features(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "features"))
    return tmp_path / "features"


@pytest.mark.torture
def test_a_thousand_damaged_files_are_all_found(tmp_path, features, capsys):
    counts, wrong = damage_everything(tmp_path, features, 1.0, capsys)
    with capsys.disabled():
        print(f"\nmutations: {counts.total():,}, accepted: {len(wrong)}")
        for name, count in counts.items():
            print(f"  {count:>5}  {name}")
    assert wrong == [] and counts.total() >= 1_000


def test_damaged_files_are_found(tmp_path, features, capsys):
    counts, wrong = damage_everything(tmp_path, features, 0.01, capsys)
    assert wrong == [] and counts.total() >= 22


def test_a_checkpoint_without_its_trailer_would_be_read_with_other_numbers(trained, tmp_path):
    """Why there is a checksum: torch reads most flipped bits as other numbers, without a word."""
    content = bytearray((trained.checkpoints / "latest.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    torch.load(tmp_path / "flipped.pt", weights_only=True)
    with pytest.raises(BadFile, match="its content does not match its checksum"):
        checkpoint.read_checkpoint(
            tmp_path / "flipped.pt", json.loads((trained.path / "recipe.json").read_text())["id"]
        )
