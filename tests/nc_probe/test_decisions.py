"""The class of the highest score, against sums of fractions."""

from fractions import Fraction

import pytest
import torch

from nc_probe.moments import decisions
from nc_probe.moments.decisions import Scores

K, d = 5, 24


def exact(x, weight, bias):
    """The first class of the highest score, in rational arithmetic."""
    rows = [[Fraction(v) for v in row] for row in x.tolist()]
    weights = [[Fraction(v) for v in row] for row in weight.tolist()]
    chosen = []
    for row in rows:
        scores = [sum(map(Fraction.__mul__, w, row)) + Fraction(b) for w, b in zip(weights, bias.tolist(), strict=True)]
        chosen.append(scores.index(max(scores)))
    return chosen


def problem(gap, size=1.0, seed=0):
    """Two classes score alike, but for `gap` of it, and higher than the others."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(200, d, generator=gen).double()
    weight = torch.randn(K, d, generator=gen).double()
    weight[0] /= 1e3
    weight[3] = weight[1] + gap * torch.randn(d, generator=gen).double()
    bias = torch.tensor([0, 1, -1, 1, 1]).double()
    return size * x, weight, size * bias


@pytest.mark.parametrize("gap", [1.0, 1e-4, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("size, dtype", [(1, torch.float64), (1e4, torch.float32), (1e-4, torch.bfloat16)])
def test_close_decisions_are_those_of_rational_arithmetic(gap, size, dtype):
    x, weight, bias = problem(gap, size)
    x = x.to(dtype)
    chosen = Scores(weight, bias).highest(x)
    assert chosen.tolist() == exact(x.double(), weight, bias)
    assert {1, 3} <= set(chosen.tolist())


@pytest.mark.parametrize("size, scale", [(1e-30, 1e-30), (1e-44, 1.0), (1e-60, 1e60), (1e25, 1e25), (1e60, 1.0)])
def test_beyond_the_range_of_float32(size, scale):
    x, weight, bias = problem(1e-3, size)
    assert Scores(scale * weight, scale * bias).highest(x).tolist() == exact(x, scale * weight, scale * bias)


def test_the_bound_grows_with_weights_and_features():
    x, weight, bias = problem(1e-6, 1e4)
    x = x.repeat(100, 1) + torch.randn(20_000, d, generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(Scores(weight, 0 * bias).highest(x), (x @ weight.T).argmax(1))


def test_a_bias_that_hides_the_rest():
    """In float32, numbers about 1e7 are 1 apart."""
    x, weight, bias = problem(1.0)
    bias += 1e7 + torch.linspace(-0.7, 0.7, K).double()
    assert Scores(weight, bias).highest(x).tolist() == exact(x, weight, bias)


def test_sums_that_overflow_on_their_way():
    """1e38 + ... - 1e38 - ..., of which nothing is left in one class, while another scores 1."""
    x = torch.ones(3, 8, dtype=torch.float64)
    weight = torch.zeros(2, 8, dtype=torch.float64)
    weight[0] = 3e38 * torch.tensor([1, 1, 1, 1, -1, -1, -1, -1])
    weight[1, 0] = 1
    assert Scores(weight, torch.zeros(2).double()).highest(x).tolist() == [1, 1, 1]


def test_of_equals_the_first_and_never_one_at_minus_infinity():
    gen = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-9, 9, (n, d), generator=gen).double() for n in (200, K))  # sums are exact
    weight[1] = weight[3] = weight[4]
    bias = torch.tensor([-torch.inf, 9e3, 0, 9e3, 9e3], dtype=torch.float64)
    assert set(Scores(weight, bias).highest(x).tolist()) == {1}
    bias[:4] = -torch.inf
    assert set(Scores(weight, bias).highest(x).tolist()) == {4}
    assert Scores(weight, bias).highest(x[:0]).shape == (0,)


def test_float64_is_asked_for_the_undecided_alone(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(K, d, generator=gen).double()
    labels = torch.arange(300) % K
    x = weight[labels] + 0.1 * torch.randn(300, d, generator=gen)
    asked = []
    exactly = Scores._exactly
    monkeypatch.setattr(Scores, "_exactly", lambda self, x: asked.append(len(x)) or exactly(self, x))
    scores = Scores(weight, -weight.square().sum(1) / 2)  # the nearest row; the sum of two is as far from both
    x[77] = weight[0] / 2 + weight[1] / 2
    chosen = scores.highest(x)
    assert asked == [1] and chosen[77] in (0, 1)
    assert torch.equal(chosen[78:], labels[78:])


@pytest.mark.parametrize("given", [False, True], ids=["product", "logits"])
def test_contenders_alone_are_scored_in_float64(monkeypatch, given):
    """Of 100 classes pairs are alike but for what float32 cannot tell apart."""
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(100, d, generator=gen).double()
    weight[50:] = weight[:50] + 3e-8 * torch.randn(50, d, generator=gen)
    weight[7] = weight[57]
    bias = torch.zeros(100).double()
    x = (weight[:50] + 0.01 * torch.randn(50, d, generator=gen)).float()
    expected = exact(x.double(), weight, bias)
    assert 7 in expected and 57 not in expected and any(k > 50 for k in expected)
    monkeypatch.setattr(Scores, "_exactly", None)
    scores = Scores(weight, bias)
    if given:
        monkeypatch.setattr(scores, "highest", None)
        logits, guess = x @ weight.float().T, torch.arange(50)
        assert scores.highest_of(logits, x, guess).tolist() == expected
        assert scores.highest_of(logits, x, guess, scores.sketch(x)).tolist() == expected
    else:
        assert scores.highest(x).tolist() == expected


def test_fewer_bits_for_float32_are_no_bits_lost(monkeypatch):
    def roughly(self, x):
        raise AssertionError("products of float32 may have 8 bits")

    monkeypatch.setattr(Scores, "_roughly", roughly)
    x, weight, bias = problem(1e-8)
    try:
        torch.set_float32_matmul_precision("medium")
        assert Scores(weight, bias).highest(x).tolist() == exact(x, weight, bias)
    finally:
        torch.set_float32_matmul_precision("highest")


def changed(logits, how):
    """What a model may give in place of its logits, most of which would change decisions."""
    order = torch.arange(K).roll(1)
    return {
        "as they are": logits,
        "exchanged": logits[:, order],
        "hotter": logits / 3 + 1,
        "negative": -logits,
        "bfloat16": logits.bfloat16().float(),
        "float64": logits.double(),
        "one more": torch.cat([logits[:1] + torch.eye(K)[3] * 100, logits[1:]]),
        "no numbers": logits * torch.nan,
        "of others": logits.flip(0),
    }[how]


@pytest.mark.parametrize("gap", [1.0, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize(
    "how",
    ["as they are", "exchanged", "hotter", "negative", "bfloat16", "float64", "one more", "no numbers", "of others"],
)
def test_logits_that_were_given_decide_only_where_they_are_the_scores(how, gap, monkeypatch):
    x, weight, bias = problem(gap)
    x = x.float()
    given = changed(torch.nn.functional.linear(x, weight.float(), bias.float()), how)
    before, labels = given.clone(), torch.arange(len(x)) % K
    chosen = Scores(weight, bias).highest_of(given, x, labels)
    assert chosen.tolist() == exact(x.double(), weight, bias)
    monkeypatch.setattr(decisions, "COPIED", 0)  # few rows at a time, as of many classes
    assert torch.equal(Scores(weight, bias).highest_of(given, x, labels), chosen)
    assert torch.equal(given, before) or how == "no numbers"


def test_logits_that_were_given_spare_the_product(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(K, d, generator=gen).double()
    labels = torch.arange(300) % K
    x = (weight[labels] + 0.1 * torch.randn(300, d, generator=gen)).float()
    asked, highest = [], Scores.highest
    monkeypatch.setattr(Scores, "highest", lambda self, x: asked.append(len(x)) or highest(self, x))
    scores = Scores(weight, torch.zeros(K).double())
    logits = x @ weight.T.float()
    assert torch.equal(scores.highest_of(logits, x, labels), labels)
    assert torch.equal(scores.highest_of(logits, x, labels.roll(7)), labels), (
        "wrong guesses are looked at in the logits"
    )
    assert asked == []
    logits[5, 2] += 0.1
    assert torch.equal(scores.highest_of(logits, x, labels), labels) and asked == [1], "one row is not as it should be"
