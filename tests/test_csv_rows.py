"""What a quote means in a table; and rows that one would swallow."""

import csv

import pytest

from finetune.data.table_files import read_rows
from finetune.errors import UsageError


def rows(path, quotes="auto"):
    return [tuple(row.values()) for _, row in read_rows(path, quotes)]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


REVIEWS = [
    ('"Great" he said', "good"),
    ("fine", "good"),
    ('"so so', "bad"),
    ("x", "bad"),
    ('never again"', "bad"),
    ('5" nails', "good"),
]


def test_in_a_tsv_a_quote_is_a_letter_unless_the_value_begins_and_ends_with_one(tmp_path):
    path = write(tmp_path / "a.tsv", ["text\tlabel", *(f"{text}\t{label}" for text, label in REVIEWS)])
    assert rows(path) == REVIEWS and rows(path, "none") == REVIEWS
    # The standard takes '"so so' for the beginning of a value of three lines.
    lines = write(tmp_path / "b.tsv", ["text\tlabel", *(f"{text}\t{label}" for text, label in REVIEWS[1:])])
    assert rows(lines) == REVIEWS[1:] and len(rows(lines, "standard")) == 3


def test_quotes_around_values_of_a_tsv_are_none_of_their_letters(tmp_path):
    wanted = [("a\tb", "x"), ('say "hi"', "y"), ("two\nlines", "x"), ("", "y"), ('"', "x"), ("plain", "y")]
    with (tmp_path / "a.tsv").open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerows([("text", "label"), *wanted])
    assert rows(tmp_path / "a.tsv") == wanted


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
def test_a_quote_that_swallows_rows_is_refused_with_its_lines(tmp_path, suffix, separator):
    lines = [("text", "label"), ("a", "x"), ("b", "y"), ('"c', "x"), ("d", "y"), ("e", "x"), ('f"', "y"), ("g", "x")]
    path = write(tmp_path / f"a.{suffix}", [separator.join(line) for line in lines])
    if separator == "\t":
        assert len(rows(path)) == 7  # a letter, between tabs
        return
    words = r"line 4: the quote that begins there holds 4 lines together, up to line 7, and each .* --quotes none .*standard"
    with pytest.raises(UsageError, match=words):
        rows(path)
    assert len(rows(path, "none")) == 7 and rows(path, "none")[2] == ('"c', "x")
    assert len(rows(path, "standard")) == 4


def test_numbers_are_known_for_rows_as_labels_are(tmp_path):
    plain = [f"text {number},{number / 7:.3f}" for number in range(40)]
    path = write(tmp_path / "a.csv", ["text,stars", *plain, '"c,3', "d,4.75", 'e",5'])
    with pytest.raises(UsageError, match="line 42: the quote that begins there holds 3 lines together"):
        rows(path)


def test_letters_of_several_lines_stay_whole(tmp_path):
    long = ["x" * 200, "y" * 200]
    for wanted in (
        [("Hello,\nthanks", "praise"), ("Dear Bob, I\nwrite, and", "praise"), ("a", "complaint"), ("b", "praise")],
        [(long[0], "neg"), (long[1], "pos"), ("I bought it, it broke.\nNever again", "neg")],
        [("March 3, 2020\nGreat product", "5"), ("good", "1"), ("bad", "2"), ("fine", "5")],
        [("Dear Bob,\ngood 1", "pos"), ("Dear Bob,\ngood 2", "pos")],
    ):
        with (tmp_path / "a.csv").open("w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("text", "label"), *wanted])
        assert rows(tmp_path / "a.csv") == wanted


def test_a_tsv_may_end_its_rows_with_a_text_of_several_lines(tmp_path):
    wanted = [("pos", "line one\nline two, good"), ("neg", "bad"), ("pos", "so\n\nso"), ("neg", '"'), ("pos", '"open')]
    lines = [
        "label\ttext",
        'pos\t"line one',
        'line two, good"',
        "neg\tbad",
        'pos\t"so',
        "",
        'so"',
        'neg\t"',
        'pos\t"open',
    ]
    assert rows(write(tmp_path / "a.tsv", lines)) == wanted


def test_a_quote_that_never_ends_says_what_a_quote_may_be(tmp_path):
    path = write(tmp_path / "a.csv", ["text,label", "a,x", '"b,y', "c,x"])
    with pytest.raises(
        UsageError, match=r"line 3: unexpected end of data; check the quotes from there on; .*--quotes none"
    ):
        rows(path)
