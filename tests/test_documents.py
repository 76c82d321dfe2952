"""The documents list exactly what exists."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stallfree.cli import COMMANDS, app
from stallfree.core.record import VERSION, Run, StepRecord
from stallfree.metrics.report import Report
from stallfree.metrics.requests import COLUMNS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
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


TOUR = (DOCS / "tour.md").read_text()
PLACES = TOUR + (DOCS / "extending.md").read_text()


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`([\w/]+/(?:\w+\.py)?)`", PLACES))))
def test_every_place_that_tour_and_extending_name_is_there(place):
    assert (ROOT / "stallfree" / place).exists() or (ROOT / place).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(\w+\.[a-z_]+)`", TOUR)) - {"transfer.md"}))
def test_every_name_of_the_tour_is_defined(name):
    """Names are Class.method or module.function."""
    owner, attribute = name.split(".")
    files = [file.read_text() for file in (ROOT / "stallfree").rglob("*.py")]
    classes = [text.partition(f"class {owner}")[2] for text in files if re.search(rf"^class {owner}\b", text, re.MULTILINE)]
    modules = [file.read_text() for file in (ROOT / "stallfree").rglob(f"{owner}.py")]
    assert any(re.search(rf"def {attribute}\(", text) for text in classes or modules)


def test_the_readme_fits_on_a_page_or_two():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 140


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text()
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if "decisions" not in page.parts} - {"README.md"}
    assert set() == {page for page in pages if f"({page})" not in index}


def commands() -> str:
    """The page of all commands, from their help texts."""
    pages = ["# Commands\n\nGenerated from `--help`: `python -m tests.test_documents` writes this page."]
    for name, (what, _) in COMMANDS.items():
        names = [name] if not isinstance(what, typer.Typer) else [f"{name} {sub.name}".strip() for sub in what.registered_commands]
        if isinstance(what, typer.Typer) and what.info.invoke_without_command is True:
            names.insert(0, name)
        for command in names:
            text = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="stallfree", env={"COLUMNS": "100"}).output
            pages.append(f"## {command}\n\n```\n{text.strip()}\n```")
    return "\n\n".join(pages) + "\n"


def test_the_page_of_commands_is_what_they_say_of_themselves():
    assert (DOCS / "commands.md").read_text() == commands(), "run `python -m tests.test_documents`"


@pytest.mark.parametrize("document", sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]), ids=lambda file: file.name)
def test_no_document_names_an_option_that_is_gone(document):
    assert [] == re.findall(r"--budget\b|--memory\b|\bf16\b|stallfree\[\w+\]", document.read_text())


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands())
