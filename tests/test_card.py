"""The card beside an export: what it says is so, and what is not known it says is not."""

import json
import re
import shutil

import pytest
from encoders import ANIMALS, FILLERS, TOOLS
from safetensors.torch import load_file

from finetune import Training, text_head
from finetune.export.card import markdown
from finetune.export.hf_folder import export_folder
from finetune.export.weights import export
from finetune.store.run_folder import RunFolder

from conftest import small_recipe, train_run  # isort: skip


def rows_of(card: str) -> dict[str, list[str]]:
    """The tables' rows by their first cell."""
    rows = re.findall(r"^\| (.*) \|$", card, re.MULTILINE)
    return {cells[0]: cells[1:] for cells in (re.split(r" \| ", row) for row in rows)}


def test_its_figures_are_those_of_the_validation_and_its_program_is_the_one_that_was_printed(trained, tmp_path):
    run = RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
    which = "final" if (run.checkpoints / "final.pt").exists() else "best"
    report = export(run, which, tmp_path / "model.pt")
    card, rows = report.card.read_text(), rows_of(report.card.read_text())
    figures = json.loads(run.validation_file.read_text())["figures"]
    assert report.card == tmp_path / "model.md"
    assert float(rows["Accuracy"][0]) == pytest.approx(figures["accuracy"], abs=1e-4) and " of " in rows["Accuracy"][1]
    assert rows["samples"] == ["1,438 to train on, 359 to validate with"] and rows["from"] == ["digits"]
    assert rows["fingerprint"][0].startswith("digits ") and "10: 0, 1, 2" in card
    assert report.description["sha256"] in rows["file"][0]
    assert f"```python\n{report.program}```" in card and report.seen.text() in card
    assert "Pretrained weights (bundled/vgg): MIT." in card and "CC BY 4.0" in card
    assert "who collected and labelled it" in rows and "Calibration error" in card and "distance_percentile" in card
    # Another format beside it: one card, both programs.
    other = export(run, which, tmp_path / "model.onnx")
    both = other.card.read_text()
    assert f"```python\n{other.program}```" in both and f"```python\n{report.program}```" in both
    assert "`finetune predict model.pt PHOTO`" in both


def test_what_is_not_known_is_said_to_be_so(tmp_path):
    recipe = small_recipe(epochs=1)
    run = train_run(tmp_path / "run", recipe, save_every_steps=0)
    run.validation_file.unlink()
    run.novelty_file.unlink()
    card = export(run, "latest", tmp_path / "model.onnx").card.read_text()
    assert "Accuracy" in card and "not known" in rows_of(card)["Accuracy"][1]
    assert "How honest its probabilities are is not known." in card
    assert "It gives an answer to any image, also to one of a kind that it has never seen." in card
    assert "finetune predict" not in card.rpartition("```")[2]  # this kit loads no .onnx


def test_limits_are_those_of_what_was_trained_on(tmp_path):
    rows = [
        f"{FILLERS[n % 9]} {ANIMALS[n % 5] if n % 6 else TOOLS[n % 5]} {n},{'animal' if n % 6 else 'tool'}"
        for n in range(160)
    ]
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join([*rows, *rows[:8]]) + "\n")
    training = Training(drop_duplicates=True, final="train")
    recipe = text_head(texts=str(tmp_path / "texts.csv"), backbone="bundled/bert", epochs=1, training=training)
    run = train_run(tmp_path / "a run", recipe, save_every_steps=0)
    report = export(run, "final", tmp_path / "my model.pt")
    card = report.card.read_text()
    sizes = report.trained.compared.class_sizes
    assert sum(sizes.values()) == report.trained.state.data.train_samples  # copies and what validates do not count
    assert sizes["tool"] < 40 and f"like tool ({sizes['tool']})" in card and "texts to train on" in card
    kept = len(load_file(run.novelty_file)["rows"])
    assert "about one in a hundred of the texts" in card if kept >= 100 else f"about one in {kept + 1} of" in card
    assert "`finetune predict 'my model.pt' TEXT`" in card and "finetune.load('my model.pt')" in card
    # The same of an .onnx alone: this kit does not load it.
    (tmp_path / "other").mkdir()
    assert "distance_percentile" not in export(run, "final", tmp_path / "other" / "model.onnx").card.read_text()
    # Of data that has changed since nothing is said of classes.
    with (tmp_path / "texts.csv").open("a") as stream:
        stream.write("one more,tool\n")
    assert not export(run, "final", tmp_path / "my model.pt").trained.compared.class_sizes


def test_in_a_folder_for_transformers_it_is_its_readme(tmp_path):
    run = train_run(
        tmp_path / "run", text_head(texts="messages", backbone="bundled/bert", epochs=1), save_every_steps=0
    )
    report = export_folder(run, "final", tmp_path / "hf", half=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"```python\n{report.program}```" in card and "late\\_delivery" in card
    assert "(bundled/bert): Apache-2.0." in card
    assert not card.rpartition("```")[2].strip()  # this kit loads no such folder


def test_names_of_others_are_shown_and_mean_nothing():
    assert markdown("a|b `c` *d* [e](f)\n# <script>") == r"a\|b \`c\` \*d\* \[e\](f) \# \<script\>"
