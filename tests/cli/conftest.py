"""A command as its user meets it; files that need it otherwise have a fixture of their own."""

import sys

import pytest

from stallfree.cli import main


@pytest.fixture
def stallfree(monkeypatch, capfd):
    """The exit code, standard output and standard error of a command, run in this process."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["stallfree", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capfd.readouterr())

    return run
