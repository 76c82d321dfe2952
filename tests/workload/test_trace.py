"""Traces in the formats that others publish, and what is said to lines that are none; prompts that share what the trace says."""

from pathlib import Path

import pytest

from stallfree.workload.prompt import Prompt
from stallfree.workload.trace import Trace
from stallfree.workload.workload import Arrival, Workload

DATA = Path(__file__).parents[3] / "shared" / "data" / "traces"
MOONCAKE = '{"timestamp":%s,"input_length":%s,"output_length":%s,"hash_ids":%s}\n'
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(tmp_path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_mooncake_trace_has_times_lengths_and_blocks(tmp_path):
    path = write(tmp_path, "x.jsonl", MOONCAKE % (3000, 700, 5, [0, 1]) + MOONCAKE % (4500, 1030, 6, [0, 2, 3]))
    expected = [Arrival(0, 700, 5, (0, 1)), Arrival(1.5, 1030, 6, (0, 2, 3))]
    assert expected == Workload.parse("trace", str(path)).draw(None, 0)


def test_a_mooncake_trace_may_arrive_otherwise_and_keeps_its_blocks(tmp_path):
    path = write(tmp_path, "x.jsonl", MOONCAKE % (0, 700, 5, [0, 1]) + MOONCAKE % (0, 1030, 6, [0, 2, 3]))
    drawn = Workload.parse("poisson", str(path)).draw(2, 0, requests=20)
    assert {(700, (0, 1)), (1030, (0, 2, 3))} == {(a.prompt_tokens, a.blocks) for a in drawn}


def test_a_burstgpt_csv_is_read_without_the_requests_that_failed(tmp_path):
    path = write(
        tmp_path, "x.csv", BURSTGPT + "5,ChatGPT,472,18,490,API log\n45,GPT-4,100,0,100,API log\n118,GPT-4,30,6,36,API log\n"
    )
    assert Trace(((472, 18), (30, 6)), (0, 113)) == Trace.read(path)


def test_a_request_longer_than_the_context_is_named_with_its_line(tmp_path):
    path = write(tmp_path, "x.csv", "prompt_tokens,output_tokens\n5,5\n\n90,20\n")
    Trace.read(path).check(110)
    with pytest.raises(ValueError, match="x.csv: line 4: 90 prompt and 20 output tokens are more than the context of 100"):
        Trace.read(path).check(100)


def test_lines_are_counted_in_the_file_also_behind_a_limit(tmp_path):
    path = write(tmp_path, "x.csv", "prompt_tokens,output_tokens\n500,5\n5,5\n90,20\n")
    with pytest.raises(ValueError, match="line 4"):
        Trace.read(path).within(200).check(100)


def test_a_mixture_is_checked_in_all_its_parts(tmp_path):
    path = write(tmp_path, "x.csv", "prompt_tokens,output_tokens\n90,20\n")
    with pytest.raises(ValueError, match="line 2"):
        Workload.parse("poisson", f"8/8 + 10%:{path}").lengths.check(100)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MOONCAKE % (0, 600, 5, [0, 1]) + "oops\n", "line 2 is 'oops'; write one JSON object a line"),
        ('{"timestamp":0,"input_length":5}\n', "line 1 is .*output_length, hash_ids"),
        (MOONCAKE % (-1, 600, 5, [0, 1]), "line 1: timestamp is '-1'"),
        (MOONCAKE % (5, 600, 5, [0]) + MOONCAKE % (4, 600, 5, [0]), "line 2: its time, 0.004 s, is before"),
        (MOONCAKE % (0, 0, 5, []), "line 1: input_length is '0'"),
        (MOONCAKE % (0, 600, "2.5", [0]), "line 1: output_length is '2.5'"),
        (MOONCAKE % (0, 600, 5, [0, 1, 2]), "line 1: hash_ids are the numbers of at most 2 blocks"),
        (MOONCAKE % (0, 600, 5, [0, -1]), "line 1: hash_ids"),
        ("", "holds no request"),
    ],
)
def test_a_malformed_mooncake_line_is_named(tmp_path, text, says):
    with pytest.raises(ValueError, match=f"x\\.jsonl.*{says}"):
        Trace.read(write(tmp_path, "x.jsonl", text))


def test_a_negative_time_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 2: arrived_at is '-3'"):
        Trace.read(write(tmp_path, "x.csv", "arrived_at,prompt_tokens,output_tokens\n-3,1,1\n"))


def test_a_prompts_tokens_are_equal_where_its_blocks_are_and_its_own_elsewhere():
    one, other = Prompt(10, (7, 8), -1, 4), Prompt(9, (7, 9), -2, 4)
    assert [7, 7, 7, 7, 8, 8, 8, 8, -1, -1] == list(one)
    assert list(one[:4]) == list(other[:4])
    assert [7, 8, 8] == list(one[3:6])
    assert [-2] == list(other[8:20])
    assert (-1, 7) == (one[-1], one[0])
    assert [7, 8, -1] == list(one[::4])


def test_a_prompt_ends_where_its_length_says_though_its_last_block_goes_on():
    assert [7, 7, 7, 7, 8] == list(Prompt(5, (7, 8), -1, 4))
    with pytest.raises(IndexError):
        Prompt(5, (7, 8), -1, 4)[5]


@pytest.mark.skipif(not DATA.exists(), reason="the published traces are not here")
@pytest.mark.parametrize("name", ["mooncake_conversation.jsonl", "azure2023_conv_first_half.csv", "azure2023_code_first_half.csv"])
def test_published_traces_are_read(name):
    trace = Trace.read(DATA / name)
    assert len(trace.lengths) == len(trace.times) > 4000
    assert 0 == trace.times[0]


@pytest.mark.skipif(not DATA.exists(), reason="the published traces are not here")
def test_the_shipped_quantiles_are_those_of_the_published_lengths():
    from stallfree.workload.lengths import DATASETS

    rows = Trace.read(DATA / "openchat_sharegpt4_8k_lengths.csv").lengths
    for side, measured in enumerate((DATASETS["openchat"].prompt, DATASETS["openchat"].output)):
        found = sorted(row[side] for row in rows)
        assert all(abs(found[min(int(share * len(found)), len(found) - 1)] - tokens) <= 2 for share, tokens in measured.quantiles)
