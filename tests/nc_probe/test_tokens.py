"""Classifiers of tokens against a probe that is shown each token that counts as a sample of its own."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from nc_probe import NCProbe

B, T, d, K = 5, 6, 7, 4


class Tagger(nn.Module):
    """A classifier of tokens."""

    def __init__(self, classes=K):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc = nn.Linear(3, d), nn.Linear(d, classes)

    def forward(self, x):
        return self.fc(self.stem(x))


class Flat(nn.Module):
    """Its classifier, on features that are known."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def data(n=4):
    gen = torch.Generator().manual_seed(1)
    labels = torch.randint(0, K, (n, B, T), generator=gen)
    x = torch.randn(n, B, T, 3, generator=gen) + labels[..., None]
    labels[torch.rand(n, B, T, generator=gen) < 0.3] = -100
    return x, labels


def one_by_one(linear, features, labels, ignored=(-100,), **settings):
    """A loop over sequences and positions."""
    with torch.no_grad(), NCProbe(Flat(linear).eval(), **settings) as probe:
        for sequence, words in zip(features.flatten(0, -3), labels.flatten(0, -2), strict=True):
            for feature, word in zip(sequence, words.tolist(), strict=True):
                if word not in ignored:
                    probe.model(feature[None])
                    probe.update([word])
    return probe.compute()


def assert_equal(a, b):
    for f in dataclasses.fields(a):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if isinstance(left, tuple):
            assert left == pytest.approx(right, rel=1e-8, abs=1e-10), f.name
        elif isinstance(left, float | int):
            assert left == pytest.approx(right, rel=1e-8, abs=1e-10, nan_ok=True), f.name
        elif f.name == "groups":
            assert all(assert_equal(left[name], right[name]) is None for name in left)


@pytest.mark.parametrize("settings", [{}, {"cache_bytes": 0}, {"center": "empirical"}], ids=str)
def test_tokens_are_samples(settings):
    model, (x, labels) = Tagger().eval(), data()
    settings |= {"groups": {"a": [0, 1], "b": [2, 3]}}
    with torch.no_grad(), NCProbe(model, ignore_index=-100, **settings) as probe:
        for images, words in zip(x, labels, strict=True):
            model(images)
            probe.update(words)
    with torch.no_grad():
        expected = one_by_one(model.fc, model.stem(x), labels, **settings)
    assert probe.compute().samples == int((labels >= 0).sum()) == expected.samples
    assert_equal(probe.compute(), expected)
    assert 0 < probe.linear_error < 1e-5


@pytest.mark.parametrize("shape", [(B,), (B, T)])
def test_masks_of_sequences_and_of_tokens(shape):
    model, (x, labels) = Tagger().eval(), data(1)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    with torch.no_grad(), NCProbe(model, ignore_index=-100) as probe:
        model(x[0])
        probe.update(labels[0].tolist(), mask.tolist())
        expected = labels[0].masked_fill(~(mask if mask.ndim == 2 else mask[:, None]), -100)
        assert_equal(probe.compute(), one_by_one(model.fc, model.stem(x), expected[None]))


def test_the_first_batch_may_have_nothing_that_counts():
    model, (x, labels) = Tagger().eval(), data()
    labels[0] = -100
    with torch.no_grad(), NCProbe(model, ignore_index=-100) as probe:
        for images, words in zip(x, labels, strict=True):
            model(images)
            probe.update(words)
        assert_equal(probe.compute(), one_by_one(model.fc, model.stem(x), labels))


def gpt2(kind, **settings):
    import transformers  # takes seconds

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=11, **settings)
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("as_dict", [True, False])
def test_gpt2_predicts_the_next_token(as_dict):
    """The head is lm_head after ln_f, its rows those of the embedding; labels are the inputs, as it has them."""
    model = gpt2("GPT2LMHeadModel")
    words = torch.randint(0, 11, (6, 9), generator=torch.Generator().manual_seed(0))
    pad = torch.arange(9) >= torch.tensor([9, 9, 8, 5, 2, 1])[:, None]
    with torch.no_grad(), NCProbe(model, shift_labels=True, ignore_index=-100) as probe:
        features = model.transformer(words).last_hidden_state
        for part, padded in zip(words.split(4), pad.split(4), strict=True):
            model(part, return_dict=as_dict)
            probe.update(part.masked_fill(padded, -100))
        expected = one_by_one(model.lm_head, features[None, :, :-1], words.masked_fill(pad, -100)[None, :, 1:])
    report = probe.compute()
    assert probe.head.name == "lm_head" and report.samples == 8 + 8 + 7 + 4 + 1
    assert probe.linear_error < 1e-5
    assert_equal(report, expected)
    with torch.no_grad(), NCProbe(model, shift_labels=True) as probe:  # the mask is that of the labels
        model(words)
        probe.update(words, mask=~pad)
    assert_equal(probe.compute(), expected)
    with torch.no_grad(), NCProbe(model, shift_labels=False, ignore_index=-100) as probe:
        model(words, labels=words)
        probe.update(torch.cat([words[:, 1:], torch.full((6, 1), -100)], 1), mask=(~pad).roll(-1, 1))
    assert_equal(probe.compute(), expected)


def test_token_classifiers_of_transformers():
    model = gpt2("GPT2ForTokenClassification", num_labels=K)
    words = torch.randint(0, 11, (5, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, K, (5, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), NCProbe(model) as probe:
        features = model.transformer(words).last_hidden_state
        model(input_ids=words)
        probe.update(labels)
        assert_equal(probe.compute(), one_by_one(model.classifier, features[None], labels[None]))


def test_ignored_labels_of_images():
    model, (x, labels) = Tagger().eval(), data(1)
    with torch.no_grad(), NCProbe(model, ignore_index=-100) as probe:
        model(x[0, 0])
        probe.update(labels[0, 0])
    assert probe.compute().samples == int((labels[0, 0] >= 0).sum())


def update(model, x, *labels, **settings):
    with torch.no_grad(), NCProbe(model, **settings) as probe:
        model(x)
        probe.update(*labels)
    return probe.compute()


EVERYTHING = torch.full((B, T), -100)


@pytest.mark.parametrize(
    "labels, settings, message",
    [
        ((EVERYTHING,), {"ignore_index": -100}, r"at least one sample.*; every label was ignore_index=-100"),
        (
            (EVERYTHING[:, 0] * 0,),
            {},
            r"classifier 'fc' must receive \(B, d\) where labels are \(B,\), got \(5, 6, 7\)",
        ),
        ((EVERYTHING,), {}, r"labels must be in 0..3, got -100..-100 in batch 0"),
        ((EVERYTHING[:, :2],), {}, r"labels must have shape \(5, 6\) as the tokens have, got \(5, 2\)"),
        ((EVERYTHING[..., None],), {}, r"labels must have shape \(5, 6\) as the tokens have, got \(5, 6, 1\)"),
        ((EVERYTHING, [[True] * 2] * B), {}, r"mask must be bool \(5, 6\) or \(5,\), got torch.bool \(5, 2\)"),
        ((EVERYTHING, [[1] * T] * B), {}, r"mask must be bool \(5, 6\) or \(5,\), got torch.int64 \(5, 6\)"),
        ((EVERYTHING,), {"layers": ["stem"]}, r"labels must be \(B,\) where layers or iterates are measured"),
        ((EVERYTHING,), {"ignore_index": "-100"}, "ignore_index must be an integer, got '-100'"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(labels, settings, message):
    with pytest.raises(ValueError, match=message):
        update(Tagger().eval(), data(1)[0][0], *labels, **settings)


def test_labels_of_tokens_for_a_classifier_of_images():
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\) as the batch has, got \(B, T\), which is"):
        update(Tagger().eval(), data(1)[0][0, :, 0], EVERYTHING)


def test_a_causal_language_model_must_say_whether_labels_are_shifted():
    with pytest.raises(ValueError, match="shift_labels must be given for a causal language model, got None: True if"):
        NCProbe(gpt2("GPT2LMHeadModel"))


def test_features_of_tokens_without_a_classifier():
    class Backbone(nn.Identity):
        def get_classifier(self):
            return nn.Identity()

    (x, labels), model = data(1), Tagger().eval()
    with torch.no_grad():
        report = update(Backbone().eval(), model.stem(x[0]), labels[0], num_classes=K, ignore_index=-100)
        expected = one_by_one(model.fc, model.stem(x), labels)
    assert math.isnan(report.nc3) and report.nc1 == pytest.approx(expected.nc1, rel=1e-9)
    with pytest.raises(
        ValueError, match=r"a model without classifier must give one tensor \(B, d\), got tensors of sh"
    ):
        update(Backbone().eval(), x[0], labels[0, :, 0], num_classes=K)
