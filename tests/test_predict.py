import csv
import json

import pytest
import torch
from PIL import Image

from finetune import UsageError
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.export.weights import export


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    """An export alone in its folder: nothing of the run is near."""
    folder = tmp_path_factory.mktemp("export")
    export(trained, "best", folder / "model.pt")
    return folder / "model.pt"


def save_digits(folder, count: int) -> list[str]:
    digits = load_digits()
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.fromarray(digits.images[index, 0].numpy()).save(folder / f"{index:03}.png")
    return [digits.classes[target] for target in digits.targets[:count]]


def lines_of(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_folder_of_digits_is_read_well_a_json_line_each_in_the_order_of_names(model, tmp_path, capsys):
    labels = save_digits(tmp_path / "digits", 100)
    assert main(["predict", str(model), str(tmp_path / "digits"), "--batch-size", "33"]) == 0
    lines = lines_of(capsys)
    assert [line["file"] for line in lines] == [str(tmp_path / "digits" / f"{i:03}.png") for i in range(100)]
    assert sum(line["label"] == label for line, label in zip(lines, labels, strict=True)) >= 97
    first = lines[0]
    assert first["probability"] == first["top"][0]["probability"] and len(first["top"]) == 3
    assert [entry["probability"] for entry in first["top"]] == sorted(
        (e["probability"] for e in first["top"]), reverse=True
    )


def test_predictions_are_those_of_the_validation_pipeline(model, trained, tmp_path, capsys):
    """A picture read from a file goes through the very same preparation as in training."""
    from conftest import small_recipe

    import finetune
    from finetune import Images
    from finetune.data.batch import Request
    from finetune.models.backbones import find_backbone
    from finetune.training.dataset import open_data

    save_digits(tmp_path / "digits", 5)
    main(["predict", str(model), str(tmp_path / "digits"), "--top-k", "10"])
    lines = lines_of(capsys)
    pipeline = open_data(small_recipe(data=Images("digits")), find_backbone("bundled/vgg")).pipeline
    images = pipeline.fetch(Request([0, 1, 2, 3, 4])).inputs
    with torch.inference_mode():
        probabilities = finetune.load(model)(images).softmax(1)
    for line, row in zip(lines, probabilities, strict=True):
        found = {entry["label"]: entry["probability"] for entry in line["top"]}
        assert [found[str(digit)] for digit in range(10)] == pytest.approx(row.tolist(), abs=1e-5)


def test_a_broken_image_is_reported_in_its_line_and_the_others_are_predicted(model, tmp_path, capsys):
    save_digits(tmp_path / "digits", 3)
    (tmp_path / "digits" / "001.png").write_bytes(b"broken")
    assert main(["predict", str(model), str(tmp_path / "digits")]) == 1
    lines = lines_of(capsys)
    assert ["label" in line for line in lines] == [True, False, True]
    assert "cannot be decoded" in lines[1]["error"]


def test_missing_inputs_are_one_line_and_exit_2(model, tmp_path, capsys):
    assert main(["predict", str(model), str(tmp_path / "nowhere.png")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(model), str(tmp_path / "empty")]) == 2
    assert "holds no images" in capsys.readouterr().err
    with pytest.raises(UsageError, match="must be 1 or more"):
        from finetune.export.predict import predict

        predict(
            model, ["x"], top_k=0, batch_size=1, device_name="cpu", image_column="", text_column="", quotes="", allow_outside=False,
            as_csv=False,
        )  # fmt: skip


# ---- Tables in and out --------------------------------------------------------------------------------------------


def test_the_images_of_a_csv_are_predicted_in_its_order_relative_to_itself(model, tmp_path, capsys):
    save_digits(tmp_path / "digits", 4)
    (tmp_path / "list.csv").write_text("id,photo\n1,digits/003.png\n2,digits/nowhere.png\n3,digits/001.png\n")
    words = ["predict", str(model), str(tmp_path / "list.csv"), "--image-column", "photo"]
    assert main(words) == 1
    lines = lines_of(capsys)
    assert [line["file"] for line in lines] == [
        str(tmp_path / "digits" / f"{n}.png") for n in ("003", "nowhere", "001")
    ]
    assert [line.get("label") for line in lines] == ["3", None, "1"] and "does not exist" in lines[1]["error"]


def test_csv_out_has_a_header_the_top_classes_and_the_error_of_a_broken_file(model, tmp_path, capsys):
    save_digits(tmp_path / "digits", 3)
    (tmp_path / "digits" / "001.png").write_bytes(b"broken")
    assert main(["predict", str(model), str(tmp_path / "digits"), "--csv", "--top-k", "2"]) == 1
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    columns = [
        "file",
        "label",
        "probability",
        "label_2",
        "probability_2",
        "labels",
        "distance_percentile",
        "unsure",
        "error",
    ]
    assert list(rows[0]) == columns
    assert [row["label"] for row in rows] == ["0", "", "2"] and "cannot be decoded" in rows[1]["error"]
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"])


def test_batches_change_nothing_but_speed(model, tmp_path, capsys):
    save_digits(tmp_path / "digits", 11)
    main(["predict", str(model), str(tmp_path / "digits"), "--batch-size", "3"])
    small = lines_of(capsys)
    main(["predict", str(model), str(tmp_path / "digits"), "--batch-size", "64"])
    large = lines_of(capsys)
    assert [line["file"] for line in small] == [line["file"] for line in large] and len(small) == 11
    assert [line["probability"] for line in small] == pytest.approx([line["probability"] for line in large], abs=2e-6)
