"""Iterations without the graph, compiled by numba, at most `MOST` tokens at once: `few_tokens` gives them, if it can. `obstacle`
says why a model cannot have them, `first` whether all has to be compiled."""

from stallfree.executors.openvino.few.compiled import first
from stallfree.executors.openvino.few.forward import FewTokens, few_tokens
from stallfree.executors.openvino.few.step import MOST, USUAL
from stallfree.executors.openvino.few.suited import obstacle

__all__ = ["MOST", "USUAL", "FewTokens", "few_tokens", "first", "obstacle"]
