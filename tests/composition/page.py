"""docs/composition.md, from what the tests of all pairs are of: a pair that is not refused by name is tested, and a test that fails
fails the project. So no cell can be empty, or say what is not so.
"""

from pathlib import Path

from tests.composition.serving import FEATURES, REFUSED

PAGE = Path(__file__).parent.parent.parent / "docs" / "composition.md"

HEAD = """# What works together

Each feature was tested with each other one: a small model with random weights, in float32, serves the same requests (greedy and
sampled, with penalties and log-probabilities) with both features, and every token must be that of an engine that has neither.
Features that belong to the requests (salts, adapters, grammars, tools, several completions) are compared with a plain engine that
serves these requests one after another; KV of fewer bits, and few tokens, with one whose numbers are the same. In each run both
must also have had an effect, the accounts of requests and KV blocks must agree (`check()`), and no block may be left with nobody.
Pairs with SP2, and sixty sets of three, are tested by `make test-all`.

This page is made from the tests (`python -m tests.composition`; the tests are in `tests/composition/`): **yes** is a test that
passes, and a number is a note below that says why the two cannot be had together.
"""

TAIL = """
What the table does not say: how fast two features are together. Speculation's gain beside others is in
[speculation](speculation.md), that of adapters in [adapters](adapters.md), and of slack in [qos](qos.md). Numbers are the same in
float32 only: with int8 weights, which is the default on a processor, a product's last bits depend on how many tokens an iteration
has, so a near tie may be decided otherwise, with or without any of these features.
"""


def page() -> str:
    names = list(FEATURES)
    reasons = list(dict.fromkeys(REFUSED.values()))
    lines = [HEAD, "| feature | what it is here |", "|---|---|"]
    lines += [f"| {name} | {what} |" for name, what in FEATURES.items()]
    lines += ["", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in names:
        cells = [_cell(row, column, reasons) for column in names]
        lines.append(f"| **{row}** | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. Refused: {reason}." for number, reason in enumerate(reasons, 1)), TAIL]
    return "\n".join(lines)


def _cell(row: str, column: str, reasons: list[str]) -> str:
    why = REFUSED.get(frozenset({row, column}))
    return "yes" if why is None else f"no ({reasons.index(why) + 1})"
