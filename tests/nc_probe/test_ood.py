"""OOD scores against scikit-learn and SciPy on the full batch, and against the formulas of other public code."""

import json
import math

import numpy as np
import pytest
import torch
from collapsed import crosses, etf
from scipy.spatial.distance import cdist
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler
from torch import nn

from nc_probe import NCProbe, OODProbe
from nc_probe.measures.detection import auroc, false_positive_rate, orthogonality

K, d = 4, 7
COUNTS = torch.tensor([12, 6, 4, 3])


class Head(nn.Module):
    """Features are what it is shown."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], len(weight), bias=bias is not None).to(weight.dtype)
        self.fc.weight.data = weight
        if bias is not None:
            self.fc.bias.data = bias

    def forward(self, x):
        return self.fc(x)


def problem(dtype=torch.float64):
    """Training, held out, and unknown features; the last of d is 5 wherever a class is known."""
    gen = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(K, d, generator=gen)

    def samples(labels):
        x = 1 + means[labels] + torch.randn(len(labels), d, generator=gen)
        x[:, -1] = 5
        return x.to(dtype)

    labels = torch.arange(K).repeat_interleave(COUNTS)[torch.randperm(25, generator=gen)]
    unknown = (3 * torch.randn(31, d, generator=gen) + 0.5).to(dtype)
    head = Head(torch.randn(K, d, generator=gen).to(dtype), torch.randn(K, generator=gen).to(dtype)).eval()
    return head, (samples(labels), labels), samples(torch.arange(40) % K), unknown


@torch.no_grad()
def scored(probe, batches, known=(), unknown=(), **settings):
    with probe:
        for x, labels in batches:
            probe.model(x)
            probe.update(labels)
    with OODProbe(probe, **settings) as ood:
        for x in known:
            probe.model(x)
            ood.update_known()
        for x in unknown:
            probe.model(x)
            ood.update()
    return ood


def published(train, labels, x, W, b, *, components, standardize=True):
    """The code released with NECO, EmpiricalCovariance for the Mahalanobis distance; all arrays."""
    scaler = StandardScaler(with_std=standardize).fit(train)
    z = scaler.transform(x)
    reduced = PCA(train.shape[1]).fit(scaler.transform(train)).transform(z)[:, :components]
    neco = np.linalg.norm(reduced, axis=1) / np.linalg.norm(z, axis=1)
    means = np.stack([train[labels == k].mean(0) for k in range(len(W))])
    shared = EmpiricalCovariance(assume_centered=True).fit(train - means[labels])
    to_means = [shared.mahalanobis(x - mean) for mean in means]
    logits = (x @ W.T + b).max(1)
    return {
        "neco": neco,
        "nearest_mean": -cdist(x, means).min(1),
        "mahalanobis": -np.sqrt(np.min(to_means, axis=0)),
        "max_logit": logits,
        "neco_max_logit": neco * logits,
    }


def replicated(x, labels):
    """Every class equally often, so that samples weigh as classes do."""
    times = (12 // COUNTS)[labels]
    return x.repeat_interleave(times, 0), labels.repeat_interleave(times)


@pytest.mark.parametrize("center", ["empirical", "balanced"])
@pytest.mark.parametrize("settings", [{}, {"components": 2, "standardize": False}, {"components": 5}], ids=str)
def test_scores_and_rates_are_those_of_scikit_learn(center, settings):
    head, (x, labels), held_out, unknown = problem()
    batches = list(zip(x.split(9), labels.split(9), strict=True))
    ood = scored(NCProbe(head, center=center), batches, held_out.split(7), unknown.split(6), **settings)
    train = (x, labels) if center == "empirical" else replicated(x, labels)
    arrays = [t.detach().numpy() for t in (*train, head.fc.weight, head.fc.bias)]
    options = {"components": 3, **settings}
    expected = [published(*arrays[:2], y.numpy(), *arrays[2:], **options) for y in (held_out, unknown)]
    report, (scores, source) = ood.compute(), ood.scores()
    assert list(scores) == list(expected[0]) == list(report.auroc) and source == "shown"
    for name in scores:
        for got, of in zip(scores[name], expected, strict=True):
            np.testing.assert_allclose(got.numpy(), of[name], rtol=1e-9, atol=1e-12, err_msg=name)
        truth, values = np.r_[np.ones(40), np.zeros(31)], np.r_[expected[0][name], expected[1][name]]
        fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
        assert report.auroc[name] == pytest.approx(roc_auc_score(truth, values), rel=1e-12), name
        assert report.fpr95[name] == fpr[np.argmax(tpr >= 0.95 - 1e-12)], name
    assert (report.known, report.unknown, report.mahalanobis_rank, report.center) == (40, 31, d - 1, center)
    # A second formula: the library of rhubarbwu, whose orthogonality_deviation takes the mean that it is given.
    means = torch.stack([x[labels == k].mean(0) for k in range(K)])
    deviations = torch.cosine_similarity(means, unknown.mean(0, keepdim=True)).abs()
    assert report.nc5 == pytest.approx(float(deviations.mean()), rel=1e-12)


def test_neco_by_the_formula_of_the_paper():
    """sqrt(z^T P P^T z / z^T z) with P of the largest singular vectors, as in public code that has no scikit-learn."""
    head, (x, labels), _, unknown = problem()
    ood = scored(NCProbe(head, center="empirical"), [(x, labels)], unknown=[unknown])
    x, y = x[:, :-1], unknown[:, :-1]
    std = x.std(0, correction=0)
    z, last = (y - x.mean(0)) / std, unknown[:, -1] - 5  # which is the same in all known samples: sigma is 1
    P = torch.linalg.svd((x - x.mean(0)) / std)[2][:3].T
    expected = ((z @ P).square().sum(1) / (z.square().sum(1) + last.square())).sqrt()
    torch.testing.assert_close(ood.scores()[0]["neco"][1], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_bytes": 0},
        {"cache_bytes": 0, "class_counts": COUNTS.tolist()},
        {"cache_bytes": 500, "spill_bytes": 0},
        {"cache_bytes": 100, "spill_bytes": 10**6},
    ],
    ids=str,
)
def test_any_budget_any_order_any_batches(settings):
    head, (x, labels), held_out, unknown = problem()
    expected = scored(NCProbe(head), [(x, labels)], [held_out], [unknown]).compute().as_dict()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    batches = list(zip(x[order].split(4), labels[order].split(4), strict=True))
    got = scored(NCProbe(head, **settings), batches, held_out.flip(0).split(3), unknown.flip(0).split(5)).compute()
    for name, value in got.as_dict().items():
        assert value == (expected[name] if isinstance(value, str) else pytest.approx(expected[name], rel=1e-10)), name


def test_known_samples_are_those_of_the_pass_where_none_are_shown():
    head, (x, labels), _, unknown = problem()
    shown = scored(NCProbe(head), [(x, labels)], [x], [unknown]).compute()
    ood = scored(NCProbe(head), [(x[:9], labels[:9]), (x[9:], labels[9:])], unknown=[unknown])
    assert ood.compute().known_source == "those of the pass"
    assert ood.compute().auroc == pytest.approx(shown.auroc, rel=1e-12)
    gone = scored(NCProbe(head, cache_bytes=0), [(x, labels)], unknown=[unknown])
    with pytest.raises(ValueError, match="known samples must be shown by update_known, as the features of the pass"):
        gone.compute()


def test_at_collapse():
    """Known samples have NECO 1 and the unknown, orthogonal to the simplex, 0; without variance no Mahalanobis."""
    means = etf(3, 6)
    x, labels = crosses(means, torch.zeros(6, 1, dtype=torch.float64), 0)
    away = torch.eye(6, dtype=torch.float64) - means.T @ torch.linalg.pinv(means.T)
    unknown = (torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).double()) @ away
    ood = scored(NCProbe(Head(means).eval()), [(x, labels)], unknown=[unknown], standardize=False)
    report, (scores, _) = ood.compute(), ood.scores()
    torch.testing.assert_close(scores["neco"][0], torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(scores["neco"][1], torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-7)
    assert report.nc5 < 1e-14 and report.mahalanobis_rank == 0 and "mahalanobis" not in report.auroc
    assert report.auroc["neco"] == report.auroc["nearest_mean"] == 1 and report.fpr95["neco"] == 0
    assert orthogonality(means, means[0]) == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_distances_to_a_collapsed_class_far_from_the_origin():
    """About 1e-7 at an offset of 1e4: expanded squares would be rounding."""
    means = 1e4 + etf(3, 6)
    x, labels = crosses(means, torch.eye(6, dtype=torch.float64)[:, :2], 1e-7)
    ood = scored(NCProbe(Head(means).eval()), [(x, labels)], unknown=[means[:1] + 1])
    known = ood.scores()[0]["nearest_mean"][0]
    torch.testing.assert_close(known, torch.full_like(known, -1e-7), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("n, m", [(1, 1), (19, 40), (20, 40), (21, 50), (100, 40), (7, 300)])
def test_rates_by_counting(n, m, ties):
    gen = torch.Generator().manual_seed(n)
    known, unknown = 2 * torch.rand(n, generator=gen).double(), 2 * torch.rand(m, generator=gen).double()
    known, unknown = ((3 * known).round(), (2 * unknown).round()) if ties else (known, unknown)
    wins = [(float(a > b) + float(a >= b)) / 2 for a in known for b in unknown]
    assert auroc(known, unknown) == pytest.approx(sum(wins) / len(wins), rel=1e-14)
    passing = [t for t in known if (known >= t).sum() * 100 >= 95 * n]
    assert false_positive_rate(known, unknown) == float((unknown >= max(passing)).double().mean())


def test_float32_features_whose_variance_is_their_rounding_have_no_direction_of_their_own():
    head, (x, labels), held_out, unknown = problem(torch.float32)
    x[:, 0] = 1000 + 2e-5 * torch.randn(len(x), generator=torch.Generator().manual_seed(2))  # rounded to 6e-5
    report = scored(NCProbe(head), [(x, labels)], [held_out], [unknown]).compute()
    assert report.mahalanobis_rank == d - 2


def test_report_in_words_and_numbers():
    head, (x, labels), held_out, unknown = problem()
    report = scored(NCProbe(head), [(x, labels)], [held_out], [unknown]).compute()
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == report.as_dict()
    scalars = report.scalars("ood/")
    assert scalars["ood/nc5"] == report.nc5 and scalars["ood/auroc/neco"] == report.auroc["neco"]
    assert scalars["ood/fpr95/max_logit"] == report.fpr95["max_logit"] and scalars["ood/unknown"] == 31
    assert all(isinstance(v, float) for v in scalars.values())
    text = str(report)
    assert f"{report.auroc['mahalanobis']:.4f}" in text and "40 known samples (shown), 31 of no class" in text
    assert max(map(len, text.splitlines())) <= 80


def test_masks_and_labels():
    head, (x, labels), held_out, unknown = problem()
    expected = scored(NCProbe(head), [(x, labels)], [held_out], [unknown]).compute()
    probe = NCProbe(head)
    scored(probe, [(x, labels)])
    padded, mask = torch.cat([unknown, x[:2]]), [True] * 31 + [False] * 2
    with torch.no_grad(), OODProbe(probe) as ood:
        head(held_out[:3]), ood.update_known(torch.ones(3, dtype=torch.bool))
        head(held_out[2:]), ood.update_known(torch.arange(38) > 0)
        head(padded), ood.update(labels=[-1] * 31 + [0, 1], mask=mask)  # a label that is not counted says nothing
        with pytest.raises(ValueError, match=r"labels of unknown samples must be none of the classes 0..3, got -1..9"):
            head(unknown[:3])
            ood.update([-1, 2, 9])
    assert ood.compute() == expected
    assert math.isfinite(ood.compute().nc5)


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda p, ood, x: ood.update(), "got 0 since the last update"),
        (lambda p, ood, x: (p.model(x), p.model(x), ood.update()), "got 2 since the last update"),
        (lambda p, ood, x: (p.model(x), p.update([0] * len(x))), "update must be called inside `with NCProbe"),
        (lambda p, ood, x: ood.compute(), "compute needs at least one sample of no class"),
        (lambda p, ood, x: (p.model(x), ood.update(labels=[9])), r"labels must have shape \(31,\)"),
        (lambda p, ood, x: (p.model(x / 0), ood.update()), "features must be finite, got NaN or infinity in batch 0"),
        (lambda p, ood, x: p.__enter__(), "already attached"),
        (lambda p, ood, x: ood.__enter__(), "already attached"),
    ],
)
def test_misuse_is_one_line(use, message):
    head, (x, labels), _, unknown = problem()
    probe = NCProbe(head)
    scored(probe, [(x, labels)])
    with torch.no_grad(), OODProbe(probe) as ood, pytest.raises(ValueError, match=message):
        use(probe, ood, unknown)
    with pytest.raises(ValueError, match="update must be called inside `with OODProbe"):
        ood.update()
    assert not head.fc._forward_pre_hooks and probe.compute().samples == 25


def test_what_cannot_be_scored_is_one_line():
    head, (x, labels), _, unknown = problem()
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        OODProbe(NCProbe(head), components=0)
    with pytest.raises(ValueError, match="compute needs at least one sample"):
        OODProbe(NCProbe(head)).__enter__()
    with pytest.raises(ValueError, match="components must be in 1..7, the length of a feature, got 8"):
        scored(NCProbe(head), [(x, labels)], components=8)
    with pytest.raises(ValueError, match="components must be in 1..7, the length of a feature, got 0 with 1 classes"):
        scored(NCProbe(head), [(x, labels * 0)])
    with pytest.raises(ValueError, match="scores need a pass"):
        OODProbe(NCProbe(head)).compute()


def test_features_without_a_classifier():
    _, (x, labels), held_out, unknown = problem()

    class Backbone(nn.Identity):
        def get_classifier(self):
            return nn.Identity()

    report = scored(NCProbe(Backbone().eval(), num_classes=K), [(x, labels)], [held_out], [unknown]).compute()
    assert list(report.auroc) == ["neco", "nearest_mean", "mahalanobis"] and report.num_classes == K
