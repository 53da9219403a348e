"""`finetune look`: what a recipe would train on, before anything is trained."""

import dataclasses
import functools
from contextlib import closing
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.base.formatting import printable
from finetune.base.signals import StopRequest
from finetune.base.terminal import Terminal
from finetune.base.words import without_option
from finetune.data.copies import Copies, find_copies
from finetune.data.preprocess import Preprocessing
from finetune.data.source import PARTS, ArraySource, TextSource
from finetune.data.texts import TextPipeline
from finetune.report.examples import pictures_of
from finetune.report.look_page import KINDS, SHOWN_FINDINGS, Finding, Look
from finetune.report.overview import label_of, overview_of
from finetune.runs.start import Plan, new_setup, surroundings_put_back
from finetune.store.finish_state import Finish
from finetune.tasks.doubts import find_doubts, marked_as_wrong, plain_name
from finetune.training.advice import of_labels
from finetune.training.data_check import BrokenSample, known_digests, look, measured_view, near_pairs, notes_on_groups
from finetune.training.dataset import Data
from finetune.training.finish import gather, reason_against, temperature_of_head, workers
from finetune.training.phase import Feed, feed_if_kept
from finetune.training.regularisation import next_strength, try_next
from finetune.training.setup import Setup

SHOWN_CLASSES, SHOWN_NOTES = 12, 12


class _Teller:
    """Tells of samples what a finding says; looks each up once, for there may be very many."""

    def __init__(self, data: Data):
        self.data = data
        self._parts = [""] * len(data.source.targets)
        for name, members in zip(PARTS, data.split, strict=True):
            for index in members.tolist():
                self._parts[index] = name

    def finding(self, kind: str, index: int, other: int | None = None, detail: str = "") -> Finding:
        """About a sample, and perhaps another one."""
        source = self.data.source
        beside = "" if other is None else source.name(other)
        text = source.texts[index] if isinstance(source, TextSource) else ""
        return Finding(kind, source.name(index), self.label(index), self._parts[index], beside, detail, text)

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Samples by name, as a csv of them has it."""
        source = self.data.source
        return {plain_name(source.name(index)): index for index in range(len(source.targets))}

    def with_pictures(self, finding: Finding) -> Finding:
        """The same with its pictures, and that of the other sample."""
        if finding.kind == "broken":
            return finding
        places = [self.places.get(plain_name(name)) for name in (finding.name, finding.beside)]
        pictures = pictures_of(self.data.source, places)
        return dataclasses.replace(finding, pictures=tuple(one for one in pictures if one))

    def label(self, index: int) -> str:
        return label_of(self.data.source, index, self.data.scale)


def look_at(plan: Plan, terminal: Terminal, stop: StopRequest) -> Look:
    """Read every sample once, and say what the data is like. Nothing is trained; no features are computed, but where
    an earlier run kept them they are used.

    Raises:
        FinetuneError: the data cannot be used at all.
        StoppedEarly: asked for.
    """
    with surroundings_put_back():
        setup, _ = new_setup(plan)
        feed = feed_if_kept(setup, terminal, stop)
        with closing(setup.loaders):
            read = Feed(setup.network.module, *setup.loaders, why_not="nothing is trained")
            broken = look(setup, read, measure=False, all_files=True, terminal=terminal, stop=stop)
            data = setup.data.leave_out([one.name for one in broken])
            copies, teller = _copies(setup, data), _Teller(data)
        found = [*_broken(broken), *_of_copies(copies, teller)]
        notes = _notes(plan, setup, data, broken, copies)
        checked = "features are not kept yet: near copies and labels that look wrong are found after a first run"
        if feed is not None and feed.features is not None:
            try:
                setup = dataclasses.replace(setup, data=data)
                near, (doubts, why_not) = _near(setup, feed, teller), _doubts(setup, feed, teller)
            finally:
                feed.features.close()
            found += near + doubts
            if near:
                notes.append(f"{len(near):,} {data.source.noun}(s) that validate are near to one that is trained on")
            if doubts:
                notes.append(f"{len(doubts):,} label(s) look wrong")
            both = "near copies" if why_not else "near copies and labels that look wrong"
            checked = f"{both} were looked for in features that an earlier run kept{why_not}"
        return _look(plan, setup, teller, found, notes, checked)


def _look(plan: Plan, setup: Setup, teller: _Teller, found: list[Finding], notes: list[str], checked: str) -> Look:
    data, preprocessing, lengths, cut = teller.data, setup.backbone.preprocessing, None, None
    if isinstance(data.pipeline, TextPipeline):
        lengths, cut = data.pipeline.lengths, torch.from_numpy(data.pipeline.table.truncated)
    images = preprocessing if isinstance(preprocessing, Preprocessing) else None
    view = overview_of(data.pipeline.source, data.split, plan.recipe, images, data.scale, lengths, cut)
    spec, source = plan.recipe.data, data.source
    brings = "as the data brings it" if source.parts is not None else f"drawn, seed {plan.recipe.seed}"
    facts = [("data", spec.place), ("split", brings), *view.facts]
    if not isinstance(source, ArraySource) and source.left:
        facts.append(("left aside", source.left))
    facts += [("network", f"{setup.backbone.name}, {preprocessing.text}"), ("looked for", checked)]
    order = list(KINDS)
    found = [
        teller.with_pictures(one) if number < SHOWN_FINDINGS else one
        for kind in order
        for number, one in enumerate(one for one in found if one.kind == kind)
    ]
    name = Path(spec.place).name or spec.place
    train = ["finetune", *without_option(plan.command, "--output")]
    all_clear = f"No broken {source.noun}, no copy, nothing left aside that looks like data."
    if isinstance(source, ArraySource):
        all_clear = f"These {source.noun}s come with finetune: none is broken, and copies were not looked for."
    return Look(name, view, facts, notes, found, spec.augment, train, marked_as_wrong(spec.without, source), all_clear)


# ---- What is found --------------------------------------------------------------------------------------------------


def _broken(broken: list[BrokenSample]) -> list[Finding]:
    return [Finding("broken", one.name, detail=one.reason.rpartition("; ")[0]) for one in broken]


def _copies(setup: Setup, data: Data) -> Copies:
    if isinstance(data.source, ArraySource):
        return Copies()
    return find_copies(known_digests(setup), data.source.targets, data.split)


def _of_copies(copies: Copies, teller: _Teller) -> list[Finding]:
    found = []
    for (first, second), pairs in sorted(copies.across.items()):
        detail = f"in {PARTS[second]}, a copy in {PARTS[first]}"
        found += [teller.finding("copy across parts", one, other, detail) for other, one in pairs]
    for group in copies.labels:
        for number, index in enumerate(group):
            other = group[1 if number == 0 else 0]
            found.append(teller.finding("copy with another label", index, other, f"also {teller.label(other)}"))
    return found + [teller.finding("copy", one, other) for other, one in copies.within]


def _near(setup: Setup, feed: Feed, teller: _Teller) -> list[Finding]:
    assert feed.features is not None
    pairs = near_pairs(feed.features, setup.data, measured_view(setup))
    details = (f"cosine of features {likeness:.3f}" for _, _, likeness in pairs)
    return [
        teller.finding("near copy across parts", judged, known, detail)
        for (judged, known, _), detail in zip(pairs, details, strict=True)
    ]


def _doubts(setup: Setup, feed: Feed, teller: _Teller) -> tuple[list[Finding], str]:
    """Labels that heads on kept features, solved without each, find improbable; or why they were not looked for."""
    if not setup.data.source.classes:
        return [], "; numbers are not judged"
    if reason := reason_against(setup, feed):
        return [], f"; labels that look wrong were not: no head is solved, because {reason}"
    stage, finish = gather(setup, feed, setup.make_task()), Finish()
    while next_strength(finish) is not None:
        try_next(finish, stage.held, workers())
    outputs = stage.held.outputs_held_out(finish.best_weights) / temperature_of_head(setup, finish)
    source = setup.data.source
    doubts = find_doubts(source, setup.recipe.task, stage.held.held_out.of(stage.samples), outputs)
    wrong = [one for one in doubts if one.looks_wrong]
    details = (f"likelier {one.likelier} ({one.probability:.3f})" for one in wrong)
    return [
        teller.finding("label looks wrong", teller.places[plain_name(one.name)], None, detail)
        for one, detail in zip(wrong, details, strict=True)
    ], ""


def _notes(plan: Plan, setup: Setup, data: Data, broken: list[BrokenSample], copies: Copies) -> list[str]:
    """Sentences about what to know before a training."""
    source, notes = data.source, []
    if broken:
        first = broken[0].reason.rpartition("; ")[0]
        done = "left out, as --skip-broken says" if plan.skip_broken else "--skip-broken leaves them out"
        notes.append(f"{len(broken):,} broken {source.noun}(s), like: {first}; {done}")
    if not isinstance(source, ArraySource):
        notes += [*copies.notes(source), *notes_on_groups(data), *source.notes]
    return notes + of_labels(data, setup.recipe)


# ---- In the terminal ------------------------------------------------------------------------------------------------


def show_look(found: Look, console: Console) -> None:
    """Print what was found as tables."""
    view = found.view
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    parts = ", ".join(f"{count:,} {name}" for name, count in view.parts.items())
    table.add_row("samples", f"{parts}{f', {len(view.classes):,} classes' if view.classes else ''}")
    for label, text in found.facts:
        table.add_row(label, Text(printable(text)))
    for number, note in enumerate(found.notes[:SHOWN_NOTES]):
        table.add_row("" if number else "note", Text(printable(note)))
    if len(found.notes) > SHOWN_NOTES:
        table.add_row("", f"{len(found.notes) - SHOWN_NOTES} more on the page")
    console.print(table)
    if view.classes:
        console.print(_class_table(found))
    if found.findings:
        console.print(_finding_table(found))


def _class_table(found: Look) -> Table:
    """Samples by class; of many classes the largest and the smallest."""
    view, table = found.view, Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("class", "train", "validation", *(["test"] if view.has_test else [])):
        table.add_column(name, justify="left" if name == "class" else "right", overflow="fold")
    rows = view.classes
    if len(rows) > SHOWN_CLASSES:
        rows = sorted(rows, key=lambda one: -one.all)
    half = SHOWN_CLASSES // 2
    for number, one in enumerate(rows):
        if len(rows) > SHOWN_CLASSES and number == half:
            table.add_row(f"... {len(rows) - SHOWN_CLASSES:,} between", *[""] * (len(table.columns) - 1))
        if len(rows) <= SHOWN_CLASSES or number < half or number >= len(rows) - half:
            counts = [one.train, one.validation, *([one.test] if view.has_test else [])]
            table.add_row(Text(printable(one.name)), *(f"{count:,}" for count in counts))
    return table


def _finding_table(found: Look) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("finding", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("like", overflow="fold")
    for kind in KINDS:
        of_kind = [one for one in found.findings if one.kind == kind]
        if of_kind:
            first = of_kind[0]
            like = f"{first.name}{f' and {first.beside}' if first.beside else ''}"
            table.add_row(kind, f"{len(of_kind):,}", Text(printable(like)))
    return table
