"""The Triton kernels give what the reference gives, in Triton's interpreter where there is no GPU."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from stallfree.core.plan import Capacity, Work  # noqa: E402
from stallfree.executors.torch import fused, kernels, quantised  # noqa: E402
from stallfree.executors.torch.attention import reference, write  # noqa: E402
from stallfree.executors.torch.batch import pack  # noqa: E402
from stallfree.executors.torch.graphs import empty, first, put  # noqa: E402
from stallfree.executors.torch.weights import GROUP, Matrix  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = Capacity(16, 64, 512)
SHAPES = {
    "decodes": [(5, 1), (100, 1), (0, 1), (16, 1)],
    "chunks": [(0, 40), (30, 17), (64, 64)],
    "hybrid": [(90, 1), (33, 20), (0, 5), (200, 1)],
    "long": [(500, 1)],
}


def batch(shape, device=DEVICE):
    free = iter(torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist())
    work = [
        Work(
            str(i),
            start,
            count,
            True,
            count == 1,
            (0,) * count,
            tuple(next(free) for _ in range(-(-(start + count) // 16))),
            None,
            "",
            (),
            (),
        )
        for i, (start, count) in enumerate(shape)
    ]
    return pack(work, range(sum(count for _, count in shape)), CAPACITY, device)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [0, 25])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(4, 2, 32), pytest.param(9, 3, 64, marks=pytest.mark.slow), (8, 1, 16), (2, 2, 48)]
)
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_gives_what_the_reference_gives(monkeypatch, name, heads, kv_heads, size, window, splits):
    monkeypatch.setattr(kernels, "_splits", lambda tiles, programs, longest, device: splits)
    generator = torch.Generator().manual_seed(2)
    of = batch(SHAPES[name])
    query = torch.randn(len(of.tokens), heads, size, generator=generator).to(DEVICE)
    keys, values = (torch.randn(64, 16, kv_heads, size, generator=generator).to(DEVICE) for _ in range(2))
    expected = reference(query, keys, values, of, window)
    torch.testing.assert_close(kernels.paged_attention(query, keys, values, of, window), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [0, 25])
@pytest.mark.parametrize("name", ["hybrid", "long"])
def test_the_kernel_has_the_sinks_of_the_reference(monkeypatch, name, window, splits):
    monkeypatch.setattr(kernels, "_splits", lambda tiles, programs, longest, device: splits)
    generator = torch.Generator().manual_seed(2)
    of = batch(SHAPES[name])
    query = torch.randn(len(of.tokens), 4, 32, generator=generator).to(DEVICE)
    keys, values = (torch.randn(64, 16, 2, 32, generator=generator).to(DEVICE) for _ in range(2))
    sinks = torch.tensor([-9.0, 0.0, 4.0, 40.0]).to(DEVICE)
    expected = reference(query, keys, values, of, window, sinks)
    torch.testing.assert_close(kernels.paged_attention(query, keys, values, of, window, sinks), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5])
def test_fused_kernels_give_what_torch_gives(tokens):
    generator = torch.Generator().manual_seed(3)
    x, delta = (torch.randn(tokens, 96, generator=generator).to(DEVICE) for _ in range(2))
    weight = torch.randn(96, generator=generator).to(DEVICE)
    for result, expected in zip(
        fused._add_norm(x, delta, weight, 1e-5), reference_of(fused.add_norm, x, delta, weight, 1e-5), strict=True
    ):
        torch.testing.assert_close(result, expected)
    torch.testing.assert_close(fused._swiglu(x), reference_of(fused.swiglu, x))
    angles = torch.rand(tokens, 16, generator=generator).to(DEVICE)
    turns, slots = (angles.cos(), angles.sin()), torch.arange(tokens, 0, -1).to(DEVICE)
    q, k, v = torch.randn(tokens, 5, 32, generator=generator).to(DEVICE).split([3, 1, 1], 1)  # as after one product
    cache, other = ((torch.zeros(2, 16, 1, 32).to(DEVICE), torch.zeros(2, 16, 1, 32).to(DEVICE)) for _ in range(2))
    rotated, expected = fused._keep(q, k, v, turns, cache, slots), fused.rotate(q, turns)
    write(other[0], fused.rotate(k, turns), slots)
    write(other[1], v, slots)
    torch.testing.assert_close((rotated, *cache), (expected, *other))


def reference_of(function, *values):
    """The result of `function` on the processor, moved to DEVICE."""

    def to(value, device):
        return (
            tuple(to(v, device) for v in value)
            if isinstance(value, tuple)
            else value.to(device)
            if torch.is_tensor(value)
            else value
        )

    return to(function(*(to(v, torch.device("cpu")) for v in values)), DEVICE)


def test_padding_changes_no_decode():
    of = batch(SHAPES["decodes"])
    whole = empty(8, CAPACITY, 63, DEVICE)
    put(of, whole, 8, 63, 16)
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(8, 4, 32, generator=generator).to(DEVICE)
    keys, values = (torch.randn(64, 16, 2, 32, generator=generator).to(DEVICE) for _ in range(2))
    number = len(of.counts)
    torch.testing.assert_close(
        kernels.paged_attention(query, keys, values, whole, 0)[:number],
        reference(query[:number], keys, values, of, 0),
        rtol=1e-4,
        atol=1e-4,
    )
    put(of, whole, number, 63, 16)
    assert (first(whole, number).tables[:, : of.tables.shape[1]] == of.tables).all()


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(("rows", "splits", "few"), [(1, 1, 64), (3, 2, 64), (70, 1, 64), (20, 1, 0)])
def test_products_of_quantised_weights_are_those_of_the_numbers_that_they_stand_for(monkeypatch, form, rows, splits, few):
    monkeypatch.setattr(quantised, "_splits", lambda tiles, programs, ins, device: splits)
    monkeypatch.setattr(quantised, "FEW", few)
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(72, 128, generator=generator), torch.randn(rows, 128, generator=generator)
    matrix = Matrix(weight, form, None)
    result = quantised.product(x.to(DEVICE), matrix._values.to(DEVICE), matrix._scale.to(DEVICE), low(matrix), GROUP)
    torch.testing.assert_close(result.cpu(), x @ matrix.dense(torch.float32).T, rtol=1e-4, atol=1e-4)


def low(matrix):
    return None if matrix._low is None else matrix._low.to(DEVICE)
