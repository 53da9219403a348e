"""Somebody else's weights: which of a file's tensors are the network, whatever a training script has put around them.

Lightning, torchvision's references, timm, MoCo, DINO, mmpretrain and plain scripts nest a state dict in others, put
prefixes before its names, and keep averaged weights, a loss or a metric beside it. The names of the architecture decide
what of it is the network; what is over is left aside, by name.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from finetune.errors import UsageError

# Where networks are looked for first, in this order; then as the file has them; such as these last: averages of others,
# and networks that another one teaches.
FIRST = ("", "state_dict.", "model_state_dict.", "model.")
LAST = re.compile(
    r"(^|[._])(ema|averag\w*|swa|shadow|momentum|target|encoder_k|student|exp_avg|exp_avg_sq|momentum_buffer|grads?|init"
    r"|initial)([._]|$)",
    re.IGNORECASE,
)
CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
# Says nothing where BatchNorm's momentum is fixed, and is left out by some.
COUNTER = "num_batches_tracked"
# What torch.compile, FSDP and activation checkpointing put within names.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# DenseNet's files are older than its module names.
OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)\.")
DEEPEST_NEST, SHOWN_NAMES, SHOWN_GROUPS = 6, 3, 12
# Of the architecture's names: a file that has fewer is of another network, or calls its tensors otherwise.
LEAST_SHARE = 0.5


class StateDict(OrderedDict[str, Tensor]):
    """Tensors by name, of all the mappings in a file; the name of one within others begins with theirs.

    Attributes:
        _metadata: what torch's modules keep beside theirs: which version of themselves it is of.
    """

    _metadata: dict[str, object]

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, metadata: Mapping[str, object] | None = None):
        super().__init__(tensors or {})
        self._metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[object, ...]:
        """Saved as torch saves its own, so that whoever reads the file needs nothing of this kit."""
        return OrderedDict, (), {"_metadata": self._metadata}, None, iter(self.items())

    def below(self, prefix: str) -> "StateDict":
        """Those whose names begin so, without it."""
        found = {name.removeprefix(prefix): value for name, value in self.items() if name.startswith(prefix)}
        metadata = {
            f"{name}.".removeprefix(prefix).rstrip("."): value
            for name, value in self._metadata.items()
            if f"{name}.".startswith(prefix) or not prefix
        }
        return StateDict(found, metadata)


def flattened(content: object) -> StateDict:
    """All tensors in mappings within mappings, and whatever else they hold left out."""
    found = StateDict()
    _flatten(content, "", found, DEEPEST_NEST, set())
    return found


def _flatten(content: object, prefix: str, found: StateDict, deeper: int, seen: set[int]) -> None:
    # A mapping may hold itself, many times over.
    if not isinstance(content, Mapping) or id(content) in seen:
        return
    seen.add(id(content))
    metadata = getattr(content, "_metadata", None)
    for name, version in metadata.items() if isinstance(metadata, Mapping) else ():
        if isinstance(name, str) and isinstance(version, dict):
            found._metadata[f"{prefix}{name}".rstrip(".")] = version
    for name, value in content.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, Tensor):
            found.setdefault(f"{prefix}{name}", value.detach())
        elif deeper:
            _flatten(value, f"{prefix}{name}.", found, deeper - 1, seen)


def part_of(state: StateDict, key: str, source: str) -> StateDict:
    """What a person names as KEY in FILE:KEY.

    Raises:
        UsageError: nothing begins so.
    """
    found = state.below(f"{key}.")
    if not found:
        raise UsageError(f"{source}: holds nothing below {key!r}; it has", groups_in(state))
    return found


@dataclass(frozen=True)
class Picked:
    """The network's tensors in a file.

    Attributes:
        state: by the architecture's names.
        prefix: what stood before these; "" = nothing.
        others: prefixes under which there is another such network.
        left: names of what is left aside, as the file has them.
        share: of the architecture's names without a head, those that the file has.
    """

    state: StateDict
    prefix: str
    others: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    share: float = 1.0

    @property
    def text(self) -> str:
        """What a person should know of the choice; "" = nothing."""
        said = []
        if self.others:
            others = ", ".join(prefix.rstrip(".") or "what stands outside" for prefix in self.others)
            said.append(f"taken is {self.prefix.rstrip('.') or 'what stands outside'}, not {others} (FILE:KEY decides)")
        if self.left:
            shown = ", ".join(self.left[:SHOWN_NAMES])
            more = f" and {len(self.left) - SHOWN_NAMES:,} more" if len(self.left) > SHOWN_NAMES else ""
            said.append(f"left aside: {shown}{more}")
        return "; ".join(said)


def pick(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: Sequence[str], source: str, base_prefix: str = ""
) -> Picked:
    """Find the architecture's tensors in a file.

    Args:
        own: the architecture's state dict.
        head: module paths of its head, which another one may stand in for.
        base_prefix: of a class of transformers: what it calls the network without its head.

    Raises:
        UsageError: a name is there twice, with and without a wrapper's.
    """
    plain, origin = _without_wrappers(state, own, source)
    body = {name for name in own if not in_any(name, head) and not name.endswith(COUNTER)} or set(own)
    bare = {name.removeprefix(f"{base_prefix}.") for name in body} if base_prefix else set()
    counts = Counter[tuple[str, str]]()
    for name in plain:
        for start in [0, *(match.end() for match in re.finditer(r"\.", name))]:
            prefix, rest = name[:start], name[start:]
            if rest in body:
                counts[prefix, ""] += 1
            elif rest in bare and not prefix.endswith(f"{base_prefix}."):  # else it is the full name, one part shorter
                counts[prefix, f"{base_prefix}."] += 1
    if not counts:
        return Picked(plain, "", share=0.0)
    most = max(counts.values())
    best = sorted((one for one, count in counts.items() if count == most), key=lambda one: _rank(one[0]))
    prefix, added = best[0]
    chosen = plain.below(prefix)
    renamed = StateDict(
        {f"{added}{name}" if f"{added}{name}" in own else name: value for name, value in chosen.items()},
        chosen._metadata if not added else None,
    )
    tops = {name.partition(".")[0] for name in own}
    inside = StateDict(
        {name: value for name, value in renamed.items() if name.partition(".")[0] in tops}, renamed._metadata
    )
    kept = {f"{prefix}{name.removeprefix(added)}" for name in inside}
    rivals = [one for one, count in counts.most_common() if count >= LEAST_SHARE * len(body)]
    of_rivals = {f"{other}{name.removeprefix(bare_of)}" for other, bare_of in rivals for name in own}
    others = [
        other for other, bare_of in rivals
        if other != prefix and not _same(plain, prefix, added, other, bare_of, body)
    ]  # fmt: skip
    left = [origin[name] for name in plain if name not in kept and name not in of_rivals]
    return Picked(inside, prefix, others, left, most / len(body))


def in_any(name: str, paths: Collection[str]) -> bool:
    """Whether a tensor belongs to one of these modules."""
    return any(name.startswith(f"{path}.") for path in paths)


def _without_wrappers(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> tuple[StateDict, dict[str, str]]:
    """The tensors by names without those of wrappers, in today's spelling; and how the file has each name."""
    is_densenet = any("denselayer" in name for name in own)
    found, origin = StateDict(), dict[str, str]()

    def plain(name: str) -> str:
        name = WRAPPERS.sub("", name)
        return OLD_DENSENET_NAME.sub(r"\1\2.", name) if is_densenet else name

    for name, value in state.items():
        if (today := plain(name)) in found:
            raise UsageError(f"{source}: holds {today} twice, with and without a wrapper's name; remove one of them")
        found[today], origin[today] = value, name
    metadata = getattr(state, "_metadata", None) or {}
    found._metadata = {plain(f"{name}.").rstrip("."): version for name, version in metadata.items()}
    return found, origin


def _rank(prefix: str) -> int:
    """Of several networks in a file, the one with the least is taken; of equals the first."""
    prefix = CAMEL.sub("_", prefix)
    nests = (place for place, first in enumerate(FIRST) if prefix == first or (first and prefix.startswith(first)))
    return next(nests, len(FIRST)) + (len(FIRST) + 1) * bool(LAST.search(prefix))


def _same(state: StateDict, prefix: str, added: str, other: str, other_added: str, names: Collection[str]) -> bool:
    """Whether the networks under two prefixes are one and the same.

    Args:
        added, other_added: what of the architecture's names the file leaves out there.
    """
    pairs = (
        (state.get(prefix + name.removeprefix(added)), state.get(other + name.removeprefix(other_added)))
        for name in names
    )
    return all(a is not None and b is not None and a.equal(b) for a, b in pairs)


def groups_in(state: Mapping[str, Tensor]) -> list[str]:
    """Lines that say what a file holds: the beginnings of names, with how many begin so, and one of them."""
    first = Counter(name.partition(".")[0] for name in state)
    groups: dict[str, list[str]] = {}
    for name in state:
        parts = name.split(".")
        # One step further in where all would stand in a line or two.
        depth = 1 if len(first) > 2 or len(parts) < 3 else 2
        groups.setdefault(".".join(parts[:depth]), []).append(name)
    lines = [f"  {group}: {len(names):,} tensor(s), like {names[0]}" for group, names in groups.items()]
    more = len(lines) - SHOWN_GROUPS
    return [*lines[:SHOWN_GROUPS], f"  ... {more:,} more"] if more > 0 else lines
