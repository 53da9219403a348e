"""What a rehearsal found, for people and as plain values."""

import dataclasses

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.base.formatting import duration_text, number_text, printable, seconds_text, size_text
from finetune.rehearse.compare import Comparison
from finetune.rehearse.extent import Extent
from finetune.rehearse.measure import Measured, Room
from finetune.rehearse.rehearsal import Rehearsal


def plan_text(name: str, extent: Extent) -> str:
    """What is about to happen."""
    count = extent.short.train + extent.short.validation
    of = f" of {extent.whole.train + extent.whole.validation:,}" if extent.samples else ""
    return (
        f"rehearsal of {name}: {count:,}{of} {extent.noun}s, {extent.epochs} epochs of {extent.short.steps} step(s); "
        f"one run is left alone, one is killed after step {extent.kill_step} and goes on from step {extent.save_step}"
    )


def verdict(found: Rehearsal) -> str:
    """In one line: the same, or what differs first."""
    if found.found is None:
        return f"not the same: the killed run cannot be resumed: {found.complaint}"
    if found.is_same:
        return f"the same in every bit: {found.found.tensors:,} tensors, {found.found.figures:,} logged figures"
    return f"not the same: {'; '.join(_differences(found.found))}"


def _differences(found: Comparison) -> list[str]:
    parts = list(found.recipe)
    if found.figure is not None:
        name, step, one, other = found.figure
        values = ", ".join(
            f"{'nothing' if value is None else repr(value)} {how}"
            for value, how in ((one, "unbroken"), (other, "resumed"))
        )
        parts.append(f"first {name} at step {step}: {values}")
    if found.tensor is not None:
        parts.append(f"{found.differing:,} value(s) of the checkpoints, like {found.tensor[0]}: {found.tensor[1]}")
    return parts


def show(found: Rehearsal, console: Console) -> None:
    """The verdict, its likely cause, and the measured minute."""
    console.print(Text(f"\n{printable(verdict(found))}", "bold green" if found.is_same else "bold red"))
    if found.cause is not None:
        console.print(Text(printable(f"likely cause: {found.cause.text}")))
        for line in found.cause.lines:
            console.print(Text(printable(f"  look at {line}")))
    console.print(Text("\nthe training itself, worked out from this:"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text, is_bad in _rows(found.extent, found.measured):
        table.add_row(Text(label), Text(printable(text), "bold red" if is_bad else ""))
    console.print(table)


def _rows(extent: Extent, measured: Measured) -> list[tuple[str, str, bool]]:
    """(label, text, whether it will not do)."""
    steps = f"{extent.whole.steps:,} steps of {number_text(measured.step_seconds, 3)} s, and a validation"
    before = f"start {duration_text(measured.start_seconds)}"
    if measured.pass_seconds:
        before += f", the frozen backbone once over the {extent.noun}s {duration_text(measured.pass_seconds)}"
    rows = [
        ("an epoch", f"about {duration_text(measured.epoch_seconds)}: {steps}", False),
        (f"{extent.whole_epochs:,} epochs", f"about {seconds_text(measured.total_seconds)}: {before}", False),
        ("memory", f"{size_text(measured.peak_bytes)} at most, worker processes included", False),
    ]
    if measured.device_bytes:
        rows.append(("GPU memory", f"{size_text(measured.device_bytes)} at most", False))
    rows.append(("a checkpoint", size_text(measured.checkpoint_bytes), False))
    if measured.run is not None:
        rows.append(("the run", _room_text(measured.run), not measured.run.suffices))
    if measured.features is not None:
        limit = "" if measured.are_kept else "; more than --cache-limit allows, so the backbone will run in every epoch"
        rows.append(("kept features", f"{_room_text(measured.features)}{limit}", not measured.are_kept))
    return rows


def _room_text(room: Room) -> str:
    short = "" if room.suffices else ": too little room"
    return f"{size_text(room.bytes)} of {size_text(room.free_bytes)} free in {room.folder}{short}"


def to_plain(found: Rehearsal) -> dict[str, object]:
    """For `--json`."""
    extent, measured = found.extent, found.measured
    rooms = {
        name: None if room is None else dataclasses.asdict(room) | {"folder": str(room.folder)}
        for name, room in (("run", measured.run), ("features", measured.features))
    }
    return {
        "is_same": found.is_same,
        "verdict": verdict(found),
        "difference": None if found.found is None or found.is_same else dataclasses.asdict(found.found),
        "cause": None if found.cause is None else dataclasses.asdict(found.cause),
        "rehearsed": {
            "samples": extent.short.train + extent.short.validation,
            "epochs": extent.epochs,
            "steps": extent.steps,
            "killed_after_step": extent.kill_step,
            "resumed_from_step": extent.save_step,
        },
        "training": dataclasses.asdict(measured) | rooms | {"epochs": extent.whole_epochs},
    }
