"""What is said of one run in a table or in JSON."""

import datetime
import time

from finetune.base.formatting import finite, number_text, printable
from finetune.listing.found import FoundRun

STATE_STYLES = {"running": "bold green", "resumable": "yellow", "new": "yellow", "damaged": "bold red"}


def to_plain(run: FoundRun) -> dict[str, object]:
    """A run for `--json`."""
    owner = run.owner
    return {
        "run": str(run.path),
        "name": run.name,
        "state": run.state,
        "note": run.note,
        "process": {"pid": owner.pid, "host": owner.host, "since": owner.since} if owner else None,
        "step": run.step,
        "epochs_done": run.epochs_done,
        "epochs": run.epochs,
        "best": finite(run.best) if run.best else None,
        "options": finite(run.options),
        "seconds": run.seconds,
        "size_bytes": run.size_bytes,
        "changed": local_time_text(run.changed),
    }


def local_time_text(seconds: float) -> str | None:
    try:
        return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds") if seconds else None
    except (ValueError, OverflowError, OSError):  # no such year
        return None


def best_cell(run: FoundRun, with_metric: bool = True) -> str:
    best = run.best
    if not best:
        return "-"
    metric = f"{printable(best['metric'])} " if with_metric else ""
    where = "solved head" if best.get("is_solved") else f"epoch {best['epoch']}"
    return f"{metric}{number_text(best['value'])}, {where}"


def epochs_text(run: FoundRun) -> str:
    if run.epochs_done is None:
        return "-"
    return f"{run.epochs_done}/{run.epochs}" if run.epochs else f"{run.epochs_done}"


def ago_text(changed: float) -> str:
    """When something was changed; after a week, the day."""
    if not changed:
        return "-"
    seconds = time.time() - changed
    if not -60 < seconds < 7 * 86400:
        return (local_time_text(changed) or "-").partition("T")[0]
    for unit_seconds, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_seconds:
            return f"{int(seconds // unit_seconds)} {unit} ago"
    return "just now"
