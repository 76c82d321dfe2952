"""What plots need, and how to get it."""

import pytest

from stallfree.metrics import plot


def test_without_matplotlib_the_hint_names_the_checkout(monkeypatch):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[plot\]' in the checkout"):
        plot.require()
