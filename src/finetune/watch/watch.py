"""Everybody who watches a run, told together. Nothing that a watcher does can stop or change the run, but for trackers
that were handed in from Python: what they raise is their caller's."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from finetune.base.events import Begun, Best, Ended, Example, Pictures, Tracker, Validated
from finetune.base.files import copy_file, read_json, write_json
from finetune.base.terminal import Terminal
from finetune.data.source import Source
from finetune.errors import in_words
from finetune.store.run_folder import RunFolder
from finetune.store.state import generators_put_back
from finetune.tasks.calibration import calibrated
from finetune.tasks.evaluation import MATRIX_CLASSES, Evaluation
from finetune.tasks.losses import Classifying
from finetune.watch.devices import device_figures
from finetune.watch.leak import LeakWatch

# Nobody sees more points than that, and each costs the thread that trains.
SECONDS_BETWEEN_POINTS = 0.1
# Pictures and the report take their time at the end; before it they may take this share of it.
PICTURES_SHARE = 0.01
FIRST_PICTURES_SECONDS = 3.0
ENDED_WELL = ("finished", "stopped early")


@dataclass(frozen=True)
class Subject:
    """What is watched, beyond numbers.

    Attributes:
        folder: of the run; None = nothing is written.
        run_id: of the run.
        classes: names by number; [] where numbers are predicted.
        source: of the samples that validate.
        facts: label to text, as in the table at the start.
        model: the network, with its `head` and the `last_layer` of that, if it has one; and `example`, an input for one
            sample, on its device.
        report: write report.html at the end.
    """

    folder: RunFolder | None
    run_id: str
    classes: Sequence[str]
    source: Source
    facts: dict[str, str]
    model: nn.Module
    head: nn.Module | None
    last_layer: nn.Module | None
    example: Tensor
    report: bool


class Watch:
    """Told by the training loop what happens; passes it on.

    Args:
        run: the one that is watched; None = it has no folder.
        handed_in: trackers of whoever called from Python: what they raise while the run goes on ends it, and reaches
            the caller.

    Attributes:
        subject: what can be seen beyond numbers, once that is known.
        was_ended_by_tracker: something that was handed in raised.
    """

    def __init__(self, terminal: Terminal, run: RunFolder | None = None, handed_in: Sequence[Tracker] = ()):
        self.terminal, self.run = terminal, run
        self._handed_in = list(handed_in)
        self._has_ended = False
        self.was_ended_by_tracker = False
        self.subject: Subject | None = None
        self._trackers: list[Tracker] = []
        self._said: set[str] = set()
        self._step, self._best, self._ships = 0, Best(), "best"
        self._device = torch.device("cpu")
        self._leak = LeakWatch()
        self._measured: dict[str, float] = {}
        self._measured_at = self._pointed_at = 0.0
        self._waiting: tuple[int, dict[str, float]] | None = None
        self._started = time.monotonic()
        self._samples, self._samples_before = 0, (0, self._started)
        self._evaluation: Evaluation | None = None
        self._pictures_seconds, self._last_pictures_seconds = 0.0, FIRST_PICTURES_SECONDS
        self._gradients: dict[str, Tensor] = {}

    def say(self, text: str) -> None:
        self.terminal.say(text)

    def add(self, name: str, make: Callable[[], Tracker]) -> None:
        """One more who watches, if it can be made."""
        self._guarded(name, lambda: self._trackers.append(make()))

    # ---- The one place where whatever goes wrong is let go ----------------------------------------------------------

    def _guarded(self, what: str, action: Callable[[], object]) -> bool:
        """Do something for a watcher; say once what fails. Whether it went well."""
        try:
            action()
            return True
        except Exception as error:  # whatever a library, a disk or a network can raise: the run goes on
            text = f"{what}: {in_words(error)}; the run goes on without it"
            if text not in self._said:
                self._said.add(text)
                self.terminal.say(text)
            return False

    @property
    def _is_watched(self) -> bool:
        return bool(self._trackers or self._handed_in)

    def _tell(self, action: Callable[[Tracker], None], *, guard_all: bool = False) -> None:
        """Tell everybody.

        Args:
            guard_all: also those handed in, because the run is over and what ended it must not be hidden.
        """
        self._tell_named(action)
        self._tell_handed_in(action, guard_all)

    def _tell_named(self, action: Callable[[Tracker], None]) -> None:
        if self._trackers:
            with generators_put_back():
                for tracker in list(self._trackers):
                    if not self._guarded(tracker.name, partial(action, tracker)):
                        self._trackers.remove(tracker)
                        with suppress(Exception):  # it has failed already
                            tracker.close()

    def _tell_handed_in(self, action: Callable[[Tracker], None], guarded: bool = False) -> None:
        """Tell all of them, then raise what the first raised."""
        if not self._handed_in:
            return
        first: tuple[str, Exception] | None = None
        with generators_put_back():
            for tracker in self._handed_in:
                try:
                    action(tracker)
                except Exception as error:
                    first = first or (tracker.name, error)
        if first is not None and guarded:
            self.say(f"{first[0]}: {in_words(first[1])}")
        elif first is not None:
            self.was_ended_by_tracker = True
            raise first[1]

    # ---- Told by the loop --------------------------------------------------------------------------------------------

    def begin(self, begun: Begun, device: torch.device) -> None:
        self._device, self._step, self._best = device, begun.step, begun.best
        self._started = time.monotonic()
        self._samples_before = 0, self._started
        self._tell(lambda tracker: tracker.begin(begun))

    def step(self, step: int, epoch: int, epochs: int, samples: int) -> None:
        """After each optimizer step: nothing that makes a device wait."""
        self._samples += samples
        self.terminal.step(step, epoch, epochs, samples)

    def measure(self) -> dict[str, float]:
        """What the clock and the devices say just now, for the log: samples a second, memory, use."""
        now = time.monotonic()
        if now - self._measured_at >= SECONDS_BETWEEN_POINTS or not self._measured:
            before, then = self._samples_before
            rate = (self._samples - before) / max(now - then, 1e-9)
            figures = device_figures(self._device)
            self._measured = {"time/samples_per_second": round(rate, 1)} | figures
            self._samples_before, self._measured_at = (self._samples, now), now
        return self._measured

    def logged(self, step: int, values: dict[str, float]) -> None:
        """Every so many steps: what metrics.jsonl gets."""
        self.terminal.logged(values)
        grows = self._leak.add(step, values.get("memory/process_mb", 0.0))
        if grows:
            self.say(grows)
        self._tell_handed_in(lambda tracker: tracker.logged(step, values))
        if not self._trackers:
            return
        self._waiting = step, values
        if time.monotonic() - self._pointed_at >= SECONDS_BETWEEN_POINTS:
            self._send_point()

    def _send_point(self) -> None:
        if self._waiting is not None:
            step, values = self._waiting
            self._waiting, self._pointed_at = None, time.monotonic()
            self._tell_named(lambda tracker: tracker.logged(step, values))

    @property
    def layer(self) -> nn.Module | None:
        """The one whose input is drawn as a cloud of points."""
        return self.subject.last_layer if self._is_watched and self.subject is not None else None

    def take_gradients(self) -> None:
        """The optimizer has not seen the gradients yet. Once after each validation those of the head are kept, to be
        shown at the next."""
        if self._gradients or not self._is_watched or self.subject is None or self.subject.head is None:
            return
        head = self.subject.head

        def take() -> None:
            parameters = head.named_parameters()
            self._gradients = {name: value.grad.clone() for name, value in parameters if value.grad is not None}

        self._guarded("gradients", take)

    def validated(self, validated: Validated, evaluation: Evaluation) -> None:
        self.terminal.validated(validated)
        self._step, self._best = validated.step, validated.best
        self._send_point()
        self._tell(lambda tracker: tracker.validated(validated))
        if validated.is_best and self.subject is not None and self.subject.folder is not None:
            self._guarded(
                "validation.json",
                lambda: self._write_validation(
                    validated.step, validated.epoch, evaluation, validated.best.get("temperature")
                ),
            )
        self._evaluation = evaluation
        if self._is_watched and self.subject is not None and self.subject.head is not None:
            weights = {name: value.detach() for name, value in self.subject.head.named_parameters()}
            gradients, self._gradients = self._gradients, {}
            self._tell(lambda tracker: tracker.histograms(validated.step, weights, gradients))
        elapsed = time.monotonic() - self._started
        if self._pictures_seconds + self._last_pictures_seconds <= PICTURES_SHARE * elapsed:
            show = self._draw(validated.step, at_end=False)
            if show is not None:
                self._tell(show)

    def solved(
        self, text: str, step: int, epoch: int, evaluation: Evaluation, temperature: float | None, *, ships: bool
    ) -> None:
        """The head was solved.

        Args:
            text: what came of it.
            evaluation: what it makes of the samples that validate.
            temperature: that its outputs were divided by; None = by none.
            ships: it is better than the loop's best.
        """
        self.say(text)
        self._ships = "final" if ships else "best"
        if self.subject is None or (folder := self.subject.folder) is None:
            return

        def write() -> None:
            # The loop's stays beside it: an extension may find that it was the better one.
            is_solved = folder.validation_file.exists() and read_json(folder.validation_file, "validation")["is_solved"]
            if ships:
                if folder.validation_file.exists() and not is_solved:
                    copy_file(folder.validation_file, folder.loop_validation_file)
                self._write_validation(step, epoch, evaluation, temperature, is_solved=True)
            elif is_solved and folder.loop_validation_file.exists():
                copy_file(folder.loop_validation_file, folder.validation_file)

        self._guarded("validation.json", write)

    def _write_validation(
        self, step: int, epoch: int, evaluation: Evaluation, temperature: float | None, *, is_solved: bool = False
    ) -> None:
        subject = self.subject
        assert subject is not None and subject.folder is not None
        place = {"run_id": subject.run_id, "step": step, "epoch": epoch, "facts": subject.facts, "is_solved": is_solved}
        if temperature is not None and isinstance(evaluation.task, Classifying):
            given = evaluation.given()
            place |= {"calibrated": calibrated(evaluation.task, *given, temperature, is_divided=is_solved)}
        write_json(subject.folder.validation_file, place | evaluation.record(subject.source).to_plain())

    def saving(self) -> None:
        """A checkpoint is about to be written."""
        self._send_point()
        self._tell_named(lambda tracker: tracker.flush())

    def saved(self) -> None:
        """It is written: what a tracker from Python raises now costs nothing."""
        self.terminal.saved()
        self._tell_handed_in(lambda tracker: tracker.flush())

    # ---- Pictures, and the end --------------------------------------------------------------------------------------

    def _draw(self, step: int, at_end: bool) -> Callable[[Tracker], None] | None:
        """Make pictures of the newest validation, in this process; what shows them to a tracker."""
        if not self._is_watched or self.subject is None or self._evaluation is None:
            return None
        started, subject, evaluation = time.monotonic(), self.subject, self._evaluation
        made: list[Pictures] = []
        self._guarded("pictures", lambda: made.append(_pictures(subject, evaluation, step, at_end)))
        self._last_pictures_seconds = time.monotonic() - started
        self._pictures_seconds += self._last_pictures_seconds
        return partial(_be_shown, made[0]) if made else None

    def end(self, status: str, text: str) -> None:
        """This process has done its part; see `Ended`. What trackers from Python raise comes last of all.

        Args:
            text: one line for a person.
        """
        if self._has_ended:  # what is raised at the end is no second end
            return
        self._has_ended, is_well = True, status in ENDED_WELL
        self.terminal.end()
        worst: list[Example] = []
        show = self._draw(self._step, at_end=True) if is_well else None
        if show is not None:
            self._tell_named(show)
        subject = self.subject
        if is_well and subject is not None and subject.folder is not None and (self._is_watched or subject.report):
            folder = subject.folder
            self._guarded("report.html", lambda: worst.extend(_report(subject, folder, status)))
        ended = Ended(status, text, str(self.run or ""), self._best, tuple(worst), self._ships)
        self._tell_named(lambda tracker: tracker.end(ended))
        self._trackers = []

        def end_of_own(tracker: Tracker) -> None:
            if show is not None:
                show(tracker)
            tracker.end(ended)

        self._tell_handed_in(end_of_own, guarded=not is_well)

    def close(self) -> None:
        """Let go of everybody, whatever they were told."""
        self.terminal.end()
        self._tell(lambda tracker: tracker.close(), guard_all=True)
        self._trackers, self._handed_in = [], []

    def report_old(self, run: RunFolder, place: str) -> None:
        """The report of a run that is over, out of its files.

        Args:
            place: where its data lies now; "" = where the run says.
        """

        def report() -> None:
            from finetune.report.page import report_run

            report_run(run, run.report_file, place, self.say)

        self._guarded("report.html", report)


def _be_shown(pictures: Pictures, tracker: Tracker) -> None:
    tracker.draw(pictures)


def _report(subject: Subject, folder: RunFolder, status: str) -> list[Example]:
    """Write it; the samples of the best validation with the largest loss."""
    from finetune.report.data import gather
    from finetune.report.page import samples_to_show, write_report

    data = gather(folder)
    shown = samples_to_show(data, subject.source, standardised=True)
    if subject.report:
        write_report(data, folder.report_file, shown, status)
    return list(shown.worst)


def _pictures(subject: Subject, evaluation: Evaluation, step: int, at_end: bool) -> Pictures:
    from finetune.report.examples import examples_of

    record = evaluation.record(subject.source)
    matrix = record.confusion
    return Pictures(
        step,
        tuple(examples_of(record.worst, subject.classes, subject.source)),
        matrix if matrix is not None and len(matrix) <= MATRIX_CLASSES else None,
        tuple(subject.classes),
        evaluation.features(),
        subject.model,
        subject.example,
        at_end,
    )
