"""One file of equally long rows: a safetensors file that is filled block by block, checked, and read by `pread`.

The header comes first, then the rows, then what belongs to them: a digest and a time for each, and two checksums a
block. A block counts as written once its checksums stand, and they are written last; so a killed writer leaves whole
blocks and gaps, never half a block that looks whole. Mapping the file would be shorter, but then everything that was
ever touched counts as the process's memory.
"""

import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.base.files import BadFile, read_safetensors_header
from finetune.base.plain import Fields

BLOCK_BYTES = 1 << 20
# Blocks are whole batches of the pass that fills them, and short enough that little is lost with one.
BATCH_ROWS = 64
LARGEST_BLOCK_ROWS = 4_096
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SCHEMA = "finetune rows 1"
WRITTEN = 1 << 32  # above the 32 bits of a checksum: 0 = not written
# Digests, times and checksums; and rows, as they lie on the disk.
Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def rows_per_block(row_bytes: int) -> int:
    """About 1 MB, in whole batches: so much of the work is lost at most when a pass is killed."""
    return BATCH_ROWS * min(max(BLOCK_BYTES // (row_bytes * BATCH_ROWS), 1), LARGEST_BLOCK_ROWS // BATCH_ROWS)


@dataclass(frozen=True)
class Layout:
    """What a file of rows looks like.

    Attributes:
        count: rows.
        width: numbers in a row.
        dtype: of those numbers.
        about: what they are, for people. Two layouts that differ in nothing else are equal.
    """

    count: int
    width: int
    dtype: torch.dtype
    about: str = field(default="", compare=False)

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def block_rows(self) -> int:
        return rows_per_block(self.row_bytes)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.block_rows)

    def header(self) -> bytes:
        sizes = {
            "rows": (DTYPES[self.dtype], [self.count, self.width], self.count * self.row_bytes),
            "digests": ("I64", [self.count], 8 * self.count),
            "changed_ns": ("I64", [self.count], 8 * self.count),
            "checksums": ("I64", [2, self.blocks], 16 * self.blocks),
        }
        header: dict[str, object] = {"__metadata__": {"schema": SCHEMA, "about": self.about}}
        position = 0
        for name, (dtype, shape, size_bytes) in sizes.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size_bytes]}
            position += size_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        return len(self.header()) + self.count * (self.row_bytes + 16) + self.blocks * 16


def read_layout(path: Path) -> Layout:
    """The layout of a file.

    Raises:
        BadFile: not a file of rows.
    """
    try:
        header = Fields(read_safetensors_header(path), str(path))
        rows, metadata = header.fields("rows"), header.fields("__metadata__")
        dtype = next(dtype for dtype, name in DTYPES.items() if name == rows.text("dtype"))
        count, width = rows.items("shape", int)
        layout = Layout(count, width, dtype, metadata.text("about"))
        whole = path.stat().st_size == layout.file_bytes
    except (BadFile, ValueError, LookupError, TypeError, StopIteration) as error:
        raise BadFile(f"{path} is not a file of rows ({error!r})") from None
    if not whole or metadata.text("schema") != SCHEMA:
        raise BadFile(f"{path} is not a whole file of rows, or one of another version")
    return layout


class RowFile:
    """Rows on disk.

    Attributes:
        digests: (count,) int64, of what a row was computed from; a negative one = nothing could be computed.
        changed_ns: (count,) int64, when that was last changed.
        checksums: (2, blocks) int64, of rows and digests.
    """

    def __init__(self, path: Path, layout: Layout, *, read_only: bool = False):
        """Open the file, or make one without any row where there is none with this layout.

        Args:
            read_only: nothing is made or written; what is damaged counts as missing.

        Raises:
            BadFile: to be read only, and there is none with this layout.
        """
        if read_only and read_layout(path) != layout:
            raise BadFile(f"{path} holds other rows")
        layout = layout if read_only else _found_or_made(path, layout)
        self.path, self.layout, self._is_read_only = path, layout, read_only
        self._stream = open(path, "rb" if read_only else "r+b", buffering=0)  # noqa: SIM115 - as long as rows are used
        self._rows_at = len(layout.header())
        self._digests_at = self._rows_at + layout.count * layout.row_bytes
        self._changed_at = self._digests_at + 8 * layout.count
        self._checksums_at = self._changed_at + 8 * layout.count
        self.digests = self._read_table(self._digests_at, layout.count)
        self.changed_ns = self._read_table(self._changed_at, layout.count)
        self.checksums = self._read_table(self._checksums_at, 2 * layout.blocks).reshape(2, layout.blocks)
        for block in range(layout.blocks):
            if self.is_written(block) and self.checksums[1, block] != _checksum(self.digests[self._slice(block)]):
                self.discard(block)

    def close(self) -> None:
        self._stream.close()

    # ---- Bytes ------------------------------------------------------------------------------------------------

    def _read_into(self, buffer: memoryview, position: int) -> None:
        done = 0
        while done < len(buffer):
            if hasattr(os, "preadv"):
                count = os.preadv(self._stream.fileno(), [buffer[done:]], position + done)
            else:  # Windows
                self._stream.seek(position + done)
                count = self._stream.readinto(buffer[done:])
            if not count:
                raise BadFile(f"{self.path} was cut off while it was in use; start again, and it is made anew")
            done += count

    def _write_at(self, content: Numbers | Bytes, position: int) -> None:
        if self._is_read_only:
            return
        self._stream.seek(position)
        rest = np.ascontiguousarray(content).data.cast("B")
        while rest:
            rest = rest[self._stream.write(rest) :]

    def _read_table(self, position: int, count: int) -> Numbers:
        table = np.empty(count, dtype="<i8")
        self._read_into(table.data.cast("B"), position)
        return table

    # ---- Blocks -----------------------------------------------------------------------------------------------

    def _slice(self, block: int) -> "slice[int, int, int]":
        return slice(block * self.layout.block_rows, min((block + 1) * self.layout.block_rows, self.layout.count))

    def rows_of(self, block: int) -> range:
        """The numbers of the rows of a block."""
        return range(self.layout.count)[self._slice(block)]

    def is_written(self, block: int) -> bool:
        return bool(self.checksums[0, block] and self.checksums[1, block])

    def missing(self) -> list[int]:
        """The blocks that are not written."""
        return [block for block in range(self.layout.blocks) if not self.is_written(block)]

    def write(self, block: int, rows: Tensor, digests: Numbers, changed_ns: Numbers) -> None:
        """Write a whole block: its checksums come last."""
        part, values = self._slice(block), _bytes_of(rows)
        self.digests[part], self.changed_ns[part] = digests, changed_ns
        self._write_at(values, self._rows_at + part.start * self.layout.row_bytes)
        self._write_at(self.digests[part], self._digests_at + 8 * part.start)
        self._write_at(self.changed_ns[part], self._changed_at + 8 * part.start)
        self._write_checksums(block, _checksum(values), _checksum(self.digests[part]))

    def discard(self, block: int) -> None:
        """Count a block as not written."""
        self._write_checksums(block, 0, 0)

    def touch(self, row: int, changed_ns: int) -> None:
        """Note that what a row was computed from has another time, but the same content."""
        self.changed_ns[row] = changed_ns
        self._write_at(self.changed_ns[row : row + 1], self._changed_at + 8 * row)

    def _write_checksums(self, block: int, of_rows: int, of_digests: int) -> None:
        self.checksums[:, block] = of_rows, of_digests
        for table in (0, 1):
            position = self._checksums_at + 8 * (table * self.layout.blocks + block)
            self._write_at(self.checksums[table, block : block + 1], position)

    def read_block(self, block: int, into: Tensor) -> bool:
        """Read a block into the first rows of a tensor; False if it is not what was written."""
        values = _bytes_of(into[: len(self.rows_of(block))])
        self._read_into(values.data.cast("B"), self._rows_at + self._slice(block).start * self.layout.row_bytes)
        return bool(self.checksums[0, block] == _checksum(values))

    def read_row(self, row: int, into: Tensor) -> None:
        self._read_into(_bytes_of(into).data.cast("B"), self._rows_at + row * self.layout.row_bytes)

    def sync(self) -> None:
        os.fsync(self._stream.fileno())


def written_blocks(path: Path, layout: Layout) -> int:
    """How many blocks of a file with this layout are written; 0 where there is no such file. Changes nothing."""
    try:
        found = read_layout(path)
        if found != layout:
            return 0
        table_bytes = 16 * layout.blocks
        checksums = np.fromfile(path, dtype="<i8", offset=found.file_bytes - table_bytes)
    except (OSError, BadFile):
        return 0
    return int((checksums.reshape(2, layout.blocks) != 0).all(0).sum())


def _bytes_of(rows: Tensor) -> Bytes:
    """The bytes of a tensor, shared; numpy has no bfloat16."""
    return rows.view(torch.uint8).numpy()


def _checksum(values: Numbers | Bytes) -> int:
    return zlib.crc32(values.data.cast("B")) | WRITTEN


def _found_or_made(path: Path, layout: Layout) -> Layout:
    """The layout of the file that is there, if it is as wanted; else of a new one, whose blocks are all missing."""
    with suppress(FileNotFoundError):
        with suppress(BadFile):
            found = read_layout(path)
            if found == layout:
                return found
        path.unlink()  # never cut short: another process may still read it
    with open(path, "xb") as stream:
        stream.write(layout.header())
        stream.truncate(layout.file_bytes)  # its space is taken as it is filled
    return layout


# ---- Reading in any order -----------------------------------------------------------------------------------------


class RowReader:
    """Reads rows by their numbers. Each block is checked when it is first used.

    A few blocks are kept in memory, those used last; an order that stays within them for a while (see
    `order.epoch_order`) reads the file from front to back. Where it would not, rows are read one by one.

    Args:
        file: all of its blocks are written.
        remake: writes a damaged block anew.
        memory_bytes: for the blocks that are kept.
        window_rows: how far an order may jump about for a while; 0 = over everything.
    """

    def __init__(self, file: RowFile, remake: Callable[[int], None], memory_bytes: int, window_rows: int):
        layout = file.layout
        self._file, self._remake, self._rows = file, remake, layout.block_rows
        slots = min(max(memory_bytes // (layout.block_rows * layout.row_bytes), 1), layout.blocks)
        window_blocks = -(-window_rows // layout.block_rows) + 1 if window_rows else layout.blocks
        self._one_by_one = slots < min(window_blocks, layout.blocks)
        if self._one_by_one:
            slots = 1
        self._memory = torch.empty(slots * self._rows, layout.width, dtype=layout.dtype)
        self._block_in_slot = np.full(slots, -1)
        self._slot_of_block = np.full(layout.blocks, -1)
        self._used_at = np.zeros(slots, dtype=np.int64)
        self._checked = np.zeros(layout.blocks, dtype=bool)
        self._clock = 0

    def read(self, rows: Tensor) -> Tensor:
        """(n,) int64 numbers of rows to (n, width)."""
        numbers = rows.numpy()
        blocks, places = np.divmod(numbers, self._rows)
        if self._one_by_one:
            for block in np.unique(blocks[~self._checked[blocks]]):
                self._load(int(block), 0)
            values = torch.empty(len(numbers), self._file.layout.width, dtype=self._file.layout.dtype)
            for place, number in enumerate(numbers.tolist()):
                self._file.read_row(number, values[place])
            return values
        slots = self._slot_of_block[blocks]
        if (slots < 0).any():
            if len(wanted := np.unique(blocks)) > len(self._block_in_slot):
                half = len(numbers) // 2
                return torch.cat([self.read(rows[:half]), self.read(rows[half:])])
            self._fetch(wanted)
            slots = self._slot_of_block[blocks]
        self._clock += 1
        self._used_at[slots] = self._clock
        return self._memory[torch.from_numpy(slots * self._rows + places)]

    def _fetch(self, wanted: Numbers) -> None:
        """Bring blocks into memory, in the place of those that were not used for longest."""
        self._clock += 1
        present = self._slot_of_block[wanted]
        self._used_at[present[present >= 0]] = self._clock
        for block in wanted[present < 0].tolist():
            slot = int(self._used_at.argmin())
            if self._block_in_slot[slot] >= 0:
                self._slot_of_block[self._block_in_slot[slot]] = -1
            self._load(block, slot)
            self._block_in_slot[slot], self._slot_of_block[block] = block, slot
            self._used_at[slot] = self._clock

    def _load(self, block: int, slot: int) -> None:
        """Raises: BadFile: a block is damaged again as soon as it is written."""
        into = self._memory[slot * self._rows : (slot + 1) * self._rows]
        if not self._file.read_block(block, into):
            self._remake(block)
            if not self._file.read_block(block, into):
                raise BadFile(f"{self._file.path}: block {block} cannot be kept; check the disk")
        self._checked[block] = True
