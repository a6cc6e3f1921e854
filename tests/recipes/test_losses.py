"""Each loss against its published formula in 60 digits, and all of them on a problem whose answer is known."""

import itertools
from fractions import Fraction

import mpmath as mp
import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.loss.class_weights import compute_class_weights
from torch import nn

from recipes.imbalance.losses import LOSSES, LogitAdjustment, create_loss, loss_parameters
from recipes.imbalance.priors import adjust_logits, class_weights

mp.mp.dps = 60

COUNTS = [500, 5000, 50, 700]  # no order: a class's index is not its rank
K = len(COUNTS)


def softmax_loss(u, y):
    return mp.log(sum(mp.exp(v - u[y]) for v in u))


def ldam(z, y, *, margin, scale):
    C = margin * mp.mpf(min(COUNTS)) ** mp.mpf("0.25")
    true = mp.exp(z[y] - scale * C / mp.mpf(COUNTS[y]) ** mp.mpf("0.25"))
    return -mp.log(true / (true + sum(mp.exp(v) for j, v in enumerate(z) if j != y)))


def focal(z, y, *, gamma):
    p = mp.exp(-softmax_loss(z, y))
    return -((1 - p) ** mp.mpf(gamma)) * mp.log(p)


def pairwise(z, y, *, tau, gamma=0):
    """Menon et al., eq. 10 (right) and Kini et al., eq. 2: sums over the other classes."""
    delta = [(mp.mpf(n) / max(COUNTS)) ** mp.mpf(gamma) for n in COUNTS]
    terms = (
        (mp.mpf(COUNTS[j]) / COUNTS[y]) ** mp.mpf(tau) * mp.exp(delta[j] * z[j] - delta[y] * z[y]) for j in range(K)
    )
    return mp.log(1 + sum(term for j, term in enumerate(terms) if j != y))


def squares(z, y, *, k, M):
    return (k * (z[y] - M) ** 2 + sum(v**2 for j, v in enumerate(z) if j != y)) / K


CASES = {
    "cross_entropy": ({}, softmax_loss),
    "class_balanced": ({"beta": 0.0}, softmax_loss),
    "balanced_softmax": (
        {},
        lambda z, y: -mp.log(COUNTS[y] * mp.exp(z[y]) / sum(n * mp.exp(v) for n, v in zip(COUNTS, z, strict=True))),
    ),
    "logit_adjustment": ({"tau": 1.5}, lambda z, y: pairwise(z, y, tau=1.5)),
    "vs": ({}, lambda z, y: pairwise(z, y, tau=1.25, gamma=0.15)),
    "focal": ({}, lambda z, y: focal(z, y, gamma=2)),
    "ldam": ({}, lambda z, y: ldam(z, y, margin=0.5, scale=30)),
    "mse": ({"weight_true": 3.0, "target_true": 5.0}, lambda z, y: squares(z, y, k=3, M=5)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def test_every_loss_has_a_formula():
    assert CASES.keys() == LOSSES.keys()


def draw(B=12, *, seed=0, spread=3.0):
    gen = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(B, K, generator=gen, dtype=torch.float64)
    return logits, torch.arange(B) % K


def build(name, **more):
    return create_loss(name, COUNTS, **CASES[name][0], **more)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@every_loss
def test_the_published_formula(name, spread):
    logits, labels = draw(spread=spread)
    formula = CASES[name][1]
    for z, y in zip(logits, labels, strict=True):
        expected = formula([mp.mpf(v) for v in z.tolist()], int(y))
        value = build(name)(z[None], y[None])
        # The constants of a loss are float32.
        assert abs(value.item() - expected) <= 3e-6 * abs(expected) + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_loss
def test_half_precision_and_autocast_are_computed_in_float32(name, dtype):
    logits, labels = draw(spread=30.0)
    logits = logits.to(dtype)
    rounded = logits.double().requires_grad_()
    expected = build(name)(rounded, labels)
    expected.backward()
    x = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = build(name)(x, labels)
    value.backward()
    assert value.dtype == torch.float32 and x.grad.isfinite().all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, rounded.grad.to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-5)


@pytest.mark.parametrize("gap", [0.0, 50.0, 1e4])
@every_loss
def test_no_logits_break_a_gradient(name, gap):
    logits = torch.zeros(K, K).fill_diagonal_(gap).requires_grad_()
    for target in (torch.arange(K), torch.arange(K).roll(1), torch.full((K, K), 1 / K)):
        value = build(name)(logits, target)
        assert value.isfinite() and torch.autograd.grad(value, logits)[0].isfinite().all()


@pytest.mark.parametrize("soft", [False, True])
@every_loss
def test_gradients_are_those_of_finite_differences(name, soft):
    logits, labels = draw(5)
    target = logits.flip(1).softmax(1) if soft else labels
    loss = build(name, reweight_epoch=0, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda z: loss(z, target), logits.requires_grad_())


@every_loss
def test_a_soft_target_is_the_expectation_over_labels(name):
    logits, labels = draw()
    loss = build(name, reweight_epoch=0)
    torch.testing.assert_close(loss(logits, nn.functional.one_hot(labels, K).double()), loss(logits, labels))
    mixed = loss(logits, mixup_target(labels, K, lam=0.3).double())
    torch.testing.assert_close(
        mixed, 0.3 * loss(logits, labels) + 0.7 * loss(logits, labels.flip(0)), rtol=1e-6, atol=0
    )
    assert not torch.allclose(loss(logits, labels), loss(logits, labels.flip(0)))


@every_loss
def test_smoothing_a_label_is_smoothing_a_target(name):
    logits, labels = draw()
    smooth = mixup_target(labels, K, smoothing=0.2)
    expected = build(name, reweight_epoch=0)(logits, smooth.double())
    smoothed = build(name, reweight_epoch=0, label_smoothing=0.2)
    torch.testing.assert_close(smoothed(logits, labels), expected, rtol=1e-6, atol=0)
    one_hot = nn.functional.one_hot(labels, K).double()
    torch.testing.assert_close(smoothed(logits, one_hot), expected, rtol=1e-6, atol=0)


def test_cross_entropy_is_that_of_torch_and_timm():
    logits, labels = draw()
    soft = logits.flip(0).softmax(1)
    plain, smooth = create_loss("cross_entropy", COUNTS), create_loss("cross_entropy", COUNTS, label_smoothing=0.1)
    for value, expected in [
        (plain(logits, labels), nn.CrossEntropyLoss()(logits, labels)),
        (plain(logits, soft), SoftTargetCrossEntropy()(logits, soft)),
        (smooth(logits, labels), nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)),
        (smooth(logits, soft), nn.CrossEntropyLoss(label_smoothing=0.1)(logits, soft)),
        (smooth(logits, labels), LabelSmoothingCrossEntropy(0.1)(logits, labels)),
    ]:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_a_weighted_loss_is_the_plain_mean_of_weighted_losses(soft):
    logits, labels = draw()
    target = logits.flip(0).softmax(1) if soft else labels
    weight = class_weights(COUNTS, beta=0.999)
    each = nn.CrossEntropyLoss(weight, reduction="none", label_smoothing=0.1)(logits, target)
    loss = create_loss("class_balanced", COUNTS, beta=0.999, label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, target), each.mean(), rtol=1e-6, atol=0)


def test_special_cases():
    logits, labels = draw()

    def value(name, **parameters):
        return create_loss(name, COUNTS, **parameters)(logits, labels).item()

    plain = value("cross_entropy")
    for name, parameters in [
        ("logit_adjustment", {"tau": 0.0}),
        ("vs", {"gamma": 0.0, "tau": 0.0}),
        ("focal", {"gamma": 0.0}),
        ("ldam", {"max_margin": 0.0}),
        ("class_balanced", {"beta": 0.0}),
    ]:
        assert value(name, **parameters) == pytest.approx(plain, rel=1e-6), name
    assert value("logit_adjustment") == value("balanced_softmax") == value("vs", gamma=0.0, tau=1.0)
    assert value("logit_adjustment", tau=0.7) == value("vs", gamma=0.0, tau=0.7) != pytest.approx(plain, rel=1e-2)
    balanced = [create_loss(name, [7] * K)(logits, labels).item() for name in LOSSES]
    names = {name for name, v in zip(LOSSES, balanced, strict=True) if v == pytest.approx(plain, rel=1e-6)}
    assert names == set(LOSSES) - {"mse", "focal", "ldam"}


def test_margins_by_hand():
    # 16, 81 and 256 have whole fourth roots: margins 0.6 x (2/2, 2/3, 2/4), times a scale of 10.
    loss = create_loss("ldam", [81, 16, 256], max_margin=0.6, scale=10.0)
    torch.testing.assert_close(loss.margin, torch.tensor([4.0, 6.0, 3.0]))
    # Two classes whose cosines differ by exactly the margin: even odds.
    torch.testing.assert_close(
        loss(torch.tensor([[9.0, 3.0, -1e4]]), torch.tensor([0])), torch.tensor(6.0 - 4.0).neg().exp().log1p()
    )


def test_square_loss_is_the_distance_to_the_label():
    logits, labels = draw()
    one_hot = nn.functional.one_hot(labels, K).double()
    torch.testing.assert_close(create_loss("mse", COUNTS)(logits, labels), nn.MSELoss()(logits, one_hot))
    soft = logits.flip(0).softmax(1)
    z = logits.clone().requires_grad_()
    mine, theirs = create_loss("mse", COUNTS)(z, soft), nn.MSELoss()(z, soft)
    torch.testing.assert_close(torch.autograd.grad(mine, z), torch.autograd.grad(theirs, z))


def test_effective_numbers_by_fractions():
    counts, beta = [3, 1, 7], Fraction(1, 2)
    effective = [(1 - beta**n) / (1 - beta) for n in counts]
    assert effective[1] == 1
    mean = sum(Fraction(n, sum(counts)) / e for n, e in zip(counts, effective, strict=True))
    expected = [float(1 / e / mean) for e in effective]
    assert class_weights(counts, beta=0.5).tolist() == pytest.approx(expected, rel=1e-14)
    assert class_weights(counts, beta=1.0).tolist() == pytest.approx([float(Fraction(11, 3 * n)) for n in counts])
    assert class_weights(counts, beta=0.0).tolist() == [1.0] * 3


@pytest.mark.parametrize("beta", [0.9, 0.9999, 1 - 1e-9])
def test_effective_numbers_are_those_of_timm_but_for_a_factor(beta):
    theirs = compute_class_weights(COUNTS, sum(COUNTS), method="effective_num", beta=beta)[1].double()
    mine = class_weights(COUNTS, beta=beta)
    torch.testing.assert_close(mine / mine.mean(), theirs, rtol=1e-5, atol=0)
    assert (mine * torch.tensor(COUNTS)).sum().item() == pytest.approx(sum(COUNTS), rel=1e-12)


@every_loss
def test_deferred_reweighting_begins_at_its_epoch(name):
    logits, labels = draw(1)[0], torch.tensor([2])
    weight = class_weights(COUNTS, beta=0.999)[2].item()
    before = create_loss(name, COUNTS, beta=0.0)(logits, labels).item()
    loss = create_loss(name, COUNTS, reweight_epoch=3, beta=0.999)
    assert loss(logits, labels).item() == pytest.approx(before)
    for epoch, expected in [(2, before), (3, weight * before), (9, weight * before), (0, before)]:
        loss.set_epoch(epoch)
        assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert weight > 5


def test_class_balanced_is_cross_entropy_weighted_from_the_start():
    logits, labels = draw()
    from_start = create_loss("cross_entropy", COUNTS, reweight_epoch=0)(logits, labels)
    assert create_loss("class_balanced", COUNTS)(logits, labels) == from_start
    assert create_loss("class_balanced", COUNTS, reweight_epoch=5)(logits, labels) != from_start


@every_loss
def test_the_mean_over_parts_is_the_loss_of_the_whole(name):
    logits, labels = draw(12)
    loss = build(name, reweight_epoch=0)
    parts = [slice(0, 3), slice(3, 5), slice(5, 12)]
    shares = [(part.stop - part.start) / 12 * loss(logits[part], labels[part]) for part in parts]
    torch.testing.assert_close(sum(shares), loss(logits, labels), rtol=1e-12, atol=0)


def test_a_loss_moves_and_leaves_nothing_to_save():
    for name in LOSSES:
        loss = create_loss(name, COUNTS)
        assert not loss.state_dict() and not list(loss.parameters())
        assert loss.to("meta")(torch.empty(2, K, device="meta"), torch.empty(2, K, device="meta")).shape == ()


@pytest.mark.parametrize(
    ("name", "counts", "parameters", "message"),
    [
        (
            "cross_entropi",
            COUNTS,
            {},
            r"loss 'cross_entropi' is unknown \(did you mean 'cross_entropy'\?\); allowed: cr",
        ),
        (
            "ldam",
            COUNTS,
            {"max_margn": 1},
            r"'ldam' has no parameter 'max_margn' \(did you mean 'max_margin'\?\); allow",
        ),
        (
            "balanced_softmax",
            COUNTS,
            {"tau": 1.0},
            r"'balanced_softmax' has no parameter 'tau'.*allowed: label_smoothing",
        ),
        ("focal", COUNTS, {"shared": 1}, "'focal' has no parameter 'shared'"),
        ("focal", COUNTS, {"gamma": -1.0}, r"gamma is -1.0; allowed: 0 or more"),
        ("vs", COUNTS, {"gamma": -0.1}, r"gamma is -0.1; allowed: 0 or more"),
        ("vs", COUNTS, {"tau": float("nan")}, r"tau is nan; allowed: a finite number"),
        ("ldam", COUNTS, {"max_margin": -0.1}, r"max_margin is -0.1; allowed: 0 to 2"),
        ("ldam", COUNTS, {"scale": 0.0}, r"scale is 0.0; allowed: above 0"),
        ("mse", COUNTS, {"weight_true": 0.0}, r"weight_true is 0.0; allowed: above 0"),
        ("mse", COUNTS, {"target_true": 0.0}, r"target_true is 0.0; allowed: above 0"),
        ("cross_entropy", COUNTS, {"label_smoothing": 1.1}, r"label_smoothing is 1.1; allowed: 0 to 1"),
        ("cross_entropy", COUNTS, {"reweight_epoch": -1}, r"reweight_epoch is -1; allowed: 0 or more"),
        ("cross_entropy", COUNTS, {"beta": 1.1}, r"beta is 1.1; allowed: 0 to 1"),
        ("cross_entropy", [5, 0, 3], {}, r"counts is 0 for class 1; allowed: above 0"),
        ("cross_entropy", [5.0, float("inf")], {}, r"counts is inf for class 1; allowed: above 0, finite"),
        ("cross_entropy", [5], {}, r"counts has shape \(1,\); allowed"),
    ],
)
def test_mistakes_are_named(name, counts, parameters, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, counts, **parameters)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2).long(), r"logits has shape \(2, 3\); allowed: \(B, 4\)"),
        (torch.zeros(2, K, 1), torch.zeros(2).long(), r"logits has shape"),
        (
            torch.zeros(2, K),
            torch.zeros(2),
            r"target has shape \(2,\) and dtype torch.float32; allowed: classes \(2,\)",
        ),
        (torch.zeros(2, K), torch.zeros(2, K).long(), r"target has shape \(2, 4\) and dtype torch.int64"),
        (torch.zeros(2, K), torch.zeros(3).long(), r"target has shape \(3,\)"),
    ],
)
def test_shapes_are_checked(logits, target, message):
    with pytest.raises(ValueError, match=message):
        create_loss("cross_entropy", COUNTS)(logits, target)


def test_parameters_of_a_loss_are_listed():
    assert loss_parameters("ldam") == ["max_margin", "scale", "label_smoothing", "reweight_epoch", "beta"]


# Three Gaussian classes of unit covariance about the corners of a triangle. Logits  mu_k . x - |mu_k|^2 / 2  are the
# balanced Bayes rule, and with log pi_k added the posterior of the training distribution: the linear model is exact, so
# logit adjustment is maximum likelihood and errs by sampling alone.
MEANS = 1.6 * torch.tensor([[0, 1], [-(3**0.5) / 2, -0.5], [3**0.5 / 2, -0.5]], dtype=torch.float64)
IMBALANCED = [500, 5000, 50]
BAYES = torch.cat([MEANS, -MEANS.square().sum(1, keepdim=True) / 2], dim=1)  # columns: weights, bias


def sample(counts, seed):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    gen = torch.Generator().manual_seed(seed)
    x = MEANS[labels] + torch.randn(len(labels), 2, generator=gen, dtype=torch.float64)
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1), labels


TEST = sample([20000] * 3, seed=1)


def recalls(theta):
    """Of each class, (3,), for parameters (3, 3); or for many of them, (..., 3, 3)."""
    x, labels = TEST
    right = (x @ theta.mT).argmax(-1) == labels
    return right.view(*right.shape[:-1], 3, -1).double().mean(-1)


def fit(loss):
    """Parameters of least loss, and their covariance over training sets (9, 9), by the sandwich formula of M-estimation
    (White, Econometrica 1982)."""
    x, labels = sample(IMBALANCED, seed=0)
    theta = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=300, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x @ theta.T, labels)
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    assert theta.grad.norm() < 1e-7
    theta = theta.detach()
    H = torch.autograd.functional.hessian(lambda t: loss(x @ t.T, labels), theta).view(9, 9)
    logits = (x @ theta.T).requires_grad_()
    (g,) = torch.autograd.grad(len(x) * loss(logits, labels), logits)
    G = (g[:, :, None] * x[:, None]).flatten(1)  # gradient of each sample
    # Centred class by class, because the number of samples of each is fixed.
    G = torch.cat([g - g.mean(0) for g in G.split(IMBALANCED)])
    inverse = torch.linalg.pinv(H, rtol=1e-8, hermitian=True)  # logits may be shifted, so H has rank 6
    return theta, inverse @ (G.T @ G) @ inverse / len(x) ** 2


def distance(theta, covariance):
    """Squared, from the Bayes rule, in standard errors: chi-squared of 6 degrees of freedom if there is no bias."""
    error = (theta - BAYES) - (theta - BAYES).mean(0)
    return (error.flatten() @ torch.linalg.pinv(covariance, rtol=1e-8, hermitian=True) @ error.flatten()).item()


def shortfall(covariance):
    """Balanced accuracy that sampling alone costs, once in a hundred training sets."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(300, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    thetas = BAYES + (noise * values.clamp_min(0).sqrt() @ vectors.T).view(300, 3, 3)
    return recalls(BAYES).mean() - torch.cat([recalls(t) for t in thetas.split(50)]).mean(1).quantile(0.01)


CHI_SQUARED_999 = 22.46  # exceeded once in a thousand by a chi-squared variable of 6 degrees of freedom


@pytest.mark.parametrize(
    ("name", "parameters"), [("logit_adjustment", {}), ("balanced_softmax", {}), ("class_balanced", {"beta": 1.0})]
)
def test_a_corrected_loss_learns_the_balanced_bayes_rule(name, parameters):
    theta, covariance = fit(create_loss(name, IMBALANCED, **parameters))
    assert distance(theta, covariance) < CHI_SQUARED_999
    tolerance = shortfall(covariance)
    assert 0 < tolerance < 0.03
    assert recalls(theta).mean() > recalls(BAYES).mean() - tolerance


def test_cross_entropy_does_not_until_its_logits_are_adjusted():
    theta, covariance = fit(create_loss("cross_entropy", IMBALANCED))
    tolerance = shortfall(covariance)
    assert distance(theta, covariance) > 10 * CHI_SQUARED_999
    assert recalls(theta).mean() < recalls(BAYES).mean() - 3 * tolerance
    assert recalls(theta)[2] < recalls(BAYES)[2] - 0.3
    # Adjusting what the constant feature gives adjusts every logit.
    adjusted = torch.cat([theta[:, :2], adjust_logits(theta[:, 2], IMBALANCED)[:, None]], dim=1)
    assert distance(adjusted, covariance) < CHI_SQUARED_999
    assert recalls(adjusted).mean() > recalls(BAYES).mean() - tolerance


def test_the_sign_reversed_abandons_the_rare_class():
    theta, _ = fit(LogitAdjustment(IMBALANCED, tau=-1.0))
    assert recalls(theta)[2] < 0.05 < 0.8 < recalls(BAYES)[2]
    assert recalls(theta).mean() < recalls(BAYES).mean() - 0.2


def test_adjusting_afterwards_undoes_the_prior():
    """On joint probabilities p(x, k) = pi_k p(x | k) it leaves the likelihoods, up to a common factor."""
    likelihood = torch.tensor([[0.5, 0.25, 0.125], [0.1, 0.7, 0.2]])
    prior = torch.tensor([n / sum(IMBALANCED) for n in IMBALANCED])
    for tau, dtype in itertools.product([0.0, 1.0, 2.0], [torch.float32, torch.bfloat16]):
        logits = (likelihood * prior).log().to(dtype)
        adjusted = adjust_logits(logits, IMBALANCED, tau)
        assert adjusted.dtype == torch.float32
        expected = logits.float().exp() / prior**tau
        torch.testing.assert_close(adjusted.exp(), expected, rtol=1e-5, atol=0)
