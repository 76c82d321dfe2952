"""From the words of `--speculate` to a proposer. It does not know how guesses are used."""

from collections.abc import Callable
from pathlib import Path

from stallfree import user_classes
from stallfree.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.core.nearest import nearest
from stallfree.core.speculation import MOST, Proposer
from stallfree.engine.text import Text
from stallfree.executors.base import Executor, Verifies
from stallfree.proposers.guarded import Guarded
from stallfree.proposers.model import DraftModel
from stallfree.proposers.ngram import Ngram

FORMS = ("ngram", "draft:MODEL")


def check(speculate: str | None, most: int) -> None:
    """Raises ValueError for words that name no proposer, and for a number of draft tokens that is not possible."""
    if not 1 <= most <= MOST:
        raise ValueError(f"--draft-tokens {most} is not possible; take 1 to {MOST}")
    if speculate is None or speculate == "ngram":
        return
    form, _, model = speculate.partition(":")
    if "," in speculate:
        raise ValueError(f"--speculate {speculate!r} names several proposers, and only one guesses; take one of them")
    if form == "draft":
        if not model:
            raise ValueError("--speculate draft: names no model; write draft:MODEL, a GGUF file, a folder or a hub id")
    elif ":" in speculate:
        user_classes.find("proposer", speculate, method="propose", attributes=("draft_s",))
    else:
        raise ValueError(
            f"--speculate {speculate!r} is unknown{nearest(speculate, FORMS)}; known: {', '.join(FORMS)}; or {user_classes.FORMS}"
        )


def proposer(
    speculate: str,
    executor: Executor,
    text: Text,
    config: ModelConfig | None,
    open_executor: Callable[[Checkpoint, float], Executor],
    say: Callable[[str], None],
) -> Proposer:
    """The proposer that `speculate` names, for the model of `executor` with this `text` and `config` (None: there is no model).
    `open_executor` opens a smaller model, with this share of the KV memory beside it. Raises ValueError if the executor checks no
    drafts, or the smaller model has other tokens.
    """
    if not isinstance(executor, Verifies):
        raise ValueError("--speculate: this executor checks no drafts; leave the option out, or take executor openvino or torch")
    if speculate == "ngram":
        return Ngram()
    form, _, model = speculate.partition(":")
    if form != "draft":
        cls = user_classes.find("proposer", speculate, method="propose", attributes=("draft_s",))
        try:
            return Guarded(cls(), speculate)
        except Exception as error:
            raise ValueError(f"proposer {speculate!r} cannot be made: {type(error).__name__}: {error}") from error
    if config is None:
        raise ValueError(f"--speculate {speculate}: the simulated executor has no vocabulary; take ngram")
    checkpoint = open_checkpoint(locate(model, say))
    _check_same_tokens(checkpoint, text)
    small = checkpoint.config
    share = _kv_width(small) / _kv_width(config)
    return Guarded(DraftModel(open_executor(checkpoint, share)), "the draft model")


def _kv_width(config: ModelConfig) -> int:
    """Numbers in the KV of a token."""
    return config.num_layers * config.num_kv_heads * config.head_dim


def _check_same_tokens(checkpoint: Checkpoint, text: Text) -> None:
    path, metadata, size = checkpoint.path, checkpoint.metadata, checkpoint.config.vocab_size
    other = Text.from_folder(Path(path), size) if metadata is None else Text.from_gguf(metadata, size)
    vocabulary, others = text.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if vocabulary != others:
        differ = next(token for token in {**vocabulary, **others} if vocabulary.get(token) != others.get(token))
        raise ValueError(
            f"the draft model {path.name} has another vocabulary: token {differ!r} is {others.get(differ)} there, and "
            f"{vocabulary.get(differ)} in the model; take a smaller model of the same family"
        )
