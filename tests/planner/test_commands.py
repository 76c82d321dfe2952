"""The planner's commands can be typed as printed: every option exists, with the policies and limits that were simulated."""

import json
import shlex

import pytest
from typer.main import get_command

from stallfree.cli import app
from stallfree.core.classes import Classes
from stallfree.core.slo import Slo
from stallfree.planner.candidates import Candidates, Shape
from stallfree.planner.commands import commands, cross_check
from stallfree.planner.site import Site

SLO = Slo.parse("ttft=2s@p90,tbt=100ms@p99")


def parsed(line: str) -> dict[str, object]:
    """The options of a command line, as the command would get them."""
    _, name, *arguments = shlex.split(line, comments=True)
    command = get_command(app).commands[name]
    return command.make_context(name, arguments).params


def test_classes_are_typed_as_one_argument():
    candidates = Candidates(Site("llama3-8b", gpus=1))
    classes = Classes.parse("chat: ttft=2s,tbt=100ms; batch: ttlt=10min")
    (line,) = commands(candidates.site, candidates.replica(Shape(1), "slo"), classes)
    assert Classes.parse(parsed(line)["slo"]) == classes


@pytest.mark.parametrize("model", ["opt-13b", "opt-66b", "opt-175b"])
def test_a_model_that_no_engine_here_serves_has_no_command(model):
    candidates = Candidates(Site(model, gpus=16, nodes=2))
    shape = next(iter(candidates.shapes))
    for deployed in (candidates.replica(shape, "slo"), candidates.split("distserve", shape, shape, (1, 1))):
        (line,) = commands(candidates.site, deployed, SLO)
        assert line.startswith(f"# no command: this engine does not serve {model}")


def test_weights_that_no_engine_here_loads_have_no_command():
    candidates = Candidates(Site("llama2-13b", gpus=4, hardware="h100", weights="fp8-block"))
    (line,) = commands(candidates.site, candidates.replica(Shape(1), "slo"), SLO)
    assert line.startswith("# no command: this engine has no products in fp8 with block scales")


def test_kv_that_no_engine_on_a_gpu_has_is_planned_without_a_command():
    candidates = Candidates(Site("llama2-13b", gpus=4, hardware="h100", kv="u4"))
    (line,) = commands(candidates.site, candidates.replica(Shape(1), "slo"), SLO)
    assert line.startswith("# no command: executor torch has no KV in u4")


def test_a_model_of_a_file_is_named_by_its_folder(tmp_path):
    values = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 32, "vocab_size": 32000}
    values |= {"intermediate_size": 11008, "max_position_embeddings": 4096, "num_key_value_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(values))
    candidates = Candidates(Site(str(tmp_path / "config.json"), gpus=1))
    (line,) = commands(candidates.site, candidates.replica(Shape(1), "sarathi", 512), SLO)
    assert str(tmp_path) == parsed(line)["model"]


def test_co_located_replicas_are_one_command():
    candidates = Candidates(Site("llama2-13b", gpus=4, weights="int8", max_model_len=2048))
    (line,) = commands(candidates.site, candidates.replica(Shape(2), "sarathi", 512, replicas=2), SLO)
    assert line.startswith("stallfree deploy meta-llama/Llama-2-13b-hf --executor torch --tp 2 ")
    options = parsed(line)
    assert ("meta-llama/Llama-2-13b-hf", 2, 1, "sarathi", 512, "int8", 2048, "2") == tuple(
        options[name] for name in ("model", "tp", "pp", "policy", "token_budget", "weights", "max_model_len", "replicas")
    )


def test_a_ring_is_started_with_its_groups():
    candidates = Candidates(Site("llama2-13b", gpus=4))
    (line,) = commands(candidates.site, candidates.replica(Shape(2, 1, 2), "sarathi"), SLO)
    assert (2, 2) == tuple(parsed(line)[name] for name in ("tp", "sp"))


def test_two_pools_run_the_policies_that_were_simulated():
    candidates = Candidates(Site("llama2-13b", gpus=4))
    pair = candidates.split("splitwise", Shape(1), Shape(2), (2, 1))
    prefill, decode, route, lacks = commands(candidates.site, pair, SLO)
    options = [parsed(prefill), parsed(decode)]
    assert [("prefill", 1, "hybrid-only", 2048), ("decode", 2, "sarathi", 8192)] == [
        tuple(command[name] for name in ("role", "tp", "policy", "max_tokens")) for command in options
    ]
    assert [None, 512] == [command["token_budget"] for command in options]
    assert str(SLO) == options[0]["slo"]
    assert "2 times, each with its own ports and 1 GPU of its own" in prefill
    assert "once, with 2 GPUs of its own" in decode
    assert 3 == len({8000, parsed(prefill)["port"], parsed(decode)["port"]})
    assert 8192 == parsed(route)["spill"]
    assert "not done by these servers" in lacks
    assert "0.0.0.0" not in prefill + decode


def test_engines_on_several_hosts_listen_for_each_other():
    candidates = Candidates(Site("llama2-70b", gpus=16, nodes=16))
    key, prefill, decode, route = commands(candidates.site, candidates.split("distserve", Shape(1, 2), Shape(1, 2), (1, 1)), SLO)
    assert key.startswith("export STALLFREE_PEER_KEY=")
    assert "0.0.0.0" == parsed(prefill)["peer_host"] == parsed(decode)["host"]
    assert parsed(route)["spill"] is None
    assert "ray" == parsed(prefill)["workers"] == parsed(decode)["workers"]


@pytest.mark.parametrize("shape", [Shape(1), Shape(2), Shape(1, 1, 2)])
def test_ranks_within_a_node_are_processes_of_it(shape):
    candidates = Candidates(Site("llama2-13b", gpus=4, nodes=2))
    (line,) = commands(candidates.site, candidates.replica(shape), SLO)
    assert "--workers" not in line


def test_another_tool_is_asked_the_same_question():
    """By the options of aiconfigurator 0.12."""
    expected = "aiconfigurator cli default --model meta-llama/Llama-2-13b-hf --total-gpus 8 --system h100_sxm --backend vllm "
    site = Site("llama2-13b", hardware="h100", gpus=8)
    assert expected + "--isl 1320 --osl 433 --ttft 2000 --tpot 100" == cross_check(site, 1319.6, 433.3, SLO)
    assert cross_check(Site("llama2-13b", hardware="a40"), 1.0, 1.0, SLO) is None
    assert cross_check(Site("/models/config.json", hardware="h100"), 1.0, 1.0, SLO) is None
