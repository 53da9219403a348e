import math
import random
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from finetune.watch.leak import MOST_POINTS, LeakWatch

# Points come every so many steps, as the log is written.
EVERY_STEPS = 10
BASE_MB = 1_500.0


def alarm(series: Callable[[int], float], points: int = 3_000) -> tuple[int, str]:
    """(step, sentence) of the first alarm over a series of megabytes by step; (0, "") = none."""
    watch = LeakWatch()
    for step in range(EVERY_STEPS, points * EVERY_STEPS + 1, EVERY_STEPS):
        text = watch.add(step, series(step))
        if text:
            return step, text
    return 0, ""


def noise(megabytes: float, seed: int) -> Callable[[int], float]:
    draw = random.Random(seed)
    return lambda step: draw.uniform(-megabytes, megabytes)


def warmed_up(step: int) -> float:
    return BASE_MB + 800 * min(step / 400, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("nothing happens", lambda step: BASE_MB),
        ("a run warms up", warmed_up),
        ("a saw", lambda step: BASE_MB + 300 * (step % 370 / 370)),
        ("a quick saw", lambda step: BASE_MB + 300 * (step % 70 / 70)),
        ("one jump", lambda step: BASE_MB + 1_000 * (step > 2_345)),
        ("an early jump", lambda step: BASE_MB + 1_000 * (step > 620)),
        ("several jumps", lambda step: BASE_MB + 300 * (step > 620) + 200 * (step > 3_000) + 200 * (step > 3_600)),
        ("caches that fill and level off", lambda step: BASE_MB + 1_000 * (1 - math.exp(-step / 700))),
        ("memory is given back", lambda step: BASE_MB - 0.01 * step),
    ],
)
def test_what_is_no_leak_gives_no_alarm(name, series, seed):
    for megabytes in (2, 30):
        rough = noise(megabytes, seed)
        assert alarm(lambda step: series(step) + rough(step)) == (0, ""), (name, megabytes)  # noqa: B023


@pytest.mark.parametrize("rate", [0.1, 0.3, 1.3, 10.0])
def test_a_steady_leak_is_told_after_about_a_thousand_steps(rate):
    step, text = alarm(lambda step: BASE_MB + rate * step)
    assert 800 <= step <= 1_100
    assert text.startswith(f"memory grows by {rate:.2g} MB a step since step ")
    assert re.search(r": a leak\? about [\d,]+ steps until .* is full$", text)


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_told_behind_a_warm_up_a_saw_and_noise(seed):
    quiet, rough = noise(3, seed), noise(30, seed)
    assert 800 <= alarm(lambda step: warmed_up(step) + 0.1 * step + quiet(step))[0] <= 3_000
    assert 800 <= alarm(lambda step: BASE_MB + 0.1 * step + rough(step))[0] <= 6_000
    assert 800 <= alarm(lambda step: BASE_MB + 0.3 * step + rough(step))[0] <= 3_000
    assert 800 <= alarm(lambda step: BASE_MB + 100 * (step % 370 / 370) + 0.3 * step)[0] <= 5_000


def test_a_leak_is_told_once_and_counts_from_the_first_step_that_was_seen():
    watch = LeakWatch()
    texts = [watch.add(50_000 + 10 * number, BASE_MB + 5 * number) for number in range(1_000)]
    told = [(number, text) for number, text in enumerate(texts) if text]
    assert len(told) == 1
    number, text = told[0]
    assert 80 <= number <= 110 and "since step 50," in text


def test_a_leak_that_begins_late_in_a_long_run_is_told():
    step, _ = alarm(lambda step: BASE_MB + max(step - 20_000, 0) * 0.5, points=10_000)
    assert 20_000 < step <= 50_000


def test_so_many_points_never_take_more_room():
    watch = LeakWatch()
    for step in range(100_000):
        assert watch.add(step, BASE_MB) == ""
    assert len(watch._points) < MOST_POINTS


PROGRAM = """
import sys
from finetune.watch.leak import LeakWatch
import psutil
leaked_bytes = int(sys.argv[1])
kept, watch, text = [], LeakWatch(), ""
for step in range(1, 1_501):
    block = bytearray(leaked_bytes or 300_000)
    block[::4096] = bytes([1]) * len(block[::4096])  # memory that nobody touches is not there
    if leaked_bytes:
        kept.append(block)
    if step % 10 == 0:
        text = text or watch.add(step, psutil.Process().memory_info().rss / 1e6)
print(text)
"""


@pytest.mark.parametrize(("leaked_bytes", "is_told"), [(300_000, True), (0, False)])
def test_a_process_that_really_leaks_is_told_from_one_that_does_not(leaked_bytes, is_told):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(leaked_bytes)], capture_output=True, text=True, check=True
    )
    assert bool(done.stdout.strip()) == is_told
    if is_told:
        rate = float(re.match(r"memory grows by (\S+) MB a step", done.stdout)[1])
        assert rate == pytest.approx(0.3, rel=0.15)
