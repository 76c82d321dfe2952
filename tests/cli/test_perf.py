"""`stallfree perf` as a user sees it: the price of an iteration, its parts, and messages for mistakes."""

import json

import pytest

from stallfree.cli import words
from stallfree.cli.perf import parse
from stallfree.core.plan import Capacity
from stallfree.engine import calibrate
from stallfree.perf import hardware, shape
from stallfree.perf.fitted import Fitted
from stallfree.perf.roofline import ENGINES

QUESTION = ("perf", "--model", "llama2-7b", "--hardware", "a100-80g", "--tp", "1", "--shape", "32@2048,512")


@pytest.mark.parametrize(
    ("text", "work"),
    [
        ("32@2048,512", [(2048, 1)] * 32 + [(0, 512)]),
        ("4096+512", [(4096, 512)]),
        (" 2@10 , 3 , 4+5 ", [(10, 1), (10, 1), (0, 3), (4, 5)]),
        ("0@5,7", [(0, 7)]),
    ],
)
def test_a_shape_in_words(text, work):
    assert work == parse(text)


@pytest.mark.parametrize("text", ["", "x", "3x5", "1@", "@5", "-3", "1.5", "0", "0@7", "1@2@3", "1+2+3", "5,"])
def test_what_is_no_shape_is_told_how_to_write_one(text):
    with pytest.raises(ValueError, match="write 32@2048 for 32 decodes"):
        parse(text)


def test_an_iteration_is_priced_operator_by_operator_beside_its_limit(stallfree):
    code, out, _ = stallfree(*QUESTION)
    assert 0 == code
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert "compute" in rows["up"]
    assert "bandwidth" in rows["norm"]
    assert "llama2-7b on a100-80g:" in out
    assert "544 tokens" in out


def test_the_operators_add_up(stallfree):
    code, out, _ = stallfree(*QUESTION, "--json")
    answer = json.loads(out)
    assert (0, 544) == (code, answer["tokens"])
    assert answer["seconds"] == pytest.approx(sum(op["seconds"] for op in answer["operators"]))
    assert all(op["limit_seconds"] <= op["seconds"] * (1 + 1e-9) for op in answer["operators"])


def test_a_pipeline_tells_its_stages(stallfree):
    split = ("--tp", "4", "--pp", "2", "--node", "4", "--engine", "eager-2024", "--weights", "fp8", "--kv", "fp8")
    code, out, _ = stallfree("perf", "--model", "falcon-180b", "--hardware", "a100-80g-pcie", *split, "--shape", "8@1000,500+256")
    assert 0 == code
    assert all(row in out for row in ("send", "all-reduce", "attention, chunks", "stages: ", "8 x a100-80g-pcie"))


def test_a_ring_is_priced_with_the_kv_of_all_its_groups(stallfree):
    question = ("perf", "--model", "llama2-7b", "--hardware", "a800", "--tp", "2", "--shape", "100000", "--json")
    one, four = (json.loads(stallfree(*question, "--sp", sp)[1]) for sp in "14")
    assert 4 * one["kv_tokens"] == four["kv_tokens"]
    assert one["seconds"] > 2 * four["seconds"]


def test_tokens_beyond_the_models_context_are_priced_with_a_note(stallfree):
    code, _, err = stallfree("perf", "--model", "llama2-7b", "--shape", "8000+64")
    assert (0, "note: llama2-7b was made for 4,096 tokens, this is priced at 8,064\n") == (code, err)


def test_this_cpu_is_what_its_calibration_says(stallfree, tmp_path, monkeypatch):
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path))
    model = Fitted((0.01, 0.05, 0.02, 0.03, 0.02, 0.004))
    errors = model.errors([([(1, 1)], 1.0)])
    for name, fitted in (("small.gguf", model), ("other.gguf", Fitted())):
        key = calibrate.machine() | {"model": [name, 1, 2]}
        calibrate.remember(fitted, errors, key, tmp_path / "calibration", Capacity(32, 9, 99))
    code, out, _ = stallfree("perf", "--hardware", "this-cpu", "--model", "small", "--shape", "3@100,64", "--json")
    assert 0 == code
    assert model.seconds([(100, 1)] * 3 + [(0, 64)]) == json.loads(out)["seconds"]
    assert "small.gguf on this machine, as calibrated" in stallfree("perf", "--hardware", "this-cpu", "--model", "small")[1]


@pytest.mark.parametrize(("what", "known"), [("hardware", hardware.names()), ("models", shape.names())])
def test_what_there_are_prices_for_is_listed(stallfree, what, known):
    assert known == [row["name"] for row in json.loads(stallfree("list", what, "--json")[1])]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "lama2-7b"], "did you mean 'llama2-7b'"),
        (["--hardware", "h10", "--model", "llama2-7b"], "did you mean 'h100'"),
        ([], "which model?"),
        (["--model", "llama2-70b"], "60.6 GB too much; TP 2 or PP 2 or fp8 weights would do"),
        (["--model", "llama2-7b", "--tp", "3"], "TP 3 does not divide"),
        (["--model", "llama2-7b", "--sp", "0"], "sequence parallelism 0 with 1 pipeline stages has no price"),
        (["--model", "llama2-7b", "--sp", "2", "--pp", "2"], "sequence parallelism 2 with 2 pipeline stages has no price"),
        (["--model", "llama2-7b", "--shape", "512x"], "write 32@2048"),
        (["--model", "llama2-7b", "--shape", "100@4000"], "KV of 400,100 tokens does not fit beside the weights"),
        (["--model", "llama2-7b", "--weights", "fp3"], "weights in 'fp3' are not known"),
        (["--model", "llama2-7b", "--engine", "fast"], "unknown engine 'fast'"),
        (["--hardware", "this-cpu", "--model", "no-such"], "`stallfree calibrate` makes one"),
        (["check", "nowhere"], "nowhere is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(stallfree, tmp_path, monkeypatch, arguments, says):
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path))
    code, out, err = stallfree("perf", *arguments)
    assert (2, "", 1) == (code, out, err.count("\n")), err
    assert says in err


def test_measured_kernels_are_held_against_the_model(stallfree, tmp_path):
    (tmp_path / "a100_dgx_send_recv.csv").write_text("num_workers,devices_per_node,bytes,median_ms\n2,2,100000000,0.4\n")
    (tmp_path / "cpu.csv").write_text("batch_size,schedule_median\n1,1\n")
    code, out, err = stallfree("perf", "check", str(tmp_path))
    assert 0 == code
    assert ["a100_dgx_send_recv.csv", "send_recv", "1"] in [line.split()[:3] for line in out.splitlines()]
    assert ["all", "files", "send-receive", "1"] in [line.split()[:4] for line in out.splitlines()]
    assert "ignored, because its columns" in err
    answer = json.loads(stallfree("perf", "check", str(tmp_path), "--json")[1])
    assert {"points", "median", "p90", "bias"} == set(answer["kinds"]["send-receive"])
    assert ["send_recv"] == [row["operator"] for row in answer["operators"]]


def test_deployments_are_simulated_and_dtypes_without_a_price_are_named(stallfree, tmp_path):
    head = "gemm_quant_mode,tp,concurrency,prompt_tokens,output_tokens,ttft_ms,tpot_ms\n"
    (tmp_path / "h100_llama-70b_vllm_deployments.csv").write_text(head + "fp8,8,2,128,16,60,9\n")
    code, out, err = stallfree("perf", "check", str(tmp_path))
    assert 0 == code
    assert ["TTFT", "TPOT"] == [line.split()[2] for line in out.splitlines() if "all files" in line]
    assert "simulating the deployments" in err
    (tmp_path / "b200_matmul.csv").write_text("dtype,m,n,k,ms\nnvfp4,8,8192,8192,0.05\nfp8,8,8192,8192,0.05\n")
    _, _, err = stallfree("perf", "check", str(tmp_path))
    assert "left out, because nvfp4 has no price: 1 row of b200_matmul.csv" in err


def test_the_help_names_every_engine():
    assert f"An engine of a year: {', '.join(ENGINES)}." == words.ENGINE
