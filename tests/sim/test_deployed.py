"""Measured deployments are read by their file's name and columns, and simulated as they were measured."""

from pathlib import Path

import pytest

from stallfree.perf.point import Error
from stallfree.sim.deployed import OPERATORS, read

KERNELS = Path(__file__).parents[3] / "shared" / "data" / "kernels"
HEAD = "precision,gemm_quant_mode,tp,concurrency,prompt_tokens,output_tokens,ttft_ms,tpot_ms\n"
NAME = "h100_llama-70b_vllm_deployments.csv"


def write(folder: Path, text: str, name: str = NAME) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_each_row_has_a_ttft_and_a_tpot(tmp_path):
    points = list(read(write(tmp_path, HEAD + "fp8,fp8,8.0,4.0,256,64,70.4,9.1\nfp8,fp8,8,4,256,64,,9.1\n")))
    assert [*OPERATORS, OPERATORS[1]] == [p.operator for p in points]
    assert ["h100"] * 3 == [p.device.name for p in points]
    ttft, tpot = (p.price(p.device) for p in points[:2])
    assert 0.02 < ttft < 0.2
    assert 0.005 < tpot < 0.015


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (NAME, HEAD.replace("tp,", "") + "fp8,fp8,4,256,64,70,9\n", "the column tp is missing"),
        (NAME, HEAD + "fp8,fp9,8,4,256,64,70,9\n", "line 2: gemm_quant_mode is 'fp9'.*did you mean 'fp8'"),
        (NAME, HEAD + "fp8,fp8,0,4,256,64,70,9\n", "line 2: tp is '0'; write a number of at least 1"),
        (NAME, HEAD + "fp8,fp8,4.7,4,256,64,70,9\n", "tp is '4.7'; write a whole number up to"),
        (NAME, HEAD + "fp8,fp8,8,4,many,64,70,9\n", "line 2: prompt_tokens is 'many'"),
        (NAME.replace("vllm", "vlm"), HEAD, "'vlm' in its name is not known.*did you mean 'vllm'"),
        (NAME.replace("70b", "7b"), HEAD, "'llama-7b' in its name is not known"),
        (NAME.replace("h100", "h1000"), HEAD + "fp8,fp8,8,4,256,64,70,9\n", "no hardware is called 'h1000'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=says):
        list(read(write(tmp_path, text, name)))


def test_a_row_that_cannot_be_simulated_is_named(tmp_path):
    point, *_ = read(write(tmp_path, HEAD + "fp8,fp8,3,4,256,64,70,9\n"))
    with pytest.raises(ValueError, match=r"deployments.csv: line 2: TP 3 does not divide"):
        point.price(point.device)


def test_a_deployment_with_one_token_of_output_can_be_simulated(tmp_path):
    point, *_ = read(write(tmp_path, HEAD + "fp8,fp8,8,2,256,1,70,9\n"))
    assert 0 < point.price(point.device) < 1


@pytest.mark.slow
@pytest.mark.skipif(not KERNELS.is_dir(), reason="the measured deployments are not beside the checkout")
def test_deployments_are_met():
    points = list(read(KERNELS / NAME))
    ttft, tpot = (Error.of(p for p in points if p.operator == operator) for operator in OPERATORS)
    assert tpot.median < 0.06
    assert tpot.p90 < 0.12
    assert ttft.median < 0.15
