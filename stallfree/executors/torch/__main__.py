"""A rank as a process of its own: `python -m stallfree.executors.torch HOST PORT RANK LOCAL`, as the driver starts it."""

import os
import sys

from stallfree.executors.torch.worker import TOKEN, work

if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), os.environ.pop(TOKEN), int(sys.argv[3]), int(sys.argv[4]))
