"""Labels that are probably wrong: what heads that were solved without a sample give to the label that it has.

Ranked by that probability alone (the rule of confident learning: Northcutt, Jiang and Chuang, "Confident learning:
estimating uncertainty in dataset labels", JAIR 70, 2021).
"""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.data.source import Source, TextSource
from finetune.data.table_files import read_rows
from finetune.errors import UsageError
from finetune.recipe.spec import Classification, MultiLabel, Task

# A person marks rows in the first column; `--without` reads the first two.
COLUMNS = ("wrong", "name", "label", "likelier", "probability", "likelier_probability", "text")
TEXT_LETTERS, MARK = 200, "x"
# A label with less than that is one to look at, where another one has more than half.
DOUBTFUL, LIKELIER = 0.2, 0.5


@dataclass(frozen=True)
class Doubt:
    """A label, and what speaks against it.

    Attributes:
        probability: of the label.
        likelier: the label that has most; of several labels a sample: the one decision that is most in doubt.
        is_marked: somebody says that it is wrong.
    """

    name: str
    label: str
    likelier: str
    probability: float
    likelier_probability: float
    text: str = ""
    is_marked: bool = False

    @property
    def looks_wrong(self) -> bool:
        return self.probability < DOUBTFUL and self.likelier_probability > LIKELIER


def plain_name(name: str) -> str:
    """A sample's name as a file of UTF-8 can hold it."""
    return name.encode(errors="backslashreplace").decode()


def find_doubts(source: Source, task: Task, samples: Tensor, outputs: Tensor) -> list[Doubt]:
    """All samples, the most doubtful first; [] where there are no classes.

    Args:
        samples: (rows,) int64.
        outputs: (rows, classes) of heads that have not seen them.
    """
    if isinstance(task, Classification):
        chances = outputs.double().softmax(1)
        labels = source.targets[samples]
        own, (best, likelier) = chances.gather(1, labels.unsqueeze(1)).squeeze(1), chances.max(1)
        names = [
            (source.classes[a], source.classes[b]) for a, b in zip(labels.tolist(), likelier.tolist(), strict=True)
        ]
    elif isinstance(task, MultiLabel):
        yes, likely = source.targets[samples] != 0, outputs.double().sigmoid()
        own, worst = torch.where(yes, likely, 1 - likely).min(1)
        best = torch.maximum(own, 1 - own)
        names = []
        for is_yes, place, chance in zip(yes, worst.tolist(), own.tolist(), strict=True):
            said = [f"{source.classes[place]}: {word}" for word in ("no", "yes")]
            given = bool(is_yes[place])
            names.append((said[given], said[given if chance >= 0.5 else not given]))
    else:
        return []
    found = []
    for row in own.argsort(stable=True).tolist():
        index = int(samples[row])
        text = source.texts[index][:TEXT_LETTERS] if isinstance(source, TextSource) else ""
        label, other = names[row]
        found.append(Doubt(source.name(index), label, other, own[row].item(), best[row].item(), text))
    return found


def csv_of(doubts: Sequence[Doubt], marked: Collection[str] = (), left_out: Collection[str] = ()) -> str:
    """labels.csv.

    Args:
        marked: names that somebody marked before.
        left_out: names of samples that were not looked at, as somebody marked them for this run: they stay marked.
    """
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(COLUMNS)
    for one in doubts:
        chances, name = (f"{one.probability:.4f}", f"{one.likelier_probability:.4f}"), plain_name(one.name)
        rows.writerow([MARK if name in marked else "", name, one.label, one.likelier, *chances, plain_name(one.text)])
    rows.writerows([MARK, plain_name(name)] + [""] * (len(COLUMNS) - 2) for name in left_out)
    return stream.getvalue()


def read_doubts(file: Path) -> list[Doubt]:
    """What a labels.csv holds; columns but for wrong and name may be missing.

    Raises:
        UsageError: it is none.

    Returns:
        Of samples that were left out, the probabilities are no numbers.
    """
    found = []
    for line, row in read_rows(file):
        if not {"wrong", "name"} <= set(row):
            raise UsageError(f"{file} line {line}: has no columns wrong and name; give a run's labels.csv")
        words = {name: str(row.get(name) or "") for name in COLUMNS}
        try:
            own, other = (float(words[name] or "nan") for name in ("probability", "likelier_probability"))
        except ValueError:
            raise UsageError(f"{file} line {line}: its probability is no number; give a run's labels.csv") from None
        is_marked = bool(words["wrong"].strip())
        found.append(Doubt(words["name"], words["label"], words["likelier"], own, other, words["text"], is_marked))
    return found


def marked_as_wrong(place: str, source: Source) -> list[str]:
    """Names of the samples that somebody marked in a labels.csv; [] where none is given.

    Raises:
        UsageError: it is no such file, nothing is marked in it, or it is of other data.
    """
    if not place:
        return []
    try:
        marked = {one.name: one for one in read_doubts(Path(place)) if one.is_marked}
    except UsageError as error:
        raise UsageError(f"--without {error}") from None
    if not marked:
        raise UsageError(f"--without {place}: no row is marked; write an x into the column wrong of those to leave out")
    names = []
    for index in range(len(source.targets)):
        one = marked.pop(plain_name(source.name(index)), None)
        if one is None:
            continue
        text = source.texts[index][:TEXT_LETTERS] if isinstance(source, TextSource) else ""
        if one.text and plain_name(text) != one.text:
            raise UsageError(
                f"--without {place}: its {one.name} is {one.text[:40]!r}, but here it is {text[:40]!r}; give the "
                "labels.csv of a run on this data"
            )
        names.append(source.name(index))
    if marked:
        raise UsageError(
            f"--without {place}: {len(marked)} of its marked {source.noun}s are not in the data, like "
            f"{next(iter(marked))}; give the labels.csv of a run on this data"
        )
    return names
