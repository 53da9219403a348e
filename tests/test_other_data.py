"""Other data, or the same again, is read as a run's own was: judged, predicted, gone on with, taken over."""

import json
import unicodedata

import numpy as np
import pytest
from conftest import Killed, resume_run, small_recipe, train_run
from encoders import make_encoder
from PIL import Image

from finetune import Images, RunError, TextTable, Training, UsageError, text_head
from finetune.base.files import read_json, write_json
from finetune.cli import main
from finetune.recipe.execution import Machine, Numerics
from finetune.recipe.serialize import asked, to_plain
from finetune.runs.start import Plan, new_setup
from finetune.store.run_folder import RunFolder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(make_encoder(tmp_path_factory.mktemp("bert")))


def trained_on(place, encoder, run, *, table=TextTable(), training=Training(), epochs=1):
    return train_run(run, text_head(texts=str(place), backbone=encoder, epochs=epochs, table=table, training=training))


def figures(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_quotes_and_missing_labels_are_as_in_the_run_unless_they_are_given(tmp_path, encoder, capsys):
    lines = [f'"cat number {n}"\tpos\na dog {n}\tneg\n' for n in range(12)] + ["no label\tNA\n"]
    place = tmp_path / "t.tsv"
    place.write_text("text\tlabel\n" + "".join(lines))
    table = TextTable(quotes="none", missing_labels="leave-out")
    run = trained_on(place, encoder, tmp_path / "run", table=table)
    own, same = figures(capsys, str(run.path)), figures(capsys, str(run.path), "--texts", str(place))
    assert own["part"] == same["part"] == "validation" and own["samples"] == same["samples"] == 4
    given = figures(capsys, str(run.path), "--texts", str(place), "--quotes", "auto")
    assert given["part"] == "all"  # read otherwise, it is other data
    assert main(["export", str(run.path)]) == 0
    assert read_json(run.path / "model.json", "export")["quotes"] == "none"
    capsys.readouterr()
    for more, first in (([], '"cat number 0"'), (["--quotes", "standard"], "cat number 0")):
        assert main(["predict", str(run.path / "model.pt"), str(place), *more]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[0])["text"] == first


def test_an_export_that_does_not_say_what_a_quote_is_reads_as_its_run_did(tmp_path, encoder, capsys):
    place = tmp_path / "t.tsv"
    place.write_text("text\tlabel\n" + "".join(f"cat number {n}\tpos\na dog {n}\tneg\n" for n in range(12)))
    run = trained_on(place, encoder, tmp_path / "run")
    assert main(["export", str(run.path)]) == 0
    description = read_json(run.path / "model.json", "export")
    assert description.pop("quotes") == "auto"
    write_json(run.path / "model.json", description)
    place.write_text('text\tlabel\n"one\tpos\ntwo\tneg\nthree"\tpos\n')
    capsys.readouterr()
    assert main(["predict", str(run.path / "model.pt"), str(place)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def grouped(path, shift=0):
    rows = [
        f"{'cat' if n % 2 else 'dog'} number {n},{'ab'[n % 2]},patient {(n // 2 + shift * (n // 8)) % 12}"
        for n in range(48)
    ]
    path.write_text("text,label,patient\n" + "\n".join(rows) + "\n")
    return path


def test_groups_that_changed_are_other_data_and_groups_of_other_data_do_not_matter(tmp_path, encoder, capsys):
    place = grouped(tmp_path / "g.csv")
    run = trained_on(place, encoder, tmp_path / "run", training=Training(group_column="patient"))
    assert figures(capsys, str(run.path), "--texts", str(place))["part"] == "validation"
    moved = tmp_path / "moved.csv"
    moved.write_text(place.read_text())
    assert figures(capsys, str(run.path), "--texts", str(moved))["part"] == "validation"
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "".join(f"cat {n},{'ab'[n % 2]}\n" for n in range(9)))
    assert figures(capsys, str(run.path), "--texts", str(other))["samples"] == 9
    grouped(place, shift=1)
    with pytest.raises(
        RunError, match=r"was trained on: as many texts by the same names, but with other sizes, contents, labels or"
    ):
        resume_run(run, epochs=2)
    assert main(["evaluate", str(run.path)]) == 1
    assert "is not what the run was trained on any more" in capsys.readouterr().err


def pictures(folder, names, dtype=np.uint8, low=0, high=255):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for one in range(8):
            noise = np.random.default_rng(one).integers(0, (high - low) // 4, (16, 16))
            Image.fromarray((low + noise + number * (high - low) // 2).astype(dtype)).save(folder / name / f"{one}.png")
    return folder


def test_weights_are_taken_over_by_the_meaning_of_class_names_whatever_their_order(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Äpfel")
    folder = pictures(tmp_path / "data", [decomposed, "Birne"])
    before = small_recipe(data=Images(str(folder), listing="suffix"), epochs=3, augment="none")
    run = train_run(tmp_path / "run", before)
    after = small_recipe(data=Images(str(folder)), augment="none")
    first, second = (
        new_setup(Plan(recipe, Numerics(), Machine(device="cpu"), init_from=str(run.path)))[0]
        for recipe in (before, after)
    )
    assert first.data.source.classes == [decomposed, "Birne"] and second.data.source.classes == ["Birne", "Äpfel"]
    weights = [setup.network.last_layer().weight for setup in (first, second)]
    assert weights[1].equal(weights[0].flip(0)) and not weights[1].equal(weights[0])


def test_pictures_of_16_bits_are_prepared_as_in_the_run_whose_weights_are_taken(tmp_path):
    folder = pictures(tmp_path / "data", ["a", "b"], np.uint16, 51_000, 52_000)
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(folder)), epochs=1, augment="none"))
    plan = Plan(small_recipe(data=Images(str(folder))), Numerics(), Machine(device="cpu"), init_from=str(run.path))
    setup, _ = new_setup(plan)
    assert setup.backbone.preprocessing.pixel_range[0] == pytest.approx(51_000, abs=30)
    assert f"(as in {run.path})" in setup.data.source.notes[0]
    given = Plan(
        small_recipe(data=Images(str(folder), pixel_range="0,9")),
        Numerics(),
        Machine(device="cpu"),
        init_from=str(run.path),
    )
    with pytest.raises(UsageError, match=r"--pixel-range 0,9: images are prepared as in .*; leave it out"):
        new_setup(given)


def test_the_same_command_with_the_old_way_said_goes_on_with_an_old_run(tmp_path):
    folder = pictures(tmp_path / "data", ["a", "b"])
    recipe = small_recipe(data=Images(str(folder)), augment="none")
    with pytest.raises(Killed):
        train_run(tmp_path / "run", recipe, die_after_steps=1)
    run = RunFolder(tmp_path / "run")
    record = read_json(run.recipe_file, "recipe")
    config = {**record["config"], "data": {k: v for k, v in record["config"]["data"].items() if k != "missing_labels"}}
    for way, is_asked in (("refuse", False), ("class", False), ("leave-out", True)):
        given = small_recipe(data=Images(str(folder), missing_labels=way), augment="none")
        assert ("missing_labels" in asked(given, to_plain(given), config)["data"]) is is_asked
