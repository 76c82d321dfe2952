"""The known name that is meant by an unknown one, for error messages. It knows no names itself."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown `name`: " (did you mean ...?)" with the known one that is nearest, "" if none is.

    A known name that begins with `name` is nearer than one that contains it, that than one that `name` begins with, and that than
    one that is only written alike. Of several the shortest is taken, and of those the first.
    """
    text, names = name.lower(), list(known)
    begun = [one for one in names if text and one.lower().startswith(text)]
    holding = [one for one in names if len(text) > 1 and text in one.lower()]
    held = sorted((one for one in names if len(one) > 1 and text.startswith(one.lower())), key=len, reverse=True)
    alike = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    found = min(begun or holding, key=len, default=None) or next(iter([*held, *alike]), None)
    return f" (did you mean {found!r}?)" if found else ""
