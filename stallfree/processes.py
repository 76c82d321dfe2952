"""Helper processes: Ctrl-C in a terminal reaches them too, and is not for them; and none outlives the process that made it, however
that one ended.
"""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Call it first thing in a helper process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever made this process ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
