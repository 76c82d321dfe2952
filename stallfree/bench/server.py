"""A server of this project in a process of its own, there for as long as it is measured. It knows how `stallfree serve` begins and
ends, and nothing of what is asked of it.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

END_S = 10.0
"""Seconds in which a server must have ended after SIGTERM; then it is killed."""
ENDS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that would end this process without a word, and leave the server behind."""


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[str]:
    """The URL of a `stallfree serve` with `arguments`, on a free port, which ends when this is left, however that comes about.

    Its port listens before the URL is known, so that the first request waits until it is served. What it says goes to standard
    error. Raises ValueError if it ends before it serves.
    """
    command = [sys.executable, "-m", "stallfree", "serve", *arguments, "--port", "0", "--drain-timeout", "0", "--json"]
    with _ending():
        # In a process group of its own: Ctrl-C is for the one who measures, who then ends the server.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, process_group=0)
        try:
            card = process.stdout.readline() if process.stdout else ""
            if not card:
                code = process.wait()
                raise ValueError(f"`stallfree serve {' '.join(arguments)}` ended with exit code {code} before it served; see above")
            yield json.loads(card)["url"]
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout:
            process.stdout.close()


@contextmanager
def _ending() -> Iterator[None]:
    """Signals that end this process do so by way of SystemExit meanwhile, so that what is left is cleaned up."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
