import hashlib

import pytest
import torch
from conftest import small_recipe

from finetune import UsageError
from finetune.data.batch import Request
from finetune.data.contents import Contents
from finetune.data.digits import load_digits
from finetune.data.glyphs import CANVAS_PIXELS, CHARACTERS, distort, render_glyphs
from finetune.data.images import split_source
from finetune.data.loader import Loader, one_thread
from finetune.models.backbones import find_backbone
from finetune.training.dataset import open_data


def test_the_digits_are_the_1797_of_the_test_part():
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8) and digits.images.max() == 255
    assert torch.bincount(digits.targets).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The first sample as it stands in UCI's file, on its scale of 0..16.
    first = (digits.images[0, 0].float() * 16 / 255).round().int()
    assert first[:2].tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    assert digits.targets[:10].tolist() == list(range(10))


def all_batches(workers: int, start_method: str = "auto") -> str:
    """A hash over three batches of augmented digits, fetched by so many workers."""
    data = open_data(small_recipe(), find_backbone("bundled/vgg"))
    loader = Loader(data.pipeline, workers, start_method, False, Contents(data.source))
    requests = [Request(data.split.train[start : start + 30].tolist(), augment_epoch=4) for start in (0, 30, 60)]
    sha256 = hashlib.sha256()
    for batch in loader.batches(requests):
        sha256.update(batch.inputs.numpy().tobytes() + batch.targets.numpy().tobytes())
    return sha256.hexdigest()


def test_workers_and_how_they_start_change_no_bit():
    alone = all_batches(0)
    assert all_batches(2) == alone
    assert all_batches(2, "spawn") == alone


def test_fetching_in_this_process_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    all_batches(0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_samples_augmentation_depends_on_seed_epoch_and_index_not_on_its_batch():
    pipeline = open_data(small_recipe(), find_backbone("bundled/vgg")).pipeline
    together = pipeline.fetch(Request([7, 8, 9], augment_epoch=1)).inputs
    alone = pipeline.fetch(Request([8], augment_epoch=1)).inputs
    assert torch.equal(together[1], alone[0])
    other_epoch = pipeline.fetch(Request([8], augment_epoch=2)).inputs
    plain = pipeline.fetch(Request([8])).inputs
    assert not torch.equal(alone, other_epoch) and not torch.equal(alone, plain)


def test_one_thread_puts_the_number_of_threads_back():
    threads = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


# ---- Glyphs --------------------------------------------------------------------------------------------------------


def test_glyphs_render_every_character_of_matplotlibs_fonts_and_no_symbol_font():
    glyphs = render_glyphs("")
    fonts = len(glyphs.targets) // len(CHARACTERS)
    assert fonts >= 20
    assert glyphs.classes == list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    assert glyphs.images.shape == (fonts * 62, 1, CANVAS_PIXELS, CANVAS_PIXELS)
    # Every image has ink, and a margin without any.
    assert (glyphs.images.amax(dim=(1, 2, 3)) > 100).all()
    assert (glyphs.images[..., :4, :] == 0).all()


def test_no_font_stands_on_both_sides_of_the_split():
    glyphs = render_glyphs("")
    train, validation = split_source(glyphs, 0.1, seed=0)[:2]
    assert not set(glyphs.groups[train].tolist()) & set(glyphs.groups[validation].tolist())
    assert len(train) + len(validation) == len(glyphs.targets)


def test_a_distorted_glyph_depends_on_seed_epoch_and_index_not_on_its_batch():
    glyphs = render_glyphs("")
    images = torch.stack([glyphs.read(index)[0] for index in (3, 4, 5)])
    together = distort(images, 32, 0, 1, [3, 4, 5])
    assert together.shape == (3, 3, 32, 32) and together.dtype == torch.uint8
    assert torch.equal(together[1:2], distort(images[1:2], 32, 0, 1, [4]))
    assert not torch.equal(together, distort(images, 32, 0, 2, [3, 4, 5]))
    assert not torch.equal(together, distort(images, 32, 1, 1, [3, 4, 5]))


def test_a_folder_without_usable_fonts_is_refused(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(UsageError, match="0 usable fonts among 1 files"):
        render_glyphs(str(tmp_path))
