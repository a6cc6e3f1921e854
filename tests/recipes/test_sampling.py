"""The batch sampler: who draws what, checked by counting and by gradients on one machine."""

import os
import random
import socket
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from recipes.imbalance.sampling import STRATEGIES, EpochSampler, round_to_quotas

SIZES = [60, 30, 7]
LABELS = np.repeat([0, 1, 2], SIZES)
EPOCHS = 50

sizes_of_any_set = st.lists(st.integers(1, 40), min_size=1, max_size=6)
any_order = st.sampled_from(sorted(STRATEGIES))


def make(labels=LABELS, epoch=0, start=0, **arguments):
    sampler = EpochSampler(labels, **{"batch_size": 16, "epochs": EPOCHS, **arguments})
    sampler.set_epoch(epoch, start)
    return sampler


def positions(parts):
    return [position for part in parts for position, _ in part]


def exposure_of(sampler, epochs):
    """How often each class is drawn in the first epochs."""
    total = np.zeros(sampler.classes[-1] + 1, dtype=int)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        total += sampler.samples_per_class(sampler.updates)
    return total


def shuffled(sizes, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def asked(order, sizes, epoch, epochs=EPOCHS, threshold=None):
    """Draws of each class by the formulas of the papers, each a probability times the length of the epoch."""
    images, classes = sum(sizes), len(sizes)
    if order == "repeat_factor":
        frequency = [n / images for n in sizes]
        factors = [max(1.0, ((threshold or 1 / classes) / f) ** 0.5) for f in frequency]
        draws = [n * r for n, r in zip(sizes, factors, strict=True)]
        return np.array(draws) * round(sum(draws)) / sum(draws)
    shift = epoch / (epochs - 1)
    instance, balanced = [n / images for n in sizes], [1 / classes] * classes
    weights = {
        "instance": instance,
        "square_root": [n**0.5 for n in sizes],
        "class_balanced": balanced,
        "class_aware": balanced,
        "reverse": [max(sizes) / n for n in sizes],
        "progressively_balanced": [(1 - shift) * p + shift * q for p, q in zip(instance, balanced, strict=True)],
    }[order]
    return images * np.array(weights) / sum(weights)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(1, 3),
    st.integers(1, 3),
    any_order,
    st.integers(0, 9),
    st.data(),
)
def test_ranks_share_the_draws_of_one_process(images, batch_size, world, accumulation, order, epoch, data):
    labels = np.arange(images) ** 2 % 5
    arguments = dict(labels=labels, batch_size=batch_size, strategy=order, seed=5)
    single = make(**arguments)
    draws = round(sum(asked(order, np.unique(labels, return_counts=True)[1].tolist(), 0)))
    updates = -(-draws // batch_size)
    assert (single.num_samples, single.updates) == (draws, updates)
    if draws // updates < world * accumulation:
        with pytest.raises(ValueError, match=f"batch_size {batch_size}"):
            make(**arguments, world=world, accumulation=accumulation)
        return
    start = data.draw(st.integers(0, updates))
    single.set_epoch(epoch, start)
    ranks = []
    for rank in range(world):
        sampler = make(**arguments, epoch=epoch, start=start, rank=rank, world=world, accumulation=accumulation)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == len(sampler.weights()) == (updates - start) * accumulation
    for update, whole in enumerate(single):
        forwards = range(update * accumulation, (update + 1) * accumulation)
        parts = [ranks[rank][i] for i in forwards for rank in range(world)]
        assert [draw for part in parts for draw in part] == whole
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    cut = data.draw(st.integers(0, updates))
    samples_per_class = single.samples_per_class(cut)
    single.set_epoch(epoch)
    wholes = list(single)
    assert (
        samples_per_class.tolist() == np.bincount(labels[positions(wholes[:cut])], minlength=max(labels) + 1).tolist()
    )
    sizes = [len(whole) for whole in wholes]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert [single.images(n) for n in range(updates + 1)] == np.cumsum([0, *sizes]).tolist()


@settings(deadline=None, max_examples=60)
@given(sizes_of_any_set, any_order, st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_an_epoch_rounds_what_is_asked_and_repeats_no_image_while_another_waits(sizes, order, epochs, seed):
    labels = shuffled(sizes, seed)
    sampler = make(labels, strategy=order, seed=seed)
    total, goal = np.zeros(len(labels), dtype=int), np.zeros(len(sizes))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        times = np.bincount(positions(sampler), minlength=len(labels))
        counts, target = np.bincount(labels, times, len(sizes)), asked(order, sizes, epoch)
        assert times.sum() == sampler.num_samples and np.abs(counts - target).max() < 1 - 1e-9
        total, goal = total + times, goal + target
        for k in range(len(sizes)):
            assert np.ptp(times[labels == k]) <= 1 and np.ptp(total[labels == k]) <= 1
    samples_per_class = exposure_of(sampler, epochs)
    assert samples_per_class.tolist() == np.bincount(labels, total, len(sizes)).tolist()
    assert np.abs(samples_per_class - goal).max() < 1.5


@pytest.mark.parametrize("order", sorted(STRATEGIES))
def test_exposure_is_what_is_asked_over_a_training_that_is_killed_and_resumed(order):
    total, goal, rng = np.zeros(97, dtype=int), np.zeros(3), random.Random(order)
    for epoch in range(EPOCHS):
        kill = rng.randrange(8)
        before = list(make(strategy=order, epoch=epoch))[:kill]
        after = list(make(strategy=order, epoch=epoch, start=kill))  # a new process
        total += np.bincount(positions(before + after), minlength=97)
        goal += asked(order, SIZES, epoch)
    samples_per_class = np.array([total[LABELS == k].sum() for k in range(3)])
    assert exposure_of(make(strategy=order), EPOCHS).tolist() == samples_per_class.tolist()
    assert np.abs(samples_per_class / goal - 1).max() < 0.01
    assert all(np.ptp(total[LABELS == k]) <= 1 for k in range(3))


@settings(deadline=None, max_examples=60)
@given(sizes_of_any_set, st.integers(0, 12))
def test_balanced_draws_go_round_the_classes(sizes, epochs):
    classes = np.arange(epochs * sum(sizes)) % len(sizes)
    for order in ("class_balanced", "class_aware"):
        samples_per_class = exposure_of(make(shuffled(sizes), strategy=order), epochs)
        assert samples_per_class.tolist() == np.bincount(classes, minlength=len(sizes)).tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any), st.integers(1, 20))
def test_counting_out_a_repeated_share_is_exact_whenever_it_can_be(weights, rows):
    total = sum(weights)
    counts = round_to_quotas(np.tile(np.array(weights) * rows / total, (total, 1)))
    assert counts.sum(0).tolist() == [w * rows for w in weights]
    assert (counts.sum(1) == rows).all()


def test_a_class_that_is_not_asked_for_is_not_drawn_however_far_behind():
    assert round_to_quotas(np.array([[0.5, 0, 0.5], [0.9, 0.1, 0]])).tolist() == [[1, 0, 0], [1, 0, 0]]


@settings(deadline=None, max_examples=60)
@given(sizes_of_any_set, any_order, st.permutations(range(6)))
def test_the_number_of_a_class_says_nothing_about_its_draws(sizes, order, names):
    names = np.array([k for k in names if k < len(sizes)])
    labels = shuffled(sizes)
    samples_per_class = exposure_of(make(labels, strategy=order), 5)
    renamed = exposure_of(make(names[labels], strategy=order), 5)
    assert np.abs(renamed[names] - samples_per_class).max() <= 1  # ties go by number


def test_class_aware_draws_every_class_before_any_comes_again_and_so_its_images():
    labels = shuffled(SIZES)
    for epoch in range(4):
        order = np.array(positions(make(labels, epoch, strategy="class_aware")))
        blocks = [labels[order][i : i + 3].tolist() for i in range(0, 97, 3)]
        assert all(len(set(block)) == len(block) for block in blocks)
        assert {tuple(block) for block in blocks} >= set(permutations(range(3)))
        for k, size in enumerate(SIZES):
            mine = order[labels[order] == k]
            rounds = [mine[i : i + size] for i in range(0, len(mine), size)]
            assert all(len(set(images)) == len(images) for images in rounds)
            assert len(rounds) == 1 or rounds[0].tolist() != rounds[1][:size].tolist()


def test_progress_goes_from_every_image_once_to_every_class_equally():
    first, last = (make(strategy="progressively_balanced", epochs=11, epoch=epoch) for epoch in (0, 10))
    assert sorted(positions(first)) == list(range(97))
    assert sorted(np.bincount(LABELS[positions(last)]).tolist()) == [32, 32, 33]
    middle = LABELS[positions(make(strategy="progressively_balanced", epochs=11, epoch=5))]
    assert np.abs(np.bincount(middle) - (np.array(SIZES) + 97 / 3) / 2).max() < 1
    beyond = [exposure_of(make(strategy="progressively_balanced", epochs=3), e)[0] for e in range(2, 6)]
    assert set(np.diff(beyond)) <= {32, 33}
    assert exposure_of(make(strategy="progressively_balanced", epochs=1), 1).tolist() == SIZES


# t = 1/4 and shares 0.9, 0.09, 0.01: factors 1, 5/3 and 5.
def test_repeat_factors_of_a_set_worked_by_hand():
    sampler = make(np.repeat([0, 1, 2], [900, 90, 10]), strategy="repeat_factor", threshold=0.25)
    assert (sampler.num_samples, sampler.updates, sampler.images(69)) == (1100, 69, 1100)
    assert exposure_of(sampler, 7).tolist() == [7 * 900, 7 * 150, 7 * 50]
    repeated = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        times = np.bincount(positions(sampler))
        assert np.bincount(times[:900]).tolist() == [0, 900]
        assert np.bincount(times[900:990]).tolist() == [0, 30, 60]
        assert np.bincount(times[990:]).tolist() == [0, 0, 0, 0, 0, 10]
        repeated += np.flatnonzero(times[900:990] == 2).tolist()
    assert np.bincount(repeated).tolist() == [2] * 90  # in three epochs, each of 90 images is among the 60 twice


def test_repeat_factors_do_nothing_where_no_class_is_rare():
    sampler = make(strategy="repeat_factor", threshold=1e-3)
    assert sorted(positions(sampler)) == list(range(97))


@pytest.mark.parametrize("order", sorted(STRATEGIES))
def test_deferring_puts_epochs_of_instance_before_the_order(order):
    deferred = make(strategy=order, deferred_epochs=2, epochs=8)
    whole = deferred.num_samples // 97  # 1, but where repeated images fill up the first epochs too
    for epoch in range(2):
        deferred.set_epoch(epoch)
        times = np.bincount(positions(deferred), minlength=97)
        assert times.min() >= whole and (deferred.num_samples > 97 or times.max() == 1)
        share = np.bincount(LABELS, times) / deferred.num_samples
        assert np.abs(share - np.array(SIZES) / 97).max() < 1 / deferred.num_samples
        assert deferred.num_samples > 97 or list(deferred) == list(make(epoch=epoch))
    later = exposure_of(deferred, 8) - exposure_of(deferred, 2)
    alone = exposure_of(make(strategy=order, epochs=6), 6)
    assert np.abs(later - alone).max() <= 1
    if order == "class_aware":
        deferred.set_epoch(2)
        assert sorted(LABELS[positions(deferred)[:3]]) == [0, 1, 2]


def test_instance_draws_every_image_once_an_epoch_over_two_ranks():
    seen = [positions(make(epoch=3, rank=rank, world=2)) for rank in range(2)]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == list(range(97))


@pytest.mark.parametrize("order", sorted(STRATEGIES))
def test_order_is_a_function_of_seed_and_epoch_and_leaves_the_global_generators_alone(order):
    def draw(**arguments):
        return list(make(strategy=order, **arguments))

    first = draw(epoch=1, seed=3)
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert draw(epoch=1, seed=3) == first
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    others = draw(epoch=2, seed=3), draw(epoch=1, seed=4)
    assert positions(first) not in map(positions, others)
    (back := make(strategy=order, seed=3, epoch=7)).set_epoch(1)
    assert list(back) == first


def test_which_images_of_a_class_come_first_is_random():
    drawn = [{p for p in positions(make(strategy="reverse", seed=seed)) if p < 60} for seed in range(2)]
    assert len(drawn[0] | drawn[1]) > len(drawn[0])
    assert drawn[0] != set(range(len(drawn[0])))
    twins = positions(make(np.repeat([0, 1, 2], [40, 40, 7]), strategy="reverse"))
    assert {p for p in twins if p < 40} != {p - 40 for p in twins if 40 <= p < 80}


def test_draws_are_numbered_through_the_epochs():
    for order in ("instance", "repeat_factor"):
        length = make(strategy=order).num_samples
        numbers = [draw for epoch in range(3) for part in make(strategy=order, epoch=epoch) for _, draw in part]
        assert numbers == list(range(3 * length))
        (resumed := make(strategy=order)).set_epoch(1, start=2)
        assert next(iter(resumed))[0][1] == length + resumed.images(2)


def test_classes_that_have_no_image_are_left_out():
    labels = np.array([0, 0, 5, 5, 5])
    sampler = make(labels, strategy="class_balanced")
    assert sorted(np.bincount(labels[positions(sampler)], minlength=6).tolist()) == [0, 0, 0, 0, 2, 3]
    assert exposure_of(sampler, 2).tolist() == [5, 0, 0, 0, 0, 5]
    assert exposure_of(sampler, 0).tolist() == [0] * 6


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("start", [0, 3])
def test_weighted_parts_have_the_gradient_of_the_whole_batch(world, accumulation, start):
    torch.manual_seed(0)
    inputs, targets = torch.randn(97, 4, dtype=torch.float64), torch.randn(97, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def gradient(part):
        mean_loss = (inputs[part] @ w - targets[part]).square().mean()
        return torch.autograd.grad(mean_loss, w)[0]

    single = [[position for position, _ in batch] for batch in make()][start:]
    samplers = [make(start=start, rank=rank, world=world, accumulation=accumulation) for rank in range(world)]
    parts = [list(zip(sampler, sampler.weights(), strict=True)) for sampler in samplers]
    for update, whole in enumerate(single):
        forwards = range(update * accumulation, (update + 1) * accumulation)
        shares = [
            weight * gradient([position for position, _ in part])
            for rank in parts
            for part, weight in (rank[i] for i in forwards)
        ]
        # The mean that DDP takes over ranks and accelerate over accumulation steps.
        torch.testing.assert_close(torch.stack(shares).mean(0), gradient(whole), rtol=1e-12, atol=1e-12)


class Positions(torch.utils.data.Dataset):
    """An image is its position."""

    def __getitem__(self, item):
        return item[0]


def load(rank, port, folder):
    """The positions that this rank of two is given, whatever `split_batches` says."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for split in (False, True):
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=split))
        assert accelerator.split_batches == split
        sampler = make(epoch=1, strategy="square_root", rank=accelerator.process_index, world=accelerator.num_processes)
        torch.save(torch.cat(list(DataLoader(Positions(), batch_sampler=sampler))), folder / f"{split}{rank}.pt")
        AcceleratorState._reset_state()  # for the other setting
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_accelerate_has_no_say_in_who_draws_what(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(load, (port, tmp_path), nprocs=2)
    whole = positions(make(epoch=1, strategy="square_root"))
    for split in (False, True):
        ranks = [torch.load(tmp_path / f"{split}{rank}.pt").tolist() for rank in range(2)]
        assert sorted(ranks[0] + ranks[1]) == sorted(whole)
        for rank in range(2):
            assert ranks[rank] == positions(make(epoch=1, strategy="square_root", rank=rank, world=2))


def test_accelerate_would_deal_out_the_parts_of_one_process_alike():
    parts = make(epoch=1, accumulation=2 * 3)
    for rank in range(3):
        dealt = list(BatchSamplerShard(parts, 3, rank, even_batches=False))
        assert dealt == list(make(epoch=1, rank=rank, world=3, accumulation=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=3, world=2, accumulation=2), r"batch_size 3 .* allowed: 4 or more, one image for each of 2 r"),
        (dict(strategy="fair"), "strategy is 'fair'; allowed: instance, square_root, class_balanced"),
        (dict(strategy="progressively_balanced", epochs=None), "epochs is None; allowed: the epochs of training"),
        (dict(threshold=0.0), "threshold is 0; allowed: above 0, at most 1"),
        (dict(threshold=float("nan")), "threshold is nan; allowed: above 0"),
        (dict(deferred_epochs=-1), "deferred_epochs is -1; allowed: 0 or more"),
        (dict(start=8), "start is 8; allowed: 0 to 7, the updates of an epoch"),
        (dict(start=-1), "start is -1; allowed: 0 to 7"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
