"""Writes docs/composition.md."""

from tests.composition.page import PAGE, page

PAGE.write_text(page())
