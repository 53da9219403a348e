"""The same sample more than once: across the parts of a data set, under two labels, within a class."""

from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from finetune.data.batch import Split
from finetune.data.source import PARTS, Source, TextSource, digest_of

# Models are judged by the latter parts: of two copies the one there stays.
KEPT_FIRST = (2, 1, 0)
ADVICE = "--drop-duplicates leaves copies out"


@dataclass
class Copies:
    """Samples of equal content, by sample index.

    Attributes:
        across: by two parts: (sample of the former, its copy in the latter).
        labels: groups of copies that have more than one label.
        within: (sample, its copy of the same label in the same part).
    """

    across: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    labels: list[list[int]] = field(default_factory=list)
    within: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def notes(self, source: Source, limits: str = "") -> list[str]:
        """What to say of them, a sentence each.

        Args:
            limits: of how many samples the content is known; "" = of all.
        """
        noun, notes = source.noun, []

        def like(pair: tuple[int, int]) -> str:
            return f"{limits}, like {source.name(pair[1])} of {source.name(pair[0])}"

        for (first, second), pairs in sorted(self.across.items()):
            stands = f"of the {PARTS[second]} part are copies of some in the {PARTS[first]} part"
            notes.append(f"{len(pairs):,} {noun}(s) {stands}{like(pairs[0])}: {ADVICE}")
        if self.labels:
            count, pair = sum(map(len, self.labels)), (self.labels[0][0], self.labels[0][1])
            advice = "mend the labels; --drop-duplicates leaves all of them out"
            notes.append(f"{count:,} {noun}(s) are copies of some with another label{like(pair)}: {advice}")
        if self.within:
            stands = "are copies of some with the same label in the same part"
            notes.append(f"{len(self.within):,} {noun}(s) {stands}{like(self.within[0])}: {ADVICE}")
        return notes


def digests_of_texts(source: TextSource) -> Tensor:
    """(samples,) int64 by content, blanks at the ends aside; 0 = empty."""
    plain = (text.strip() for text in source.texts)
    return torch.tensor([digest_of(text.encode("utf-8", "surrogatepass")) if text else 0 for text in plain])


def find_copies(digests: Tensor, targets: Tensor, split: Split) -> Copies:
    """Which samples of a split are copies of others.

    Of copies with one label all but one are to be dropped: the one that stays is in the test part, else in the
    validation part, else in the training part, and the first there. Of those with several labels none stays, for nobody
    knows which is right; numbers to predict may differ.

    Args:
        digests: (samples,) int64 by content; 0 = not known.
        targets: of the samples.
    """
    part_of = torch.full((len(digests),), -1, dtype=torch.int64)
    for number, part in enumerate(split):
        part_of[part] = number
    chosen = ((part_of >= 0) & (digests != 0)).nonzero().squeeze(1)
    if len(chosen):
        _, inverse, counts = digests[chosen].unique(return_inverse=True, return_counts=True)
        chosen = chosen[counts[inverse] > 1]
    order = chosen[digests[chosen].argsort(stable=True)]
    _, sizes = digests[order].unique_consecutive(return_counts=True)
    groups = order.split(sizes.tolist())
    copies = Copies()
    for members in sorted(groups, key=lambda members: int(members[0])):
        by_part: dict[int, list[int]] = {}
        for index, part in zip(members.tolist(), part_of[members].tolist(), strict=True):
            by_part.setdefault(part, []).append(index)
        for first, second in combinations(sorted(by_part), 2):
            pairs = [(by_part[first][0], index) for index in by_part[second]]
            copies.across.setdefault((first, second), []).extend(pairs)
        if not targets.is_floating_point() and not bool((targets[members] == targets[members[0]]).all()):
            copies.labels.append(_differing_first(members, targets))
            copies.dropped += members.tolist()
            continue
        copies.within += [(group[0], index) for group in by_part.values() for index in group[1:]]
        kept = by_part[next(part for part in KEPT_FIRST if part in by_part)][0]
        copies.dropped += [index for index in members.tolist() if index != kept]
    return copies


def _differing_first(members: Tensor, targets: Tensor) -> list[int]:
    """The copies, two of different labels in front."""
    differs = (targets[members] != targets[members[0]]).reshape(len(members), -1).any(1)
    return [int(members[0]), *members[differs].tolist(), *members[1:][~differs[1:]].tolist()]


def limits_of(digests: Tensor, split: Split) -> str:
    """Words for how many samples of a split are known by content; "" = all."""
    used = torch.cat(list(split))
    known = int((digests[used] != 0).sum())
    return f" (of the {known:,} looked at)" if known < len(used) else ""
