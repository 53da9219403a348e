"""Where what can be made again is kept."""

import os
from pathlib import Path

import platformdirs

FOLDER_VARIABLE = "FINETUNE_CACHE"


def features_folder() -> Path:
    """Of kept features: in the user's cache folder, or what FINETUNE_CACHE names."""
    return _named() or _usual() / "features"


def unpacked_folder() -> Path:
    """Of images that lay in tables: beside the features, or within what FINETUNE_CACHE names."""
    return (_named() or _usual()) / "unpacked"


def _named() -> Path | None:
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else None


def _usual() -> Path:
    return platformdirs.user_cache_path("finetune", appauthor=False)
