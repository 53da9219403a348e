"""Predicting from Python: what `finetune.load` gives says what `finetune predict` prints, of whatever it is handed."""

import copy
import dataclasses
import inspect
import json
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import finetune
from finetune import RunError, StoppedEarly, UsageError
from finetune.api import FinishedRun, fit, resume
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.data.open import open_source, split_data
from finetune.export.weights import export
from finetune.options import ResumeOptions, RunOptions
from finetune.store.restore import trained_network
from finetune.store.run_folder import RunFolder
from finetune.tasks.conformal import half_width_of
from finetune.tasks.levels import levels_of
from finetune.tasks.novelty import NoveltyReference, reference_of

from conftest import small_recipe, train_run  # isort: skip


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """An export, and a folder of five digits beside it."""
    folder = tmp_path_factory.mktemp("export")
    export(trained, "best", folder / "model.pt")
    (folder / "digits").mkdir()
    for index, picture in enumerate(load_digits().images[:5]):
        Image.fromarray(picture[0].numpy()).save(folder / "digits" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(place):
    return finetune.load(place / "model.pt")


def printed(place, *words, capsys) -> list[dict]:
    capsys.readouterr()
    main(["predict", str(place / "model.pt"), *map(str, words), "--device", "cpu"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_a_list_and_a_folder_give_what_the_command_prints(place, model, capsys):
    files = [place / "digits" / f"{index}.png" for index in range(5)]
    lines = printed(place, place / "digits", capsys=capsys)
    one = model.predict(str(files[3]))
    assert one.label == "3" and one.to_plain().keys() == lines[3].keys()
    assert one.probability == pytest.approx(lines[3]["probability"], abs=1e-5)
    assert one.distance_percentile == pytest.approx(lines[3]["distance_percentile"], abs=1)
    for inputs in (place / "digits", files, [str(file) for file in files], tuple(files)):
        found = model.predict(inputs)
        assert [row.label for row in found] == [line["label"] for line in lines]
        assert [row.where["file"] for row in found] == [line["file"] for line in lines]
    assert [len(row.top) for row in model.predict(files, top_k=2)] == [2] * 5
    assert model.predict([]) == []


def test_pictures_arrays_and_tensors_in_memory_are_what_their_files_are(place, model):
    file = place / "digits" / "4.png"
    picture = Image.open(file)
    grey, colours = np.asarray(picture), np.asarray(picture.convert("RGB"))
    wanted = model.predict(file)
    for one in (picture, grey, grey[:, :, None], colours, torch.from_numpy(colours.copy()).permute(2, 0, 1)):
        found = model.predict(one)
        assert (found.label, found.top) == (wanted.label, wanted.top) and not found.where
    assert [row.label for row in model.predict([picture, file, grey])] == ["4"] * 3
    for wrong in (np.zeros((2, 2, 5), np.uint8), np.zeros((4, 4)), torch.zeros(3, 4, 4)):
        with pytest.raises(
            RunError, match=r"a picture cannot be an? .* of .*; give a path, a picture of PIL, an array"
        ):
            model.predict(wrong)
    with pytest.raises(UsageError, match="int is nothing to predict; give a path, a picture of PIL or an array"):
        model.predict(3)


def test_a_broken_one_raises_alone_and_is_an_error_in_its_place_among_others(place, model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match="cannot be decoded"):
        model.predict(tmp_path / "broken.png")
    good, bad = model.predict([place / "digits" / "0.png", tmp_path / "broken.png"])
    assert good.label == "0" and bad.label is None and "cannot be decoded" in bad.error
    # A column of a table has a value for each row, whatever that is.
    column = np.array([str(place / "digits" / "0.png"), str(tmp_path / "nowhere.png")], dtype=object)
    first, second = model.predict(column)
    assert first.label == "0" and "does not exist" in second.error
    first, second = model.predict([str(place / "digits" / "0.png"), str(tmp_path / "nowhere.png")])
    assert first.label == "0" and "does not exist" in second.error
    with pytest.raises(UsageError, match="no such file"):
        model.predict(tmp_path / "nowhere.png")


def test_the_network_itself_is_there_and_the_model_can_be_called_like_it(model):
    assert isinstance(model.module, torch.nn.Module) and not model.module.training
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), model.module(images))
    assert model.state_dict().keys() == model.module.state_dict().keys() and model.classes[3] == "3"
    assert "10 classes" in repr(model)
    with pytest.raises(AttributeError):
        _ = model.no_such_thing


def test_what_is_asked_of_the_network_is_done_to_it_and_the_model_predicts_as_before(place, capsys):
    model, file = finetune.load(place / "model.pt"), place / "digits" / "4.png"
    wanted = model.predict(file)
    assert model.train() is model and model.module.training and model.training
    assert model.predict(file) == wanted and model.module.training  # dropout draws nothing
    assert model.eval().double().predict(file).probability == pytest.approx(wanted.probability, abs=1e-6)
    assert next(model.module.parameters()).dtype == torch.float64
    assert model.to(torch.bfloat16).predict(file).label == "4" and model.device == torch.device("cpu")
    model.note = "mine"
    assert model.module.note == "mine"
    model = copy.deepcopy(finetune.load(place / "model.pt"))
    layer = model.classifier[-1]
    model.classifier = torch.nn.Sequential(*model.classifier[:-1], layer)
    assert model.module.classifier[-1] is layer and model.predict(file).label == "4"


def test_threads_share_a_model_and_what_it_computes_in_is_put_back(place, model, monkeypatch):
    files = sorted((place / "digits").glob("*.png"))
    wanted = [one.top for one in model.predict(files)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: model.predict(files, batch_size=1), range(24)))
    assert all([one.top[0].label for one in rows] == [top[0].label for top in wanted] for rows in found)
    distances = [[one.distance_percentile for one in rows] for rows in found]
    assert all(row == distances[0] for row in distances)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as torch has it
    stranger = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    stop, images = threading.Event(), torch.randn(4, 3, 32, 32)

    def call_it() -> None:
        while not stop.is_set():
            with torch.inference_mode():
                model(images)

    beside = threading.Thread(target=call_it)
    beside.start()
    try:  # what others ask of the network itself does not count
        assert {one.distance_percentile for one in (model.predict(files[0]) for _ in range(20))} == {distances[0][0]}
        assert model.predict(stranger).distance_percentile > 99
    finally:
        stop.set()
        beside.join()
    torch.use_deterministic_algorithms(True)
    try:
        model.predict(files[0])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    going = model.predictions(model.samples(files)[0], batch_size=1)
    next(going)
    assert torch.backends.cudnn.allow_tf32  # also while somebody reads it line by line


def test_what_cannot_be_is_refused_in_words(model, place, trained, tmp_path):
    for options, words in (
        ({"top_k": 2.5}, "--top-k 2.5: is no whole number"),
        ({"batch_size": "8"}, "--batch-size '8': is no whole number"),
        ({"unsure_below": "half"}, "--unsure-below 'half': is no number"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            model.predict(place / "digits", **options)
    with pytest.raises(UsageError, match="load: NoneType is no path"):
        finetune.load(None)
    run = FinishedRun(tmp_path / "run", "finished", {}, "")
    with pytest.raises(UsageError, match="--workers -1: not allowed"):
        dataclasses.replace(run, folder=trained.path).evaluate(workers=-1)
    with pytest.raises(RunError, match="check the path and its rights"):
        dataclasses.replace(run, folder=trained.path).export("/proc/nowhere/model.pt")
    (tmp_path / "model.pt2").write_bytes(b"")
    with pytest.raises(RunError, match=r"is a file for torch\.export\.load; give the \.pt"):
        finetune.load(tmp_path / "model.pt2")


def test_a_run_folder_stands_for_its_model_and_without_one_says_what_to_type(place, trained, tmp_path, capsys):
    assert finetune.load(place).file == place / "model.pt"
    assert main(["predict", str(place), str(place / "digits" / "1.png"), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "1"
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty"), "x.png"]) == 1
    assert "write it with: finetune export" in capsys.readouterr().err


def test_texts_of_a_list_and_of_a_column_with_gaps(tmp_path):
    from finetune import text_head

    recipe = text_head(texts="messages", backbone="bundled/bert", epochs=1)
    run = finetune.fit(recipe, tmp_path / "run", track="none", report=False, quiet=True, device="cpu")
    text = "where is my parcel, it should have been here on Monday"
    assert run.predict(text).label == "late_delivery"
    written = (run.folder / "model.pt").stat().st_mtime_ns
    column = np.array([text, float("nan"), None, "", "notes.txt"], dtype=object)
    found = run.predict(column)  # as pandas gives it
    assert [bool(one.error) for one in found] == [False, True, True, True, False]
    assert (run.folder / "model.pt").stat().st_mtime_ns == written  # made once
    (tmp_path / "letter.txt").write_text(text)
    assert run.predict(tmp_path / "letter.txt").where["file"].endswith("letter.txt")
    # In a list a str is a text, whatever it looks like; a path is a file, or says why not.
    words = [text, "letter.txt", "no/such/folder/", "I wrote to you about the report.csv"]
    assert [one.where["text"] for one in run.predict(words)] == words
    found = run.predict([tmp_path / "letter.txt", tmp_path / "nowhere.txt", run.folder / "recipe.json"])
    assert found[0].label == "late_delivery" and "nowhere.txt" in found[1].error and found[2].error
    assert run.predict("please look at the report.csv").where["text"].endswith("report.csv")  # one text, no list
    with pytest.raises(UsageError, match=r"gone\.csv: no such file"):
        run.predict("gone.csv")
    frame = SimpleNamespace(columns=["text", "when"], __iter__=None)
    with pytest.raises(
        UsageError, match=r"a SimpleNamespace of the columns text, when: .* as in predict\(table\['text'\]"
    ):
        run.predict(frame)
    figures = run.evaluate(device="cpu")
    assert figures["samples"] == 316 and figures["accuracy"] > 0.7
    assert finetune.load(run.folder / "model.pt").predict([text])[0].label == "late_delivery"


# ---- What an editor sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "options"), [(fit, RunOptions), (resume, ResumeOptions)])
def test_every_option_is_a_typed_and_documented_keyword_with_the_default_of_the_command_line(function, options):
    parameters, document = inspect.signature(function).parameters, inspect.getdoc(function)
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        parameter = parameters[field.name]
        assert parameter.annotation is not inspect.Parameter.empty, field.name
        assert re.search(rf"^ +[\w, ]*\b{field.name}\b[\w, ]*:", document, re.MULTILINE), f"{field.name} has no line"
        if field.name not in ("run", "resume"):  # a notebook's own
            assert parameter.default == field.default, field.name
            assert hints[field.name] is not None


def test_types_ship_and_the_package_says_what_it_has():
    assert (Path(finetune.__file__).parent / "py.typed").is_file()
    assert {"fit", "load", "resume", "LoadedModel", "Prediction", "FinishedRun"} <= set(dir(finetune))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = finetune.nothing


# ---- Not known --------------------------------------------------------------------------------------------------------


def test_a_picture_like_nothing_it_was_trained_on_is_told_apart(place, model, capsys):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    strange, digit = model.predict(noise), model.predict(place / "digits" / "0.png")
    assert strange.distance_percentile > 99 and strange.unsure == "unlike the training data" and strange.label
    assert digit.distance_percentile < 99 and not digit.unsure
    refused = model.predict(noise, unsure_below=0.01)
    assert refused.label is None and refused.probability is None and refused.top
    noise.save(place / "noise.png")
    (line,) = printed(place, place / "noise.png", "--unsure-below", "0.01", capsys=capsys)
    assert line["label"] is None and line["unsure"] == "unlike the training data" and line["distance_percentile"] > 99
    main(["predict", str(place / "model.pt"), str(place / "noise.png"), "--csv", "--unsure-below", "0.01"])
    header, row = capsys.readouterr().out.splitlines()
    assert header.startswith("file,label,probability,label_2") and row.split(",")[1:3] == ["", ""]
    (line,) = printed(place, place / "digits" / "0.png", "--unsure-below", "1", capsys=capsys)
    assert line["label"] is None and line["unsure"].startswith("probability 0.")
    assert main(["predict", str(place / "model.pt"), "x.png", "--unsure-below", "2"]) == 2
    assert "--unsure-below 2: not allowed; give a probability, 0 to 1" in capsys.readouterr().err


def test_distances_are_those_of_plain_cosines_and_copies_are_near(tmp_path):
    rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    reference = reference_of(rows)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2).fill_diagonal_(-1)
    torch.testing.assert_close(reference.distances, (1 - cosines.amax(1)).sort().values, rtol=0, atol=0.02)  # of 8 bits
    assert max(reference.percentiles(rows[:5])) == 0 and reference.percentiles(-7 * rows.sum(0, keepdim=True))[0] > 50
    assert reference.percentiles(rows[:2].view(2, 16, 1, 1)) == reference.percentiles(rows[:2])  # a feature map
    assert reference_of(rows[:3]) is None
    twice = reference_of(rows.repeat(2, 1))  # copies among them change nothing
    assert torch.equal(twice.distances, reference.distances) and reference_of(rows[:1].repeat(50, 1)) is None
    (tmp_path / "kept.safetensors").write_bytes(reference.to_file("sha256"))
    again = NoveltyReference.from_tensors(load_file(tmp_path / "kept.safetensors"))
    assert again.percentiles(rows * 2 + 1) == reference.percentiles(rows * 2 + 1)
    # As far as the rows lie from one another is not farther than they do.
    even = reference_of(torch.eye(20))
    assert len(set(even.distances.tolist())) == 1 and even.percentiles(torch.eye(21)[20:, :20] + 1) != [100.0]


def test_what_the_head_reads_is_kept_small_and_goes_with_the_export(trained, place):
    kept = load_file(trained.novelty_file)
    assert kept["rows"].shape == (1_438, 512) and kept["rows"].dtype == torch.int8
    description = json.loads((place / "model.json").read_text())
    assert description["novelty"]["layer"] == "classifier.1"
    assert (place / "model-novelty.safetensors").read_bytes() == trained.novelty_file.read_bytes()


def test_without_that_file_it_says_so_and_a_damaged_one_is_refused(place, tmp_path, capsys):
    for name in ("model.pt", "model.json"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    found = finetune.load(tmp_path / "model.pt").predict(place / "digits" / "0.png")
    assert found.distance_percentile is None and "model-novelty.safetensors is missing" in capsys.readouterr().err
    (tmp_path / "model-novelty.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match="does not match"):
        finetune.load(tmp_path / "model.pt").predict(place / "digits" / "0.png")


@pytest.mark.slow
def test_the_features_of_the_best_epoch_are_kept_where_the_backbone_trains(tmp_path):
    recipe = small_recipe(augment="none", epochs=2, trainable=finetune.Trainable((("*", "trainable", 0),)))
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    export(run, "best", tmp_path / "model.pt")
    model = finetune.load(tmp_path / "model.pt")
    train = split_data(open_source(recipe.data, "classification"), recipe).train[:20]
    pictures = [load_digits().images[index, 0].numpy() for index in train.tolist()]
    # Those that it was trained on lie at no distance at all: the features are those of this network.
    assert {one.distance_percentile for one in model.predict(pictures)} == {0.0}
    export(run, "latest", tmp_path / "latest.pt")  # the best epoch is the last one, or its head reads other features
    best, latest = (trained_network(run, which)[1].progress.step for which in ("best", "latest"))
    assert ("novelty" in json.loads((tmp_path / "latest.json").read_text())) == (best == latest)
    # Trained on, another epoch is best: until its features are kept, nothing is said of distances.
    kept = run.novelty_file.read_bytes()
    finetune.resume(run.path, epochs=4, lr=1e-3, quiet=True, device="cpu")
    assert trained_network(run, "best")[1].progress.step > best and run.novelty_file.read_bytes() != kept
    export(run, "best", tmp_path / "model.pt")
    assert (tmp_path / "model-novelty.safetensors").read_bytes() == run.novelty_file.read_bytes()
    run.novelty_file.write_bytes(kept)  # of the epoch that was best before
    export(run, "best", tmp_path / "model.pt")
    assert "novelty" not in json.loads((tmp_path / "model.json").read_text())
    assert finetune.load(tmp_path / "model.pt").predict(pictures[0]).distance_percentile is None
    assert not (tmp_path / "model-novelty.safetensors").exists()


def test_a_stop_after_the_last_step_is_heard_and_whoever_resumes_goes_on_there(tmp_path, capsys):
    class Asking:
        def __init__(self, stop):
            self.stop = stop

        def validated(self, event):
            if event.epoch == event.epochs:
                self.stop.ask("by a test")

    recipe, stop = small_recipe(epochs=2), finetune.StopRequest()
    options = {"track": "none", "report": False, "device": "cpu", "cache": False, "workers": 0}
    with pytest.raises(StoppedEarly, match="in the pass that follows the last step; saved"):
        fit(recipe, tmp_path / "stopped", trackers=[Asking(stop)], stop=stop, **options)
    assert not (tmp_path / "stopped" / "novelty.safetensors").exists()
    capsys.readouterr()
    assert resume(tmp_path / "stopped", device="cpu", workers=0).status == "finished"
    whole = fit(recipe, tmp_path / "whole", **options)
    first, second = (load_file(tmp_path / run / "novelty.safetensors") for run in ("stopped", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [trained_network(RunFolder(tmp_path / run), "best")[0].module.state_dict() for run in ("stopped", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    steps = [one["step"] for one in whole.validations()]
    assert [one["step"] for one in dataclasses.replace(whole, folder=tmp_path / "stopped").validations()] == steps


# ---- Numbers ----------------------------------------------------------------------------------------------------------


def test_an_interval_holds_nine_of_ten_new_numbers():
    generator = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(200):
        residuals, new = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
        covered.append((new.abs() <= half_width_of(residuals)).double().mean())
    assert 0.89 < torch.stack(covered).mean() < 0.93  # at least COVERAGE, at most 1 / 51 more
    assert half_width_of(torch.ones(8)) == 0.0 and half_width_of(torch.ones(9)) == 1.0


def test_numbers_come_with_their_interval(tmp_path, capsys):
    from encoders import ANIMALS, TOOLS

    from finetune import TextTable, text_head

    generator, rows = np.random.default_rng(0), ["text,price"]
    for number in range(200):
        word, price = (generator.choice(ANIMALS), 900) if number % 2 else (generator.choice(TOOLS), 100)
        rows.append(f"it was a {word},{price + 20 * generator.normal():.2f}")
    (tmp_path / "prices.csv").write_text("\n".join(rows) + "\n")
    recipe = text_head(
        texts=str(tmp_path / "prices.csv"), backbone="bundled/bert", task="regression", epochs=1,
        table=TextTable(label_column="price"),
    )  # fmt: skip
    run = finetune.fit(recipe, tmp_path / "run", track="none", report=False, quiet=True, device="cpu")
    found = run.predict("it was a hammer")
    assert found.low < found.value < found.high and 20 < found.high - found.low < 400
    assert found.high - found.value == pytest.approx(found.value - found.low)
    description = json.loads((run.folder / "model.json").read_text())
    assert description["interval"] == {"coverage": 0.9, "half_width": pytest.approx(found.high - found.value)}
    inside = [
        one.low <= float(row.split(",")[1]) <= one.high
        for row, one in zip(rows[1:], run.predict([row.split(",")[0] for row in rows[1:]]), strict=True)
    ]
    assert np.mean(inside) > 0.85
    capsys.readouterr()
    assert main(["predict", str(run.folder), "it was a hammer", "--csv", "--device", "cpu"]) == 0
    header, _ = capsys.readouterr().out.splitlines()
    assert header == "file,line,text,value,low,high,distance_percentile,unsure,error"
    assert "split conformal prediction" in (run.folder / "model.md").read_text()
    with pytest.raises(UsageError, match="has no effect"):
        run.predict("x y", unsure_below=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(found).startswith("Prediction(value=")


def test_numbers_that_are_steps_of_a_scale_name_the_nearest_one(tmp_path, capsys):
    from finetune import TextTable, text_head

    generator, rows = np.random.default_rng(0), ["text,stars"]
    for number in range(150):
        words = ["lovely"] * (number % 5) + ["broken"] * (4 - number % 5)
        rows.append(f"it was {' and '.join(generator.permutation(words))},{number % 5 + 1}")
    (tmp_path / "stars.csv").write_text("\n".join(rows) + "\n")
    table = TextTable(label_column="stars")
    recipe = text_head(
        texts=str(tmp_path / "stars.csv"), backbone="bundled/bert", task="regression", epochs=1, table=table
    )
    run = finetune.fit(recipe, tmp_path / "run", track="none", report=False, device="cpu")
    assert "5 levels from 1 to 5" in re.sub(r"\s+", " ", capsys.readouterr().out)
    found = run.predict(
        ["it was lovely and lovely and lovely and lovely", "it was broken and broken and lovely and broken"]
    )
    assert [one.level for one in found] == [5.0, 2.0] and all(abs(one.value - one.level) < 0.5 for one in found)
    assert found[0].to_plain()["level"] == 5.0
    figures = run.evaluate(device="cpu")
    assert figures["level_accuracy"] > 0.9
    assert main(["evaluate", str(run.folder), "--device", "cpu"]) == 0
    assert re.search(r"nearest level is right +\d\.\d+ +\d+ of 30, ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("numbers", "levels"),
    [
        ([1, 2, 3, 4, 5] * 3, [1, 2, 3, 4, 5]),
        ([0.5, 1.0, 1.5] * 2, [0.5, 1.0, 1.5]),
        ([1, 2, 3], []),  # too few to know
        ([1, 2, 4] * 5, []),  # a step is missing, or they are none
        ([0, 1] * 9, []),
        (list(range(40)) * 3, []),
        ([7.0] * 9, []),
    ],
)
def test_what_steps_of_a_scale_are(numbers, levels):
    assert levels_of(torch.tensor(numbers, dtype=torch.float32)) == levels


# ---- One number for two classes ------------------------------------------------------------------------------------


def test_one_logit_behind_the_old_head_is_the_sigmoid_of_the_second_class(tmp_path, capsys):
    folder = tmp_path / "two"
    digits = load_digits()
    for index in range(300):
        name = {3: "three", 7: "seven"}.get(int(digits.targets[index]))
        if name:
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[index, 0].numpy()).save(folder / name / f"{index}.png")
    words = [
        "vgg_head",
        "--images",
        str(folder),
        "--head",
        "append",
        "--device",
        "cpu",
        "--track",
        "none",
        "--no-report",
    ]
    assert main([*words, "--one-logit", "--epochs", "80", "--run", str(tmp_path / "run")]) == 0
    assert "last stage" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run")]) == 0
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert state["classifier.1.1.weight"].shape[0] == 1 and state["classifier.1.1.bias"].shape == (1,)
    model = finetune.load(tmp_path / "run")
    file = next((folder / "three").iterdir())
    found = model.predict(file)
    assert model.classes == ["seven", "three"] and found.label == "three" and found.probability > 0.5
    assert sum(one.probability for one in found.top) == pytest.approx(1)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.8
    for more, said in (
        (["--head", "linear"], "--one-logit with --head linear: not allowed; give --head append"),
        (["--images", "digits"], "--one-logit: is for two classes, digits has 10"),
    ):
        assert main([*words, *more, "--one-logit", "--run", str(tmp_path / "other")]) == 2
        assert said in capsys.readouterr().err
