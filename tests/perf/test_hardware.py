"""Every device in the folder states its figures and their source; a mistake in a file is named."""

from dataclasses import asdict
from pathlib import Path

import pytest

from stallfree.perf import hardware
from stallfree.perf.hardware import load, names, profiled

A100 = Path(hardware.__file__).parent / "a100-80g.toml"


@pytest.fixture(params=names())
def device(request):
    return load(request.param)


def test_the_devices_that_people_ask_for_are_there():
    assert {"a100-80g", "a100-80g-pcie", "a100-40g", "a800", "a40", "h100", "h100-nvl", "h200"} <= set(names())
    assert {"b200", "l40s", "rtx-6000-ada"} <= set(names())


def test_every_figure_has_a_source(device):
    assert {"datasheet", "memory", "links", "price"} == set(device.sources)
    assert all(len(source) > 10 for source in (*device.sources.values(), *(m.source for m in device.measured.values())))


def test_figures_are_in_their_units(device):
    assert 1e14 < device.peak["fp16"] < 1e16
    assert 5e11 < device.bandwidth < 1e13
    assert 3e10 < device.memory < 1e12
    assert 0.1 < device.price < 20
    assert 1e9 < device.clock < 3e9


def test_shares_and_times_are_those_of_kernels(device):
    """A share of the peak is before the losses of tiles, so it may be a little above 1; test_kernels has them with these."""
    for measured in device.measured.values():
        products, attention = list(measured.products.values()), list(measured.attention.values())
        assert all(0 < p.compute < 1.1 and 0 < p.bandwidth <= 1 for p in products)
        assert all(0 < share <= 1 for a in attention for share in (a.compute, a.stream, a.rows))
        times = [value for part in (*products, *attention) for name, value in asdict(part).items() if name.endswith("_s")]
        assert all(0 <= seconds < 1e-4 for seconds in times)


def test_kernels_that_were_not_measured_are_those_of_the_other_generation():
    a40, l40s = load("a40"), load("l40s")
    assert a40.kernels("2026") is a40.measured["2024"]
    assert l40s.kernels("2024") is l40s.measured["2026"]


def test_links_reach_within_the_node_and_beyond(device):
    assert device.link(device.node, device.node).span == device.node
    assert device.link(2 * device.node, device.node).span == 0
    assert all(link.step_s <= link.collective_s for link in device.links.values())


def test_the_narrowest_link_that_is_wide_enough_is_taken():
    pcie = load("a100-80g-pcie")
    assert pcie.links["nvlink"] == pcie.link(2, 4)
    assert pcie.links["pcie"] == pcie.link(4, 4)


def test_a_network_is_named_or_the_first():
    h100 = load("h100")
    assert h100.links["infiniband"] == h100.link(16, 8)
    assert h100.links["ethernet"] == h100.link(16, 8, "ethernet")
    with pytest.raises(ValueError, match="no network 'token ring'; it has infiniband, ethernet"):
        h100.link(16, 8, "token ring")


def test_profiles_have_other_names_for_devices():
    aliases = {"a100": "a100-80g", "a100_pairwise_nvlink": "a100-80g-pcie", "h100_dgx": "h100", "h100_pairwise_nvlink": "h100-nvl"}
    assert aliases == {alias: profiled(alias).name for alias in aliases}
    with pytest.raises(ValueError, match="'a1000'.*did you mean 'a100'"):
        profiled("a1000")


def test_a_device_from_elsewhere_is_loaded_by_its_path(tmp_path):
    (tmp_path / "mine.toml").write_text(A100.read_text())
    assert "mine" == load(str(tmp_path / "mine.toml")).name


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("processors = 108", "", "has no processors"),
        ("bandwidth_gb_s = 2039", "bandwidth_gb_s = -1", "bandwidth_gb_s is -1, expected a number above 0"),
        ("bandwidth_gb_s = 2039", "bandwidth_gb_s = 'fast'", "expected a number above 0"),
        ("node = 8", "node = 8\ncolour = 'green'", "'colour' is not known"),
        ("fp16 =", "fp17 =", "expected fp16"),
        ("[measured.2026]", "[measured.2025]", "measured has .*2025.*expected any of 2024, 2026"),
        ("kernel_us", "kernel_s", "'kernel_s' in measured.2024.products.fp16 is not known .did you mean 'kernel_us'"),
        ("kernel_us = 3.6, ", "", "has no kernel_us"),
        ("tile_us = 3.96", "tile_us = -1", "tile_us in measured.2026.attention.fp16 is -1, expected a number of at least 0"),
        ("bandwidth = 0.79", "bandwidth = 0", "bandwidth in measured.2024.products.fp16 is 0, expected a number above 0"),
        ("fp16 = { compute = 0.93", "fp32 = { compute = 0.93", "has no fp16 in measured.2024.products"),
        ("rank_us", "rank_s", "has no rank_us"),
        ("processors = 108", "processors = ", "is no TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, old, new, says):
    file = tmp_path / "broken.toml"
    file.write_text(A100.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=says):
        load(str(file))


@pytest.mark.parametrize(("name", "says"), [("h10", "did you mean 'h100'"), ("nowhere.toml", "cannot be read")])
def test_a_device_that_is_not_there_is_named(name, says):
    with pytest.raises(ValueError, match=says):
        load(name)
