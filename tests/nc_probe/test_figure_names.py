"""Names in figures, whatever they are: drawn to the letter, or short, or by their number."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nc_probe import ClassMoments, measure
from nc_probe.output.labels import label
from nc_probe.plots import plot_angles, plot_depth, plot_grams


def pixels(text, **settings):
    figure = Figure(figsize=(4, 0.4))
    figure.text(0.02, 0.3, text, **settings)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize(
    "name", [r"$\frac$", "$x_1^2$", "$", "$$", r"\$", r"a\$b$", "{a}_b", "50 %", "#1 & ~", "Café", "Ελλάδα"]
)
def test_a_name_is_drawn_to_the_letter(name):
    assert np.array_equal(pixels(label(name)), pixels(name, parse_math=False))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("African elephant, Loxodonta africana", "African…fricana"),
        ("two\nlines\tand  more", "two line…nd more"),
        ("猫", "7"),
        ("猫 2", "7"),
        ("dog \U0001f436", "dog"),
        ("\U0001f436", ""),
        ("\n", "7"),
        ("\udcff", "7"),
        ("_hidden", " _hidden"),
    ],
)
def test_a_name_stays_inside(name, shown):
    assert label(name, most=16, instead="7") == shown


def test_a_name_without_a_number_has_question_marks():
    assert label("猫 2") == "? 2" and label("") == ""


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60), st.integers(3, 30))
def test_any_name_can_be_drawn(name, most):
    text = label(name, most=most, instead="0")
    pixels(text)
    assert len(text.replace(r"\$", "$")) <= most + 1


def overhang(figure):
    """How far, in inches, what is drawn goes beyond the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    return max(-box.x0, -box.y0, box.x1 - width, box.y1 - height)


LONG = "a name that nobody would give, but for a folder of many words " * 3


@pytest.mark.parametrize(("name", "classes"), [(r"$\frac$", 4), (LONG, 4), (LONG, 30), ("_hidden", 4), ("猫", 4)])
def test_figures_hold_names_of_any_kind(name, classes):
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(5 * classes) % classes
    moments = ClassMoments(classes, 6).update(torch.randn(len(labels), 6, generator=gen), labels)
    groups = {name: range(2), f"{name} again": range(2, classes)}
    report = measure(moments, torch.randn(classes, 6, generator=gen), groups=groups)
    report = dataclasses.replace(report, layers={name: report})
    for figure in (
        plot_grams(report, class_names=[name] * classes, title=name),
        plot_angles(report, title=name),
        plot_depth(report, title=name),
    ):
        assert overhang(figure) < 0.03
        legends = [
            [text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes if axes.get_legend()
        ]
        assert all(any(label(name) in text for text in texts) for texts in legends)
