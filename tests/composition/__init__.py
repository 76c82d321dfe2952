"""That everything composes: any two features together give the tokens of an engine that has neither.

`python -m tests.composition` runs all pairs, and writes docs/composition.md from what came of them.
"""
