"""Models for server tests whose answers mean something: one follows a script, one draws random tokens that constraints allow."""

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stallfree.core.plan import StepResult
from stallfree.engine.text import Text
from stallfree.executors.sampling import begin_constraints, ready_rows, sample
from tests.server.conftest import Executor

END = "<|end|>"
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
HERMES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if tools %}Tools: {{ tools | tojson }} as <tool_call> {% endif %}<|assistant|>"
)
THINKING = HERMES + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{# ends with </think> #}"
CLOSERS = b'"}],0123456789 '


def chat_text(template: str = CHATML) -> Text:
    """A tokenizer whose tokens are bytes, with an end token and the marks of ChatML, Hermes' tools and Qwen's reasoning."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"])
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    return Text(tokenizer, template, [tokenizer.token_to_id(END)])


class Random(Executor):
    """Draws from random logits, as a real executor does, and likes to close what it has opened."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        text = chat_text()
        self._favour = np.zeros(text.vocab_size, np.float32)
        self._favour[[text.encode(chr(byte), special=False)[0] for byte in CLOSERS]] = 3.0
        self._favour[list(text.eos_ids)] = 6.0

    def collect(self) -> StepResult:
        works = [w for w in self._plans[0].work if w.samples]
        begin_constraints(works)
        result = super().collect()
        rows = [
            np.random.default_rng([w.start + w.count, w.sampling.seed & 2**32 - 1]).normal(0, 2, len(self._favour)) for w in works
        ]
        logits = np.array(rows, np.float32).reshape(len(works), len(self._favour)) + self._favour
        ready, deferred = ready_rows(works)
        tokens, details, failed = sample(logits[ready], [works[row] for row in ready])
        return StepResult(result.step, tokens, result.seconds, details=details, failed=failed, deferred=deferred)


class Scripted(Executor):
    """Answers with `script` (a text) and then the end token."""

    script = ""
    text = chat_text()

    def collect(self) -> StepResult:
        plan = self._plans[0]
        result = super().collect()
        ids = [*self.text.encode(self.script, special=False), *self.text.eos_ids]
        tokens = {w.id: (ids[min(w.start + w.count - len(w.prompt), len(ids) - 1)],) for w in plan.work if w.samples}
        return StepResult(plan.step, tokens, result.seconds)
