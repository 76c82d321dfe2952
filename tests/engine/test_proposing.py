"""The words of `--speculate` name a proposer, or say what is wrong with them."""

import pytest

from stallfree.core.plan import Capacity
from stallfree.core.request import Request
from stallfree.engine.assemble import Options, assemble
from stallfree.engine.proposing import check, proposer
from stallfree.engine.streams import Output, Reading
from stallfree.executors.simulated import SimulatedExecutor
from tests.composition.serving import write_model
from tests.server.models import chat_text

TEXT = chat_text()


@pytest.mark.parametrize("most", [0, -1, 16, 64])
def test_a_number_of_draft_tokens_that_is_not_possible(most):
    with pytest.raises(ValueError, match=f"--draft-tokens {most} is not possible; take 1 to 15"):
        check("ngram", most)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ngrams", r"'ngrams' is unknown \(did you mean 'ngram'\?\); known: ngram, draft:MODEL"),
        ("draft", "names no model"),
        ("draft:", "names no model"),
        ("ngram,draft:x.gguf", "names several proposers"),
        ("./nowhere.py:Mine", "there is no file ./nowhere.py"),
        ("", "'' is unknown"),
    ],
)
def test_words_that_name_no_proposer(words, says):
    with pytest.raises(ValueError, match=says):
        check(words, 7)


def test_a_proposer_that_a_user_wrote(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Mine:\n    draft_s = 0.0\n    def propose(self, requests, most): return [(1,) for _ in requests]\n")
    check(f"{file}:Mine", 7)
    made = proposer(f"{file}:Mine", SimulatedExecutor(Capacity(16, 9, 99), [1]), TEXT, None, lambda *_: None, print)
    assert [(1,)] == made.propose([None], [3])
    other = tmp_path / "other.py"
    other.write_text("class Mine:\n    def propose(self, requests, most): ...\n")
    with pytest.raises(ValueError, match="has no draft_s"):
        check(f"{other}:Mine", 7)


def test_an_executor_that_checks_no_drafts_is_named():
    class Plain:
        capacity = Capacity(16, 9, 99)

    with pytest.raises(ValueError, match="this executor checks no drafts; leave the option out"):
        proposer("ngram", Plain(), TEXT, None, lambda *_: None, print)


def saved(folder, tokenizer, seed=0):
    checkpoint = write_model(folder, seed)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x", "eos_token": "<|end|>"}')
    return checkpoint


def test_a_draft_model_with_other_tokens_is_refused(tmp_path):
    checkpoint = saved(tmp_path / "small", chat_text().tokenizer)
    executor = SimulatedExecutor(Capacity(16, 9, 99), [1])
    shares = []

    class Small(SimulatedExecutor):
        closed = False

    def opened(checkpoint, share):
        shares.append(share)
        return Small(Capacity(16, 9, 99), [1])

    made = proposer(f"draft:{checkpoint.path}", executor, TEXT, checkpoint.config, opened, print)
    assert (1.0, True) == (shares[0], made.draft_s > 0)
    other = chat_text()
    other.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match="has another vocabulary: token '<extra>' is None there, and 265 in the model"):
        proposer(f"draft:{checkpoint.path}", executor, other, checkpoint.config, opened, print)
    with pytest.raises(ValueError, match="the simulated executor has no vocabulary"):
        proposer("draft:x", executor, TEXT, None, opened, print)


def run(engine):
    outputs: list[Output] = []
    while engine.busy:
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("policy", ["slo", "sarathi", "fcfs"])
def test_an_engine_that_guesses_answers_as_one_that_does_not(policy):
    """The simulated executor says the alphabet, which a lookup soon guesses: several tokens come in an iteration, each by
    itself."""
    texts, iterations = [], []
    for speculate in (None, "ngram"):
        engine = assemble(Options(executor="simulated", policy=policy, speculate=speculate)).engine
        engine.executor.sleep = lambda seconds: None
        engine.clock = lambda: 0.0  # a busy machine would teach the policy other prices, and guesses would not pay
        records = []
        engine.record = records.append
        engine.submit(Request("a", engine.text.encode("Hello"), 150))
        outputs = run(engine)
        assert all(len(output.tokens) == 1 for output in outputs)
        assert 150 == len(outputs) == sum(len(record.emitted) for record in records)
        texts.append("".join(output.text for output in outputs))
        iterations.append(len(records))
    assert texts[0] == texts[1]
    assert iterations[1] < 0.6 * iterations[0]


def test_a_stop_string_ends_an_answer_within_the_tokens_of_an_iteration():
    engine = assemble(Options(executor="simulated", policy="sarathi", speculate="ngram", draft_tokens=15)).engine
    engine.executor.sleep = lambda seconds: None
    plain = assemble(Options(executor="simulated", policy="sarathi")).engine
    plain.executor.sleep = lambda seconds: None
    whole = {}
    for own in (engine, plain):
        own.submit(Request("warm", own.text.encode("Hello"), 120))
        text = "".join(output.text for output in run(own))
        for number in range(1, 20):
            stop = text[70 + number : 73 + number]
            own.submit(Request(f"{number}", own.text.encode("Hello"), 120), Reading([stop]))
            outputs = run(own)
            whole.setdefault(number, []).append(
                ("".join(o.text for o in outputs), outputs[-1].finish_reason, outputs[-1].stop_reason, len(outputs))
            )
    assert all(with_guesses == without for with_guesses, without in whole.values())
    assert {"stop"} == {reason for pair in whole.values() for _, reason, _, _ in pair}
