"""Accuracy by group and class, and the pass over the images, against loops written out."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from recipes.evaluate import accuracies, evaluate, recalls

CONFUSION = np.array([[8, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 5, 1]])


def test_accuracy_counts_images_and_groups_without_images_have_none():
    found = accuracies(CONFUSION, {"majority": [0, 1], "minority": [3], "unseen": [2], "empty": []})
    assert {k: found[k] for k in ("overall", "majority", "minority")} == {
        "overall": 12 / 20,
        "majority": 11 / 14,
        "minority": 1 / 6,
    }
    assert math.isnan(found["unseen"]) and math.isnan(found["empty"])


def test_recall_of_a_class_without_images_is_not_a_number():
    np.testing.assert_allclose(recalls(CONFUSION), [0.8, 0.75, np.nan, 1 / 6])


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_counts_every_image_in_evaluation_mode(training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3)).train(training)
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(3, (23,))
    batches = list(zip(images.split(5), labels.split(5), strict=True))
    confusion, solver, log = evaluate(net, batches, Accelerator(cpu=True), 3)
    expected = np.zeros((3, 3), dtype=int)
    for image, label in zip(images, labels, strict=True):
        expected[label, int(net.eval()(image[None]).argmax())] += 1
    assert confusion.tolist() == expected.tolist()
    assert solver == {} and len(log) == 0
