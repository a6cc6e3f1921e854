"""NC1 at the sizes of real models, from features in float32, against least squares on the full batch in float64.

With H (K-1, K) orthonormal rows that sum to zero and N = H M, of full rank, S_B = N^T N / K, so

    tr(S_W S_B^+) / K = mean over classes of mean over samples of ||c||^2,    c = argmin ||N^T c - (x - mu_k)||,

by a triangular factor of N^T: no product of means with one another, and no singular values.
"""

import math

import pytest
import torch

from nc_probe import NCProbe
from recipes.benchmarks import merged

pytestmark = pytest.mark.slow

K, EACH = 10, 420
MAJORITY = 3


def least_squares_nc1(x, labels):
    means = torch.stack([x[labels == k].mean(0) for k in range(K)])
    contrasts = torch.zeros(K - 1, K, dtype=torch.float64)  # of Helmert
    for i in range(1, K):
        contrasts[i - 1, :i], contrasts[i - 1, i] = 1 / math.sqrt(i * (i + 1)), -i / math.sqrt(i * (i + 1))
    Q, R = torch.linalg.qr((contrasts @ means).T)
    c = torch.linalg.solve_triangular(R, Q.T @ (x - means[labels]).T, upper=True)
    squares = c.square().sum(0)
    return sum(float(squares[labels == k].mean()) for k in range(K)) / K


def decisions(x, labels, W, b, offset):
    """Accuracies of the classifier and of the nearest class mean, and how often they agree, in float64."""
    chosen = (x @ W.T + (b + offset * W.sum(1))).argmax(1)
    means = torch.stack([x[labels == k].mean(0) for k in range(K)])
    nearest = torch.stack([(x - mean).square().sum(1) for mean in means]).argmin(0)
    return [float(hits.double().mean()) for hits in (chosen == labels, nearest == labels, nearest == chosen)]


def problem(d, *, spread, merged=1.0, offset=0.0, outside=1.0):
    """Features (N, d) float32 of classes of equal counts, of which all but three have means `merged` apart.

    outside: how many times larger the standard deviation is in half of the directions, where all means are alike.
    """
    gen = torch.Generator().manual_seed(0)
    means = torch.randn(K, d, generator=gen, dtype=torch.float64)
    means[MAJORITY:] = means[MAJORITY] + merged * means[MAJORITY:]
    labels = (torch.arange(K * EACH) % K)[torch.randperm(K * EACH, generator=gen)]
    noise = spread * torch.randn(K * EACH, d, generator=gen, dtype=torch.float64)
    if outside > 1:
        half = d // 2
        means[:, half:] = 0
        for k in range(K):
            noise[labels == k, half:] -= noise[labels == k, half:].mean(0)
        noise[:, half:] *= outside
        means, noise = (torch.cat([x[:, :half] + x[:, half:], x[:, :half] - x[:, half:]], 1) for x in (means, noise))
    head = torch.nn.Linear(d, K).eval()
    head.weight.data = means.float() + 0.1 * torch.randn(K, d, generator=gen)
    return (means[labels] + noise + offset).float(), labels, head


def probed(x, labels, head):
    with torch.no_grad(), NCProbe(head) as probe:
        for xb, yb in zip(x.split(400), labels.split(400), strict=True):
            head(xb)
            probe.update(yb)
    return probe.compute()


@pytest.mark.parametrize("offset", [100.0, 1e4])
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("d", [512, 2048])
def test_merged_minorities(d, gap, offset):
    spread = 0.1 * gap + 5e-8 * offset  # some of its rounding, so that not all features of a class are one
    x, labels, head = problem(d, spread=spread, merged=gap, offset=offset)
    report, shifted = probed(x, labels, head), x.double() - offset  # exact
    assert report.nc1 == pytest.approx(least_squares_nc1(shifted, labels), rel=1e-6)
    found = [report.accuracy, report.center_accuracy, report.nc4]
    W, b = head.weight.detach().double(), head.bias.detach().double()
    assert found == pytest.approx(decisions(shifted, labels, W, b, offset), abs=1e-12)


@pytest.mark.parametrize("variance", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("d", [512, 2048])
def test_variance_outside_the_span(d, variance):
    x, labels, head = problem(d, spread=0.01, outside=math.sqrt(variance))
    report = probed(x, labels, head)
    assert report.nc1 == pytest.approx(least_squares_nc1(x.double(), labels), rel=1e-6)
    assert report.nc1_precision == "float64" or variance < 1e6, "the witness tells"


def test_least_squares_know_the_closed_form():
    x, labels = merged.samples(1e-4)[:2]
    assert least_squares_nc1(x.double(), labels) == pytest.approx(merged.closed_form(1e-4), rel=1e-7)
