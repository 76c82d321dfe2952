"""Rules for helper processes: they ignore Ctrl-C, which a terminal sends to them too, and none outlives its parent, however that
ended. It does not know what they do.
"""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Make a helper process ignore Ctrl-C and end with its parent. Call it before all else in the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
