"""Names in figures: to the letter, in one line, and short enough to stay inside."""

from typing import Any


def label(name: str, *, most: int = 24, instead: str = "") -> str:
    r"""A name as a figure is to be given it.

    matplotlib takes `$...$` for a formula, which may not be one, and leaves out of a legend what begins with `_`.

    Args:
        name: any text, such as the name of a folder.
        most: characters; of a longer name the middle is left out.
        instead: what stands for a name without characters, or with letters or digits that the font does not have, such
            as its number; if not given, each of these is a question mark.

    >>> print(label("$\\frac$"), label("African elephant, Loxodonta africana", most=16))
    \$\frac\$ African…fricana
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts: list[Any] = [get_font(findfont(FontProperties(family=[each]))) for each in FontProperties().get_family()]
    text = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    lacking = {c for c in text if not any(font.get_char_index(ord(c)) for font in fonts)}
    if instead and (not text or any(c.isalnum() for c in lacking)):
        return instead
    text = "".join(("?" if c.isalnum() else "") if c in lacking else c for c in text).strip()
    if len(text) > most:
        text = f"{text[: most // 2].rstrip()}…{text[len(text) - (most - most // 2) + 1 :].lstrip()}"
    return " " * text.startswith("_") + text.replace("$", r"\$")
