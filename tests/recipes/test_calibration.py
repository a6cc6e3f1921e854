"""The calibration error, against Guo et al.'s definition as a loop over bins and images."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from recipes.results.calibration import bin_table, calibration_error, calibration_errors
from recipes.results.class_figures import confusion_figure
from recipes.results.figures import reliability_figure


def by_definition(probabilities, labels, bins=15):
    total = 0.0
    for m in range(1, bins + 1):
        inside = [
            (max(p), p.index(max(p)) == label)
            for p, label in zip(probabilities, labels, strict=True)
            if Fraction(m - 1, bins) < Fraction(max(p)) <= Fraction(m, bins)
        ]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(value for value, _ in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


def sample(count=400, classes=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=gen) * torch.linspace(0.1, 4, count)[:, None]
    return logits, torch.randint(classes - 1, (count,), generator=gen)  # the last class has no images


def test_errors_are_those_of_the_definition_overall_and_by_group():
    logits, labels = sample()
    table = sum(bin_table(x, y, 6) for x, y in zip(logits.split(37), labels.split(37), strict=True)).numpy()
    found = calibration_errors(table, {"few": [0, 3], "none": [5]})
    for name, rows in (("overall", labels >= 0), ("few", (labels == 0) | (labels == 3))):
        probabilities = logits[rows].softmax(1).tolist()
        assert found[name] == pytest.approx(by_definition(probabilities, labels[rows].tolist()), abs=1e-7)
    assert math.isnan(found["none"])


@pytest.mark.parametrize(("confidence", "place"), [(0.5, 0), (0.5001, 1), (0.75, 1), (1.0, 1)])
def test_a_bin_holds_its_upper_edge(confidence, place):
    logits = torch.tensor([[confidence, 1 - confidence]]).log()
    assert bin_table(logits, torch.tensor([0]), 2, bins=2)[0, :, 0].argmax() == place


def test_an_oracle_is_calibrated_and_a_braggart_is_not():
    right = bin_table(torch.tensor([[100.0, 0.0]] * 4), torch.zeros(4, dtype=torch.long), 2).numpy()
    wrong = bin_table(torch.tensor([[100.0, 0.0]] * 4), torch.ones(4, dtype=torch.long), 2).numpy()
    assert (calibration_error(right), calibration_error(wrong)) == (0, 1)
    assert calibration_error(right + wrong) == 0.5


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_confusion_figure_shows_shares_of_each_class(classes):
    confusion = np.random.default_rng(0).integers(1, 9, (classes, classes))
    confusion[1] = confusion[0, 2] = 0
    names = [f"class of number {k}" for k in range(classes)]
    axes, _ = confusion_figure(confusion, names, title="t").axes
    shown = axes.get_images()[0].get_array()
    for i in range(classes):
        expected = [100 * x / confusion[i].sum() for x in confusion[i]] if i != 1 else [np.nan] * classes
        np.testing.assert_allclose(shown[i].filled(np.nan), expected)
    labels = [text.get_text() for text in axes.get_yticklabels()]
    if classes <= 25:
        assert labels == [f"class…ber {k}" for k in range(classes)]
    else:
        assert len(labels) <= 12
    written = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    if classes <= 15:
        assert written[2, 0] == f"{100 * confusion[2, 0] / confusion[2].sum():.0f}"
        assert len(written) == np.count_nonzero(confusion)
    else:
        assert not written


def test_reliability_figure_shows_accuracy_confidence_and_share():
    logits, labels = sample()
    table = bin_table(logits, labels, 6).numpy()
    upper, lower = reliability_figure(table, title="t").axes
    confidence, prediction = logits.softmax(1).max(1)
    inside = (confidence > 9 / 15) & (confidence <= 10 / 15)
    assert upper.patches[9].get_height() == pytest.approx((prediction == labels)[inside].double().mean().item())
    assert lower.patches[9].get_height() == pytest.approx(inside.double().mean().item())
    dots = next(line for line in upper.get_lines() if line.get_label() == "mean confidence").get_xdata()
    assert np.isclose(dots, confidence[inside].double().mean().item()).sum() == 1
    assert f"ECE {calibration_error(table):.3f}" in upper.get_title(loc="left")
