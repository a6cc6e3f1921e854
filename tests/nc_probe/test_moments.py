"""ClassMoments against full-batch sums in float64 (and in fractions, where float64 itself is not good enough)."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_probe import ClassMoments

K, d = 6, 9
COUNTS = [40, 40, 25, 3, 1, 0]


def samples(offset=1e4, counts=COUNTS, seed=0, dtype=torch.float64):
    """Features about an offset, shuffled; class 4 has one sample and class 5 none."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.randn(len(counts), d, generator=gen, dtype=torch.float64)[labels]
    x = x + torch.randn(len(labels), d, generator=gen, dtype=torch.float64) + offset
    order = torch.randperm(len(labels), generator=gen)
    return x[order].to(dtype), labels[order]


def full_batch(x, labels, class_weights):
    """Two passes about a shift: means, tr S_k, sum_k w_k S_k."""
    shift = x.double().mean(0)
    x = x.double() - shift
    means, traces, total = torch.zeros(K, d).double(), torch.zeros(K).double(), torch.zeros(d, d).double()
    for k in labels.unique().tolist():
        xk = x[labels == k]
        means[k] = xk.sum(0) / len(xk)
        S = torch.einsum("ni,nj->ij", xk - means[k], xk - means[k])
        traces[k] = S.trace()
        total += class_weights[k] * S
        means[k] += shift
    return means, traces, total


def balanced(counts=COUNTS):
    n = torch.tensor(counts).double()
    return torch.where(n > 0, 1 / n.clamp(min=1), 0) / (n > 0).sum()


def feed(moments, x, labels, sizes):
    for xb, yb in zip(x.split(sizes), labels.split(sizes), strict=True):
        moments.update(xb, yb)
    return moments


def close(a, b, tol=1e-10):
    return float((a - b).norm()) <= tol * float(b.norm())


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, sum(COUNTS)), max_size=12),
    seed=st.integers(0, 99),
    pooled=st.booleans(),
    ranks=st.integers(1, 3),
)
def test_any_chunking_any_order_any_ranks(cuts, seed, pooled, ranks):
    x, labels = samples(seed=seed)
    edges = [0, *sorted(cuts), len(labels)]
    parts = [ClassMoments(K, d, class_counts=COUNTS if pooled else None) for _ in range(ranks)]
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        parts[i % ranks].update(x[a:b], labels[a:b])
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    means, traces, within = full_batch(x, labels, balanced())
    assert total.count.tolist() == COUNTS
    assert (
        close(total.mean, means)
        and close(total.trace, traces)
        and close(total.within_class_scatter(balanced()), within)
    )
    assert total.scatter.shape == ((1 if pooled else K), d, d)
    centered, expected = total.mean[:5] - total.mean[:5].mean(0), means[:5] - means[:5].mean(0)
    assert close(centered, expected)


def test_exact_fractions_with_offset():
    """Offset 1e8, deviations 1e-3: the sums of squares cancel 22 digits; compared with rational arithmetic."""
    gen = torch.Generator().manual_seed(1)
    x = 1e8 + 1e-3 * torch.randn(50, 2, generator=gen, dtype=torch.float64)
    moments = feed(ClassMoments(1, 2), x, torch.zeros(50, dtype=torch.long), 7)
    exact = [[Fraction(v) for v in row] for row in x.tolist()]
    mean = [sum(column) / 50 for column in zip(*exact, strict=True)]
    S = [[float(sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in exact)) for j in (0, 1)] for i in (0, 1)]
    # The running mean is stored to 1e-8 (the rounding of 1e8), a hundred-thousandth of the deviations.
    assert close(moments.within_class_scatter(torch.ones(1)), torch.tensor(S, dtype=torch.float64), 1e-5)
    naive = x.T @ x - 50 * torch.outer(x.mean(0), x.mean(0))
    assert not close(naive, torch.tensor(S, dtype=torch.float64), 1e-1)


def test_a_large_batch_does_not_round_its_sum():
    """Summing 2e5 numbers of 1e4 as they are loses the last four digits of their mean."""
    x = 1e4 + 1e-3 * torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = ClassMoments(1, 1).update(x, torch.zeros(len(x), dtype=torch.long))
    assert abs(float(moments.mean) - math.fsum(x[:, 0].tolist()) / len(x)) < 4e-12


def test_accelerator_bookkeeping_on_the_cpu(monkeypatch):
    """Without knowing which classes a batch has, all of them are carried along: the same sums."""
    x, labels = samples()
    expected = feed(ClassMoments(K, d), x, labels, 9)
    monkeypatch.setattr(ClassMoments, "_present", ClassMoments._every)
    moments = feed(ClassMoments(K, d), x, labels, 9)
    assert torch.equal(moments.count, expected.count)
    assert close(moments.mean, expected.mean, 1e-14) and close(moments.scatter, expected.scatter, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_features_are_summed_in_float64(dtype):
    x, labels = samples(offset=3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = feed(ClassMoments(K, d), x, labels, 10)
    means, _, within = full_batch(x, labels, balanced())
    assert moments.mean.dtype == torch.float64
    assert close(moments.mean, means, 1e-14) and close(moments.within_class_scatter(balanced()), within, 1e-13)


def test_inference_mode_inside_and_outside():
    x, labels = samples()
    with torch.inference_mode():
        moments = ClassMoments(K, d).update(x[:50] * 1, labels[:50])
        moments.merge(ClassMoments(K, d).update(x[50:70] * 1, labels[50:70]))
    moments.update(x[70:].requires_grad_(), labels[70:])
    assert close(moments.mean, full_batch(x.detach(), labels, balanced())[0])
    assert not moments.mean.requires_grad


def test_majority_does_not_swamp_the_balanced_scatter():
    """K_A = 3, R = 100: minority deviations are 10 times larger, yet only 2.3 % of the samples are minority."""
    counts = [1000] * 3 + [10] * 3
    gen = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    x = torch.randn(len(labels), d, generator=gen).double() * torch.where(labels < 3, 1.0, 10.0)[:, None]
    expected = full_batch(x, labels, balanced(counts))[2]
    for arguments in (
        {},
        {"class_counts": counts},
        {"class_counts": counts, "partition": [0, 0, 0, 1, 1, 1]},
        {"partition": [0, 0, 0, 1, 1, 1]},
    ):
        moments = feed(ClassMoments(6, d, **arguments), x, labels, 100)
        assert close(moments.within_class_scatter(balanced(counts)), expected)
    minority = balanced(counts) * (labels.new_tensor([0, 0, 0, 1, 1, 1]))
    assert close(moments.within_class_scatter(minority), full_batch(x, labels, minority)[2])
    pooled = feed(ClassMoments(6, d, partition=torch.zeros(6)), x, labels, 100)
    empirical = torch.full((6,), 1 / len(labels), dtype=torch.float64)
    assert close(pooled.within_class_scatter(empirical), full_batch(x, labels, empirical)[2])
    with pytest.raises(ValueError, match="cannot be weighted as asked: give class_counts"):
        pooled.within_class_scatter(balanced(counts))


def test_a_class_of_one_sample_has_no_scatter_that_weights_could_disagree_on():
    """Pooled over classes of 25, 25 and 1 samples, the balanced weighting and the empirical one are both to be had."""
    counts = [0, 25, 25, 0, 1, 0]
    x, labels = samples(counts=counts)
    pooled = feed(ClassMoments(K, d, partition=torch.zeros(K)), x, labels, 7)
    for weights in (balanced(counts), torch.full((K,), 1 / 51).double()):
        assert pooled.supports_weights(weights) and close(
            pooled.within_class_scatter(weights), full_batch(x, labels, weights)[2]
        )
    weights = torch.tensor([5.0, 0.1, 0.1, 7, 9, 3]).double()  # as of classes that were not seen
    assert close(pooled.within_class_scatter(weights), full_batch(x, labels, weights)[2])
    assert not pooled.supports_weights(torch.tensor([0.1, 0.1, 0.2, 0.1, 0.1, 0.1]))
    counts = [0, 25, 25, 2, 0, 0]
    assert not feed(ClassMoments(K, d, partition=torch.zeros(K)), *samples(counts=counts), 7).supports_weights(
        balanced(counts)
    )


@pytest.mark.parametrize("arguments", [{}, {"class_counts": COUNTS, "partition": [5, 4, 3, 2, 1, 0]}])
def test_spread_of_each_class(arguments):
    """tr(B^T S_k B), also where a scatter is scaled by the count and kept under another number."""
    x, labels = samples()
    moments = feed(ClassMoments(K, d, **arguments), x, labels, 13)
    B = torch.randn(d, 3, generator=torch.Generator().manual_seed(5)).double()
    for k in range(K):
        only = torch.zeros(K).double().index_fill_(0, torch.tensor([k]), 1)
        S = full_batch(x, labels, only)[2]
        (spread,) = moments.projected_scatter_trace(B, torch.tensor([k])).tolist()
        assert spread == pytest.approx(float(torch.trace(B.T @ S @ B)), rel=1e-10, abs=1e-9)
    assert ClassMoments(K, d, class_counts=COUNTS).update(x, labels).projected_scatter_trace(B, torch.arange(K)) is None
    assert ClassMoments(K, d, scatter=False).update(x, labels).projected_scatter_trace(B, torch.arange(K)) is None


def test_scatter_added_afterwards_is_that_of_the_pass():
    x, labels = samples()
    late = feed(ClassMoments(K, d, scatter=False), x[:70], labels[:70], 9)
    assert late.scatter.numel() == 0 and not late.supports_weights(balanced())
    with pytest.raises(ValueError, match="these moments were made with scatter=False"):
        late.within_class_scatter(balanced())
    for part in (slice(0, 30), slice(30, 70)):
        late.add_scatter(x[part], labels[part])
    feed(late, x[70:], labels[70:], 9)
    assert close(late.within_class_scatter(balanced()), full_batch(x, labels, balanced())[2])


@pytest.mark.parametrize("sizes", [1, 9, 40, 60, 109])
@pytest.mark.parametrize("noise", [1.0, 1e-6])
def test_traces_without_scatter(sizes, noise):
    """In one look at a batch where it has few samples beside those before, in two otherwise; classes far apart."""
    x, labels = samples(offset=0)
    means = full_batch(x, labels, balanced())[0]
    x = 30 * means[labels] + noise * (x - means[labels])
    moments = feed(ClassMoments(K, d, scatter=False), x, labels, sizes)
    means, traces, _ = full_batch(x, labels, balanced())
    assert close(moments.mean, means, 1e-14) and close(moments.trace, traces, 1e-14 + 1e-14 / noise)


def test_pooled_scatter_refuses_other_samples_than_declared():
    x, labels = samples()
    moments = ClassMoments(K, d, class_counts=COUNTS).update(x[:60], labels[:60])
    assert not moments.supports_weights(1 / moments.count.double().clamp(min=1))
    with pytest.raises(ValueError, match=r"class_counts is \[40, 40, 25, 3, 1, 0\] but the samples seen are"):
        moments.within_class_scatter(1 / moments.count.double().clamp(min=1))


def test_merge_is_update():
    x, labels = samples()
    half = copy.deepcopy(ClassMoments(K, d).update(x[:30], labels[:30]))
    whole = ClassMoments(K, d).update(x[30:], labels[30:]).merge(half).merge(ClassMoments(K, d))
    once = ClassMoments(K, d).update(x, labels)
    assert torch.equal(whole.count, once.count)
    assert close(whole.mean, once.mean, 1e-14) and close(whole.scatter, once.scatter, 1e-12)
    assert close(half.scatter, ClassMoments(K, d).update(x[:30], labels[:30]).scatter, 1e-14), "other is untouched"


def test_sync_without_ranks_is_a_copy_and_reset_forgets():
    x, labels = samples()
    moments = ClassMoments(K, d).update(x, labels)
    total = moments.sync()
    moments.reset()
    assert not moments.count.any() and not moments.scatter.any() and moments.batches == 0
    assert total.count.tolist() == COUNTS and close(total.mean, full_batch(x, labels, balanced())[0])


@pytest.mark.parametrize("arguments", [{}, {"class_counts": COUNTS}, {"scatter": False}], ids=str)
def test_state_is_saved_and_loaded(tmp_path, arguments):
    x, labels = samples(offset=1)
    whole, first = (feed(ClassMoments(K, d, **arguments), x[:n], labels[:n], 9) for n in (109, 60))
    torch.save(first.state_dict(), tmp_path / "moments.pt")
    again = ClassMoments(K, d, **arguments).update(x, labels).load_state_dict(torch.load(tmp_path / "moments.pt"))
    ClassMoments(K, d, **arguments).load_state_dict(again.state_dict()).update(x[:20], labels[:20])  # a copy
    feed(again, x[60:63], labels[60:63], 3), feed(again, x[63:], labels[63:], 9)
    assert torch.equal(again.count, whole.count) and again.batches == 7 + 1 + 6
    for name in ("mean", "trace", "scatter"):
        torch.testing.assert_close(getattr(again, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert set(again.state_dict()) == {"count", "mean", "trace", "scatter", "bad", "batches"}
    with pytest.raises(ValueError, match=r"state must have tensors of shapes .*'mean': \(6, 10\).*, got .*\(6, 9\)"):
        ClassMoments(K, d + 1, **arguments).load_state_dict(again.state_dict())


def test_state_moves_to_another_device_as_a_whole():
    moments = ClassMoments(K, d, class_counts=COUNTS).to("meta")
    stay = {name for name, value in vars(moments).items() if torch.is_tensor(value) and value.device.type == "cpu"}
    assert stay == {"class_counts", "partition"} and moments.device.type == "meta"
    with pytest.raises(ValueError, match="no float64"):
        moments.to("mps")


def test_labels_of_any_integer_type_and_empty_batches():
    x, labels = samples()
    moments = ClassMoments(K, d).update(x[:0], labels[:0]).update(x, labels.to(torch.uint8)).update(x[:0], labels[:0])
    assert moments.count.tolist() == COUNTS and moments.batches == 3


@pytest.mark.parametrize(
    "features, labels, message",
    [
        (torch.zeros(4, d), torch.tensor([0, 1, 2, K]), "labels must be in 0..5, got 0..6 in batch 1"),
        (torch.zeros(4, d), torch.tensor([0, 1, 2, -1]), "labels must be in 0..5, got -1..2 in batch 1"),
        (torch.zeros(4, d), torch.zeros(4), "labels must be integers, got torch.float32"),
        (torch.zeros(4, d), torch.zeros(4, dtype=torch.bool), "labels must be integers, got torch.bool"),
        (torch.zeros(4, d), torch.zeros(3, dtype=torch.long), r"labels must have shape \(4,\).*got \(3,\)"),
        (torch.zeros(4, d), torch.zeros(4, 1, dtype=torch.long), r"labels must have shape \(4,\).*got \(4, 1\)"),
        (torch.zeros(4, d + 1), torch.zeros(4, dtype=torch.long), r"features must be .*\(B, 9\), got .*\(4, 10\)"),
        (torch.zeros(4, 2, d), torch.zeros(4, dtype=torch.long), "features must be"),
        (torch.zeros(4, d, dtype=torch.long), torch.zeros(4, dtype=torch.long), "features must be floating point"),
        (torch.full((4, d), torch.nan), torch.zeros(4, dtype=torch.long), "features must be finite.* in batch 1"),
        (torch.full((4, d), torch.inf), torch.zeros(4, dtype=torch.long), "features must be finite.* in batch 1"),
    ],
)
def test_bad_batches_change_nothing(features, labels, message):
    x, y = samples()
    moments = ClassMoments(K, d).update(x, y)
    before = copy.deepcopy(moments)
    with pytest.raises(ValueError, match=message) as error:
        moments.update(features, labels)
    assert "\n" not in str(error.value)
    for name in ("count", "mean", "trace", "scatter", "batches"):
        assert torch.equal(torch.as_tensor(getattr(moments, name)), torch.as_tensor(getattr(before, name)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_classes": 0, "num_features": 3}, "num_classes must be at least 1, got 0"),
        ({"num_classes": 3, "num_features": 0}, "num_features must be at least 1, got 0"),
        ({"num_classes": 3, "num_features": 2, "class_counts": [1, 2]}, "class_counts must be 3 numbers"),
        ({"num_classes": 3, "num_features": 2, "class_counts": [1, 2, -1]}, "class_counts must be 3 numbers"),
        ({"num_classes": 3, "num_features": 2, "partition": [0, 1]}, "partition must be 3 integers"),
        ({"num_classes": 3, "num_features": 2, "partition": [0, 1, -1]}, "partition must be 3 integers"),
        ({"num_classes": 1000, "num_features": 2048}, r"takes 31.2 GiB: give class_counts"),
        ({"num_classes": 3, "num_features": 2, "device": "mps"}, "no float64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassMoments(**arguments)


def test_merge_refuses_another_kind():
    moments = ClassMoments(K, d, partition=[0] * K)
    for other in (ClassMoments(K, d + 1), ClassMoments(K, d), ClassMoments(K, d, class_counts=COUNTS)):
        with pytest.raises(ValueError, match="other must have the same"):
            moments.merge(other)


def test_state_at_scale():
    """K = 1000, d = 2048 with known counts: d^2 + K d + O(K) numbers."""
    moments = ClassMoments(1000, 2048, class_counts=torch.full((1000,), 1280))
    held = sum(t.numel() for t in vars(moments).values() if isinstance(t, torch.Tensor))
    assert held <= 2048**2 + 2 * 1000 * 2048


@pytest.mark.gpu
def test_on_an_accelerator():
    x, labels = samples()
    means, _, within = full_batch(x, labels, balanced())
    for arguments in ({}, {"class_counts": COUNTS}):
        for where in ("cpu", "cuda"):
            moments = feed(ClassMoments(K, d, device="cuda", **arguments), x.cuda(), labels.to(where), 17)
            assert close(moments.mean.cpu(), means) and close(moments.within_class_scatter(balanced()).cpu(), within)
    bad = ClassMoments(K, d, device="cuda").update(x.cuda(), labels.cuda())
    bad.update(x.cuda(), labels.cuda() + 2).update(x.cuda() / 0, labels.cuda())  # the last class has no sample
    with pytest.raises(ValueError, match="labels must be in 0..5, but not all are in batch 1"):
        bad.check()
