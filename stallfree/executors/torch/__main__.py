"""The process of one rank, as the driver starts it: `python -m stallfree.executors.torch HOST PORT RANK LOCAL`."""

import os
import sys

from stallfree.executors.torch.worker import TOKEN, work

if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), os.environ.pop(TOKEN), int(sys.argv[3]), int(sys.argv[4]))
