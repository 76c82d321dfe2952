"""Lengths from words and from files, and the messages for mistakes in either."""

from itertools import islice

import numpy as np
import pytest

from stallfree.workload.lengths import Lengths
from stallfree.workload.trace import Trace

HEADER = "arrived_at,prompt_tokens,output_tokens\n"


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "x.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def draws(text: str, n: int, max_total: int | None = None):
    return list(islice(Lengths.parse(text, max_total).draws(np.random.default_rng(0)), n))


def test_fixed_lengths_are_always_the_same():
    assert [(512, 128)] * 5 == draws("512/128", 5)


def test_a_log_normal_has_its_median_and_its_p90():
    lengths = draws("median=200,p90=800/median=60,p90=150", 20_000)
    assert pytest.approx([200, 60], rel=0.05) == np.median(lengths, axis=0)
    assert pytest.approx([800, 150], rel=0.05) == np.percentile(lengths, 90, axis=0)


def test_uniform_lengths_are_all_as_likely():
    prompts = [prompt for prompt, _ in draws("uniform=10..14/1", 20_000)]
    assert pytest.approx([0.2] * 5, abs=0.02) == [prompts.count(tokens) / len(prompts) for tokens in range(10, 15)]
    assert {10, 11, 12, 13, 14} == set(prompts)


def test_zipf_lengths_fall_off_with_the_power_asked_for():
    prompts = [prompt for prompt, _ in draws("zipf=100..200,s=1.5/1", 50_000)]
    assert pytest.approx([2**-1.5, 3**-1.5], rel=0.1) == [prompts.count(100 + k) / prompts.count(100) for k in (1, 2)]
    assert (100, 200) >= (min(prompts), max(prompts))
    assert 100 == min(prompts)


@pytest.mark.parametrize(
    ("name", "prompt", "output", "limit"),
    [("openchat", (1730, 5696, 2088), (415, 834, 266), 8192), ("arxiv", (7059, 12985, 3638), (208, 371, 101), 16384)],
)
def test_a_dataset_has_the_papers_median_p90_and_deviation(name, prompt, output, limit):
    lengths = np.array(draws(name, 20_000))
    for side, expected in zip(lengths.T, (prompt, output), strict=True):
        assert pytest.approx(expected, rel=0.04) == (np.median(side), np.percentile(side, 90), np.std(side))
    assert limit >= lengths.sum(axis=1).max()


def test_a_datasets_limit_may_be_lower():
    assert 3000 >= max(prompt + output for prompt, output in draws("openchat", 1000, max_total=3000))


def test_one_side_may_be_fixed():
    assert {64} == {output for _, output in draws("median=200,p90=800/64", 100)}


def test_a_share_of_the_requests_is_long():
    lengths = draws("100/10 + 5%:2000/64 + 10%:50/1", 20_000)
    assert pytest.approx(0.05, abs=0.005) == lengths.count((2000, 64)) / len(lengths)
    assert pytest.approx(0.10, abs=0.01) == lengths.count((50, 1)) / len(lengths)
    assert {(100, 10), (2000, 64), (50, 1)} == set(lengths)


def test_lengths_above_the_limit_are_drawn_again():
    lengths = draws("median=200,p90=800/50", 1000, max_total=500)
    assert 450 >= max(prompt for prompt, _ in lengths)
    assert len({prompt for prompt, _ in lengths}) > 200


def test_rows_of_a_csv_are_drawn_in_any_order(file):
    path = file("prompt_tokens,output_tokens\n1,2\n3,4\n")
    assert {(1, 2), (3, 4)} == set(draws(str(path), 50))


def test_rows_above_the_limit_are_left_out_with_their_arrivals(file):
    trace = Trace.read(file(HEADER + "1,9,9\n2,1,2\n5,3,4\n"))
    assert Trace(((1, 2), (3, 4)), (0, 3)) == trace.within(10)


def test_a_csv_may_hold_more_columns_in_another_order(file):
    assert Trace(((1, 2),)) == Trace.read(file("model,output_tokens,prompt_tokens\nx,2,1\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("512", "'512'.*neither"),
        ("512/x", "'x'.*not a number"),
        ("0/5", "median is above 0"),
        ("uniform=9..3/5", "uniform=9..3 is not a range"),
        ("zipf=0..3,s=1/5", "zipf=0..3 is not a range"),
        ("zipf=1..3/5", "zipf=16..256,s=1.1"),
        ("openchet", "openchat, arxiv"),
        ("median=9,p90=3/5", "p90 not below"),
        ("1/1 + 100%:2/2", "100%.*is not a share"),
        ("1/1 + 60%:2/2 + 60%:3/3", "120%.*mix in less"),
        ("1/1 + 1.1.1%:2/2", "1.1.1%"),
    ],
)
def test_lengths_that_cannot_be_are_named(text, says):
    with pytest.raises(ValueError, match=says):
        Lengths.parse(text)


def test_a_limit_that_nothing_fits_is_said(file):
    with pytest.raises(ValueError, match="do not fit --max-total 100"):
        Lengths.parse("100/10", max_total=100)
    with pytest.raises(ValueError, match="no request of x.csv has at most 100 tokens"):
        Lengths.parse(str(file(HEADER + "0,100,10\n")), max_total=100)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty; a trace.s first line names its columns"),
        ("a,b\n1,2\n", "line 1 is 'a,b'.*prompt_tokens"),
        (HEADER, "no request follows"),
        (HEADER + "0,1,1\n0,x,1\n", "line 3: prompt_tokens is 'x'"),
        (HEADER + "0,1,0\n", "line 2: output_tokens is '0'"),
        (HEADER + "0,1\n", "line 2: output_tokens is ''"),
        (HEADER + "soon,1,1\n", "line 2: arrived_at is 'soon'"),
        (HEADER + "nan,1,1\n", "line 2: arrived_at is 'nan'"),
        (HEADER + "1,1,1\n0,1,1\n", "line 3: its time, 0 s, is before"),
        (b"\xff\xfe\x00", "not a csv"),
    ],
)
def test_a_malformed_csv_is_named_with_its_line_and_column(file, text, says):
    with pytest.raises(ValueError, match=f"x\\.csv.*{says}"):
        Trace.read(file(text))


def test_a_file_that_is_not_there_is_an_oserror():
    with pytest.raises(ValueError, match="the trace nowhere.csv cannot be read"):
        Lengths.parse("nowhere.csv")
