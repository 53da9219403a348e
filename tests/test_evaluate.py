"""`finetune evaluate`, on the run's own data and on other people's."""

import json

import pytest
from conftest import metrics_lines, small_recipe, train_run
from PIL import Image
from test_images import make_folder

from finetune import Images, Recipe
from finetune.base.terminal import make_console
from finetune.cli import main
from finetune.runs.evaluate import show
from finetune.store.run_folder import RunFolder


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> RunFolder:
    """A run on three colours that brings a test part along."""
    folder = tmp_path_factory.mktemp("coloured")
    for part, count in (("train", 8), ("val", 4), ("test", 6)):
        make_folder(folder / "data" / part, {"blue [a]": count, "green": count, "red": count})
    recipe: Recipe = small_recipe(data=Images(str(folder / "data")), epochs=4, batch_size=4)
    return train_run(folder / "run", recipe, save_every_steps=0)


def figures_of(capsys, *words: str) -> dict:
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_on_the_runs_own_validation_part_the_figures_are_those_of_its_training(trained, capsys):
    figures = figures_of(capsys, trained.path, "--from", "latest")
    last = [line for line in metrics_lines(trained) if "val/loss" in line][-1]
    assert figures["part"] == "validation" and figures["samples"] == 359
    assert figures["accuracy"] == last["val/accuracy"] and figures["f1"] == pytest.approx(last["val/f1"], abs=1e-12)
    # Other batches, so sums are rounded in another order.
    assert figures["loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    matrix = figures["confusion_matrix"]
    assert sum(map(sum, matrix)) == 359 and [sum(row) for row in matrix] == [c["samples"] for c in figures["classes"]]
    assert sum(matrix[n][n] for n in range(10)) / 359 == figures["accuracy"]
    assert 0 < figures["calibration_error"] < 0.2 and sum(b["count"] for b in figures["calibration"]) == 359


def test_a_test_part_is_what_a_run_is_judged_on(coloured, capsys):
    figures = figures_of(capsys, coloured.path)
    assert figures["part"] == "test" and figures["samples"] == 18
    assert [row["name"] for row in figures["classes"]] == ["blue [a]", "green", "red"]


def test_other_images_are_matched_by_the_names_of_their_classes(coloured, tmp_path, capsys):
    make_folder(tmp_path / "other", {"green": 5, "red": 3})
    (tmp_path / "other" / "red" / "00.png").write_bytes(b"broken")
    figures = figures_of(capsys, coloured.path, "--images", tmp_path / "other")
    assert figures["part"] == "all" and figures["samples"] == 7
    assert [row["samples"] for row in figures["classes"]] == [0, 5, 2]
    assert len(figures["broken"]) == 1 and "00.png" in figures["broken"][0]
    # A red that is called green counts as a mistake: labels come from the folder, not from the order of classes.
    Image.new("RGB", (12, 9), (50, 50, 255)).save(tmp_path / "other" / "green" / "99.png")
    matrix = figures_of(capsys, coloured.path, "--images", tmp_path / "other")["confusion_matrix"]
    assert sum(matrix[1]) == 6 and matrix[0] == [0, 0, 0]


def test_a_csv_is_evaluated_with_columns_of_its_own(coloured, tmp_path, capsys):
    make_folder(tmp_path / "data", {"x": 2})
    (tmp_path / "list.csv").write_text("photo,kind\ndata/x/00.png,red\ndata/x/01.png,green\n")
    words = ["--images", tmp_path / "list.csv", "--image-column", "photo", "--label-column", "kind"]
    assert figures_of(capsys, coloured.path, *words)["samples"] == 2


def test_the_runs_own_images_given_by_name_or_moved_are_judged_without_what_was_trained_on(tmp_path, capsys):
    folder = make_folder(tmp_path / "data", {"a": 10, "b": 10})
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(folder)), epochs=1, batch_size=4))
    own = figures_of(capsys, run.path)
    folder.rename(tmp_path / "moved")
    moved = figures_of(capsys, run.path, "--images", tmp_path / "moved")
    assert own["samples"] == 4 and own | {"images": ""} == moved | {"images": ""}


def test_a_mistake_in_a_table_is_an_error_and_never_another_reading_of_it(tmp_path, capsys):
    make_folder(tmp_path / "data", {"x": 12})
    rows = [f"data/x/{n:02}.png,{'ab'[n % 2]},{'ba'[n % 2]},{'train' if n < 8 else 'test'}" for n in range(12)]
    (tmp_path / "list.csv").write_text("\n".join(["image,kind,label,fold", *rows]))
    data = Images(str(tmp_path / "list.csv"), label_column="kind", split_column="fold")
    run = train_run(tmp_path / "run", small_recipe(data=data, epochs=1, batch_size=4))
    (tmp_path / "other.csv").write_text(
        "\n".join(["image,kind,label,fold", *rows[:-1], rows[-1].replace("test", "tset")])
    )
    assert main(["evaluate", str(run.path), "--images", str(tmp_path / "other.csv")]) == 2
    assert "line 13: fold 'tset' is not allowed" in capsys.readouterr().err


def test_files_that_were_swapped_since_the_run_are_found_though_their_sizes_are_the_same(tmp_path, capsys):
    folder = make_folder(tmp_path / "data", {"a": 8, "b": 8})
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(folder)), epochs=1, batch_size=4))
    for path in (folder / "a").iterdir():
        other = folder / "b" / path.name
        content, others = path.read_bytes(), other.read_bytes()
        path.write_bytes(others), other.write_bytes(content)
    assert main(["evaluate", str(run.path)]) == 1
    assert "is not what it was when the run first read it" in capsys.readouterr().err


def test_kept_features_are_used_where_every_file_is_known(tmp_path, capsys, monkeypatch):
    folder = make_folder(tmp_path / "data", {"a": 8, "b": 8})
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(folder)), epochs=1, batch_size=4))
    figures = {}
    for which in ("best", "final"):
        assert main(["evaluate", str(run.path), "--from", which, "--json"]) == 0
        figures[which] = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("finetune.data.source.FileSource.read", lambda *_arguments: pytest.fail("a file was decoded"))
    for which, found in figures.items():
        assert main(["evaluate", str(run.path), "--from", which, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == found
    monkeypatch.undo()
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "none"))  # nothing is kept there: they are computed
    for which, found in figures.items():
        assert main(["evaluate", str(run.path), "--from", which, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == found["accuracy"]


def test_what_lies_beside_the_judged_samples_is_neither_read_nor_written(tmp_path, capsys, monkeypatch):
    folder = make_folder(tmp_path / "data", {"a": 8, "b": 8})
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "features"))
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(folder)), epochs=1, batch_size=4))
    judged = {one["name"] for one in json.loads(run.validation_file.read_text())["worst"]}
    changed = next(path for path in sorted(folder.rglob("*.png")) if str(path.relative_to(folder)) not in judged)
    changed.write_bytes(bytes(changed.stat().st_size))
    kept = [path.read_bytes() for path in sorted((tmp_path / "features").glob("*"))]
    assert kept
    for _ in range(2):
        assert main(["evaluate", str(run.path), "--from", "best"]) == 0
        assert capsys.readouterr().out
    assert [path.read_bytes() for path in sorted((tmp_path / "features").glob("*"))] == kept
    held = next(path for path in sorted(folder.rglob("*.png")) if str(path.relative_to(folder)) in judged)
    held.write_bytes(bytes(held.stat().st_size))
    assert main(["evaluate", str(run.path), "--from", "best"]) == 0
    assert "left out: image" in capsys.readouterr().out


def test_strange_classes_and_missing_runs_are_one_line(coloured, tmp_path, capsys):
    make_folder(tmp_path / "other", {"green": 2, "pink": 2})
    assert main(["evaluate", str(coloured.path), "--images", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "class 'pink' is not among those trained on ('blue [a]', 'green', 'red')" in error and error.count("\n") == 1
    assert main(["evaluate", str(coloured.path), "--images", "digits"]) == 2
    assert "--images digits: its classes are not those of the run" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "no-run")]) == 1
    assert main(["evaluate", str(coloured.path), "--workers", "-1"]) == 2


def test_data_that_changed_since_the_run_is_not_evaluated_as_if_it_had_not(tmp_path, capsys):
    folder = make_folder(tmp_path / "data", {"a": 8, "b": 8})
    run = train_run(tmp_path / "run", small_recipe(data=Images(str(folder)), epochs=1, batch_size=4))
    (folder / "a" / "00.png").unlink()
    assert main(["evaluate", str(run.path)]) == 1
    assert "is not what the run was trained on any more; say what to evaluate on" in capsys.readouterr().err


def test_people_get_tables_and_class_names_are_never_markup(coloured, capsys):
    assert main(["evaluate", str(coloured.path)]) == 0
    out = capsys.readouterr().out
    assert out.count("blue [a]") == 3  # by class, and a row and a column of the confusion matrix
    for text in ("accuracy", "macro F1", "calibration error", "rows: true class; columns: predicted"):
        assert text in out


def test_of_many_classes_the_worst_mistakes_are_shown(capsys):
    names = [f"class {number}" for number in range(20)]
    matrix = [[0] * 20 for _ in names]
    matrix[3][4], matrix[5][6] = 7, 9
    figures = {
        "run": "r", "checkpoint": {"which": "best", "step": 1}, "images": "i", "part": "all", "samples": 16,
        "loss": 1.0, "accuracy": 0.0, "f1": 0.0, "calibration_error": 0.5, "confusion_matrix": matrix, "broken": [],
        "intervals": {}, "out_of_fold": False, "chosen_by_these": False, "mistakes": [[5, 6, 9], [3, 4, 7]],
        "classes": [{"name": name, "precision": 0, "recall": 0, "f1": 0, "samples": 1} for name in names],
    }  # fmt: skip
    for matrix in (figures["confusion_matrix"], None):  # of very many classes there is none
        show(figures | {"confusion_matrix": matrix}, make_console())
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().endswith(("7", "9"))]
        assert lines[-2:] == [["class", "5", "class", "6", "9"], ["class", "3", "class", "4", "7"]]
