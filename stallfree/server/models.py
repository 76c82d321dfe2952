"""The names that a request's `model` may have: those of the model, and those of its adapters. It knows names, and no weights."""

from collections.abc import Sequence

from stallfree.engine.adapters import Library
from stallfree.server.errors import ApiError, shown


class Models:
    """The model under its `names`, and the adapters in `library`. Raises ValueError if an adapter has one of these names."""

    def __init__(self, names: Sequence[str], library: Library):
        self.names, self.library = tuple(names), library
        library.reserve(self.names)

    def check(self, name: str | None) -> None:
        """Raises ApiError if neither the model nor an adapter has the name. None, for a request that names none, is the model."""
        self.adapter(name)

    def adapter(self, name: str | None) -> str:
        """The key of the adapter that a request for `name` wants; "" for the model itself. Raises ApiError as `check` does."""
        if name is None or name in self.names:
            return ""
        key = self.library.key(name)
        if key is None:
            names = ", ".join(map(repr, self.names))
            served = f"{names} {'is' if len(self.names) == 1 else 'are'}"
            number = len(self.library.named)
            adapters = f", and {number} adapters{self.library.nearest(name)}" if number else ""
            message = f"the model {shown(name)} is not served here; {served}{adapters}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return key
