"""Files with weights, and folders of them, read so that nothing in them is run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune.base.files import BadFile, sha256_of_file
from finetune.base.safe_load import load_plain
from finetune.base.stand_ins import what_stands_in
from finetune.errors import UsageError, one_line
from finetune.models import hub, text_encoders, timm_models
from finetune.models.state_dicts import StateDict, flattened, part_of

# What a damaged file makes of torch's and safetensors' readers.
UNREADABLE = (SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError)
# Of a file that says in which others each tensor lies.
INDEX_SUFFIX = ".index.json"


def read_weights(path: Path, key: str = "") -> StateDict:
    """All tensors of a file, of a file that names several (*.index.json), or of a folder. Runs no code from it.

    Args:
        key: what a person named as KEY in FILE:KEY: a mapping in it, or what names begin with; "" = all.

    Raises:
        BadFile: no such file, or one that would run code.
        UsageError: nothing in it is called so.
    """
    if hub.is_folder(str(path)):
        found = flattened(_read_folder(path))
    else:
        found = StateDict()
        for file in files_of(path):
            if not file.name.endswith(INDEX_SUFFIX):
                part = _read_file(file)
                found.update(part)
                found._metadata |= part._metadata
    return part_of(found, key, str(path)) if key else found


def files_of(path: Path) -> list[Path]:
    """The files that hold weights, and the index that names them, if there is one; of a folder whichever it has.

    Raises:
        BadFile: an index that cannot be read, or names a file that is missing or lies elsewhere.
        UsageError: a folder without such files, or with several.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX_SUFFIX}")) or hub.weight_files(path)
        if len(found) != 1:
            what = f"holds several: {', '.join(one.name for one in found[:3])}" if found else "holds no weights"
            raise UsageError(f"{path}: is a folder that {what}; name the file itself")
        path = found[0]
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} cannot be read ({one_line(error)}); restore it") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise BadFile(f"{path} is no index of weights: it has no weight_map; give the file with the weights itself")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise BadFile(f"{path} names {name}, which is not beside it; put all of its files into one folder")
    return [path, *(path.parent / name for name in names)]


def hash_of(path: Path) -> str:
    """sha256 of the file, or over those that an index names, or that a folder of transformers or timm holds."""
    if hub.is_folder(str(path)):
        return hub.hash_of_folder(path)
    hashes = [sha256_of_file(file) for file in files_of(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _read_folder(folder: Path) -> Mapping[str, Tensor]:
    """By the names that transformers, or timm, knows today."""
    if hub.timm_config(folder) is None:
        return hub.read_tensors(folder, _stock_class(folder))
    # Beside its own there may be the file of another library.
    file = next((file for name in hub.TIMM_WEIGHTS if (file := folder / name).is_file()), None)
    if file is None:
        raise UsageError(f"{folder}: holds no {' or '.join(hub.TIMM_WEIGHTS)}; put it there, or give --weights none")
    return timm_models.read_tensors(folder, _read_file(file))


def _read_file(path: Path) -> StateDict:
    try:
        is_safetensors = path.suffix == ".safetensors"
        content: object = load_file(path) if is_safetensors else load_plain(path, of_others=True)
    except UNREADABLE as error:
        raise BadFile(f"{path} {what_stands_in(path) or f'cannot be read ({one_line(error)}); restore it'}") from None
    if isinstance(content, Mapping) and {"schema_version", "frozen", "optimizer"} <= set(content):
        raise BadFile(f"{path} is a checkpoint of a run; give what `finetune export RUN` writes")
    found = flattened(content)
    if not found:
        what = f", but {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, Mapping) and content else ""
        raise BadFile(f"{path} does not hold a state dict (names to tensors){what}; give a file with weights")
    return found


def _stock_class(folder: Path) -> Any:
    """transformers' auto class for what lies in a folder: of images, where its config has one; else of texts; else the
    model without a head."""
    from transformers import AutoModel, AutoModelForImageClassification

    config, _ = hub.read_config(folder)
    if type(config) in AutoModelForImageClassification._model_mapping:
        return AutoModelForImageClassification
    of_texts = text_encoders.stock_class()
    return of_texts if type(config) in of_texts._model_mapping else AutoModel
