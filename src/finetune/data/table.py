"""A table of samples: csv, tsv, jsonl or parquet, a row a sample with its label or labels."""

import ast
import dataclasses
import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.base.table_names import IMAGE_COLUMNS, TEXT_COLUMNS, as_file_name
from finetune.base.words import typed
from finetune.data.groups import groups_of, with_groups
from finetune.data.names import MISSING, notes_on_separators
from finetune.data.source import PART_NAMES, FileSource, Reading, check_inside, make_file_source
from finetune.data.table_files import read_rows, shards_of
from finetune.data.table_images import holds_bytes, unpacked
from finetune.data.table_paths import found_below
from finetune.errors import UsageError
from finetune.recipe.scripts import RECIPE_OF_KIND

# In a column of its own, whether a label applies.
YES, NO = {"1", "1.0", "true", "t", "yes", "y", "x"}, {"", "0", "0.0", "false", "f", "no", "n", "-"}
NUMBERS = re.compile(r"\[\s*-?\d+(\s+-?\d+)*\s*\]")
ELIDED = re.compile(r"['\"\d]\s*,?\s*\.\.\.\s*,?\s*['\"\d]")
SIDE_BY_SIDE = re.compile(r"['\"]\s+['\"]")
QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
# Tried in this order where no column is named.
LABEL_COLUMNS = (
    "label", "labels", "class", "category", "target", "tags", "intent", "topic", "sentiment", "lbl", "class_name",
    "label_name", "classes",
)  # fmt: skip
# By the option of what a table is to hold: what others hold, and which columns tell.
OTHER_KIND = {"--image-column": ("texts", TEXT_COLUMNS), "--text-column": ("images", IMAGE_COLUMNS)}


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; "" = found by their names. With a separator, a row has several labels.

    `content` holds the image's path, or the text; `group` what samples have in common that stay on one side of a split.
    """

    content: str = ""
    label: str = ""
    split: str = ""
    separator: str = ""
    group: str = ""


def find_column(
    path: Path, columns: Sequence[str], given: str, candidates: Sequence[str], option: str, instead: str = ""
) -> str:
    """The column meant by the option, or by its own name.

    Args:
        instead: the end of the error.

    Raises:
        UsageError: there is no such column.
    """
    if given:
        if given in columns:
            return given
    else:
        plain = {name.strip().lower(): name for name in reversed(columns)}
        for candidate in candidates:
            if candidate in plain:
                return plain[candidate]
    what = f"{option} {given}: no such column" if given else f"no column is called {', '.join(candidates[:4])}, ..."
    raise UsageError(
        f"{path}: {what}; its columns are {', '.join(map(repr, columns))}: give {option} "
        f"(the first line of a csv must name the columns){instead}"
    )


def _other_kind(path: Path, columns: Sequence[str], option: str) -> str:
    """What to type if the other kind of data is meant, whose column a table has; "" = it has none."""
    kind, names = OTHER_KIND[option]
    if not any(name.strip().lower() in names for name in columns):
        return ""
    return f"; if its {kind} are meant: {typed(['finetune', RECIPE_OF_KIND[kind], f'--{kind}', str(path)])}"


@dataclass(frozen=True)
class Row:
    """A sample as a table lists it.

    Attributes:
        where: file and line, for errors.
        line: number.
        column: the image or text column.
        content: what it holds.
        label: one, or, with a separator, all of them; None where the table is read without labels.
        part: place in `PARTS`; None without a split column.
        group: what the group column holds; "" without one.
    """

    where: str
    line: int
    column: str
    content: object
    label: str | tuple[str, ...] | None
    part: int | None
    group: str = ""


@dataclass
class Found:
    """What a person should know of a table besides its rows.

    Attributes:
        left_out: the lines of rows without a label.
        chosen: sentences on columns that could as well be others.
    """

    left_out: list[str] = dataclasses.field(default_factory=list)
    chosen: list[str] = dataclasses.field(default_factory=list)

    def choose(self, column: str, columns: Sequence[str], candidates: Sequence[str], option: str) -> None:
        """Note a column that was found by its name, where others have such names, too."""
        others = [name for name in columns if name != column and name.strip().lower() in candidates]
        if others:
            self.chosen.append(
                f"column {column!r} is read, not {', '.join(map(repr, others))} ({option} decides otherwise)"
            )

    @property
    def notes(self) -> list[str]:
        """Sentences."""
        left_out = f"{len(self.left_out):,} row(s) without a label left out, like {(self.left_out or [''])[0]}"
        return [*self.chosen, *([left_out] if self.left_out else [])]


def sample_rows(
    path: Path,
    columns: Columns,
    candidates: Sequence[str],
    option: str,
    *,
    labelled: bool = True,
    reading: Reading = Reading(),
    found: Found | None = None,
) -> Iterator[Row]:
    """The samples that a table lists.

    Args:
        candidates: names of the content column, tried where none is given.
        option: that names it.
        labelled: whether there must be labels.
        found: takes what is not in the rows.

    Raises:
        UsageError: a line cannot be read, or lacks a label; names it.
    """
    content_column, label_column, several = "", "", list[str]()
    if found is not None and reading.is_whole and len(shards := shards_of(path)) > 1:
        found.chosen.append(f"all {len(shards):,} files are read, {shards[0].name} to {shards[-1].name}")
    rows = read_rows(path, reading.quotes, reading.encoding, is_strict=reading.is_strict, is_whole=reading.is_whole)
    for number, row in rows:
        if not content_column:
            names = list(row)
            instead = _other_kind(path, names, option) if labelled and not columns.content else ""
            content_column = find_column(path, names, columns.content, candidates, option, instead)
            several = label_columns(columns.label, names, reading) if labelled else []
            if labelled and not several:
                label_column = find_column(path, names, columns.label, LABEL_COLUMNS, "--label-column")
            if found is not None and not columns.content:
                found.choose(content_column, names, candidates, option)
            if found is not None and not columns.label and labelled:
                found.choose(label_column, names, LABEL_COLUMNS, "--label-column")
            if columns.split:
                find_column(path, names, columns.split, (), "--split-column")
            if columns.group:
                find_column(path, names, columns.group, (), "--group-column")
        where, part = f"{path} line {number}", None
        label: str | tuple[str, ...] | None = None
        if several:
            label = tuple(name for name in several if _is_yes(plain_value(row.get(name), where), where, name))
        elif labelled:
            value = plain_value(row.get(label_column), where)
            if _is_missing(value, columns.separator, reading.missing_labels):
                if reading.missing_labels != "leave-out":
                    raise UsageError(_unlabelled(value, where, label_column))
                if found is not None:
                    found.left_out.append(f"line {number}")
                continue
            label = _labels(value, columns.separator, where, label_column, reading)
        if columns.split:
            name = str(row.get(columns.split) or "").strip()
            if name.lower() not in PART_NAMES:
                raise UsageError(f"{where}: {columns.split} {name!r} is not allowed; give train, val or test")
            part = PART_NAMES[name.lower()]
        group = _group_of(row, columns.group, where) if columns.group else ""
        yield Row(where, number, content_column, row.get(content_column), label, part, group)
    if not content_column:
        raise UsageError(f"{path}: holds no rows; give a line a sample")


def _group_of(row: Mapping[str, object], column: str, where: str) -> str:
    value = plain_value(row.get(column), where)
    group = "" if value is None else str(value).strip()
    if not group:
        raise UsageError(f"{where}: column {column!r} is empty; say what the sample belongs to, or remove the line")
    return group


def _image_of(row: Row) -> str:
    """The path in a row, with "/"; a number is the name of a file, too."""
    image = as_file_name(row.content)
    if image is None or (isinstance(image, str) and not image.strip()):
        raise UsageError(f"{row.where}: column {row.column!r} is empty; name an image")
    if not isinstance(image, str):
        raise UsageError(f"{row.where}: column {row.column!r} holds {image!r}; name an image")
    return image.strip().replace("\\", "/")


def image_paths(path: Path, image_column: str = "", reading: Reading = Reading()) -> tuple[Path, list[str], str]:
    """The image column of a table alone: the folder that paths are from, the paths, and what to say of them.

    Raises:
        UsageError: a line cannot be read, or several mean the same file by other names.
    """
    columns = Columns(content=image_column)
    rows = sample_rows(path, columns, IMAGE_COLUMNS, "--image-column", labelled=False, reading=reading)
    found = list(rows)
    if found and holds_bytes(found[0].content):
        return *unpacked([(row.where, row.line, row.content) for row in found]), ""
    names = [_image_of(row) for row in found]
    if reading.is_strict:
        return path.parent, names, ""
    different = list(dict.fromkeys(names))
    paths, said = found_below(path.parent, different)
    _check_once(path, paths)
    by_name = dict(zip(different, paths, strict=True))
    return path.parent, [by_name[name] for name in names], said


def _check_once(path: Path, paths: Sequence[str]) -> None:
    """Raises: UsageError: different names were found to mean one file."""
    if twice := [name for name, count in Counter(paths).items() if count > 1]:
        raise UsageError(f"{path}: several of its lines mean {twice[0]!r}; give paths relative to {path.parent}")


def open_table(
    path: Path,
    columns: Columns,
    classes: Sequence[str] | None = None,
    allow_outside: bool = False,
    reading: Reading = Reading(),
) -> FileSource:
    """The images that a table names, relative to the table's own folder.

    Args:
        columns: `separator` makes it a multi-label data set; a row may then have no label at all.
        classes: the only classes allowed, in order; None = those found.
        allow_outside: images may lie outside the table's folder.

    Raises:
        UsageError: a line cannot be read, lacks a value, or names an image for the second time; names it.
    """
    lines: dict[str, int] = {}
    labels: list[str | tuple[str, ...]] = []
    parts: list[int] = []
    found, rows = Found(), list[str]()
    folder, within = path.parent, list[tuple[str, int, object]]()
    for row in sample_rows(path, columns, IMAGE_COLUMNS, "--image-column", reading=reading, found=found):
        if holds_bytes(row.content) or within:
            within.append((row.where, row.line, row.content))
            image = str(row.line)
        else:
            image = posixpath.normpath(_image_of(row))
        if image in lines:
            raise UsageError(
                f"{row.where}: names {image!r} like line {lines[image]}, and what is trained on must not validate: "
                "remove one line, or join their labels and give --separator"
            )
        lines[image] = row.line
        assert row.label is not None, "the table is read with its labels"
        labels.append(row.label)
        rows.append(row.group)
        if row.part is not None:
            parts.append(row.part)
    paths, said = list(lines), ""
    if within:
        folder, paths = unpacked(within)
    elif not reading.is_strict:
        paths, said = found_below(path.parent, paths)
    _check_once(path, paths)
    if not allow_outside:
        check_inside(folder, paths, f"--images {path}")
    given_parts = parts if columns.split else None
    source = make_file_source(folder, paths, labels, given_parts, classes, f"--images {path}", reading)
    groups, of_groups = groups_of(source.paths, rows, columns.group, reading.group_by, "image")
    notes = (*found.notes, *([said] if said else []), *source.notes, *made_of_others(labels, classes), *of_groups)
    return dataclasses.replace(source, notes=notes, groups=groups, fingerprint=with_groups(source.fingerprint, groups))


def made_of_others(labels: Sequence[str | tuple[str, ...] | None], classes: Sequence[str] | None) -> list[str]:
    """See `notes_on_separators`; of labels of a new data set, one a row."""
    return notes_on_separators({one for one in labels if isinstance(one, str)}) if classes is None else []


def plain_value(value: object, where: str) -> object:
    """A value as every format would give it: bytes as text, no number as nothing.

    Raises:
        UsageError: bytes that are no text.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{where}: holds bytes that are not UTF-8; save the file with texts") from None
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_missing(value: object, separator: str, missing_labels: str) -> bool:
    """Whether a row has no label, or one that is spelled like none. Of several labels a row may have none at all."""
    if isinstance(value, list | dict):
        return False
    spelling = "" if value is None else str(value).strip()
    if not spelling:
        return not separator
    parts = [part.strip() for part in spelling.split(separator)] if separator else [spelling]
    return missing_labels != "class" and any(part in MISSING for part in parts if part)


def _unlabelled(value: object, where: str, column: str) -> str:
    spelling = "" if value is None else str(value).strip()
    if not spelling:
        return f"{where}: column {column!r} is empty; give a label, remove the line, or --missing-labels leave-out"
    return (
        f"{where}: column {column!r} holds {spelling!r}, which is how a missing value is written; give a label, or say "
        "what it is: --missing-labels leave-out (such rows are left out) or class (it is the name of a class)"
    )


def label_columns(given: str, names: Sequence[str], reading: Reading) -> list[str]:
    """The columns, one a label and a yes or no in each row, that A,B,C names; [] = it names one column."""
    columns = [name.strip() for name in given.split(",")]
    is_several = len(columns) > 1 and given not in names and not reading.is_strict
    return columns if is_several and set(columns) <= set(names) else []


def _is_yes(value: object, where: str, column: str) -> bool:
    """What a row says of a label that has a column of its own.

    Raises:
        UsageError: neither yes nor no.
    """
    word = "" if value is None else str(value).strip().lower()
    if word in YES or word in NO:
        return word in YES
    raise UsageError(f"{where}: column {column!r} holds {value!r}; the column of a label holds 1 or 0, or yes or no")


def _listed(text: str, where: str) -> list[str] | None:
    """Of a list as pandas or numpy print it its items; None = it is none.

    Raises:
        UsageError: the middle of it was left out when it was printed.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return None
    if NUMBERS.fullmatch(text):  # of numpy, without commas
        return text[1:-1].split()
    if ELIDED.search(text):
        raise UsageError(
            f"{where}: {text[:40]!r} was cut short when it was printed (...); save the table with whole lists"
        )
    if SIDE_BY_SIDE.search(text):  # of numpy, without commas, which Python would take for one long text
        return [first or second for first, second in QUOTED.findall(text)]
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(one) for one in found] if isinstance(found, list) else None


def _labels(value: object, separator: str, where: str, column: str, reading: Reading) -> str | tuple[str, ...]:
    listed = _listed(value.strip(), where) if isinstance(value, str) and not reading.is_strict else None
    value = value if listed is None else listed
    if isinstance(value, dict):
        raise UsageError(f"{where}: column {column!r} holds a dict; give a column of labels: --label-column")
    if separator:
        several = value if isinstance(value, list) else ("" if value is None else str(value)).split(separator)
        return tuple(dict.fromkeys(name for one in several if (name := str(one).strip())))
    if isinstance(value, list):
        raise UsageError(f"{where}: {column!r} is a list; several labels a row need --separator, as in --separator ','")
    return str(value).strip()
