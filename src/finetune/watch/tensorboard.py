"""TensorBoard: everything that it can show of a run, in RUN/tensorboard. `tensorboard --logdir runs` shows all runs."""

import io
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from finetune.base.events import Begun, Ended, Example, Features, Pictures, Validated
from finetune.models.freeze import in_eval
from finetune.recipe.serialize import flatten
from finetune.report.image_grids import confusion_sheet, example_sheet

SHOWN_EXAMPLES = 16
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d{19})\.\d+")
# Tells a resume that the graph is there.
GRAPH_MARKER = "graph-is-written"
# torch's bins end there.
LARGEST_IN_HISTOGRAM = 1e20
# Of a weight's numbers a histogram shows no more than so many, evenly spread.
HISTOGRAM_NUMBERS = 100_000
# What the projector is given: so many principal components; a cloud of points has three.
COMPONENTS, CLOUD_COMPONENTS = 50, 3
# Ten hues that stay apart for the colour-blind; more classes begin again, a little darker.
# Okabe and Ito, "Color universal design", 2008, and two greys.
HUES = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167),
    (86, 180, 233), (240, 228, 66), (102, 102, 102), (170, 68, 153), (170, 170, 170),
)  # fmt: skip


class EventFile:
    """An event file, written by whoever calls: a record is on its way to the disk as a whole when `add_event` returns,
    so a killed process loses nothing, and a full disk is an error here rather than in a thread.

    Args:
        folder: is made.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        # The names' order is the order of reading, whatever the clock says meanwhile.
        stamps = [int(found[1]) for path in folder.iterdir() if (found := EVENT_FILE.fullmatch(path.name))]
        stamp = max([time.time_ns(), *(stamp + 1 for stamp in stamps)])
        path = folder / f"events.out.tfevents.{stamp:019d}.{os.getpid()}"
        self._stream = open(path, "xb", buffering=0)  # noqa: SIM115 - open as long as the run
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        """Raises: OSError: it cannot be written; the file ends with the record before it."""
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        whole = self._stream.tell()
        try:
            if self._stream.write(record.getbuffer()) != len(record.getbuffer()):
                raise OSError("the disk is full")
        except OSError:
            self._stream.seek(whole)
            self._stream.truncate()
            raise

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self._stream.close()


class Writer(SummaryWriter):
    """torch's writer, on a file of ours.

    Args:
        purge_step: what earlier files hold of this step and later ones does not count any more.
    """

    # Its own constructor sets them to None at first, which a checker takes for all that they can be.
    file_writer: FileWriter | None  # type: ignore[assignment]
    all_writers: dict[Path, FileWriter] | None  # type: ignore[assignment]

    def __init__(self, folder: Path, purge_step: int | None = None):
        self._folder = folder
        super().__init__(str(folder), purge_step=purge_step)

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = FileWriter.__new__(FileWriter)  # its own constructor would start a thread
            self.file_writer.event_writer = EventFile(self._folder)
            self.all_writers = {self._folder: self.file_writer}
            if self.purge_step is not None:
                restart = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(step=self.purge_step, session_log=restart))
                self.purge_step = None
        return self.file_writer

    def add_values(self, step: int, values: dict[str, float]) -> None:
        """Several scalars at once, which costs a fraction of one at a time."""
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._get_file_writer().add_summary(Summary(value=points), step)


class TensorBoard:
    """See `Tracker`.

    Args:
        folder: for the event files.
    """

    name = "tensorboard"

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Writer | None = None

    @property
    def writer(self) -> Writer:
        assert self._writer is not None, "begin comes first"
        return self._writer

    def begin(self, begun: Begun) -> None:
        self._writer = Writer(self._folder, begun.step + 1 if begun.is_resumed else None)
        if begun.is_resumed:
            return
        rows = [f"| {label} | {_cell(text)} |" for label, text in begun.facts.items()]
        self.writer.add_text("run", "\n".join(["| | |", "|---|---|", *rows]), 0)
        metric = f"val/{begun.best_metric}"
        for summary in hparams(_hyperparameters(begun.config), {metric: 0.0, "val/loss": 0.0})[:2]:
            self.writer._get_file_writer().add_summary(summary)

    def logged(self, step: int, values: dict[str, float]) -> None:
        self.writer.add_values(step, values)

    def validated(self, validated: Validated) -> None:
        self.writer.add_values(validated.step, validated.values)

    def histograms(self, step: int, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        for kind, tensors in (("weights", weights), ("gradients", gradients)):
            for name, tensor in tensors.items():
                numbers = tensor.flatten()[:: max(1, tensor.numel() // HISTOGRAM_NUMBERS)].float().cpu()
                if bool((numbers.abs() < LARGEST_IN_HISTOGRAM).all()):  # which also leaves out what is no number
                    self.writer.add_histogram(f"head {kind}/{name}", numbers.numpy(), step)

    def flush(self) -> None:
        self.writer.flush()

    def draw(self, pictures: Pictures) -> None:
        worst = pictures.worst[:SHOWN_EXAMPLES]
        if worst and worst[0].picture:
            sheet = example_sheet(worst)
            self.writer.add_image("validation/worst first", sheet, pictures.step, dataformats="HWC")
        elif worst:
            self.writer.add_text("validation/worst first", _examples_text(worst), pictures.step)
        if pictures.confusion is not None:
            sheet = confusion_sheet(pictures.confusion, pictures.classes)
            self.writer.add_image("validation/confusion matrix", sheet, pictures.step, dataformats="HWC")
        self._add_graph(pictures)
        if pictures.at_end and pictures.features is not None:
            self._add_features(pictures, pictures.features)

    def _add_graph(self, pictures: Pictures) -> None:
        # TensorBoard reads one file at a time and never goes back to an earlier one, so the graph is among all else.
        marker = self._folder / GRAPH_MARKER
        if marker.exists():
            return
        # Tracing warns of what depends on the input's size, on standard error and in the log.
        with in_eval(pictures.model), torch.no_grad(), warnings.catch_warnings(), _silent_log():
            warnings.simplefilter("ignore")
            self.writer.add_graph(pictures.model, pictures.example, use_strict_trace=False)
        marker.touch()

    def _add_features(self, pictures: Pictures, features: Features) -> None:
        """The validation's samples as points: in the projector, and as a cloud."""
        points = principal_components(features.rows, COMPONENTS)
        labels, colours = _labels(features.targets, pictures.classes)
        place = self._folder / "validation"
        # The projector's files are not events: those of an earlier end go, and their one entry with them.
        shutil.rmtree(place, ignore_errors=True)
        (self._folder / "projector_config.pbtxt").unlink(missing_ok=True)
        self.writer.add_embedding(points, labels, global_step="validation", tag="features")
        cloud = points[:, :CLOUD_COMPONENTS]
        cloud = torch.nn.functional.pad(cloud, (0, CLOUD_COMPONENTS - cloud.shape[1]))
        cloud = cloud / cloud.abs().max().clamp(min=1e-12)
        look = {"material": {"cls": "PointsMaterial", "size": 0.04}}
        self.writer.add_mesh("features by class", cloud[None], colours[None], None, look, pictures.step)

    def end(self, ended: Ended) -> None:
        if self._writer is not None and ended.status in ("finished", "stopped early"):
            self.writer._get_file_writer().add_summary(hparams({"end": True}, {})[2])
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def principal_components(rows: Tensor, count: int) -> Tensor:
    """(samples, at most `count`): centred rows along the directions in which they differ most, those first.

    Args:
        rows: (samples, width).
    """
    centred = rows.double() - rows.double().mean(0)
    # Draws no random number, unlike the quicker way.
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    return (left * values)[:, :count].float()


def _labels(targets: Tensor, classes: Sequence[str]) -> tuple[list[str], Tensor]:
    """What each point is called, and (samples, 3) uint8: its colour, by its (first) class."""
    if not classes:
        grey = torch.full((len(targets), 3), 128, dtype=torch.uint8)
        return [f"{value:.4g}" for value in targets.flatten(1 if targets.dim() > 1 else 0).tolist()], grey
    numbers = targets if targets.dim() == 1 else targets.float().argmax(1)
    palette = [[int(part * 0.75 ** (number // len(HUES))) for part in HUES[number % len(HUES)]] for number in numbers]
    # A line each in a table of tabs and newlines.
    return [" ".join(classes[number].split()) for number in numbers], torch.tensor(palette, dtype=torch.uint8)


def _hyperparameters(config: Mapping[str, object]) -> dict[str, object]:
    """Values under names with dots, but for empty ones; what is no number, string or truth value as text."""
    given = {name: value for name, value in flatten(config).items() if value not in ("", [], None)}
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in given.items()}


def _cell(text: str) -> str:
    """Text as it is within a table of Markdown."""
    return "".join(f"\\{one}" if one in "\\|`*_<>[]#" else one for one in " ".join(text.split()))


def _examples_text(examples: Sequence[Example]) -> str:
    rows = [f"| {_cell(one.text)} | {_cell(one.true)} | {_cell(one.predicted)} | {one.loss:.4g} |" for one in examples]
    return "\n".join(["| text | true | predicted | loss |", "|---|---|---|---|", *rows])


@contextmanager
def _silent_log() -> Iterator[None]:
    """The tracer logs and prints what it cannot draw."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
