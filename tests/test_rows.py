"""The file of rows: what is written is what is read, in any order, and nothing half-written counts."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.base.files import BadFile
from finetune.features.feature_file import Layout, RowFile, RowReader, rows_per_block


@pytest.fixture(autouse=True)
def all_closed(monkeypatch):
    """Every file that a test opens is closed behind it."""
    opened, init = [], RowFile.__init__

    def noting(self, *arguments):
        init(self, *arguments)
        opened.append(self)

    monkeypatch.setattr(RowFile, "__init__", noting)
    yield
    for file in opened:
        file.close()


def values(layout: Layout) -> torch.Tensor:
    numbers = torch.arange(layout.count * layout.width, dtype=torch.float64).view(layout.count, layout.width)
    return (numbers % 1009).to(layout.dtype)


def written(path, layout: Layout, blocks=None) -> RowFile:
    file, rows = RowFile(path, layout), values(layout)
    for block in range(layout.blocks) if blocks is None else blocks:
        numbers = file.rows_of(block)
        part = slice(numbers.start, numbers.stop)
        file.write(block, rows[part], np.arange(part.start, part.stop), np.arange(part.start, part.stop) * 7)
    return file


def never(_block: int) -> None:
    raise AssertionError("no block is damaged")


# 1 MB of rows of 4 KB are 256 rows.
LAYOUT = Layout(1_000, 1_024, torch.float32, "numbers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stock_reader_of_safetensors_reads_the_file(tmp_path, dtype):
    layout = Layout(300, 40, dtype, "Ünï \U0001f600")
    file = written(tmp_path / "rows.safetensors", layout)
    tensors = load_file(tmp_path / "rows.safetensors")
    assert tensors["rows"].dtype == dtype and torch.equal(tensors["rows"], values(layout))
    assert tensors["digests"].tolist() == list(range(300))
    assert (tmp_path / "rows.safetensors").stat().st_size == layout.file_bytes
    file.close()


@pytest.mark.parametrize(("row_bytes", "rows"), [(4, 4_096), (4_096, 256), (8_192, 128), (100_000, 64), (10**7, 64)])
def test_a_block_is_about_a_megabyte_in_whole_batches(row_bytes, rows):
    assert rows_per_block(row_bytes) == rows


@pytest.mark.parametrize(
    ("memory_bytes", "window_rows", "one_by_one"),
    [(1 << 30, 0, False), (2 << 20, 0, True), (3 << 20, 300, False), (2 << 20, 300, True), (1, 0, True)],
)
def test_rows_come_back_in_any_order_whatever_the_memory(tmp_path, memory_bytes, window_rows, one_by_one):
    file = written(tmp_path / "rows", LAYOUT)
    reader = RowReader(file, never, memory_bytes, window_rows)
    assert reader._one_by_one == one_by_one
    rows, generator = values(LAYOUT), torch.Generator().manual_seed(0)
    for _ in range(3):
        for batch in torch.randperm(LAYOUT.count, generator=generator).split(64):
            assert torch.equal(reader.read(batch), rows[batch])
    assert torch.equal(reader.read(torch.tensor([999, 0, 999])), rows[[999, 0, 999]])


def test_what_is_kept_in_memory_stays_within_the_limit_and_is_that_used_last(tmp_path):
    file = written(tmp_path / "rows", LAYOUT)
    reads = []
    file.read_block, read_block = lambda block, into: (reads.append(block), read_block(block, into))[1], file.read_block
    reader = RowReader(file, never, 2 << 20, 200)
    assert reader._memory.nbytes == 2 << 20
    for row in (0, 300, 0, 600, 0, 300):  # blocks 0, 1, 0, 2, 0, 1
        assert torch.equal(reader.read(torch.tensor([row])), values(LAYOUT)[[row]])
    assert reads == [0, 1, 2, 1]


def test_only_whole_blocks_count_when_a_writer_is_killed(tmp_path):
    written(tmp_path / "rows", LAYOUT, blocks=[0, 2]).close()
    # Cut off in the middle of a block: its rows are there, its checksums are not.
    file = RowFile(tmp_path / "rows", LAYOUT)
    file._write_at(values(LAYOUT)[256:300].numpy(), file._rows_at + 256 * LAYOUT.row_bytes)
    file.close()
    assert RowFile(tmp_path / "rows", LAYOUT).missing() == [1, 3]


def flip(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("memory_bytes", [1 << 30, 1])
def test_a_flipped_bit_in_the_rows_is_found_and_the_block_made_again(tmp_path, memory_bytes):
    file = written(tmp_path / "rows", LAYOUT)
    flip(tmp_path / "rows", file._rows_at + 700 * LAYOUT.row_bytes + 5)
    made = []

    def remake(block):
        made.append(block)
        written(tmp_path / "rows", LAYOUT, [block])

    file = RowFile(tmp_path / "rows", LAYOUT)
    assert file.missing() == []
    reader = RowReader(file, remake, memory_bytes, 0)
    for batch in torch.arange(LAYOUT.count).split(64):
        assert torch.equal(reader.read(batch), values(LAYOUT)[batch])
    assert made == [700 // 256]


def test_a_block_that_stays_damaged_is_an_error_that_names_the_file(tmp_path):
    file = written(tmp_path / "rows", LAYOUT)
    flip(tmp_path / "rows", file._rows_at)
    reader = RowReader(file, lambda _block: None, 1 << 30, 0)
    with pytest.raises(BadFile, match=r"rows: block 0 cannot be kept; check the disk"):
        reader.read(torch.tensor([3]))


def test_a_flipped_bit_in_the_digests_gives_up_the_block_and_no_other(tmp_path):
    file = written(tmp_path / "rows", LAYOUT)
    flip(tmp_path / "rows", file._digests_at + 8 * 300)
    assert RowFile(tmp_path / "rows", LAYOUT).missing() == [1]


@pytest.mark.parametrize("damage", ["header", "short", "empty", "garbage"])
def test_a_file_that_is_not_whole_is_made_anew(tmp_path, damage):
    path = tmp_path / "rows"
    written(path, LAYOUT).close()
    content = path.read_bytes()
    path.write_bytes(
        {"header": b"\xff" + content[1:], "short": content[:-1], "empty": b"", "garbage": b"x" * 100_000}[damage]
    )
    assert RowFile(path, LAYOUT).missing() == [0, 1, 2, 3]
    assert path.stat().st_size == LAYOUT.file_bytes


def test_a_file_of_the_same_rows_by_another_name_is_used_as_it_is(tmp_path):
    written(tmp_path / "rows", LAYOUT).close()
    other = Layout(LAYOUT.count, LAYOUT.width, LAYOUT.dtype, "a longer name of the same numbers")
    file = RowFile(tmp_path / "rows", other)
    assert file.missing() == [] and file.layout.about == "numbers"
    assert torch.equal(RowReader(file, never, 1 << 30, 0).read(torch.tensor([5])), values(LAYOUT)[[5]])
