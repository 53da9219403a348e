"""What tables are called."""

import os
from pathlib import Path

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")
# These also with .gz behind.
LINES_SUFFIXES = (".csv", ".tsv", ".jsonl")
# What the column of an image's path is called, tried in this order.
IMAGE_COLUMNS = (
    "image", "path", "file", "filename", "image_path", "file_path", "filepath", "file_name", "img", "images",
    "img_path", "image_name", "img_name", "image_file", "image_id", "img_id", "id_code", "photo", "picture",
)  # fmt: skip
# The same of a text's column.
TEXT_COLUMNS = (
    "text", "sentence", "message", "content", "review", "body", "question", "utterance", "document", "comment",
    "tweet", "headline", "title", "description",
)  # fmt: skip
KNOWN = ", ".join(TABLE_SUFFIXES)


def table_suffix(path: Path) -> str:
    """What kind of table a file is called like, as in ".csv" of a.CSV and a.csv.gz; "" = none."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    kinds = LINES_SUFFIXES if plain != name else TABLE_SUFFIXES
    return next((suffix for suffix in kinds if plain.endswith(suffix)), "")


def as_file_name(value: object) -> object:
    """A whole number as the name of a file, which pandas and spreadsheets take for a number; all else as it is."""
    if isinstance(value, float) and value.is_integer():  # of a column in which another value is missing
        value = int(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def is_table(path: Path) -> bool:
    """Whether a file, perhaps not there, is called like a table; a folder is none."""
    return bool(table_suffix(path)) and not os.path.isdir(path)
