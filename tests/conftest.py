"""What all tests share."""

import os
from pathlib import Path

import pytest

from stallfree.bench import load

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when a kernel is defined


@pytest.fixture(autouse=True)
def punctual(request, monkeypatch):
    """How late a client of the load may be depends on the machine, which is not tested, but by tests that are about being late."""
    if "behind_its_schedule" not in request.node.name:
        monkeypatch.setattr(load, "MOST_LATE_S", 60.0)
