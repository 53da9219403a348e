"""Folders and repositories in transformers' format: had from a hub or the disk, described, read without running code.

transformers is imported when such a backbone is asked for. No code from a model's repository is ever run.
"""

import copy
import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.base.files import sha256_of_file
from finetune.base.stand_ins import what_stands_in
from finetune.errors import RunError, UsageError, one_line

PREFIX = "hf:"
CONFIG_FILE = "config.json"
WEIGHTS_PATTERNS = ["*.safetensors", "*.safetensors.index.json"]
TIMM_WEIGHTS = ["model.safetensors", "pytorch_model.bin"]
OLD_WEIGHTS_PATTERNS = ["pytorch_model*.bin", "pytorch_model*.index.json"]
# Of a config: where it lay on this machine, and what could make transformers fetch or run code of others.
NOT_KEPT = ("_name_or_path", "auto_map", "quantization_config", "_attn_implementation", "attn_implementation")


def is_folder(name: str) -> bool:
    """Whether a folder in the format of transformers, or of timm, is meant."""
    return os.path.isfile(os.path.join(os.path.expanduser(name), CONFIG_FILE))


def is_identifier(name: str) -> bool:
    """Whether a name could be that of a model on the hub: NAME or OWNER/NAME, perhaps with @REVISION."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name) is not None and not os.path.exists(name)


def timm_config(folder: Path) -> dict[str, Any] | None:
    """The config of a folder in timm's format; None = it is in another."""
    try:
        plain = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_timm = isinstance(plain, dict) and isinstance(plain.get("architecture"), str) and "model_type" not in plain
    return plain if is_timm else None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold its tensors: safetensors where there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def source_files(folder: Path, others: Sequence[str]) -> list[Path]:
    """Everything that is needed to load it again: config, weights, and of `others` what there is."""
    described = [folder / name for name in (CONFIG_FILE, *others)]
    return [path for path in described if path.is_file()] + sorted(folder.glob("*.index.json")) + weight_files(folder)


def folder_of(name: str, others: Sequence[str]) -> Path:
    """The local folder of hf:ID or hf:ID@REVISION, downloaded into huggingface_hub's cache where it is not yet there;
    or the folder that was named itself.

    Args:
        others: files to fetch besides config and weights.

    Raises:
        UsageError: no model is called so.
        RunError: it cannot be had; says where to put what.
    """
    if not name.startswith(PREFIX):
        return Path(os.path.expanduser(name))
    identifier, _, revision = name.removeprefix(PREFIX).partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [CONFIG_FILE, *others, *(TIMM_WEIGHTS[:1] if identifier.startswith("timm/") else WEIGHTS_PATTERNS)]
    try:
        folder = Path(snapshot_download(identifier, revision=revision or None, allow_patterns=patterns))
        if not weight_files(folder):  # an old repository without safetensors
            patterns += OLD_WEIGHTS_PATTERNS
            folder = Path(snapshot_download(identifier, revision=revision or None, allow_patterns=patterns))
    except HFValidationError:
        raise UsageError(f"--backbone {name}: is no model's name; give hf:OWNER/NAME") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise RunError(
            f"--backbone {name}: not cached and cannot be fetched ({reason}); fetch it where there is a network "
            f"(hf download {identifier} --local-dir FOLDER) and give --backbone FOLDER, or one that ships with the kit"
        ) from None
    return folder


def read_config(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The config of a folder: transformers' own object, and plain values to keep.

    Raises:
        UsageError: it cannot be used.
    """
    from transformers import AutoConfig

    with refusing(f"--backbone {folder}: its {CONFIG_FILE} cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    plain = json.loads(config.to_json_string(use_diff=False))
    # Where a family has several classes, transformers goes through this list, and stumbles over null.
    plain["architectures"] = plain.get("architectures") or []
    return config, without_foreign_code(plain)


def without_foreign_code(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what could make transformers fetch or run code of others; it may come from any file."""
    return {name: copy.deepcopy(value) for name, value in config.items() if name not in NOT_KEPT}


def read_tensors(folder: Path, stock_class: Any) -> dict[str, Tensor]:
    """What a folder holds of a stock model, by that model's names; what it lacks is missing.

    Args:
        stock_class: one of transformers' auto classes.

    Raises:
        UsageError: it cannot be read.
    """
    files = weight_files(folder)
    if not files:
        raise UsageError(
            f"--backbone {folder}: holds no .safetensors or pytorch_model.bin; put them there, or give --weights none"
        )
    for file in files:
        if instead := what_stands_in(file):
            raise UsageError(f"--backbone {folder}: its {file.name} {instead}")
    with refusing(f"--backbone {folder}: its weights cannot be read"):
        model, found = stock_class.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.float32,
            use_safetensors=files[0].suffix == ".safetensors",
            local_files_only=True,
            trust_remote_code=False,
        )
    missing = set(found["missing_keys"])
    return OrderedDict((name, value) for name, value in model.state_dict().items() if name not in missing)


def hash_of_folder(folder: Path) -> str:
    """sha256 over the weight files of a folder; of a single one, that file's own."""
    hashes = [sha256_of_file(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def only_logits(_module: nn.Module, _inputs: object, output: Any) -> Tensor:
    """A forward hook: a hook, not a wrapper, for a wrapper would change the names of all parameters."""
    return output.logits


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever transformers makes of a strange file into one line; keep it from reporting what we say ourselves.

    Raises:
        UsageError: `what`, and why.
    """
    try:
        with silent():
            yield
    except Exception as error:  # its checks raise what they like
        raise UsageError(f"{what} ({one_line(error)})") from None


@contextmanager
def silent() -> Iterator[None]:
    """Within the block transformers reports nothing, and draws no bars."""
    from transformers.utils import logging

    level, showed_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if showed_bars:
            logging.enable_progress_bar()
