"""A few threads that run one compiled function together, and wait for each other without the operating system.

The others sleep between calls. Within a call a thread waits for the rest in a loop, and gives up its core if that takes long. It
knows nothing of what they compute.
"""

from numba import types

from stallfree.executors.openvino.few.compiled import exact
from stallfree.executors.openvino.few.vectors import add_to, look_at

LINE = 128
"""Bytes between numbers that different threads write often."""
ARRIVED, ROUNDS, STOPPED, TURNS = range(4)
"""The lines of a team's memory: how many threads have arrived, how often all have, whether the team ends; then a semaphore for each
thread."""
PATIENCE = 4000
"""How often a thread looks before it gives up its core: some ten microseconds."""

sleep = types.ExternalFunction("sem_wait", types.int32(types.int64))
wake = types.ExternalFunction("sem_post", types.int32(types.int64))
give_way = types.ExternalFunction("sched_yield", types.int32())


@exact()
def meet(team: int, size: int) -> None:
    """Wait until all `size` threads are here. `team`: the address of their memory."""
    arrived, rounds = team + ARRIVED * LINE, team + ROUNDS * LINE
    before = look_at(rounds)
    if add_to(arrived, 1) == size - 1:
        add_to(arrived, -size)
        add_to(rounds, 1)
        return
    looks = 0
    while look_at(rounds) == before:
        looks += 1
        if looks > PATIENCE:
            give_way()
