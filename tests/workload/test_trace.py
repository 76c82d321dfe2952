"""Traces in published formats, messages for bad lines, and prompts that share what the trace says."""

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


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (f"{AZURE}\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319569,3180,8\n", (0, 0.051996)),
        (f"{AZURE}\r\n2023-11-16 23:59:59.5,4808,10\r\n2023-11-17 00:00:01,3180,8\r\n\r\n", (0, 1.5)),
        (f"{AZURE}\n2024-05-10 00:00:00.009930+00:00,4808,10\n2024-05-10 02:00:00.009930+02:00,3180,8\n", (0, 0)),
        (f"{AZURE}\n2024-05-10T00:00:00Z,4808,10\n2024-05-10T00:00:02Z,3180,8\n", (0, 2)),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0.25,4808,10\n4.25,3180,8\n", (0, 4)),
        ("num_decode_tokens,num_prefill_tokens,total\n10,4808,4818\n8,3180,3188\n", None),
        ("Timestamp,Request tokens,Response tokens\n5,4808,10\n9,3180,8\n", (0, 4)),
        ("\n\narrived_at, prompt_tokens, output_tokens\n5, 4808, 10\n\n  \n,,\n9, 3180, 8\n ,\n", (0, 4)),
        ("\ufeffarrived_at,prompt_tokens,output_tokens\r\n5,4808,10,more,and more\r\n9,3180,8", (0, 4)),
    ],
    ids=["azure", "azure-midnight", "azure-zones", "iso", "vidur", "vidur-lengths", "burstgpt", "blank", "excel"],
)
def test_the_columns_of_others_and_blank_lines_are_read_as_they_are(tmp_path, text, times):
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode())
    trace = Trace.read(path)
    assert ((4808, 10), (3180, 8)) == trace.lengths
    assert times == (None if trace.times is None else pytest.approx(trace.times, abs=1e-6))


@pytest.mark.parametrize("end", ["\n", "\n\n", "\n \n\t\n", "\r\n\r\n", ""])
def test_blank_lines_of_a_mooncake_trace_are_passed_over(tmp_path, end):
    path = tmp_path / "x.jsonl"
    lines = ["\ufeff" + (MOONCAKE % (0, 600, 5, [0, 1])).strip(), "", (MOONCAKE % (2000, 600, 6, [0, 2])).strip()]
    path.write_bytes(("\r\n".join(lines) + end).encode())
    trace = Trace.read(path)
    assert ((600, 5, (0, 1)), (600, 6, (0, 2))) == trace.lengths
    assert (0, 2) == trace.times
    assert [1, 3] == list(trace.lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{AZURE}\n2023-11-16 18:17:03,1,1\n2023-11-16 18:17:02,1,1\n", "line 3: its time, .* is before that of the line above"),
        (f"{AZURE}\n2023-13-16 18:17:03,1,1\n", "line 2: TIMESTAMP is '2023-13-16 18:17:03'; write a time"),
        (f"{AZURE}\n2023-11-16 18:17:03,1,many\n", "line 2: GeneratedTokens is 'many'"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n1,,3\n", "line 2: num_prefill_tokens is ''"),
        ("\nTIMESTAMP,ContextTokens\n1,2\n", "line 2 is 'TIMESTAMP,ContextTokens'; .*Azure"),
    ],
)
def test_a_malformed_line_is_named_by_its_own_columns(tmp_path, text, says):
    with pytest.raises(ValueError, match=f"x\\.csv.*{says}"):
        Trace.read(write(tmp_path, "x.csv", text))


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


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["3,1,1"], "x.csv has one request, and a rate needs two; add requests, or simulate it without --rate"),
        (["3,1,1", "3,1,1"], "all 2 requests of x.csv arrive at the same time"),
    ],
)
def test_a_trace_without_a_rate_says_why(tmp_path, rows, says):
    trace = Trace.read(write(tmp_path, "x.csv", "arrived_at,prompt_tokens,output_tokens\n" + "\n".join(rows)))
    with pytest.raises(ValueError, match=says):
        assert trace.rate


def test_a_trace_without_times_has_no_rate(tmp_path):
    with pytest.raises(ValueError, match="x.csv has no times, so it has no rate; add a column arrived_at"):
        assert Trace.read(write(tmp_path, "x.csv", "prompt_tokens,output_tokens\n1,1\n")).rate


def test_a_limit_is_named_by_its_option(tmp_path):
    trace = Trace.read(write(tmp_path, "x.csv", "prompt_tokens,output_tokens\n90,20\n"))
    with pytest.raises(ValueError, match="no request of x.csv has at most 100 tokens, prompt and output; raise --max-total"):
        trace.within(100)
    with pytest.raises(ValueError, match="--max-total 100 leaves such requests out, a larger --max-model-len may serve them"):
        trace.check(100)


def test_a_negative_time_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 2: arrived_at is '-3'"):
        Trace.read(write(tmp_path, "x.csv", "arrived_at,prompt_tokens,output_tokens\n-3,1,1\n"))


def test_a_prompts_tokens_are_equal_where_its_blocks_are_and_its_own_elsewhere():
    first, second = Prompt(10, (7, 8), -1, 4), Prompt(9, (7, 9), -2, 4)
    assert [7, 7, 7, 7, 8, 8, 8, 8, -1, -1] == list(first)
    assert list(first[:4]) == list(second[:4])
    assert [7, 8, 8] == list(first[3:6])
    assert [-2] == list(second[8:20])
    assert (-1, 7) == (first[-1], first[0])
    assert [7, 8, -1] == list(first[::4])


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
        drawn = sorted(row[side] for row in rows)
        assert all(abs(drawn[min(int(share * len(drawn)), len(drawn) - 1)] - tokens) <= 2 for share, tokens in measured.quantiles)
