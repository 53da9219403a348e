"""Image encoders of timm, an extra: timm:NAME as its registry has them, or a folder or repository in its own format.

timm is imported when such a backbone is asked for. It is handed tensors, and reads no file of
weights itself.
"""

import difflib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.data.preprocess import Preprocessing
from finetune.errors import UsageError, one_line
from finetune.models import hub

PREFIX = "timm:"
# Of a backbone's options: timm's name of the architecture, and what else it is built with.
NAME, ARGUMENTS = "timm", "arguments"
# Of these arguments, what is not the architecture's: decided here, or files of others.
NOT_TAKEN = {
    "cache_dir", "checkpoint_path", "feature_cfg", "features_only", "in_chans", "kwargs_filter", "model_name",
    "num_classes",
}  # fmt: skip


def names_with(word: str) -> dict[str, int]:
    """Models of timm that have weights on its page and a word in their names: the edge in pixels of each.

    Raises:
        UsageError: timm is not installed.
    """
    timm = _timm("finetune backbones timm")
    found = {name: timm.get_pretrained_cfg(name) for name in timm.list_pretrained() if word in name}
    return {PREFIX + name: config.input_size[-1] for name, config in found.items() if _is_on_timms_page(config)}


def repository_of(name: str) -> str:
    """hf:OWNER/NAME, where the weights of timm:NAME lie.

    Raises:
        UsageError: timm keeps none on its own page of the hub.
    """
    found = _config_of(name)
    where = str(found.hf_hub_id or "")
    if not _is_on_timms_page(found):
        place = where or found.url
        what = f"its weights are at {place}, not on timm's own page of the hub" if place else "has no weights"
        raise UsageError(f"--backbone {name}: {what}; fetch them and give --weights FILE, or none (random)")
    return hub.PREFIX + where


def _is_on_timms_page(config: Any) -> bool:
    in_another_format = config.hf_hub_filename or config.custom_load
    return str(config.hf_hub_id or "").startswith("timm/") and not in_another_format


def describe(name: str) -> tuple[str, dict[str, Any], Preprocessing]:
    """The full name, options and preprocessing of timm:NAME; nothing is fetched.

    Raises:
        UsageError: timm is not installed or knows no such model, or prepares its images in a way that we cannot.
    """
    config = _config_of(name)
    full = ".".join(part for part in (config.architecture, config.tag) if part)
    return PREFIX + full, {NAME: full}, _preprocessing(name, config.to_dict())


def describe_folder(folder: Path) -> tuple[dict[str, Any], Preprocessing]:
    """Options and preprocessing of a folder in timm's format.

    Raises:
        UsageError: as `describe`; or its config cannot be used.
    """
    config, options = _options_of(folder)
    return options, _preprocessing(str(folder), config)


def _options_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder's config says, flat; and by which name and arguments its model is built.

    Raises:
        UsageError: as `describe`; or its config cannot be used.
    """
    timm = _timm(f"--backbone {folder}")
    config, arguments = _read_config(folder)
    name = config["architecture"]
    if not timm.is_model(name):
        raise UsageError(f"--backbone {folder}: timm {timm.__version__} has no {name}; upgrade it")
    if config.get("fixed_input_size") and "img_size" not in arguments:
        arguments["img_size"] = config["input_size"][-1]
    return config, {NAME: name, ARGUMENTS: arguments}


def read_tensors(folder: Path, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a folder in timm's format holds, by today's names: timm has changed some since.

    Args:
        state: as the folder's file has it.

    Returns:
        What timm makes of it; where it can make nothing of it, the same.
    """
    try:
        config, options = _options_of(folder)
        classes = config["num_classes"]
        given = {"state_dict": dict(state), "num_classes": classes}
        with _refusing(f"--backbone {folder}: its weights cannot be used"):
            model = _create(options, num_classes=classes, pretrained=True, pretrained_cfg_overlay=given)
    except UsageError:
        # Whoever loads them says what does not fit; another network may call its tensors so, and timm need not be here.
        return state
    found: dict[str, Tensor] = model.state_dict()
    return found


def build(options: dict[str, Any], class_count: int) -> nn.Module:
    """timm's model for so many classes, randomly initialised.

    Raises:
        UsageError: it cannot be built.
    """
    with _refusing(f"--backbone {PREFIX}{options[NAME]}: cannot be built"):
        return _create(options, num_classes=class_count)


def stock_lines(options: dict[str, Any]) -> str:
    """Lines that build it without this kit; `{classes}` stands for the number of classes."""
    arguments = "".join(f", {name}={value!r}" for name, value in options.get(ARGUMENTS, {}).items())
    arguments = arguments.replace("{", "{{").replace("}", "}}")
    return f"import timm\nmodel = timm.create_model({options[NAME]!r}, num_classes={{classes}}{arguments})"


def licence_of(options: Mapping[str, Any]) -> str:
    """Of the weights that timm's registry names; "" = it states none, or they are from a folder."""
    if NAME not in options or ARGUMENTS in options:
        return ""
    return _config_of(options[NAME]).license or ""


def _create(options: dict[str, Any], **given: object) -> nn.Module:
    name, arguments = str(options[NAME]), options.get(ARGUMENTS, {})
    timm = _timm(PREFIX + name)
    # Not hf-hub:..., nor local-dir:...: nothing is fetched or read where a network is built.
    if not timm.is_model(name.partition(".")[0]):
        raise UsageError(f"{PREFIX}{name}: timm {timm.__version__} has no such model; upgrade it")
    if refused := sorted(one for one in arguments if one in NOT_TAKEN or one.startswith("pretrained")):
        raise UsageError(
            f"{PREFIX}{name}: its arguments hold {refused[0]!r}, which is none of an architecture; take it out of the "
            f"{hub.CONFIG_FILE} that it is from"
        )
    model: nn.Module = timm.create_model(name, **arguments, **given)
    return model


def _timm(what: str) -> Any:
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"{what}: needs timm; install with: pip install timm")
    import timm

    return timm


def _config_of(name: str) -> Any:
    """What timm's registry says of a model with its weights.

    Raises:
        UsageError: it knows none of that name.
    """
    timm, plain = _timm(f"--backbone {name}"), name.removeprefix(PREFIX)
    try:
        found = timm.get_pretrained_cfg(plain, allow_unregistered=False)
    except RuntimeError:  # no such architecture, or no such weights of it
        nearest = difflib.get_close_matches(plain, [*timm.list_models(), *timm.list_pretrained()], n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(PREFIX + one for one in nearest)}?" if nearest else ""
        raise UsageError(f"--backbone {name}: timm {timm.__version__} has no such model{hint}") from None
    return found


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder's config says of the model and its weights, flat; and the arguments that it is built with.

    Raises:
        UsageError: it is not as timm writes it.
    """
    plain = hub.timm_config(folder)
    config = (plain or {}).get("pretrained_cfg", plain)
    arguments = (plain or {}).get("model_args") or {}
    if not isinstance(config, dict) or not isinstance(arguments, dict):
        raise UsageError(f"--backbone {folder}: its {hub.CONFIG_FILE} is not as timm writes it; fetch it anew")
    classes = (plain or {}).get("num_classes", config.get("num_classes"))
    size = config.get("input_size", (3, 224, 224))
    if type(classes) is not int or not (isinstance(size, list | tuple) and len(size) == 3):
        raise UsageError(f"--backbone {folder}: its {hub.CONFIG_FILE} has no num_classes and input_size; fetch it anew")
    known = {**config, "architecture": (plain or {})["architecture"], "num_classes": classes, "input_size": size}
    if (channels := arguments.get("in_chans", 3)) != 3:
        raise UsageError(f"--backbone {folder}: reads images of {channels} channels; give one of 3")
    taken = {name: value for name, value in arguments.items() if name not in ("num_classes", "in_chans")}
    return known, taken


def _preprocessing(name: str, config: dict[str, Any]) -> Preprocessing:
    """As timm's own transform does it; held against it on a picture.

    Raises:
        UsageError: it does something that we cannot.
    """
    from timm.data import create_transform, resolve_data_config

    with _refusing(f"--backbone {name}: its images are prepared in a way that this kit cannot"):
        given = resolve_data_config(pretrained_cfg=config)
        channels, height, width = given["input_size"]
        if channels != 3 or height != width:
            raise ValueError(f"{channels} channels, {height} x {width} px")
        ours = Preprocessing(
            image_size=height,
            resize_size=int(height / given["crop_pct"]),
            keep_proportions=given["crop_mode"] != "squash",
            interpolation=given["interpolation"],
            mean=list(map(float, given["mean"])),
            std=list(map(float, given["std"])),
        )
        ours.check_same(create_transform(**given, is_training=False))
    return ours


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn whatever timm makes of a strange value into one line; keep it from reporting what we say ourselves.

    Raises:
        UsageError: `what`, and why.
    """
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # its builders raise what they like
        raise UsageError(f"{what} ({one_line(error, 150)})") from None
    finally:
        logger.setLevel(level)
