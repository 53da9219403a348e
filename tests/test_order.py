import random

import numpy as np
import pytest
import torch

from finetune.data.order import (
    BLOCK_SAMPLES,
    LARGE_SAMPLES,
    WINDOW_SAMPLES,
    batches_from,
    count_batches,
    epoch_order,
    key,
    keyed_generator,
    reading_order,
    stratified_split,
)


def test_an_epochs_order_holds_every_sample_once_and_depends_on_seed_and_epoch_only():
    order = epoch_order(5, 2, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    torch.manual_seed(99)
    assert torch.equal(order, epoch_order(5, 2, 1000))
    assert not torch.equal(order, epoch_order(5, 3, 1000))
    assert not torch.equal(order, epoch_order(6, 2, 1000))


def test_batches_from_a_position_are_the_rest_of_the_epochs_batches():
    order = epoch_order(0, 0, 103)
    whole = [batch.tolist() for batch in batches_from(order, 10)]
    assert [len(batch) for batch in whole] == [10] * 10 + [3]
    assert [batch.tolist() for batch in batches_from(order, 10, 70)] == whole[7:]
    assert list(batches_from(order, 10, 103)) == []


def test_keys_of_different_parts_differ_even_where_their_digits_run_together():
    assert key("a", 1, 23) != key("a", 12, 3)
    assert len({key("augment", 0, epoch, index) for epoch in range(100) for index in range(100)}) == 10_000


def test_a_keyed_generator_leaves_every_global_generator_as_it_was():
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with keyed_generator("augment", 0, 1, 2):
        first = torch.rand(3)
    with keyed_generator("augment", 0, 1, 2):
        assert torch.equal(first, torch.rand(3))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_a_split_keeps_each_classs_share_and_is_seeded():
    targets = torch.tensor([0] * 100 + [1] * 50 + [2] * 5)
    train, validation = stratified_split(targets, 0.2, seed=1)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(155))
    assert torch.bincount(targets[validation]).tolist() == [20, 10, 1]
    again = stratified_split(targets, 0.2, seed=1)
    assert torch.equal(train, again[0]) and torch.equal(validation, again[1])
    assert not torch.equal(validation, stratified_split(targets, 0.2, seed=2)[1])


def test_a_class_with_one_sample_trains_and_one_with_two_validates_too():
    train, validation = stratified_split(torch.tensor([0, 1, 1, 2, 2, 2]), 0.2, seed=0)
    assert 0 in train.tolist()
    assert len(validation) == 2


def test_fewer_training_samples_are_dealt_evenly_and_leave_the_validation_set_alone():
    targets = torch.arange(10).repeat(100)
    _, validation = stratified_split(targets, 0.2, seed=0)
    train, same_validation = stratified_split(targets, 0.2, seed=0, train_samples=50)
    assert torch.bincount(targets[train]).tolist() == [5] * 10
    assert torch.equal(validation, same_validation)


# ---- Many samples: in blocks ----------------------------------------------------------------------------------------


def test_a_large_epoch_is_a_permutation_that_stays_within_windows_of_blocks():
    count = 3 * WINDOW_SAMPLES + 5_000
    order = epoch_order(0, 1, count)
    assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(order, epoch_order(0, 1, count)) and not torch.equal(order, epoch_order(0, 2, count))
    for window in order[: 3 * WINDOW_SAMPLES].split(WINDOW_SAMPLES):
        # The last block is short, so a window may reach into one more.
        assert len((window // BLOCK_SAMPLES).unique()) <= WINDOW_SAMPLES // BLOCK_SAMPLES + 1
        assert len((window[:64] // BLOCK_SAMPLES).unique()) > 1


def test_up_to_the_limit_an_epoch_is_shuffled_as_a_whole():
    order = epoch_order(0, 0, LARGE_SAMPLES)
    assert len((order[:200] // BLOCK_SAMPLES).unique()) == LARGE_SAMPLES // BLOCK_SAMPLES
    assert torch.equal(reading_order(torch.arange(LARGE_SAMPLES), LARGE_SAMPLES), torch.arange(LARGE_SAMPLES))


def test_many_samples_lie_scattered_so_that_a_window_of_sorted_classes_holds_them_all():
    classes = torch.arange(200_000) // 2_000  # a hundred, sorted
    lying = reading_order(torch.arange(200_000), 150_000)
    assert torch.equal(lying.sort().values, torch.arange(200_000))
    for block in lying.split(BLOCK_SAMPLES):
        assert len(classes[block].unique()) == 100
    shares = torch.bincount(classes[lying[:20_000]], minlength=100)
    assert shares.min() > 140 and shares.max() < 260


def test_samples_of_two_sets_lie_in_the_same_order_in_both():
    whole = torch.arange(300_000)
    lying = reading_order(whole, 240_000)
    for is_part in (whole % 5 != 0, whole % 5 == 0):  # those that train, those that validate
        assert torch.equal(reading_order(whole[is_part], 240_000), lying[is_part[lying]])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 32])
@pytest.mark.parametrize("folds", [False, True])
def test_a_sample_left_over_joins_the_batch_before_it_where_that_is_asked_for(size, folds):
    for count in range(1, 70):
        order = torch.arange(count)
        batches = list(batches_from(order, size, 0, folds))
        assert torch.equal(torch.cat(batches), order) and len(batches) == count_batches(count, size, folds)
        sizes = [len(batch) for batch in batches]
        assert sizes[:-1] == [size] * (len(sizes) - 1)
        if folds and size > 1 and count > 1:
            assert 2 <= sizes[-1] <= size + 1
        position = 0
        for number, batch in enumerate(batches):  # from wherever a checkpoint stands
            assert [rest.tolist() for rest in batches_from(order, size, position, folds)] == [
                rest.tolist() for rest in batches[number:]
            ]
            position += len(batch)
