"""Texts as numbers: a tokenizer in one JSON file, how long a text may be, and rows of tokens padded to the longest.

Tokens of a batch are one int64 tensor, `PADDING` behind a text's end; the network makes its attention mask from that.
So a batch of texts is cut, moved and kept like a batch of images.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from finetune.base.files import BadFile, Sink, make_folders, write_atomically
from finetune.errors import RunError, UsageError, one_line

if TYPE_CHECKING:  # imported where texts are tokenized
    from tokenizers import Tokenizer

PADDING = -1
TOKENIZER_FILE, SETTINGS_FILE = KEPT_FILES = ("tokenizer.json", "tokenizer_config.json")
# Its two ends and one token.
FEWEST_TOKENS = 3
LONGEST_TEXT_TOKENS = 1 << 16
# What is tokenized at once: the tokenizer's own objects take a hundred times the memory of the numbers.
CHUNK_TEXTS, CHUNK_CHARACTERS = 10_000, 1_000_000
EXAMPLE_TOKENS = 8


def hash_of_files(files: dict[str, str]) -> str:
    """sha256 over names and contents."""
    content = "\0".join(f"{name}\0{files[name]}" for name in KEPT_FILES)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


@functools.lru_cache(maxsize=4)
def _tokenizer(content: str, max_length: int) -> "Tokenizer":
    """Raises: BadFile: it cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # its own base class
        raise BadFile(f"the tokenizer cannot be read ({one_line(error)}); restore its file") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _write_text(content: str, stream: Sink) -> None:
    stream.write(content.encode("utf-8"))


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    """The texts in their order, so many at once as the tokenizer's own objects leave memory for."""
    chunk: list[str] = []
    characters = 0
    for text in texts:
        # Half of a character that was cut in two is no text for the tokenizer.
        chunk.append(text.encode("utf-8", "replace").decode())
        characters += len(text)
        if len(chunk) == CHUNK_TEXTS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    yield chunk


@dataclass(frozen=True)
class TokenTable:
    """The tokens of many texts.

    Attributes:
        tokens: (all tokens,) int32, text after text.
        starts: (texts + 1,) int64: where each begins.
        truncated: (texts,) bool: whether a text was longer.
    """

    tokens: np.ndarray
    starts: np.ndarray
    truncated: np.ndarray

    @property
    def lengths(self) -> Tensor:
        """(texts,) int64."""
        return torch.from_numpy(np.diff(self.starts))

    def sha256(self) -> str:
        """Of all tokens: another version of the tokenizer's library may split otherwise."""
        found = hashlib.sha256(self.starts.astype("<i8").tobytes())
        found.update(self.tokens.astype("<i4").tobytes())
        return found.hexdigest()

    def batch(self, indices: list[int]) -> Tensor:
        """(batch, longest of them) int64, `PADDING` behind the shorter ones."""
        rows = [self.tokens[self.starts[index] : self.starts[index + 1]] for index in indices]
        padded = np.full((len(rows), max(map(len, rows), default=0)), PADDING, dtype=np.int64)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        return torch.from_numpy(padded)


@dataclass(frozen=True)
class Tokenization:
    """How texts become the network's input.

    Attributes:
        max_length: tokens of a text, those that mark its ends included; what is longer is cut off.
        most_tokens: the largest `max_length` that the network can take.
        vocabulary_size: numbers that the network has an embedding for.
        sha256: over the tokenizer's files.
        files: the contents of `KEPT_FILES` by their names; None where only what a run did is described.
    """

    max_length: int
    most_tokens: int
    vocabulary_size: int
    sha256: str
    files: dict[str, str] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what no text can be prepared with: it may come from a file that somebody else wrote."""
        lengths = (self.max_length, self.most_tokens)
        if not all(type(length) is int and FEWEST_TOKENS <= length <= LONGEST_TEXT_TOKENS for length in lengths):
            raise ValueError(f"max_length {self.max_length!r}, most_tokens {self.most_tokens!r} are no text's lengths")
        if type(self.vocabulary_size) is not int or self.vocabulary_size < 1 or not isinstance(self.sha256, str):
            raise ValueError("vocabulary_size must be a number above 0, sha256 a text")

    def to_plain(self) -> dict[str, object]:
        names = ("max_length", "most_tokens", "vocabulary_size", "sha256")
        return {name: getattr(self, name) for name in names}

    def at(self, max_length: int) -> "Tokenization":
        """The same for longer or shorter texts.

        Raises:
            UsageError: the network has no positions for such long ones.
        """
        if not FEWEST_TOKENS <= max_length <= self.most_tokens:
            allowed = f"{FEWEST_TOKENS} to {self.most_tokens} tokens"
            raise UsageError(f"--max-length {max_length}: not allowed; this backbone takes {allowed}")
        return dataclasses.replace(self, max_length=max_length)

    def write(self, folder: Path) -> None:
        """Keep the tokenizer in a folder, as transformers' `AutoTokenizer` reads it.

        Raises:
            OSError: it cannot be written.
        """
        assert self.files is not None, "read() comes first"
        make_folders(folder)
        for name, content in self.files.items():
            write_atomically(folder / name, functools.partial(_write_text, content))

    def read(self, folder: Path) -> "Tokenization":
        """The same with the files that `write` kept.

        Raises:
            RunError: there are none, or others.
        """
        try:
            files = {name: (folder / name).read_bytes().decode("utf-8") for name in KEPT_FILES}
        except FileNotFoundError as error:
            raise RunError(f"tokenizer {error.filename} does not exist; put the file back") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadFile(f"tokenizer {folder} cannot be read ({one_line(error)}); restore its files") from None
        found = hash_of_files(files)
        if found != self.sha256:
            raise BadFile(
                f"{folder} does not hold the tokenizer that it did (sha256 {found}, expected {self.sha256}); restore it"
            )
        return dataclasses.replace(self, files=files)

    @property
    def text(self) -> str:
        return f"up to {self.max_length} tokens"

    def example(self, count: int) -> Tensor:
        """Network inputs of no meaning, (count, a few tokens) int64, one of them padded."""
        tokens = torch.arange(count * EXAMPLE_TOKENS).view(count, -1) % self.vocabulary_size
        tokens[-1, EXAMPLE_TOKENS // 2 :] = PADDING
        return tokens

    def tokenize(self, texts: list[str]) -> TokenTable:
        """The tokens of texts, each cut at `max_length`.

        Raises:
            RunError: the tokenizer gives numbers that the network knows nothing of.
        """
        assert self.files is not None, "read() comes first"
        tokenizer = _tokenizer(self.files[TOKENIZER_FILE], self.max_length)
        pieces, lengths, truncated = [np.zeros(0, np.int32)], [0], []
        for chunk in _chunks(texts):
            for encoding in tokenizer.encode_batch(chunk):
                pieces.append(np.asarray(encoding.ids, dtype=np.int32))
                lengths.append(len(encoding.ids))
                truncated.append(bool(encoding.overflowing))
        tokens = np.concatenate(pieces)
        if len(tokens) and not 0 <= tokens.max() < self.vocabulary_size:
            raise RunError(
                f"the tokenizer gives number {tokens.max()}, the network has {self.vocabulary_size:,} embeddings; give "
                "the tokenizer that belongs to it"
            )
        return TokenTable(tokens, np.cumsum(lengths), np.asarray(truncated, dtype=bool))


def tokenizer_folder(file: Path) -> Path:
    """Where the tokenizer of an export lies."""
    return file.with_name(f"{file.stem}-tokenizer")
