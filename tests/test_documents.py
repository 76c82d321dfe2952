"""What the documents list is what there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from stallfree.core.record import VERSION, Run, StepRecord
from stallfree.metrics.report import Report
from stallfree.metrics.requests import COLUMNS

DOCS = Path(__file__).parents[1] / "docs"
FORMATS = (DOCS / "formats.md").read_text()


def listed(heading: str) -> set[str]:
    """The names in backquotes in a section's text."""
    section = FORMATS.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    return set(re.findall(r"`(\w+)`", section))


def test_every_field_of_a_record_is_documented():
    assert f"## Records, version {VERSION}" in FORMATS
    assert set() == {field.name for kind in (Run, StepRecord) for field in fields(kind)} - listed("Records")


def test_every_column_of_a_row_is_documented():
    assert set() == set(COLUMNS) - listed("A row")


def test_every_key_of_a_report_is_documented():
    assert set() == {field.name for field in fields(Report)} - listed("`--json`")


@pytest.mark.parametrize("document", sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]), ids=lambda file: file.name)
def test_no_document_names_an_option_that_is_gone(document):
    assert [] == re.findall(r"--budget\b|--memory\b|\bf16\b|stallfree\[\w+\]", document.read_text())
