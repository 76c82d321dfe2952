"""A folder of measured kernels is read, and the model's errors on them are those that the documentation states."""

from pathlib import Path

import pytest

from stallfree.perf.profiles import KINDS, Error, by, read

MEASURED = Path(__file__).parents[3] / "shared" / "data" / "profiles"
COMPUTE = "tp,num_tokens,n_head,n_kv_head,n_embd,n_expanded_embd,use_gated_mlp,attn_pre_proj_ms,mlp_down_proj_ms,add_ms\n"
NETWORK = "num_workers,devices_per_node,bytes,median_ms\n"
ATTENTION = "device,model,tp,kind,batch_size,chunk_tokens,cached_tokens,median_ms\n"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


def test_each_time_is_a_measurement_of_its_operator(tmp_path):
    write(tmp_path, "a100_Llama.csv", COMPUTE + "2,64,32,32,4096,11008,1,0.03,,0.002\n")
    points, others = read(tmp_path)
    assert {"attn_pre_proj": 3e-5, "add": 2e-6} == pytest.approx({p.operator: p.seconds for p in points})
    assert {"a100-80g"} == {p.device.name for p in points}
    assert [] == others


def test_a_perfect_profile_has_no_error(tmp_path):
    write(tmp_path, "h100_dgx_all_reduce.csv", NETWORK + "8,8,1000000,1\n16,8,1000000,1\n")
    write(tmp_path, "a40_Phi.csv", COMPUTE.replace("_ms,add_ms", "_ms,mlp_up_proj_ms") + "1,100,32,32,2560,10240,0,0.1,0.1,0.1\n")
    write(tmp_path, "attention.csv", ATTENTION + "a100,Llama-2-7b-hf,1,decode,8,1,512,1\na100,yi-34b,2,prefill,1,64,128,1\n")
    points, _ = read(tmp_path)
    assert 7 == len(points)
    exact = Error.of(point._replace(seconds=point.price(point.device)) for point in points)
    assert (7, 0.0, 0.0) == (exact.points, exact.median, exact.p90)


def test_errors_are_relative_to_what_was_measured(tmp_path):
    points, _ = read(write(tmp_path, "a100_dgx_send_recv.csv", NETWORK + "2,2,1000000,1\n" * 3))
    half = Error.of(point._replace(seconds=2 * point.price(point.device)) for point in points)
    assert (0.5, 0.5, -0.5) == (half.median, half.p90, half.bias)


def test_a_csv_of_something_else_is_set_aside(tmp_path):
    write(tmp_path, "overheads.csv", "batch_size,schedule_median\n8,0.1\n")
    write(tmp_path, "a100_dgx_send_recv.csv", NETWORK + "2,2,1000,0.01\n")
    assert [tmp_path / "overheads.csv"] == read(tmp_path)[1]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a100_X.csv", COMPUTE.replace("n_embd,", "") + "1,1,32,32,11008,1,1,1,1\n", "a100_X.csv: the column n_embd is missing"),
        ("a100_X.csv", COMPUTE + "1,one,32,32,4096,11008,1,1,1,1\n", "a100_X.csv: line 2: num_tokens is 'one'"),
        ("a100_X.csv", COMPUTE + "1,1,32,32,4096,11008,1,-1,1,1\n", "line 2: attn_pre_proj_ms is '-1'"),
        ("a100_X.csv", COMPUTE + "1,1,32,32,4096,11008\n", "line 2: use_gated_mlp is ''"),
        ("a1000_X.csv", COMPUTE + "1,1,32,32,4096,11008,1,1,1,1\n", "no hardware is called 'a1000'.*did you mean 'a100'"),
        ("a100_dgx_all_reduce.csv", NETWORK.replace("median_ms", "ms") + "2,2,100,1\n", "the column median_ms is missing"),
        ("a100_dgx_all_gather.csv", NETWORK + "2,2,100,1\n", "ends in neither of _all_reduce.csv, _send_recv.csv"),
        ("a100_dgx_send_recv.csv", NETWORK + "1,1,100,1\n", "num_workers is '1'; write a number of at least 2"),
        ("attention.csv", ATTENTION + "a100,llama2-7b,1,encode,1,1,1,1\n", "kind is 'encode'; write decode or prefill"),
        ("attention.csv", ATTENTION + "a100,lama2-7b,1,decode,1,1,1,1\n", "did you mean 'llama2-7b'"),
        ("notes.txt", "", "holds no profile"),
        ("a100_X.csv", COMPUTE, "holds no profile"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named(tmp_path, name, text, says):
    with pytest.raises(ValueError, match=says):
        read(write(tmp_path, name, text))


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder"):
        read(tmp_path / "nowhere")


@pytest.mark.skipif(not MEASURED.is_dir(), reason="the measured profiles are not beside the checkout")
def test_kernels_are_met_as_the_documentation_says():
    errors = {kind: Error.of(points[::5]) for kind, points in by(read(MEASURED)[0], lambda p: KINDS[p.operator]).items()}
    for kind in ("linear operators", "all-reduce", "send-receive"):
        assert errors[kind].median < 0.08, kind
        assert errors[kind].p90 < 0.20, kind
