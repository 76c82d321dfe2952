"""Runs a server of this project in its own process while it is measured. It knows how `stallfree serve` starts and ends, and
nothing of the requests to it.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

END_S = 10.0
"""Seconds that a server has to end after SIGTERM, before it is killed."""
ENDS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that would end this process at once, and leave its server running."""


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[str]:
    """Run `stallfree serve` with `arguments` on a free port, and yield its URL. The server always ends with the context.

    Its port listens before the URL is known, so the first request waits until the server is ready. Its messages go to standard
    error. Raises ValueError if it ends before it serves.
    """
    command = [sys.executable, "-m", "stallfree", "serve", *arguments, "--port", "0", "--drain-timeout", "0", "--json"]
    with _ending():
        # In its own process group: Ctrl-C must reach only this process, which then ends the server.
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
    """Turn the signals that end this process into SystemExit, so that its server is ended too."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
