"""report.html: what it says of real runs, that nothing in it can be turned against its reader, and a real browser."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from conftest import Killed, read, resume_run, small_recipe, train_run, train_with_deaths
from encoders import make_encoder, sentences, text_recipe, write_csv
from PIL import Image

from finetune import Images, MultiLabel, Trainable
from finetune.base.files import read_json, write_atomically, write_json
from finetune.cli import main
from finetune.data.source import ArraySource
from finetune.recipe.head_options import TextTable
from finetune.recipe.scripts import load_recipe_function, shipped_recipes
from finetune.report.curves import MOST_POINTS, Curve, read_curves
from finetune.report.data import gather
from finetune.report.html import STYLE
from finetune.report.page import Shown, write_report
from finetune.store.run_folder import RunFolder
from finetune.tasks.evaluation import Evaluation
from finetune.tasks.losses import ClassificationTask

# What others called their classes and files.
SCRIPT, MARKUP, FORMULA = "<script>alert(1)</script>", "日本\x1b[31m\u202e & \"q\" onload='x'", "$\\frac{a}{b}$"
HOSTILE_FILE = "<img src=x onerror=alert({})>.png"


class Page(HTMLParser):
    """A report as a parser sees it.

    Attributes:
        elements: (tag, attributes) in order.
        text: all that is not markup, style sheet aside.
        tables: by caption: rows of texts of cells, the head first.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.tables = "", {}
        self._rows: list[list[str]] = []
        self._open: list[str] = []
        self._caption = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self.tables.setdefault(self._caption.strip(), self._rows)

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif self._rows and self._rows[-1] and {"th", "td"} & set(self._open):
            self._rows[-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == tag]

    def table(self, caption: str) -> list[list[str]]:
        """Rows below the head of the table whose caption contains that."""
        return next(rows[1:] for found, rows in self.tables.items() if caption in found)


def report(run: RunFolder, path: Path, *words: str) -> Page:
    assert main(["report", str(run), "--output", str(path), *words]) == 0
    return Page(path)


def rewrite_checkpoint(run: RunFolder, **changes) -> None:
    state = read(run) | changes
    write_atomically(run.checkpoints / "latest.pt", lambda stream: torch.save(state, stream), trailer=True)


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def eventful(place) -> RunFolder:
    """Killed twice, thawed, finished, then extended; on images whose names would like to be markup."""
    folder = place / "data"
    folder.mkdir()
    rows = []
    for number in range(48):
        name = HOSTILE_FILE.format(number) if number % 4 == 0 else f"{number}.png"
        colour = [90 + 3 * (number % 7)] * 3
        colour[number % 3] = 255 if number % 5 else 100  # some look like no class
        Image.new("RGB", (40, 30), tuple(colour)).save(folder / name)
        rows.append((name, (SCRIPT, MARKUP, FORMULA)[number % 3]))
    write_csv(folder / "list.csv", rows, ("image", "label"))
    rules = (("head", "trainable", 0), ("features.1*", "trainable", 2), ("*", "frozen", 0))
    data = Images(str(folder / "list.csv"), augment="light")
    recipe = small_recipe(data=data, trainable=Trainable(rules=rules), epochs=3, batch_size=8)
    run = train_with_deaths(place / "run <b>", recipe, [4, 9])
    resume_run(run, epochs=4, lr=1e-3)
    return run


@pytest.fixture(scope="module")
def regression(place) -> RunFolder:
    folder = make_encoder(place / "encoder", "minilm")
    rows = [(text, f"{1000 * len(text) + 1}") for text, _ in sentences(80)]
    file = write_csv(place / "numbers.csv", rows, ("text", "price"))
    table = TextTable(label_column="price")
    recipe = text_recipe(file, folder, task="regression", epochs=2, dropout=0.0, pooling="stock", table=table)
    return train_run(place / "regression", recipe)


@pytest.fixture(scope="module")
def thousand(place, trained) -> RunFolder:
    """As if it had been trained on a thousand classes for 100,000 steps."""
    run = RunFolder(shutil.copytree(trained.path, place / "thousand"))
    state, classes, samples = read(run), [f"class {number}" for number in range(1000)], 3000
    data = state["data"] | {"classes": classes, "outputs": 1000, "train_samples": 32_000}
    rewrite_checkpoint(run, data=data, step=100_000)
    evaluation = Evaluation(ClassificationTask(1000), torch.device("cpu"), samples)
    targets = torch.arange(samples) % 1000
    logits = 8 * torch.nn.functional.one_hot(targets, 1000).float()
    wrong = targets >= 960  # these are taken for their neighbours
    logits[wrong] = logits[wrong].roll(1, dims=1)
    evaluation.add(torch.arange(samples), logits, targets)
    source = ArraySource(torch.zeros(samples, 1, 8, 8, dtype=torch.uint8), targets, classes, "")
    about = {"run_id": state["run_id"], "step": state["best_metric"]["step"], "epoch": 3, "facts": {}}
    write_json(run.validation_file, about | evaluation.record(source).to_plain())
    with open(run.metrics_file, "w") as stream:
        for step in range(1, 100_001):
            loss = 9.5 if step == 33_333 else 0.001 if step == 66_667 else 2 + (step * 7919 % 1000) / 1000
            stream.write(json.dumps({"step": step, "epoch": 1, "train/loss": loss, "lr": 1e-3}) + "\n")
    return run


# ---- What it says ---------------------------------------------------------------------------------------------------


def test_figures_in_the_report_are_those_of_evaluate(trained, tmp_path, capsys):
    page = report(trained, tmp_path / "report.html")
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert main(["evaluate", str(trained), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    classes = [
        [row["name"], *(f"{row[name]:.3f}" for name in ("precision", "recall", "f1")), str(row["samples"])]
        for row in figures["classes"]
    ]
    assert page.table("All 10 classes") == classes
    for name in ("loss", "accuracy", "f1", "calibration_error"):
        assert f"{figures[name]:.4f}" in page.text, name
    matrix = figures["confusion_matrix"]
    wrong = sorted(
        str(count)
        for row, counts in enumerate(matrix)
        for column, count in enumerate(counts)
        if count and row != column
    )
    assert sorted(row[2] for row in page.table("mistakes")) == wrong
    drawn = re.search(r'<svg id="confusion".*?</svg>', page.source, re.DOTALL)[0]
    counts = [str(count) for counts in matrix for count in counts if count]
    assert re.findall(r">(\d+)</text>", drawn)[: len(counts)] == counts
    rows = page.table("Decisions by confidence")
    assert [row[2] for row in rows] == [str(bin["count"]) for bin in figures["calibration"]]
    facts = dict(page.tables["Facts of the run"])
    assert (
        facts["Backbone"] == "bundled/vgg"
        and "1,438 to train on, 359 to validate" in facts["Data"]
        and "torch" in facts["Versions"]
    )
    for sentence in (
        "Accuracy was highest",
        "Macro F1 was highest",
        "Validation loss was lowest",
        "Learning rate: at its highest 0.003",
    ):
        assert sentence in page.text
    assert "Finished" in page.text and "The run was never interrupted." in page.text
    doubted = page.source.count(">labelled <b>")
    assert len(page.all("img")) == 24 + 36 + doubted and all(
        one["src"].startswith("data:image/png;base64,") and one["alt"] for one in page.all("img")
    )


def test_curves_of_a_killed_and_extended_run_are_continuous_and_its_interruptions_marked(eventful, place):
    curves = gather(eventful).curves
    for name, curve in curves.items():
        assert (np.diff(curve.steps) > 0).all(), name
    assert curves["train/loss"].steps.tolist() == list(range(1, 21)) and curves["val/loss"].steps.tolist() == [
        5,
        10,
        15,
        20,
    ]
    page = report(eventful, place / "eventful.html")
    history = [one for one in read(eventful)["history"] if one["event"] != "start"]
    assert [one["event"] for one in history] == ["resume", "resume", "thaw", "extend", "resume"]
    rows = page.table("dashed lines in the curves")
    assert [row[:3] for row in rows] == [
        [str(n), str(one["step"]), str(one["epoch"] + 1)] for n, one in enumerate(history, start=1)
    ]
    assert rows[2][3].startswith("thawed") and rows[3][3] == "extended to 4 epochs, lr 0.001"
    charts = re.findall(r'<svg id="curve\d".*?</svg>', page.source, re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        assert chart.count("stroke-dasharray: 3,3") == 5 and ">4\N{EN DASH}5</text>" in chart


def test_what_to_type_and_to_load_is_there_as_it_was_typed(trained, tmp_path):
    run = RunFolder(shutil.copytree(trained.path, tmp_path / "a run"))
    record = read_json(run.recipe_file, "recipe")
    write_json(run.recipe_file, record | {"command": ["vgg_head", "--images", "my photos", "--lr", "1e-3"]})
    page = report(run, tmp_path / "report.html")
    assert "finetune vgg_head --images 'my photos' --lr 1e-3" in page.text
    assert f"finetune resume '{run}' --epochs 6" in page.text and f"finetune export '{run}'" in page.text
    assert f"model = finetune.load('{run}/model.pt')" in page.text
    assert 'model.predict("photo.jpg")' in page.text
    write_json(run.recipe_file, record | {"name": "mine"})
    (run.code / "mine.py").touch()
    assert f"finetune '{run}/code/mine.py'" in report(run, tmp_path / "report.html").text


def test_samples_with_several_labels_are_told_by_class_without_a_matrix(place):
    folder = place / "several"
    folder.mkdir()
    rows = []
    for number in range(40):
        Image.new("RGB", (9, 9), tuple(255 * (number >> bit & 1) for bit in range(3))).save(folder / f"{number}.png")
        labels = [name for bit, name in enumerate(("red", "green", "blue")) if number >> bit & 1]
        rows.append((f"{number}.png", "|".join(labels or ["black"])))
    write_csv(folder / "list.csv", rows, ("image", "label"))
    data = Images(str(folder / "list.csv"), separator="|")
    run = train_run(place / "several-run", small_recipe(data=data, task=MultiLabel(), batch_size=8, epochs=2))
    page = report(run, place / "several.html")
    assert [row[0] for row in page.table("All 4 classes")] == ["black", "blue", "green", "red"]
    assert "Confusion matrix" not in page.text and "Calibration" in page.text
    names = ["black", "blue", "green", "red"]
    several = [one["true"] for one in read_json(run.validation_file, "")["worst"] if len(one["true"]) > 1]
    assert several and ", ".join(names[number] for number in several[0]) in page.text


def test_numbers_that_are_predicted_are_told_by_a_table_of_the_worst(regression, place):
    page = report(regression, place / "regression.html")
    for title in ("Mean absolute error, validation", "R², variance explained, validation"):
        assert title in page.text
    validation = read_json(regression.validation_file, "")
    worst, shown = validation["worst"], validation["samples"] // 2
    rows = page.table("Largest loss first")
    best = page.table("Smallest loss first")
    assert len(rows) == len(best) == shown and not {row[0] for row in rows} & {row[0] for row in best}
    assert [row[0] for row in rows] == [one["name"] for one in worst[:shown]]
    true, predicted, difference = (float(text.replace(",", "")) for text in rows[0][2:5])
    assert true == pytest.approx(worst[0]["true"], rel=1e-3) and predicted - true == pytest.approx(difference, abs=20)
    assert "was" in rows[0][1] and "By class" not in page.text and "Calibration" not in page.text


def test_a_distillation_is_told_by_its_loss_and_cosine(regression, place):
    texts = place / "texts.txt"
    texts.write_text("\n".join(text for text, _ in sentences(200)))
    teacher = shutil.copytree(place / "encoder", place / "teacher")
    (teacher / "1_Pooling").mkdir()
    (teacher / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    function = load_recipe_function(shipped_recipes()["distill_bert"])
    recipe = function(teacher=str(teacher), texts=str(texts), layers=2, vocabulary_size=75, max_length=20, epochs=1, batch_size=64, lr=3e-3)  # fmt: skip
    run = train_run(place / "distillation", recipe)
    page = report(run, place / "distillation.html")
    assert "Cosine to the teacher, validation" in page.text and page.table("Largest loss first")[0][1]
    assert "finetune evaluate" not in page.text and "--format hf" in page.text
    assert "model.predict" not in page.text  # it has no head


def test_a_thousand_classes_and_a_long_log_make_a_small_file_that_says_what_it_leaves_out(thousand, place):
    page = report(thousand, place / "thousand.html")
    assert len(page.source) < 400_000
    rows = page.table("The 30 of 1,000 classes with the lowest F1")
    assert len(rows) == 30 and all(row[3] == "0.000" for row in rows)
    assert len(page.table("The 30 most frequent mistakes")) == 30 and "Confusion matrix" not in page.text
    path = re.search(r'<svg id="curve0".*?</svg>', page.source, re.DOTALL)[0]
    assert 1000 < max(one.count("\nL ") for one in re.findall(r"<path[^>]*>", path)) < MOST_POINTS
    curve = read_curves(thousand.metrics_file)["train/loss"]
    thin = curve.thinned()
    assert len(curve.steps) == 100_000 and len(thin.steps) <= MOST_POINTS and (np.diff(thin.steps) > 0).all()
    assert curve.extreme(lowest=True) == thin.extreme(lowest=True) == (66_667, 0.001)
    assert curve.extreme(lowest=False) == thin.extreme(lowest=False) == (33_333, 9.5)
    assert {1, 100_000} <= set(thin.steps.tolist())


def test_a_curve_keeps_what_can_be_read_of_a_log(tmp_path):
    lines = [
        '{"step": 1, "train/loss": 1.0}', '{"step": 2, "train/loss": NaN}', "[]", '{"step": 3, "train/lo',
        '{"step": 4, "train/loss": "x"}', '{"step": true, "train/loss": 1}', '{"step": 1e400, "train/loss": 1}',
        '{"step": -1, "train/loss": 1}', "[" * 100_000, '{"step": 5, "train/loss": 2}', '{"step": 6, "train/loss": 3}',
        '{"step": 5, "train/loss": 4}', '{"step": 6, "train/loss": -1e308}', '{"step": 9000000000000000, "train/loss": 1}',
        f'{{"step": 7, "train/loss": 1{"0" * 400}}}', '{"step": 8, "train/loss": true}',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curve = read_curves(tmp_path / "metrics.jsonl")["train/loss"]
    assert curve.steps.tolist() == [1, 5] and curve.values.tolist() == [1.0, 4.0]
    assert read_curves(tmp_path / "none.jsonl") == {}
    few = Curve(np.arange(5), np.arange(5.0))
    assert few.thinned() is few and few.at(3) == 3.0 and few.at(9) is None


# ---- What is not there ----------------------------------------------------------------------------------------------


def test_a_run_that_was_never_validated_says_so(tmp_path):
    for name, options, said in (
        ("saved", {}, "2 steps, 0.29 epochs"),
        ("unsaved", {"save_every_steps": 0}, "There is no checkpoint yet"),
    ):
        with pytest.raises(Killed):
            train_run(tmp_path / name, small_recipe(), die_after_steps=3, **options)
        run = RunFolder(tmp_path / name)
        page = report(run, tmp_path / "report.html")
        assert "The run was not validated yet: there are no figures." in page.text
        assert said in page.text and "Stopped, can be resumed" in page.text and "Loss" in page.text
        assert f"finetune resume {run}" in page.text and "finetune export" not in page.text


def test_data_that_moved_or_is_gone_leaves_names(eventful, place, capsys):
    with_pictures = len(report(eventful, place / "here.html").all("img"))
    assert with_pictures == 9 + 2 * 24  # those of the data, plain and changed at random
    moved = (place / "data").rename(place / "moved")
    try:
        capsys.readouterr()
        page = report(eventful, place / "gone.html")
        said = capsys.readouterr().err
        assert (
            "no pictures or texts in the report: " in said
            and "list.csv: no such file" in said
            and said.count("\n") == 1
        )
        assert (
            not page.all("img")
            and "The data was not at hand when this was written, so there are names only." in page.text
        )
        assert len(page.table("Largest loss first")) == 5
        assert (
            len(report(eventful, place / "moved.html", "--images", str(moved / "list.csv")).all("img")) == with_pictures
        )
        assert main(["report", str(eventful), "--images", "digits"]) == 2
        assert "--images digits: is not what run" in capsys.readouterr().err
    finally:
        moved.rename(place / "data")


def test_figures_of_another_step_than_the_best_are_not_mixed_with_it(trained, tmp_path):
    run = RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
    best, validation = read(run)["best_metric"], read_json(run.validation_file, "")
    write_json(run.validation_file, validation | {"step": best["step"] + 5})
    page = report(run, tmp_path / "report.html")
    assert (
        f"are of the validation at step {best['step'] + 5}, but that of the best checkpoint was at step {best['step']}"
        in page.text
    )
    assert "Calibration error" not in page.text and "Samples that validate" not in page.text
    run.validation_file.unlink()
    page = report(run, tmp_path / "report.html")
    assert "validation.json is missing" in page.text and f"{best['value']:.4f}" in page.text
    write_json(run.validation_file, validation | {"run_id": "another"})
    assert "validation.json is of another run" in report(run, tmp_path / "report.html").text


def test_what_ended_a_run_and_how_to_go_on_is_said(trained, tmp_path):
    run = RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
    rewrite_checkpoint(run, status="running")
    for status, words in (
        ("stopped", "Stopped, can be resumed"),
        ("failed: the loss is <b>nan</b>", "Failed: the loss is <b>nan</b>"),
        ("stopped early", "Stopped early, as nothing got better any more"),
    ):
        write_report(gather(run), run.report_file, Shown(), status)
        page = Page(run.report_file)
        assert words in page.text and f"finetune resume {run}" in page.text and "--epochs" not in page.text
    assert main(["report", str(run)]) == 0 and "Stopped, can be resumed" in Page(run.report_file).text
    (run.checkpoints / "latest.pt").write_bytes(b"damaged")
    assert main(["report", str(run)]) == 0
    assert "latest.pt is missing or damaged; this is as of step-" in Page(run.report_file).text


def test_mistakes_are_one_line(trained, tmp_path, capsys):
    run = RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()

    def said(code, *words):
        assert main(["report", *map(str, words)]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "does not exist; check the path" in said(1, tmp_path / "none")
    assert "--output x.txt: must end in .html" in said(2, run, "--output", "x.txt")
    assert "cannot be written (" in said(1, run, "--output", tmp_path / "file" / "x.html")
    assert "cannot be written (" in said(1, run, "--output", tmp_path / "folder.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "run"]
    whole = run.validation_file.read_text()
    run.validation_file.write_text(whole.replace('"samples": 359', '"samples": 360'))
    assert "damaged: its content does not match its checksum" in said(1, run)
    plain = json.loads(whole)
    for broken in (
        {"classes": {"hits": [1]}},
        {"confusion": [[1]]},
        {"mistakes": [[0, 99, 1]]},
        {"step": None},
        {"worst": 5},
    ):
        write_json(run.validation_file, plain | broken)
        assert "is not as finetune writes it; restore it, or delete it" in said(1, run)
    write_json(run.validation_file, plain | {"worst": [plain["worst"][0] | {"index": 10**6, "true": [99]}]})
    assert "names samples or classes that its data has not" in said(1, run)
    run.recipe_file.unlink()
    assert "recipe of the run" in said(1, run)


# ---- Nothing in it can be turned against its reader -----------------------------------------------------------------

TAGS = {
    "html", "head", "meta", "title", "link", "style", "body", "a", "header", "p", "h1", "h2", "h3", "span", "dl", "div", "dt",
    "dd", "nav", "ol", "ul", "li", "main", "section", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "svg",
    "g", "path", "defs", "use", "text", "clippath", "rect", "figcaption", "details", "summary", "b", "img", "pre", "code", "footer",
}  # fmt: skip


def test_names_of_classes_and_files_are_never_markup(eventful, place):
    page = report(eventful, place / "hostile.html")
    assert {tag for tag, _ in page.elements} <= TAGS
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    # The escape sequence and the character that turns text around are spelt out.
    for name in (SCRIPT, "日本\\x1b[31m\\u202e & \"q\" onload='x'", FORMULA, HOSTILE_FILE[:20], "run <b>"):
        assert name in page.text
    assert "\x1b" not in page.source and "\u202e" not in page.source
    policy = next(one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_it_refers_to_nothing_outside_itself(eventful, thousand, place):
    for run in (eventful, thousand):
        page = report(run, place / "outside.html")
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        for tag, attributes in page.elements:
            for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
                target = attributes.get(name, "#main")
                assert target.startswith("data:") or (target[0] == "#" and target[1:] in ids), (tag, target)
        assert not re.findall(r"url\((?!#)|@import|http://|https://", page.source)


# ---- In a real browser ----------------------------------------------------------------------------------------------

# Texts whose colour differs too little from what lies behind them: WCAG 2, AA.
CONTRASTS = """(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = rgb => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const rgb = parse(getComputedStyle(node).backgroundColor);
      if (rgb.length < 4 || rgb[3] > 0) return rgb;
    }
  };
  const found = [];
  for (const details of document.querySelectorAll('details')) details.open = true;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walker.nextNode());) {
    const node = text.parentElement, style = getComputedStyle(node);
    if (!text.data.trim() || (node.closest('#confusion') && /^\\d+$/.test(text.data))) continue;
    const a = light(parse(node.closest('svg') ? style.fill : style.color)), b = light(behind(node));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const pixels = parseFloat(style.fontSize), large = pixels >= 24 || (pixels >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push([text.data.trim(), ratio]);
  }
  return found;
})()"""


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_counts_can_be_read_on_every_colour_of_the_matrix_in_light_and_dark():
    light, dark = STYLE.read_text(encoding="utf-8").split("@media screen and (prefers-color-scheme: dark)")
    for sheet in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", sheet))
        for kind in ("hit", "miss"):
            for step in range(8):
                pair = sorted(luminance(colours[f"{prefix}{kind}-{step}"]) for prefix in ("", "on-"))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (kind, step)


@pytest.mark.skipif(
    find_browser() is None and not os.environ.get("FINETUNE_NO_SKIP"), reason="there is no Chromium here"
)
def test_a_browser_shows_it_on_a_phone_in_the_dark_and_to_a_screen_reader(eventful, regression, thousand, place):
    runs = {"eventful": eventful, "regression": regression, "thousand": thousand}
    pages = {name: place / f"browser-{name}.html" for name in runs}
    for name, run in runs.items():
        report(run, pages[name])
    browser = Browser(place)
    try:
        for name, page in pages.items():
            for scheme in ("light", "dark"):
                browser.open(page, width=360, scheme=scheme)
                assert browser.complaints() == [], name
                assert not [url for url in browser.requests() if not url.startswith(("data:", "file:"))], name
                assert sum(url.startswith("file:") for url in browser.requests()) == 1, name
                assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
                assert browser.run(CONTRASTS) == [], (name, scheme)  # and opens all that can be opened
                assert browser.run("document.documentElement.scrollWidth") <= 360, name
                colour = browser.run("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", colour))) > 600) == (scheme == "light")
            # What scrolls on its own can be reached without a mouse.
            beyond = "e => getComputedStyle(e).overflowX == 'auto' && e.scrollWidth > e.clientWidth && e.tabIndex < 0"
            assert browser.run(f"[...document.querySelectorAll('*')].filter({beyond}).length") == 0

        # The page of a screen reader: landmarks, headings without a gap, diagrams with names, tables with captions.
        browser.open(pages["eventful"], width=1200)
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        role_and_name = [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]
        ]
        roles = [role for role, _ in role_and_name]
        for landmark in ("banner", "navigation", "main", "contentinfo"):
            assert roles.count(landmark) == 1, landmark
        assert browser.run("document.documentElement.lang") == "en"
        levels = browser.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
        images = [name for role, name in role_and_name if role == "image"]
        assert (
            len(images) == 6 + 9 + 2 * 9  # the others are folded up
            and all(images)
            and len([name for name in images if name.startswith("Line chart")]) == 4
        )
        assert browser.run(
            "[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent.trim())"
        )
        assert browser.run("[...document.querySelectorAll('th')].every(t => t.scope)")

        # The first key leads to the link that skips what is the same in every report.
        for key in ("Tab", "Enter"):
            for kind in ("keyDown", "keyUp"):
                text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
                code = {"Tab": 9, "Enter": 13}[key]
                browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)
            if key == "Tab":
                focused = "[document.activeElement.className, document.activeElement.getBoundingClientRect().top >= 0, getComputedStyle(document.activeElement).outlineStyle]"
                assert browser.run(focused) == ["skip", True, "solid"]
        assert browser.run("document.activeElement.id") == "main"
    finally:
        browser.close()
