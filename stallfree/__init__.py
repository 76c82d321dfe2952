"""An LLM serving engine whose token streams never stall behind someone else's prompt.

Importing this package loads neither the model runtime nor the server.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stallfree.engine.llm import LLM

__all__ = ["LLM", "__version__", "extra"]


def extra(name: str) -> str:
    """The command that installs the optional dependencies `name`. The package is on no index, so it is run in the checkout."""
    return f"pip install -e '.[{name}]' in the checkout"


def __getattr__(name: str) -> object:
    if name == "LLM":
        from stallfree.engine.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
