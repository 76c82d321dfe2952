"""The torch executor computes what `transformers` computes, for every family, however the tokens are cut and batched."""

from pathlib import Path

import numpy as np
import pytest

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Plan
from tests.executors.test_openvino import MODELS, TOKENS, work
from tests.models import reference, write_folder, write_gguf

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from stallfree.executors.torch import Options, TorchExecutor  # noqa: E402

KV = 1 << 22
EXACT = Options("f32", "f32")
FAMILIES = MODELS | {
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_size": 128}),
    "falcon one norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_size": 128, "num_ln_in_parallel_attn": 1},
    ),
    "falcon 7b": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "hidden_size": 128}),
    "falcon biases": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_size": 128, "bias": True}),
}


def blocks(w, first: int = 0):
    """The work with KV blocks of 16 tokens; those of the OpenVINO tests have 32."""
    return w._replace(blocks=tuple(range(2 * first, 2 * first + 6)))


def chunked(executor: TorchExecutor, sizes: list[int], first: int = 0) -> np.ndarray:
    rows, start = [], 0
    for count in sizes:
        rows.append(executor.logits([blocks(work(TOKENS[start : start + count], start), first)]))
        start += count
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_folder(folder, "llama")
    return TorchExecutor(open_checkpoint(folder), EXACT, KV)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, config = FAMILIES[name]
    model = write_folder(tmp_path, family, **config)
    executor = TorchExecutor(open_checkpoint(tmp_path), EXACT, KV)
    expected = reference(model, TOKENS)
    close = {"rtol": 0, "atol": 1e-4 * np.abs(expected).max()}
    np.testing.assert_allclose(executor.logits([blocks(work(TOKENS))]), expected, **close)
    np.testing.assert_allclose(chunked(executor, [9, 30, 1, 1, 34]), expected, **close)


def test_a_hybrid_batch_gives_each_sequence_its_own_logits(exact: TorchExecutor) -> None:
    alone = exact.logits([blocks(work(TOKENS))])
    exact.logits([blocks(work(TOKENS[:40]), 3), blocks(work(TOKENS[:64]), 6), blocks(work(TOKENS[:70]), 12)])
    batch = [
        blocks(work(TOKENS[40:41], 40, id="decode"), 3),
        blocks(work(TOKENS[:20], id="prefill"), 9),
        blocks(work(TOKENS[64:], 64, id="chunk"), 6),
        blocks(work(TOKENS[70:71], 70, id="another"), 12),
    ]
    expected = np.concatenate([alone[40:41], alone[:20], alone[64:], alone[70:71]])
    np.testing.assert_allclose(exact.logits(batch), expected, rtol=0, atol=1e-4 * np.abs(alone).max())


def test_what_another_request_left_in_a_block_does_not_matter(exact: TorchExecutor) -> None:
    """Also if it is not a number: a block is used again as it is."""
    prompt, decode = blocks(work(TOKENS[:17]), 0), blocks(work(TOKENS[17:18], 17), 0)
    longer = blocks(work(TOKENS), 8), blocks(work(TOKENS[:1], len(TOKENS)), 8)
    expected = [exact.logits([piece]) for piece in (prompt, decode)]
    everywhere = range(exact.capacity.num_blocks)
    exact.write_blocks(everywhere, memoryview(bytearray(b"\xff" * (len(everywhere) * exact.block_bytes))))
    for piece, other, right in zip((prompt, decode), longer, expected, strict=True):
        logits = exact.logits([piece, other])
        np.testing.assert_allclose(logits[: len(right)], right, rtol=0, atol=1e-4)


def test_a_gguf_file_is_the_same_model_as_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "llama")
    folder = open_checkpoint(tmp_path / "folder")
    write_gguf(tmp_path / "model.gguf", folder)
    of_folder, of_file = (
        TorchExecutor(checkpoint, EXACT, KV).logits([blocks(work(TOKENS))])
        for checkpoint in (folder, open_checkpoint(tmp_path / "model.gguf"))
    )
    np.testing.assert_allclose(of_file, of_folder, rtol=0, atol=1e-4 * np.abs(of_folder).max())


@pytest.mark.parametrize(
    ("weights", "kv", "within"),
    [("int8", "f32", 0.15), ("fp8", "f32", 0.3), ("bf16", "bf16", 0.15), ("f32", "fp8", 0.3), ("int4", "f32", 1.0)],
)
def test_every_format_is_close_to_exact(exact: TorchExecutor, tmp_path: Path, weights: str, kv: str, within: float) -> None:
    write_folder(tmp_path, "llama", hidden_size=128, intermediate_size=192)
    checkpoint = open_checkpoint(tmp_path)
    expected = TorchExecutor(checkpoint, EXACT, KV).logits([blocks(work(TOKENS))])
    logits = TorchExecutor(checkpoint, Options(weights, kv), KV).logits([blocks(work(TOKENS))])
    assert np.abs(logits - expected).mean() < within * expected.std()


def test_only_work_that_samples_gets_a_token(exact: TorchExecutor) -> None:
    alone = exact.logits([blocks(work(TOKENS))])
    plan = Plan(7, 0.0, (blocks(work(TOKENS[:9], id="more", samples=False)), blocks(work(TOKENS, id="last"), 3)))
    exact.submit(plan)
    result = exact.collect()
    assert (7, {"last": (int(alone[-1].argmax()),)}) == (result.step, result.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w._replace(blocks=(*w.blocks[:-1], 10**6)), "block number"),
        (lambda w: w._replace(blocks=w.blocks[:3]), "5 are needed"),
        (lambda w: w._replace(tokens=(*w.tokens[:-1], 160)), "vocabulary of 160"),
        (lambda w: w._replace(tokens=w.tokens[1:]), "74 token ids for 75"),
        (lambda w: w._replace(start=-1), "max_model_len"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(exact: TorchExecutor, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exact.submit(Plan(0, 0.0, (change(blocks(work(TOKENS))),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, "weights 'int3' is unknown"),
        ({"kv": "u8"}, "kv 'u8' is unknown"),
        ({"max_model_len": 10**6}, "is not between 1 and"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"threads": 0}, "threads is 0"),
        ({"memory": 1.5}, "a share of 1.5"),
    ],
)
def test_a_bad_option_is_named(tmp_path: Path, options: dict, message: str) -> None:
    write_folder(tmp_path, "llama")
    with pytest.raises(ValueError, match=message):
        TorchExecutor(open_checkpoint(tmp_path), Options(**options), KV)
    with pytest.raises(MemoryError, match="hold no block of KV"):
        TorchExecutor(open_checkpoint(tmp_path), EXACT, 10)


@pytest.mark.parametrize(
    ("capability", "formats", "message"),
    [
        ((8, 0), ("fp8", "bf16"), r"Old has no fp8 .*8.0, and 8.9 is needed.; take --weights int8"),
        ((8, 6), ("int8", "fp8"), "Old has no fp8 .* --kv bf16"),
        ((7, 5), ("bf16", "fp16"), "Old has no bfloat16; take --weights fp16"),
    ],
)
def test_a_format_that_the_gpu_lacks_is_named(monkeypatch, tmp_path: Path, capability, formats, message) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Old")
    write_folder(tmp_path, "llama")
    with pytest.raises(ValueError, match=message):
        TorchExecutor(open_checkpoint(tmp_path), Options(*formats, device="cuda"), KV)
