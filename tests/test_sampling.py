"""The batch sampler: who draws what, checked by counting and by gradients on one machine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.sampling import ORDERS, EpochSampler, class_balanced_order

LABELS = np.repeat([0, 1, 2], [60, 30, 7])


def batches(rank=0, epoch=0, **arguments):
    sampler = EpochSampler(LABELS, **{"batch_size": 16, "rank": rank, **arguments})
    sampler.set_epoch(epoch)
    return list(sampler)


def positions(parts):
    return [position for part in parts for position, _ in part]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 4), st.integers(1, 3), st.sampled_from(sorted(ORDERS)))
def test_ranks_share_the_draws_of_one_process(images, batch_size, world, accumulation, order):
    labels = np.arange(images) % 4
    arguments = dict(batch_size=batch_size, order=order, seed=5)
    (single := EpochSampler(labels, **arguments)).set_epoch(2)
    updates = -(-images // batch_size)
    if images // updates < world * accumulation:
        with pytest.raises(ValueError, match=f"batch_size {batch_size}"):
            EpochSampler(labels, **arguments, world=world, accumulation=accumulation)
        return
    ranks = []
    for rank in range(world):
        (sampler := EpochSampler(labels, **arguments, rank=rank, world=world, accumulation=accumulation)).set_epoch(2)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) == updates * accumulation
    for update, whole in enumerate(single):
        forwards = range(update * accumulation, (update + 1) * accumulation)
        parts = [ranks[rank][i] for i in forwards for rank in range(world)]
        assert [draw for part in parts for draw in part] == whole
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    sizes = [len(whole) for whole in single]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert [single.images(n) for n in range(updates + 1)] == np.cumsum([0, *sizes]).tolist()


def test_instance_draws_every_image_once_an_epoch_over_two_ranks():
    seen = [positions(batches(rank, epoch=3, world=2)) for rank in range(2)]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == list(range(97))


def test_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    first = batches(epoch=1, seed=3)
    torch.manual_seed(2)
    np.random.seed(2)
    assert batches(epoch=1, seed=3) == first
    assert batches(epoch=2, seed=3) != first and batches(epoch=1, seed=4) != first


def test_draws_are_numbered_through_the_epochs():
    numbers = [draw for epoch in range(3) for part in batches(epoch=epoch) for _, draw in part]
    assert numbers == list(range(3 * 97))


def test_class_balanced_draws_classes_equally_and_images_of_a_class_in_turn():
    total = np.zeros(97, dtype=int)
    for epoch in range(50):
        order = class_balanced_order(LABELS, seed=0, epoch=epoch)
        counts = np.bincount(LABELS[order], minlength=3)
        assert len(order) == 97 and np.ptp(counts) <= 1
        total += np.bincount(order, minlength=97)
    for k in range(3):
        assert np.ptp(total[LABELS == k]) <= 1
    exposure = np.array([total[LABELS == k].sum() for k in range(3)])
    assert np.abs(exposure / (50 * 97 / 3) - 1).max() < 0.01


def test_class_balanced_leaves_out_classes_that_have_no_image():
    order = class_balanced_order(np.array([0, 0, 5, 5, 5]), seed=0, epoch=0)
    assert sorted(np.bincount(np.array([0, 0, 5, 5, 5])[order], minlength=6).tolist()) == [0, 0, 0, 0, 2, 3]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_weighted_parts_have_the_gradient_of_the_whole_batch(world, accumulation):
    torch.manual_seed(0)
    inputs, targets = torch.randn(97, 4, dtype=torch.float64), torch.randn(97, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def gradient(part):
        mean_loss = (inputs[part] @ w - targets[part]).square().mean()
        return torch.autograd.grad(mean_loss, w)[0]

    single = [[position for position, _ in batch] for batch in EpochSampler(LABELS, batch_size=16)]
    samplers = [
        EpochSampler(LABELS, batch_size=16, rank=rank, world=world, accumulation=accumulation) for rank in range(world)
    ]
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


def test_a_batch_too_small_for_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"batch_size 3 .* allowed: 4 or more, one image for each of 2 ranks x 2"):
        EpochSampler(LABELS, batch_size=3, world=2, accumulation=2)
