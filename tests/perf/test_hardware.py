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
    assert {"a100-80g", "a100-80g-pcie", "a100-40g", "a40", "h100", "h200", "b200", "l40s"} <= set(names())


def test_every_figure_has_a_source(device):
    assert {"datasheet", "memory", "links", "price"} == set(device.sources)
    assert all(len(source) > 10 for source in (*device.sources.values(), device.measured.source))


def test_figures_are_in_their_units(device):
    assert 1e14 < device.peak["fp16"] < 1e16
    assert 5e11 < device.bandwidth < 1e13
    assert 3e10 < device.memory < 1e12
    assert 0.1 < device.price < 20
    assert 1e9 < device.clock < 3e9


def test_no_kernel_beats_the_data_sheet(device):
    measured = device.measured
    assert all(0 < share <= 1 for share in (measured.compute, measured.bandwidth, measured.stream, measured.attention))
    assert all(0 < seconds < 1e-4 for name, seconds in asdict(measured).items() if name.endswith("_s"))


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
    assert ["a100-80g", "a100-80g-pcie", "h100"] == [profiled(n).name for n in ("a100", "a100_pairwise_nvlink", "h100_dgx")]
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
        ("[measured]", "[measurd]", "'measurd' is not known .did you mean 'measured'"),
        ("kernel_us", "kernel_s", "has no kernel_us"),
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
