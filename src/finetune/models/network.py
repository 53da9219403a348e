"""Backbone, weights and head put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.base.device import to_device
from finetune.base.files import BadFile, copy_file, link_or_copy, read_json, sha256_of_file, write_json
from finetune.base.plain import Fields
from finetune.data.order import keyed_generator
from finetune.data.tokens import PADDING
from finetune.errors import RunError, UsageError, one_line
from finetune.models import hub, huggingface, text_encoders
from finetune.models.backbones import Backbone
from finetune.models.blocks import Block, blocks_of, is_within, last_blocks, unread_paths
from finetune.models.freeze import NEVER, FreezeMap, Rule, in_eval
from finetune.models.heads import (
    NO_HEAD,
    attach_head,
    find_head,
    first_layer,
    has_auxiliary_heads,
    last_layer,
    renew_layer,
    replaced_layers,
)
from finetune.models.shapes import build_shapes
from finetune.models.state_dicts import pick
from finetune.models.weight_files import INDEX_SUFFIX, files_of, hash_of, read_weights
from finetune.models.weights import Weights, load_backbone_weights, locate
from finetune.recipe.spec import ALL, AT_PLATEAU, FROZEN, TRAINABLE, Trainable, count_of_last

# Of the largest output: so much may rounding move where a text stands in a larger batch.
PADDING_SHARE = 1e-3
# Through the network, to see in which order its modules are entered.
TRIED_SAMPLES = 2


@dataclass(frozen=True)
class Network:
    """A module and where its head is.

    Attributes:
        head_paths: the stock places of its heads; the last one is the main one, others are auxiliary.
        old_class_count: classes of the layer that an appended head stands behind; else those of the data.
        new_paths: modules before the head that the pretrained file lacks, as the poolers of some text classifiers are:
            they train like the head.
        picked_text: what a person should know of what was taken of the pretrained file; "" = nothing.
        example: makes inputs of no meaning, so many samples.
    """

    module: nn.Module
    head_paths: list[str]
    head_kind: str
    old_class_count: int
    new_paths: tuple[str, ...] = ()
    picked_text: str = ""
    example: Callable[[int], Tensor] | None = field(default=None, compare=False)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Of its backbone, in the order in which it is thawed: the last one first. Tries the network once."""
        return blocks_of(self.module, self._new_paths, self._inputs())

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """Paths of the modules with parameters that no output depends on, as of a pooler that nothing reads. Tries the
        network once."""
        return unread_paths(self.module, self._inputs())

    def _inputs(self) -> Tensor:
        assert self.example is not None
        return to_device(self.example(TRIED_SAMPLES), next(self.module.parameters()).device)

    @property
    def _new_paths(self) -> list[str]:
        """Of what trains from the beginning."""
        heads = [self.new_head_path] if self.head_kind == "append" else self.head_paths
        return [*self.new_paths, *(heads if self.head_kind != NO_HEAD else [])]

    @property
    def first_layer_path(self) -> str:
        """Of the head's first new layer."""
        return first_layer(self.head_paths[-1], self.head_kind)

    @property
    def last_layer_path(self) -> str:
        """Of what gives the network's numbers."""
        return last_layer(self.head_paths[-1], self.head_kind)

    @property
    def new_head_path(self) -> str:
        """Of what is new: the old layer under an appended head stays as it is."""
        return f"{self.head_paths[-1]}.1" if self.head_kind == "append" else self.head_paths[-1]

    def changeable_before_head(self, trainable: Trainable) -> dict[str, Tensor]:
        """What can ever change of that which computes the features that the head reads, by name."""
        freeze_map = self.freeze_map(trainable)
        found = freeze_map.at(freeze_map.last_thaw).changeable()
        return {name: value for name, value in found.items() if not name.startswith(f"{self.new_head_path}.")}

    def head(self) -> nn.Module | None:
        """The head, if it has one."""
        return self.module.get_submodule(self.head_paths[-1]) if self.head_kind != NO_HEAD else None

    def last_layer(self) -> nn.Module | None:
        """Of the head, if there is one."""
        return self.module.get_submodule(self.last_layer_path) if self.head_kind != NO_HEAD else None

    def freeze_map(self, trainable: Trainable, plateaus: Sequence[int] = ()) -> FreezeMap:
        """A recipe's freeze rules, with "head", "last:2" and "all" replaced by the paths of what is meant.

        Args:
            plateaus: the epochs that followed the plateaus so far.

        Raises:
            UsageError: a state that is none, or more blocks than there are.
        """
        rules = list[Rule]()
        for pattern, state, number in trainable.rules:
            if state not in (TRAINABLE, FROZEN, AT_PLATEAU):
                allowed = f"{TRAINABLE!r}, {FROZEN!r} or {AT_PLATEAU!r}"
                raise UsageError(f"freeze rule {pattern!r}: {state!r} is not allowed; give {allowed}")
            epoch = number
            if state == AT_PLATEAU:
                epoch = plateaus[number - 1] if 1 <= number <= len(plateaus) else NEVER
            if pattern == ALL:
                rules += [Rule(path, trainable=False) for path in self.unread]
            rules += [Rule(path, state != FROZEN, epoch) for path in self._paths_of(pattern)]
        return FreezeMap(self.module, rules, trainable.batchnorm)

    def _paths_of(self, pattern: str) -> list[str]:
        """What a rule's pattern stands for; one of the module's own paths for itself."""
        if pattern == "head":
            return self._new_paths
        if pattern == ALL:
            return ["*"]
        count = count_of_last(pattern)
        return last_blocks(self.blocks, count) if count else [pattern]

    def names_of_blocks(self, parameters: Sequence[str]) -> list[str]:
        """The blocks that hold some of them, the last one first; "the rest" where one is in none."""
        names = [block.name for block in self.blocks if any(map(block.holds, parameters))]
        in_none = any(not any(block.holds(name) for block in self.blocks) for name in parameters)
        return [*names, *(["the rest"] if in_none else [])]

    def lr_factors(self, backbone: float, decay: float) -> dict[str, tuple[str, float]]:
        """The block of each parameter, and what its learning rate is multiplied with, by name; {} = none of them is.

        Args:
            backbone: the factor of the last block; what is new has 1.
            decay: that of each further block, and of what is in none.
        """
        if backbone == 1 == decay:
            return {}
        found = dict[str, tuple[str, float]]()
        for name, _ in self.module.named_parameters():
            if any(is_within(name, path) for path in self._new_paths):
                found[name] = ("", 1.0)
                continue
            depths = (depth for depth, block in enumerate(self.blocks) if block.holds(name))
            depth = next(depths, len(self.blocks))
            block = self.blocks[depth].name if depth < len(self.blocks) else "rest"
            found[name] = (block, backbone * decay**depth)
        return found


def build_network(
    backbone: Backbone,
    state: dict[str, Tensor] | None,
    source: str,
    *,
    head: str,
    class_count: int,
    dropout: float,
    head_width: int,
    seed: int,
    old_class_count: int = 0,
    new_paths: Sequence[str] | None = None,
    unit_rows: bool = False,
    one_logit: bool = False,
) -> Network:
    """Build the architecture, load pretrained tensors, put the head on.

    Args:
        state: pretrained tensors by their stock names, or None for random ones drawn from `seed`.
        source: what to call `state` in an error.
        head: "linear", "mlp", "append", "none", or "keep" = the architecture's own last layer.
        class_count: numbers that the network gives for a sample.
        old_class_count: classes of the old layer under an appended head; 0 = as `state` has.
        new_paths: see `Network`; None = what `state` lacks.
        unit_rows, one_logit: see `heads.StandardisedLinear`.

    Raises:
        UsageError: the weights do not fit, or "append" without weights.
    """
    head_paths = find_head(backbone.build)
    if head == "append" and len(head_paths) > 1 and not has_auxiliary_heads(build_shapes(backbone.build, 2)):
        raise UsageError(f"--head append: {backbone.name} has several heads side by side; give --head linear")
    if head != "append":
        old_class_count = class_count
    elif not old_class_count:
        old_class_count = _old_class_count(backbone, state, head_paths, source)
    picked_text = ""
    with keyed_generator("model", seed):
        module = backbone.build(old_class_count)
        # An old head that stays must be whole; one that goes may be missing.
        may_lack = head_paths[:-1] if head == "append" else head_paths
        if backbone.reads_texts:
            if state is not None:
                base_prefix = str(getattr(module, "base_model_prefix", ""))
                own = module.state_dict()
                first = pick(state, own, may_lack, source, base_prefix)
                picked_text = first.text
                if first.share:
                    _check_depth(first.state, own, base_prefix, source)
                    # Pooling other than the stock one leaves some of the file aside.
                    state = {name: value for name, value in first.state.items() if name in own}
            if new_paths is None:
                new_paths = _lacking(module, state, may_lack)
        new_paths = tuple(new_paths or ())
        if state is not None:
            picked = load_backbone_weights(module, state, [*may_lack, *new_paths], source)
            picked_text = picked_text or picked.text
        for path in new_paths:
            renew_layer(module, path, dropout)
        for path in replaced_layers(head_paths, head):
            # Behind a layer that itself trains there is nothing to measure.
            attach_head(
                module, path, head, class_count, dropout, head_width, measured=not new_paths, unit_rows=unit_rows,
                one_logit=one_logit,
            )  # fmt: skip
    example = backbone.preprocessing.example
    return Network(module, head_paths, head, old_class_count, new_paths, picked_text, example)


def _check_depth(found: dict[str, Tensor], own: dict[str, Tensor], base_prefix: str, source: str) -> None:
    """Refuse the weights of an encoder that has more than this one, but for its pooler.

    Raises:
        UsageError: names what it has.
    """
    inside = f"{base_prefix}."
    more = [
        name for name in found
        if name not in own and name.startswith(inside) and not name.startswith(f"{inside}pooler.")
        and not name.endswith("position_ids")  # older files hold what is counted
    ]  # fmt: skip
    if base_prefix and more:
        lines = [f"  + {name}" for name in more[:10]]
        raise UsageError(f"{source} does not fit the architecture (- missing, + unknown, ~ other shape):", lines)


def check_padding(network: Network, backbone: Backbone, source: str) -> None:
    """Try a network on tokens: a text beside a longer one must give what it gives alone.

    Raises:
        UsageError: it does not, or cannot be computed at all.
    """
    tokens = backbone.preprocessing.example(2)
    alone = tokens[-1:, tokens[-1] != PADDING]
    try:
        with in_eval(network.module), torch.inference_mode():
            together, single = network.module(tokens)[-1:], network.module(alone)
    except Exception as error:  # a forward that is not made for such tokens raises whatever it stumbles over
        raise UsageError(f"{source}: cannot be computed ({one_line(error)}); give another encoder") from None
    if together.shape != single.shape or (together - single).abs().max() > PADDING_SHARE * single.abs().max():
        raise UsageError(f"{source}: what it makes of a text depends on the texts beside it; give another encoder")


def _lacking(module: nn.Module, state: dict[str, Tensor] | None, head_paths: list[str]) -> list[str]:
    """Paths of a text network's modules behind the encoder's tokens, but for its head, that `state` has no weights of:
    all of them, where nothing is pretrained."""
    heads = tuple(f"{path}." for path in head_paths)
    return list(dict.fromkeys(
        name.rpartition(".")[0] for name, _ in module.named_parameters()
        if text_encoders.may_be_new(module, name) and not name.startswith(heads) and name not in (state or {})
    ))  # fmt: skip


def _old_class_count(
    backbone: Backbone, state: dict[str, Tensor] | None, head_paths: Sequence[str], source: str
) -> int:
    """How many classes the old head has that a new one is appended to.

    Raises:
        UsageError: there is no old head.
    """
    shapes, path = build_shapes(backbone.build, 2).state_dict(), head_paths[-1]
    old = pick(state or {}, shapes, head_paths, source).state.get(f"{path}.weight")
    if old is None or old.dim() != shapes[f"{path}.weight"].dim():
        raise UsageError("--head append needs pretrained weights with their old head; give others, or --head linear")
    return len(old)


# ---- The frozen tensors of a run --------------------------------------------------------------------------------
# frozen/frozen.json says where they are: in files in this folder ("source" = the stock weights, "tensors" = just the
# frozen ones), else in the file that a reference names, with its hash.


def on_one_file_system(path: Path, other: Path) -> bool:
    """Whether a hard link between the two can be made."""
    return path.stat().st_dev == other.stat().st_dev


def store_frozen(
    folder: Path, weights: Weights | None, frozen: dict[str, Tensor], *, copy: bool, link: bool = True
) -> None:
    """Make sure that the frozen tensors can be had again when the run resumes.

    Of weights in a cache: hard links where the file system can, else, where the same bytes can be found again by name
    and hash, a reference. Of others: copies.

    Args:
        folder: the run's `frozen` folder.
        weights: those that `frozen` are of, or None when no file has them (random, or taken from a run).
        copy: always copy, so that the run folder stands alone.
        link: whether to keep a hard link where a reference would do; not in a folder that is uploaded.
    """
    folder.mkdir(exist_ok=True)
    record: dict[str, str] = {"kind": "none", "file": "", "reference": "", "sha256": ""}
    if weights is not None:
        # A cache is never overwritten; a file of the user's may be, and a hard link with it.
        place = copy_file if copy or not weights.reference else link_or_copy
        record |= {"kind": "source", "reference": weights.reference, "sha256": weights.sha256}
        keeps = copy or not weights.reference or (link and on_one_file_system(weights.path, folder))
        if weights.key:
            record["key"] = weights.key
        if weights.path.is_dir() or weights.path.name.endswith(INDEX_SUFFIX):
            if keeps:
                record["file"] = "model"
                (folder / "model").mkdir(exist_ok=True)
                is_model = hub.is_folder(str(weights.path))
                others = [huggingface.PREPROCESSOR_FILE]
                for path in hub.source_files(weights.path, others) if is_model else files_of(weights.path):
                    place(path.resolve(), folder / "model" / path.name)
        elif keeps:
            record["file"] = f"weights{weights.path.suffix}"
            place(weights.path.resolve(), folder / record["file"])
    elif frozen:
        path = folder / "weights.safetensors"
        temporary = folder / ".weights.safetensors.tmp"
        save_file({name: value.detach().cpu().contiguous() for name, value in frozen.items()}, temporary)
        link_or_copy(temporary, path)
        temporary.unlink()
        record |= {"kind": "tensors", "file": path.name, "sha256": sha256_of_file(path)}
    write_json(folder / "frozen.json", {**record})


def load_frozen(folder: Path) -> tuple[str, dict[str, Tensor] | None]:
    """The tensors that `store_frozen` kept: (kind, tensors); kind is "source", "tensors" or "none".

    Raises:
        RunError: the file is gone, or holds other bytes.
    """
    record_file = folder / "frozen.json"
    fields = Fields(read_json(record_file, "record of the frozen weights"), str(record_file))
    kind, sha256 = fields.text("kind"), fields.text("sha256")
    if kind == "none":
        return kind, None
    if file := fields.text("file"):
        path = folder / file
        if path.parent != folder:
            raise BadFile(f"{record_file} names {file}, which lies outside {folder}; restore it")
        if not path.exists():
            raise RunError(f"frozen weights {path} are gone; put the file with sha256 {sha256} there")
        found = hash_of(path)
    else:
        path, found = locate(fields.text("reference"))
    if found != sha256:
        raise RunError(
            f"frozen weights {path} are not those of this run: sha256 {found}, expected {sha256}; "
            "put the right file there"
        )
    return kind, read_weights(path, fields.text("key") if "key" in fields else "")
