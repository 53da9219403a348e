"""Image encoders of transformers: ViT, DeiT, ConvNeXt, DINOv2 and whatever else has an image classification class.

transformers is imported when such a backbone is asked for. No code from a model's repository is ever run.
"""

import copy
import hashlib
import json
import os
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize, to_pil_image

from finetune.data.preprocess import Preprocessing, squash
from finetune.errors import RunError, UsageError, one_line
from finetune.files import sha256_of_file

PREFIX = "hf:"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
# Of a config: where it lay on this machine, and what could make transformers fetch or run code of others.
NOT_KEPT = ("_name_or_path", "auto_map", "quantization_config", "_attn_implementation", "attn_implementation")
# PIL's numbers, which a preprocessor's file holds.
INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
STOCK_LINES = """\
import json, pathlib
from transformers import AutoConfig, AutoModelForImageClassification
config = json.loads(pathlib.Path({json!r}).read_text("utf-8"))["architecture"]["options"]["config"]
model = AutoModelForImageClassification.from_config(AutoConfig.for_model(**config, num_labels={classes}))"""


def is_name(name: str) -> bool:
    """Whether `--backbone` means a model of transformers: hf:ID, or a folder with a config.json."""
    return name.startswith(PREFIX) or os.path.isfile(os.path.join(os.path.expanduser(name), CONFIG_FILE))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold its tensors: safetensors where there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def source_files(folder: Path) -> list[Path]:
    """Everything that is needed to load it again."""
    described = [folder / name for name in (CONFIG_FILE, PREPROCESSOR_FILE)]
    return [path for path in described if path.is_file()] + sorted(folder.glob("*.index.json")) + weight_files(folder)


def folder_of(name: str) -> Path:
    """The local folder of hf:ID or hf:ID@REVISION, downloaded into huggingface_hub's cache where it is not yet there;
    or the folder that was named itself.

    Raises:
        RunError: it cannot be had; says where to put what.
    """
    if not name.startswith(PREFIX):
        return Path(os.path.expanduser(name))
    identifier, _, revision = name.removeprefix(PREFIX).partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [CONFIG_FILE, PREPROCESSOR_FILE, "*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(identifier, revision=revision or None, allow_patterns=patterns))
        if not weight_files(folder):  # an old repository without safetensors
            patterns += ["pytorch_model*.bin", "pytorch_model*.index.json"]
            folder = Path(snapshot_download(identifier, revision=revision or None, allow_patterns=patterns))
    except HFValidationError:
        raise UsageError(f"--backbone {name}: is no model's name; give hf:OWNER/NAME") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
        raise RunError(
            f"--backbone {name}: not cached and cannot be fetched ({reason}); fetch it where there is a network "
            f"(hf download {identifier} --local-dir FOLDER) and give --backbone FOLDER, or bundled/vgg"
        ) from None
    return folder


def describe(folder: Path) -> tuple[dict[str, Any], Preprocessing]:
    """Config (plain values) and preprocessing of a model in a folder.

    Raises:
        UsageError: not a model for images, or one whose images are prepared in a way that we cannot.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    with refusing(f"--backbone {folder}: its {CONFIG_FILE} cannot be used"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise UsageError(
            f"--backbone {folder}: a {config.model_type} has no image classification class in transformers; give "
            "an image encoder, such as ViT, DeiT, ConvNeXt or DINOv2"
        )
    plain = json.loads(config.to_json_string(use_diff=False))
    # Where a family has several classes, transformers goes through this list, and stumbles over null.
    plain["architectures"] = plain.get("architectures") or []
    for name in NOT_KEPT:
        plain.pop(name, None)
    with refusing(f"--backbone {folder}: its {PREPROCESSOR_FILE} cannot be used"):
        return plain, _preprocessing(folder, config)


def _preprocessing(folder: Path, config: Any) -> Preprocessing:
    """As the model's own image processor does it; held against it on a picture.

    Raises:
        ValueError: it does something that we cannot.
    """
    if not (folder / PREPROCESSOR_FILE).is_file():
        size = getattr(config, "image_size", 224)
        return squash(size if isinstance(size, int) else size[0], [0.5] * 3, [0.5] * 3)
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    given = processor.to_dict()
    size = given.get("size") or {}
    crop = given.get("crop_size") if given.get("do_center_crop") else None
    edge = size.get("shortest_edge")
    keep_proportions = edge is not None
    if edge is None:
        edge = size.get("height")
    image_size = (crop or {}).get("height", edge)
    if (fraction := given.get("crop_pct")) and keep_proportions:
        # ConvNeXt's rule: small pictures are cut out of a larger one, large ones squeezed.
        image_size, keep_proportions = edge, edge < 384
        edge = int(edge / fraction) if keep_proportions else edge
    normalises = given.get("do_normalize", True)
    ours = Preprocessing(
        image_size=image_size,
        resize_size=edge,
        keep_proportions=keep_proportions,
        interpolation=INTERPOLATIONS[given["resample"]],
        mean=list(given["image_mean"]) if normalises else [0.0] * 3,
        std=list(given["image_std"]) if normalises else [1.0] * 3,
    )
    # A picture without detail, whose edges stay whole numbers: where a crop is rounded to must not matter.
    patches = torch.randint(0, 256, (3, 4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = resize(patches, [2 * edge, 4 * edge])
    theirs = processor(to_pil_image(picture), return_tensors="pt")["pixel_values"]
    found = ours.normalise(ours.resize(picture)[None])
    allowed_levels = 3 + 255 / (edge / 2) * 1.5  # a pixel and a half of it, and rounded bytes
    if found.shape != theirs.shape or (found - theirs).abs().max() > allowed_levels / 255 / min(ours.std):
        raise ValueError(f"a {type(processor).__name__} prepares images in a way that this kit cannot")
    return ours


def _only_logits(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
    return output.logits


def build(config: dict[str, Any], class_count: int) -> nn.Module:
    """The stock classification model of a config, randomly initialised; it returns logits."""
    from transformers import AutoConfig, AutoModelForImageClassification

    with refusing("the config of this backbone cannot be used"):
        full = AutoConfig.for_model(**copy.deepcopy(config) | {"num_labels": class_count, "id2label": None})
        model = AutoModelForImageClassification.from_config(full, dtype=torch.float32, trust_remote_code=False)
    # A hook, not a wrapper: a wrapper would change the names of all parameters.
    model.register_forward_hook(_only_logits)
    return model


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """What a folder holds of its stock classification model, by that model's names; what it lacks is missing.

    Raises:
        UsageError: it cannot be read.
    """
    from transformers import AutoModelForImageClassification

    files = weight_files(folder)
    if not files:
        raise UsageError(
            f"--backbone {folder}: holds no .safetensors or pytorch_model.bin; give --weights none or a file"
        )
    with refusing(f"--backbone {folder}: its weights cannot be read"):
        model, found = AutoModelForImageClassification.from_pretrained(
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


@contextmanager
def refusing(what: str):
    """Turn whatever transformers makes of a strange file into one line; keep it from reporting what we say ourselves.

    Raises:
        UsageError: `what`, and why.
    """
    from transformers.utils import logging

    level, showed_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # its checks raise what they like
        raise UsageError(f"{what} ({one_line(error)})") from None
    finally:
        logging.set_verbosity(level)
        if showed_bars:
            logging.enable_progress_bar()
