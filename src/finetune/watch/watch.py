"""Everybody who watches a run, told together. Nothing that a watcher does can stop, slow or change the run."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.base.events import Begun, Ended, Example, Pictures, Tracker, Validated
from finetune.base.files import write_json
from finetune.base.terminal import Terminal
from finetune.data.source import Source
from finetune.errors import in_words
from finetune.store.run_folder import RunFolder
from finetune.store.state import capture_generators, restore_generators
from finetune.tasks.evaluation import Outcomes
from finetune.watch.devices import device_figures
from finetune.watch.leak import LeakWatch

# Nobody sees more points than that, and each costs the thread that trains.
SECONDS_BETWEEN_POINTS = 0.1
# Pictures and the report take their time at the end; before it they may take this share of it.
PICTURES_SHARE = 0.01
FIRST_PICTURES_SECONDS = 3.0


@dataclass(frozen=True)
class Subject:
    """What is watched, beyond numbers.

    Attributes:
        run_id: of the run.
        classes: names by number; [] where numbers are predicted.
        source: of the samples that validate.
        facts: label to text, as in the table at the start.
        model: the network, with its `head` and the `last_layer` of that, if it has one; and `example`, an input for one
            sample, on its device.
        report: write report.html at the end.
    """

    run: RunFolder
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

    Attributes:
        subject: what can be seen beyond numbers, once that is known.
    """

    def __init__(self, terminal: Terminal, run: RunFolder | None = None):
        self.terminal, self.run = terminal, run
        self.subject: Subject | None = None
        self._trackers: list[Tracker] = []
        self._said: set[str] = set()
        self._step, self._best = 0, dict[str, Any]()
        self._device = torch.device("cpu")
        self._leak = LeakWatch()
        self._measured: dict[str, float] = {}
        self._measured_at = self._pointed_at = 0.0
        self._waiting: tuple[int, dict[str, float]] | None = None
        self._started = time.monotonic()
        self._samples, self._samples_before = 0, (0, self._started)
        self._outcomes: Outcomes | None = None
        self._pictures_seconds, self._last_pictures_seconds = 0.0, FIRST_PICTURES_SECONDS
        self._gradients: dict[str, Tensor] = {}

    def say(self, text: str) -> None:
        self.terminal.say(text)

    def add(self, name: str, make: Callable[[], Tracker]) -> None:
        """One more who watches, if it can be made."""
        self._guarded(name, lambda: self._trackers.append(make()))

    # ---- The one place where whatever goes wrong is let go ----------------------------------------------------------

    def _guarded(self, what: str, action: Callable[[], None]) -> bool:
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

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        if not self._trackers:
            return
        states = capture_generators()
        for tracker in list(self._trackers):
            if not self._guarded(tracker.name, lambda tracker=tracker: action(tracker)):
                self._trackers.remove(tracker)
                with suppress(Exception):  # it has failed already
                    tracker.close()
        restore_generators(states)  # whatever a library drew of random numbers, the run does not notice

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
        if not self._trackers:
            return
        self._waiting = step, values
        if time.monotonic() - self._pointed_at >= SECONDS_BETWEEN_POINTS:
            self._send_point()

    def _send_point(self) -> None:
        if self._waiting is not None:
            step, values = self._waiting
            self._waiting, self._pointed_at = None, time.monotonic()
            self._tell(lambda tracker: tracker.logged(step, values))

    @property
    def layer(self) -> nn.Module | None:
        """The one whose input is drawn as a cloud of points."""
        return self.subject.last_layer if self._trackers and self.subject is not None else None

    def take_gradients(self) -> None:
        """The optimizer has not seen the gradients yet. Once after each validation those of the head are kept, to be
        shown at the next."""
        if self._gradients or not self._trackers or self.subject is None or self.subject.head is None:
            return
        head = self.subject.head

        def take() -> None:
            parameters = head.named_parameters()
            self._gradients = {name: value.grad.clone() for name, value in parameters if value.grad is not None}

        self._guarded("gradients", take)

    def validated(self, validated: Validated, outcomes: Outcomes) -> None:
        self.terminal.validated(validated)
        self._step, self._best = validated.step, validated.best
        self._send_point()
        self._tell(lambda tracker: tracker.validated(validated))
        if validated.is_best and self.subject is not None:
            self._guarded("validation.json", lambda: self._write_validation(validated, outcomes))
        self._outcomes = outcomes
        if self._trackers and self.subject is not None and self.subject.head is not None:
            weights = {name: value.detach() for name, value in self.subject.head.named_parameters()}
            gradients, self._gradients = self._gradients, {}
            self._tell(lambda tracker: tracker.histograms(validated.step, weights, gradients))
        elapsed = time.monotonic() - self._started
        if self._pictures_seconds + self._last_pictures_seconds <= PICTURES_SHARE * elapsed:
            self._guarded("pictures", lambda: self._draw(validated.step, at_end=False))

    def _write_validation(self, validated: Validated, outcomes: Outcomes) -> None:
        subject = self.subject
        assert subject is not None
        place = {"run_id": subject.run_id, "step": validated.step, "epoch": validated.epoch, "facts": subject.facts}
        write_json(subject.run.validation_file, place | outcomes.to_plain(subject.source))

    def saving(self) -> None:
        """A checkpoint is about to be written."""
        self._send_point()
        self._tell(lambda tracker: tracker.flush())

    def saved(self) -> None:
        self.terminal.saved()

    # ---- Pictures, and the end --------------------------------------------------------------------------------------

    def _draw(self, step: int, at_end: bool) -> None:
        """Pictures of the newest validation, in this process."""
        if not self._trackers or self.subject is None or self._outcomes is None:
            return
        started = time.monotonic()
        pictures = _pictures(self.subject, self._outcomes, step, at_end)
        self._tell(lambda tracker: tracker.draw(pictures))
        self._last_pictures_seconds = time.monotonic() - started
        self._pictures_seconds += self._last_pictures_seconds

    def end(self, status: str, text: str) -> None:
        """This process has done its part; see `Ended`.

        Args:
            text: one line for a person.
        """
        self.terminal.end()
        worst: list[Example] = []
        if self.subject is not None and status in ("finished", "stopped early"):
            self._guarded("pictures", lambda: self._draw(self._step, at_end=True))
            if self._trackers or self.subject.report:
                self._guarded("report.html", lambda: worst.extend(self._report(self.subject, status)))
        ended = Ended(status, text, str(self.run), self._best, tuple(worst))
        self._tell(lambda tracker: tracker.end(ended))
        self._trackers = []

    def close(self) -> None:
        """Let go of everybody, whatever they were told."""
        self.terminal.end()
        self._tell(lambda tracker: tracker.close())
        self._trackers = []

    def report_old(self, run: RunFolder, place: str) -> None:
        """The report of a run that is over, out of its files.

        Args:
            place: where its data lies now; "" = where the run says.
        """

        def report() -> None:
            from finetune.report.page import report_run

            report_run(run, run.report_file, place, self.say)

        self._guarded("report.html", report)

    def _report(self, subject: Subject, status: str) -> list[Example]:
        """Write it; the samples of the best validation with the largest loss."""
        from finetune.report.data import gather
        from finetune.report.page import best_and_worst, write_report

        data = gather(subject.run)
        best, worst = best_and_worst(data, subject.source)
        if subject.report:
            write_report(data, subject.run.report_file, best, worst, status)
        return worst


def _pictures(subject: Subject, outcomes: Outcomes, step: int, at_end: bool) -> Pictures:
    from finetune.report.examples import examples_of

    plain = outcomes.to_plain(subject.source)
    return Pictures(
        step,
        tuple(examples_of(plain["worst"], subject.classes, subject.source)),
        plain["confusion"],
        tuple(subject.classes),
        outcomes.features(),
        subject.model,
        subject.example,
        at_end,
    )
