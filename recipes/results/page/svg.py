"""Figures as SVG inside a page: they take the colour of its text, in light and dark, and load nothing."""

import html
import io
import re
import sys
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Drawn in this colour is what shall have that of the text around the figure.
INK = "#123457"

_STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "page",  # the same figure is the same text
    "font.size": 9,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
}


def as_svg(draw: Callable[[], Figure | None], *, name: str, alt: str) -> str:
    """Draw a figure as an element `<svg>`, or as a sentence where that fails: the numbers matter more.

    Args:
        draw: draws the figure, or returns None where there is nothing to draw, which makes no text.
        name: unlike that of every other figure of the page, of letters, digits and -.
        alt: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    try:
        with matplotlib.rc_context(_STYLE):
            figure = draw()
            if figure is None:
                return ""
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format="svg", metadata=metadata, dpi=150)
    except Exception as error:  # a picture that fails, for whatever reason, does not take the numbers with it
        if sys.flags.dev_mode:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: {alt} is not drawn: {reason}", file=sys.stderr)
        return f"<p>Not drawn: {html.escape(reason)}</p>"
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    text = text[text.index(">") + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Names are made by figure, and a page has many: those that are referred to are kept, each with that of its figure.
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="halo[^"]*"', ' class="halo"', text)
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor")
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" role="img" aria-label="'
    return f'{head}{html.escape(" ".join(alt.split()))}">{text}'
