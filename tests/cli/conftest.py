"""Runs a command as a user would. Test files that need another way have their own fixture."""

import sys

import pytest

from stallfree.cli import main


@pytest.fixture
def stallfree(monkeypatch, capfd):
    """Runs a command in this process: its exit code, standard output and standard error."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["stallfree", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capfd.readouterr())

    return run
