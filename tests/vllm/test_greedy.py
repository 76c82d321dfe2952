"""The greedy tokens of 200 requests are those of vLLM's own scheduler: the engine is vLLM's, with a tiny random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.vllm.real import HIDDEN, model_folder

pytestmark = pytest.mark.slow
VOCABULARY = 500

SCRIPT = """import json, random, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

def main():
    options = json.loads(sys.argv[1])
    structured, adapter = options.pop("structured", False), options.pop("adapter", None)
    rng = random.Random(5)
    shared = [rng.randrange(250) for _ in range(70)]
    lengths = [(rng.choice([0, 40, 70]), rng.choice([5, 60, 200])) for _ in range(200)]
    prompts = [shared[:common] + [rng.randrange(250) for _ in range(own)] for common, own in lengths]
    options["skip_tokenizer_init"] = not structured
    llm = LLM(sys.argv[2], dtype="float32", load_format="dummy", enforce_eager=True, seed=0, **options)
    common = {"temperature": 0, "detokenize": False}
    params = [SamplingParams(max_tokens=8 + i % 17, ignore_eos=True, **common) for i in range(200)]
    for i in range(0, 200, 4) if structured else ():
        held = StructuredOutputsParams(regex="[a-f]{3,6}-[0-9]{2,9}")
        params[i] = SamplingParams(max_tokens=20, structured_outputs=held, **common)
    adapters = None
    if adapter:
        prompts[1::2], adapters = prompts[::2], [None, LoRARequest("random", 1, adapter)] * 100
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, lora_request=adapters, use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))

if __name__ == "__main__":
    main()
"""

BASE = {"max_num_batched_tokens": 512, "max_num_seqs": 32, "max_model_len": 1024}
OURS = {"scheduler_cls": "stallfree.vllm.SloScheduler"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model without weights. Its tokens are bytes, and an end token, which structured output wants."""
    folder = model_folder(tmp_path, vocabulary=VOCABULARY)
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tokens(folder: Path, **options: object) -> list[list[int]]:
    """The tokens of all requests, by an engine in a process of its own."""
    script = folder / "greedy.py"
    script.write_text(SCRIPT)
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "STALLFREE_SLO": "tbt=50ms",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    ran = subprocess.run(
        [sys.executable, str(script), json.dumps(BASE | options), str(folder)], capture_output=True, text=True, env=environment
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("TOKENS")]
    assert lines, ran.stderr[-3000:]
    return json.loads(lines[0].removeprefix("TOKENS"))


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"enable_prefix_caching": True},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
        {"structured": True},
    ],
    ids=["plain", "prefix cache", "ngram", "structured output"],
)
def test_greedy_tokens_are_those_of_vllms_own_scheduler(options, folder):
    assert tokens(folder, **options) == tokens(folder, **options, **OURS)


def test_requests_with_an_adapter_and_without_get_the_same_tokens(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    rank, generator = 4, torch.Generator().manual_seed(3)
    shapes = {"lora_A": (rank, HIDDEN), "lora_B": (HIDDEN, rank)}
    weights = {
        f"base_model.model.model.layers.0.self_attn.{module}.{part}.weight": torch.randn(shape, generator=generator)
        for module in ("q_proj", "v_proj")
        for part, shape in shapes.items()
    }
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    options = {"adapter": str(adapter), "enable_lora": True, "max_lora_rank": 8}
    theirs = tokens(folder, **options)
    assert theirs[::2] != theirs[1::2]  # the same prompts: without the adapter, and with it
    assert theirs == tokens(folder, **options, **OURS)


def test_prompts_whose_kv_a_connector_has_get_the_same_tokens(folder, tmp_path):
    """vLLM's `ExampleConnector` stores prompts that are computed whole only, so an engine that splits none writes its files."""
    (tmp_path / "kv").mkdir()
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "kv")},
    }
    options = {"kv_transfer_config": connector, "enable_prefix_caching": False}
    whole = tokens(folder, **options, max_num_batched_tokens=65536)
    assert list((tmp_path / "kv").iterdir())
    assert tokens(folder, **options) == whole
    assert tokens(folder, **options, **OURS) == whole
