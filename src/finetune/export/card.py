"""A card beside an export, for whoever gets the model: what it is, how good, what it was learnt from, how to use it.

After Mitchell et al., "Model cards for model reporting", FAT* 2019. What is not known is said to be so.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune import __version__
from finetune.base.files import write_atomically
from finetune.base.formatting import number_text, printable, with_article
from finetune.base.intervals import FEW, worth_text
from finetune.base.templates import templates_in
from finetune.base.words import typed
from finetune.errors import FinetuneError
from finetune.export.verify import Trained
from finetune.models.backbones import default_member, torchvision_names
from finetune.models.bundled import LICENCES, NOVELTY_FIGURES
from finetune.models.heads import NO_HEAD
from finetune.models.timm_models import licence_of
from finetune.report.data import RunData, Validation, gather
from finetune.report.words import capitalised, metric_text
from finetune.store.run_folder import RunFolder
from finetune.tasks.doubts import read_doubts
from finetune.tasks.evaluation import ClassRow

TEMPLATES = templates_in(Path(__file__).parent)
SHOWN_CLASSES, SHOWN_ROWS = 50, 30
# A class of so many times fewer samples than another is one that the model hardly knows.
LOPSIDED = 10
OWN_DATA_LICENCES = {
    "digits": "CC BY 4.0 (Alpaydin and Kaynak, UCI)",
    "messages": "MIT",
    "glyphs": "those of the fonts",
}
TASKS = {
    "classification": "Gives one class to each {noun}.",
    "multi-label": "Says of each class whether it applies to {a_noun}.",
    "regression": "Predicts a number from each {noun}.",
    "distillation": "Gives an embedding of each {noun}.",
}


class Program(NamedTuple):
    """A program that uses a file of an export without this kit.

    Attributes:
        seen: what it gave when it was run; "" = not now.
    """

    file: str
    text: str
    seen: str = ""


def write_card(
    path: Path, run: RunFolder, trained: Trained, description: Mapping[str, Any], programs: Sequence[Program]
) -> Path:
    """Write the card of an export.

    Returns:
        Where it lies.
    """
    text = _card(path, run, trained, description, programs)
    write_atomically(path, lambda stream: stream.write(text.encode(errors="backslashreplace")))
    return path


def _card(
    path: Path, run: RunFolder, trained: Trained, description: Mapping[str, Any], programs: Sequence[Program]
) -> str:
    data, predicts = gather(run), description["task"] != "distillation"
    kit_file = next((name for name in description["files"] if predicts and name.endswith((".pt", ".safetensors"))), "")
    validation = _validation_of(data, description["checkpoint"]["which"], trained)
    rows = validation.classes if validation else []
    shown = rows if len(rows) <= SHOWN_ROWS else sorted(rows, key=lambda row: (row.f1, row.recall))[:SHOWN_ROWS]
    noun = "text" if trained.backbone.reads_texts else "image"
    text = TEMPLATES.get_template("card.md.j2").render(
        md=markdown,
        name=f"{path.stem} of {description['source_run']}",
        what=TASKS[description["task"]].format(noun=noun, a_noun=with_article(noun)),
        version=__version__,
        run=description["source_run"],
        which=description["checkpoint"]["which"],
        step=f"{description['checkpoint']['step']:,}",
        backbone=trained.backbone.name,
        head=_head_text(description),
        input=description["preprocessing_text"],
        files=description["files"],
        commands=_with_kit(kit_file, noun),
        json=path.with_suffix(".json").name,
        classes=[printable(name) for name in description["classes"]],
        shown_classes=SHOWN_CLASSES,
        task=description["task"],
        thresholds=description.get("thresholds", []),
        data=_data_rows(data, trained, validation),
        judged_on=_judged_on(description, noun),
        figures=_figures(description, validation),
        rows=shown,
        more_rows=len(rows) - len(shown),
        trust=_trust(description, trained, validation, noun, kit_file),
        limits=_limits(run, trained, rows, noun),
        licences=_licences(trained),
        programs=programs,
    )
    # Of what stands between the programs, which are given word for word.
    parts = text.split("```")
    return "```".join(part if number % 2 else re.sub(r"\n{3,}", "\n\n", part) for number, part in enumerate(parts))


def _with_kit(kit_file: str, noun: str) -> tuple[str, str] | None:
    """What to type, and in Python."""
    if not kit_file:
        return None
    sample = "TEXT" if noun == "text" else "PHOTO"
    return typed(["finetune", "predict", kit_file, sample]), f"finetune.load({kit_file!r}).predict(...)"


def markdown(text: str) -> str:
    """A text of somebody else's as it is, within a line or a table of markdown."""
    plain = printable(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", plain)


def _head_text(description: Mapping[str, Any]) -> str:
    architecture = description["architecture"]
    if architecture["head"] == NO_HEAD:
        return "no head"
    stock = "loads into the stock class" if architecture["stock"] else "built of stock parts by the program below"
    return f"head {architecture['head']}; {stock}"


def _validation_of(data: RunData, which: str, trained: Trained) -> Validation | None:
    """What is known by class, of this very checkpoint."""
    found = data.validation
    if found is None:
        return None
    if which == "final":
        return found if data.shows_solved else None
    is_same = not found.is_solved and found.step == trained.state.progress.best.get("step")
    return found if which == "best" and is_same else None


def _data_rows(data: RunData, trained: Trained, validation: Validation | None) -> list[tuple[str, str]]:
    recipe, facts = trained.recipe, trained.state.data
    rows = [("from", recipe.data.place)]
    rows.append(("samples", f"{facts.train_samples:,} to train on, {facts.validation_samples:,} to validate with"))
    if validation is not None and "data" in validation.facts:
        rows.append(("as it was found", validation.facts["data"]))
    if facts.skipped:
        rows.append(("left out", f"{len(facts.skipped):,}: broken, copies, or marked as wrong"))
    rows.append(("split", _split_text(trained)))
    rows.append(("fingerprint", facts.fingerprint))
    if data.record.command:
        rows.append(("command", typed(["finetune", *data.record.command])))
    rows.append(("who collected and labelled it", "not known to finetune"))
    return rows


def _split_text(trained: Trained) -> str:
    spec = trained.recipe.data
    of = "each class" if trained.state.data.classes else "the samples"
    drawn = f"where the data brings no part of its own, {spec.validation_fraction:.0%} of {of}, seed "
    grouped = spec.group_column or spec.group_by
    return (
        drawn.replace("%", " %")
        + f"{trained.recipe.seed}"
        + (f"; groups by {grouped} kept together" if grouped else "")
    )


def _judged_on(description: Mapping[str, Any], noun: str) -> str:
    which = description["checkpoint"]["which"]
    if not description["metrics"]:
        return "None: nothing was validated."
    if which == "final":
        return (
            f"On the {noun}s that validate, out of fold: each was judged by a head that was solved without it. How "
            "strongly the head is held back was chosen by such losses."
        )
    if which == "best":
        return (
            f"On the {noun}s that validate. This checkpoint was chosen by these very {noun}s, of all epochs, so on "
            "others it may be less good."
        )
    return f"On the {noun}s that validate, at this checkpoint's last validation."


def _figures(description: Mapping[str, Any], validation: Validation | None) -> list[tuple[str, str, str]]:
    if validation is None:
        metrics = description["metrics"].items()
        found = [(name.removeprefix("val/"), value) for name, value in metrics if name.startswith("val/")]
        return [
            (capitalised(metric_text(name)), "undefined" if value is None else number_text(value), "")
            for name, value in found
        ]
    record = validation.record
    rows = [
        (capitalised(metric_text(name)), number_text(value), worth_text(name, value, record.samples, record.intervals))
        for name, value in record.figures.items()
    ]
    return [*rows, ("Samples", f"{record.samples:,}", "all of them")]


def _trust(
    description: Mapping[str, Any], trained: Trained, validation: Validation | None, noun: str, kit_file: str
) -> list[str]:
    """What a probability, a number, a distance is worth.

    Args:
        kit_file: of the export, the file that `finetune predict` reads; "" = it has none.
    """
    lines = []
    error = validation.record.calibration_error if validation else None
    if error is not None:
        calibrated = validation.calibrated if validation else None
        how = (
            ""
            if calibrated is None
            else f", after division of logits by a temperature of {calibrated['temperature']:.3g}"
        )
        lines.append(
            f"Calibration error (15 bins): {number_text(error)}{how}: so far a probability lies from the share that is "
            "right."
        )
    elif description["classes"]:
        lines.append("How honest its probabilities are is not known.")
    if interval := description.get("interval"):
        share = f"{interval['coverage']:.0%}".replace("%", " %")
        lines.append(
            f"The true number lies within {interval['half_width']:.4g} of the predicted one with a probability of "
            f"{share} (split conformal prediction, out of residuals on {noun}s that were not trained on), for {noun}s "
            "like those."
        )
    elif description["task"] == "regression":
        lines.append("How far a number lies from the true one is not known beyond the figures above.")
    if "novelty" in description and kit_file:
        lines.append(
            f"`finetune predict` says of each {noun} how many of 100 training {noun}s lie nearer to another one than "
            f"it does (`distance_percentile`), and calls it unsure from 99 on: about {_rare(description)} of the "
            f"{noun}s of the right kind, and most of a quite different kind. The program below does not: it gives an "
            "answer to everything."
        )
        if figures := NOVELTY_FIGURES.get(trained.backbone.name):
            lines.append(
                "How well that distance told other kinds apart in a benchmark of finetune with this backbone, AUROC, "
                f"in brackets by probability alone: {figures}. On other data it was not measured."
            )
    else:
        lines.append(f"It gives an answer to any {noun}, also to one of a kind that it has never seen.")
    return lines


def _rare(description: Mapping[str, Any]) -> str:
    """How many of new samples of the right kind lie farther than 99 of 100 that were kept: of few that is the one which
    lies farthest of all."""
    kept = description["novelty"]["samples"]
    return "one in a hundred" if kept >= 100 else f"one in {kept + 1}"


def _limits(run: RunFolder, trained: Trained, rows: list[ClassRow], noun: str) -> list[str]:
    facts = trained.state.data
    lines = [f"Judged on {noun}s of the same origin as those it was trained on; on others it was not tried."]
    if facts.validation_samples < FEW:
        lines.append(f"Only {facts.validation_samples} {noun}(s) validated: the figures say little.")
    if counts := trained.compared.class_sizes:
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[fewest] < FEW:
            few = [name for name, count in counts.items() if count < FEW]
            lines.append(
                f"{len(few)} class(es) with fewer than {FEW} {noun}s to train on, like {markdown(fewest)} "
                f"({counts[fewest]})."
            )
        if counts[most] > LOPSIDED * max(counts[fewest], 1):
            lines.append(
                f"Classes of very different size: {markdown(most)} has {counts[most]:,} {noun}s to train on, "
                f"{markdown(fewest)} {counts[fewest]:,}."
            )
    weak = [row for row in rows if row.samples and row.recall < 0.5]
    if weak:
        names = ", ".join(markdown(row.name) for row in weak[:5])
        missed = "missed" if trained.recipe.task.kind == "multi-label" else "taken for something else"
        lines.append(f"More than half of the {noun}s of these classes are {missed}: {names}.")
    try:
        wrong = sum(one.looks_wrong for one in read_doubts(run.labels_file))
    except (FinetuneError, OSError):
        wrong = 0
    if wrong:
        lines.append(f"{wrong:,} of the labels that it learnt from look wrong (labels.csv of the run).")
    lines.append("Whether it treats all kinds of people alike was not examined.")
    return lines


def _licences(trained: Trained) -> list[str]:
    place, name = trained.recipe.data.place, trained.backbone.name
    data = OWN_DATA_LICENCES.get(place, "not known to finetune; ask whoever gave it to you")
    if name in LICENCES:
        weights = LICENCES[name]
    elif name in torchvision_names():
        stated = default_member(name).meta.get("license", "")
        weights = stated or (
            "not stated; torchvision (BSD-3-Clause) says that its weights may have terms of their own, derived from "
            "the data they were trained on, for most ImageNet's"
        )
    elif licence := licence_of(trained.backbone.options):
        weights = f"{markdown(licence)}, as timm states it"
    else:
        weights = "not known to finetune; the page or folder that they are from says it"
    if trained.recipe.model.weights not in ("default", "none"):
        weights = f"not known to finetune: they are from {markdown(trained.recipe.model.weights)}"
    elif trained.recipe.model.weights == "none":
        weights = "none: nothing was pretrained"
    return [
        f"Pretrained weights ({markdown(name)}): {weights}.",
        f"Data: {data}.",
        "This model: not decided by finetune.",
    ]
