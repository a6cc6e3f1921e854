"""Words for settings that are not allowed."""

import difflib
from collections.abc import Sequence
from typing import Any


def check(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Refuse the value of a setting, in one line, unless all is well.

    Raises:
        ValueError: not `ok`.
    """
    if not ok:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def nearest(word: str, words: Sequence[str]) -> str:
    """A hint for a mistyped word, or nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
