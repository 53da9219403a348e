"""Labels that are probably wrong, as a report shows them."""

import math
from dataclasses import dataclass

from finetune.base.events import Example
from finetune.data.source import Source, TextSource
from finetune.errors import UsageError
from finetune.report.examples import TEXT_CHARACTERS, pictures_of
from finetune.store.run_folder import RunFolder
from finetune.tasks.doubts import Doubt, plain_name, read_doubts

SHOWN_DOUBTS = 24


@dataclass(frozen=True)
class Doubtful:
    """What labels.csv of a run says.

    Attributes:
        count: labels that look wrong.
        labels: all that were looked at.
        examples: of the most doubtful.
        marked: names that somebody marked as wrong.
    """

    count: int = 0
    labels: int = 0
    examples: tuple[Example, ...] = ()
    marked: frozenset[str] = frozenset()


def doubtful(run: RunFolder, source: Source | None) -> Doubtful:
    """The most doubtful labels of a run; none where its labels.csv is missing, or is none any more.

    Args:
        source: the data, to fetch pictures from; None = it is not there any more, names must do.
    """
    try:
        doubts = read_doubts(run.labels_file)
    except (UsageError, OSError):
        return Doubtful()
    wrong = sorted((one for one in doubts if one.looks_wrong), key=lambda one: one.probability)
    shown, looked_at = wrong[:SHOWN_DOUBTS], sum(math.isfinite(one.probability) for one in doubts)
    indices = {}
    if source is not None and not isinstance(source, TextSource):
        names = {one.name for one in shown}
        indices = {
            name: index for index in range(len(source.targets)) if (name := plain_name(source.name(index))) in names
        }
    pictures = pictures_of(source, [indices.get(one.name) for one in shown])
    examples = tuple(map(_example, shown, pictures))
    return Doubtful(len(wrong), looked_at, examples, frozenset(one.name for one in doubts if one.is_marked))


def _example(doubt: Doubt, picture: bytes) -> Example:
    chances = (doubt.likelier, doubt.likelier_probability), (doubt.label, doubt.probability)
    loss = -math.log(max(doubt.probability, 1e-12))
    return Example(doubt.name, loss, doubt.label, doubt.likelier, chances, picture, doubt.text[:TEXT_CHARACTERS])
