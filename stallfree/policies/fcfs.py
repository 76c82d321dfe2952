"""First come, first served, with KV reserved for the longest answer: what a server does that knows no tenants. One that sends more
requests gets more of the machine, and the others wait behind them.
"""

from stallfree.core.policy import Reserve
from stallfree.policies.sarathi import Sarathi


class Fcfs(Sarathi):
    """`token_budget`: the most tokens in an iteration, including decodes."""

    reserve: Reserve = "max"
