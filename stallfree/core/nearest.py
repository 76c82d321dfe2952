"""The known name that an unknown name probably means, for error messages. It knows no names itself."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `name`: " (did you mean ...?)" with the nearest known name, or "" if none is near.

    Nearest first: a known name that begins with `name`, one that contains it, one with which `name` begins, one that is spelt
    alike. Of the first two kinds the shortest is taken, of the third the longest.
    """
    text, names = name.lower(), list(known)
    longer = [word for word in names if text and word.lower().startswith(text)]
    holding = [word for word in names if len(text) > 1 and text in word.lower()]
    shorter = sorted((word for word in names if len(word) > 1 and text.startswith(word.lower())), key=len, reverse=True)
    alike = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    best = min(longer or holding, key=len, default=None) or next(iter([*shorter, *alike]), None)
    return f" (did you mean {best!r}?)" if best else ""
