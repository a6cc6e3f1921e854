"""What a loop may do to its logits between the forward pass and `update`, and after it."""

import pytest
import torch
from torch import nn

from nc_probe import NCProbe
from nc_probe.moments import waiting

K, d, N = 5, 8, 40


def problem():
    gen = torch.Generator().manual_seed(0)
    model = nn.Linear(d, K).eval()
    model.weight.data, model.bias.data = torch.randn(K, d, generator=gen), torch.randn(K, generator=gen)
    x = torch.randn(N, d, generator=gen)
    return model, x, torch.arange(N) % K


@pytest.mark.parametrize("size", [N, 8], ids=["one batch", "batches that wait"])
def test_logits_that_are_changed_in_place_decide_nothing(size):
    """Before the update, all classes alike or others; after it, while the batch waits for more."""
    model, x, labels = problem()
    chosen = (x.double() @ model.weight.double().T + model.bias.double()).argmax(1)
    with torch.no_grad(), NCProbe(model) as probe:
        for i, (xb, yb) in enumerate(zip(x.split(size), labels.split(size), strict=True)):
            logits = model(xb)
            if i % 2 == 0:
                logits.copy_(logits.roll(1, 1)) if i % 4 else logits.zero_()
            probe.update(yb)
            logits.neg_()
    right = [int(((chosen == labels) & (labels == k)).sum()) for k in range(K)]
    assert probe.compute().class_accuracy == tuple(n * K / N for n in right)
    assert probe.linear_error is not None and probe.linear_error < 1e-6, "compared as the model gave them"


def test_logits_are_not_written_to(monkeypatch):
    """A loss of them can be differentiated after the update: autograd tells changes in place."""
    monkeypatch.setattr(waiting, "LARGE", 0)
    model, x, labels = problem()
    with NCProbe(model) as probe:
        for _ in range(3):
            logits = model(x)
            loss, before = logits.square().sum(), logits.detach().clone()
            probe.update(labels)
            loss.backward()
            assert torch.equal(logits, before)
    assert probe.compute().samples == 3 * N
