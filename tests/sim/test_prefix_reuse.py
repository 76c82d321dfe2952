"""How many blocks of a trace's prompts the simulated prefix cache finds."""

from pathlib import Path

import pytest

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.perf.fitted import Fitted
from stallfree.policies.sarathi import Sarathi
from stallfree.sim.simulate import simulate
from stallfree.workload.prompt import BLOCK
from stallfree.workload.traffic import Traffic

LONGEST = 200_000
FAST = Fitted((0.02, 0.0002, 0.0, 0.0, 0.0, 0.0))
"""20 ms an iteration and 2 us a token, so that no queue forms."""
PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "traces" / "mooncake_conversation.jsonl"


def found(trace: Path, num_blocks: int) -> int:
    """Blocks that a cache of `num_blocks` has when prompts ask for them."""
    lines = []
    simulate(
        Traffic("trace", str(trace), LONGEST).stream(),
        lambda: Sarathi(8192),
        FAST,
        Capacity(BLOCK, num_blocks, LONGEST),
        Limits(256, 8192),
        reuse=True,
        ended=lines.append,
    )
    return sum(line.cached for line in lines) // BLOCK


def trace(tmp_path, *rows: list[int]) -> Path:
    """A trace whose prompts are these blocks and one token more, each after the one before has ended."""
    line = '{"timestamp":%d,"input_length":%d,"output_length":2,"hash_ids":%s}\n'
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(line % (60_000 * i, BLOCK * len(row) + 1, row) for i, row in enumerate(rows)))
    return file


def test_prompts_find_the_blocks_that_earlier_ones_had(tmp_path):
    file = trace(tmp_path, [0, 1, 2], [0, 1, 3], [4], [0, 1, 2, 5])
    assert 5 == found(file, 400)
    assert found(file, 5) < 5


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published trace is not here")
def test_of_the_published_trace_36_6_percent_are_found_without_a_limit():
    total = 288_500
    assert pytest.approx(36.6, abs=1) == 100 * found(PUBLISHED, total + LONGEST // BLOCK) / total
