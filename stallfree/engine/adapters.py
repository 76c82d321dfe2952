"""Adapters while the engine runs: their weights are read in a thread of their own when requests want them, and their names may come
and go. No iteration waits for a disk.

The ledger decides which adapter gets room (`core/adapters.py`); the executor knows where the weights are. This module does not know
what an adapter computes.
"""

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stallfree.checkpoint.adapter import MAX_RANK, Adapter, open_adapter
from stallfree.checkpoint.config import ModelConfig
from stallfree.checkpoint.dimensions import CheckpointError
from stallfree.checkpoint.identity import adapter_identity
from stallfree.core.adapters import Adapters, Resident
from stallfree.core.ledger import Ledger
from stallfree.core.nearest import nearest
from stallfree.core.record import Loaded
from stallfree.core.request import Request
from stallfree.executors.base import Adapts, Executor

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,199}")
"""What may be the name of an adapter."""

VERSION = "#"
"""What is between an adapter's name and its version, in the key of a later adapter of the same name. No name has it."""

MOST = 10_000
"""Adapters that one engine knows. Each takes some kilobytes of memory, and its name is in /v1/models."""


USUAL_S, HABIT = 0.1, 0.25
"""Seconds that a load takes if none is known, and the weight of the newest."""


def name_of(key: str) -> str:
    """The name under which the adapter with this key was given."""
    return key.partition(VERSION)[0]


class BadName(ValueError):
    """No adapter may have this name, or one has it already (`used`)."""

    def __init__(self, message: str, *, used: bool = False):
        super().__init__(message)
        self.used = used


MOST_NAMED = 5
"""Adapters that cannot be used, in one message."""

MOST_ALIKE = 500
"""Names that are compared with one that is not there; a comparison takes microseconds of the server's loop."""


NICE = 15
"""How far the thread that loads steps back behind those that compute, where the system lets single threads: a load takes a few
times as long while the processor is busy, and iterations hardly notice it."""


class Loader:
    """Brings the adapters that the requests of `ledger` want into their blocks. `failed` is called with the requests whose adapter
    cannot be loaded, and the reason. `taken` is called after an adapter got blocks, before anything is written to them. Used in the
    engine's thread, except `add`. `wake` is called, in any thread, when a load ends.
    """

    def __init__(
        self,
        ledger: Ledger,
        executor: Executor,
        clock: Callable[[], float],
        failed: Callable[[Sequence[Request], str], None],
        taken: Callable[[], None] = lambda: None,
    ):
        self._ledger, self._clock, self._failed, self._taken = ledger, clock, failed, taken
        self._executor = executor if isinstance(executor, Adapts) else None
        self._adapters: dict[str, Adapter] = {}
        self._identities: dict[str, str] = {}
        self._leaving: set[str] = set()
        self._ended: queue.SimpleQueue[tuple[Resident, str | None, Loaded]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(1, "adapters", initializer=_step_back)
        self._loaded: list[Loaded] = []
        self._under_way = 0
        self._usual_s = USUAL_S
        self.wake: Callable[[], None] = lambda: None

    @property
    def accounts(self) -> Adapters:
        return self._ledger.adapters

    @property
    def under_way(self) -> bool:
        """Whether any adapter is being loaded."""
        return self._under_way > 0

    def add(self, key: str, adapter: Adapter) -> None:
        """Know an adapter from now on. For any thread. Raises ValueError if the executor cannot run it, or if it is too large."""
        if self._executor is None:
            raise ValueError("this executor runs no adapters; take --executor openvino or torch")
        blocks, total = self._executor.adapter_blocks(adapter), self._ledger.capacity.num_blocks
        if blocks >= total:
            raise ValueError(f"{adapter.path}: the adapter takes {blocks} KV blocks, and there are {total}; give more, --kv-memory")
        self._adapters[key] = adapter
        self.accounts.known[key] = blocks, adapter.rank

    def warm_up(self) -> None:
        """Load some adapters and drop them again, so that the executor has compiled what the known ones need: iterations are slow
        while it does. Only before there are requests. Raises CheckpointError for an adapter that cannot be read."""
        seen: frozenset[str] = frozenset()
        for key, adapter in sorted(self._adapters.items(), key=lambda item: -len(item[1].modules)):
            if self._executor is not None and not adapter.modules <= seen:
                seen |= adapter.modules
                try:
                    self._executor.load_adapter(key, adapter, range(self.accounts.known[key][0]))
                except OSError as error:
                    raise CheckpointError(_unread(adapter, error)) from error
                self._executor.drop_adapter(key)

    def identity(self, key: str) -> str:
        """A name of the adapter's contents (see `checkpoint.identity`). For any thread. Raises OSError if its files are gone."""
        if key not in self._identities:
            self._identities[key] = adapter_identity(self._adapters[key])
        return self._identities[key]

    def find(self, name: str, identity: str) -> str | None:
        """The key of the adapter that another engine calls `name`, with the same contents. None if there is none. For any
        thread."""
        keys = [key for key in list(self._adapters) if name_of(key) == name]
        try:
            return next((key for key in keys if self.identity(key) == identity), None)
        except (KeyError, OSError):  # it has just gone
            return None

    def wait_s(self, request: Request) -> float:
        """About how many seconds a request that arrives now would wait for its adapter: the loads before it and its own, each as
        long as the last ones took. 0 if it needs none, or if the weights are here. For any thread."""
        return self.accounts.loads_until(request) * self._usual_s

    def knows(self, key: str) -> bool:
        """Whether the adapter is served, or was retired and is still wanted. For any thread."""
        return key in self._adapters

    def retire(self, key: str) -> None:
        """Forget an adapter once no request wants it any more."""
        self._leaving.add(key)

    @property
    def due(self) -> bool:
        """Whether `start` has something to forget."""
        return bool(self._leaving) and any(self._is_free(key) for key in self._leaving)

    def start(self) -> None:
        """Apply the loads that have ended, and begin others that find room now."""
        accounts = self.accounts
        if not accounts.known:
            return
        while not self._ended.empty():
            self._end(*self._ended.get())
        for key in [key for key in self._leaving if self._is_free(key)]:
            self._forget(key)
        self._drop_evicted()
        while (resident := accounts.next(self._ledger.spare)) is not None:
            self._drop_evicted()
            self._taken()
            self._under_way += 1
            self._threads.submit(self._load, resident, self._adapters[resident.key], self._clock())

    def join(self) -> None:
        """Wait until a load has ended. Only while one is under way."""
        self._ended.put(self._ended.get())

    def news(self) -> list[Loaded]:
        """The loads that have ended well since the last call."""
        loaded, self._loaded = self._loaded, []
        return loaded

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _load(self, resident: Resident, adapter: Adapter, asked: float) -> None:
        """In the thread: read the weights and write them into the blocks."""
        error, began = None, time.perf_counter()
        try:
            if self._executor is not None:
                self.identity(resident.key)  # read here, so that no iteration waits for it
                self._executor.load_adapter(resident.key, adapter, resident.blocks)
        except CheckpointError as problem:
            error = str(problem)
        except OSError as problem:
            error = _unread(adapter, problem)
        except Exception as problem:
            log.exception("adapter %s cannot be loaded", resident.key)
            error = f"{type(problem).__name__}: {problem}"
        if error is not None:
            log.warning("adapter %s cannot be loaded, and its requests fail: %s", resident.key, error)
        seconds = time.perf_counter() - began
        self._ended.put((resident, error, Loaded(resident.key, resident.rank, len(resident.blocks), asked, asked + seconds)))
        self.wake()

    def _end(self, resident: Resident, error: str | None, loaded: Loaded) -> None:
        self._under_way -= 1
        if self.accounts.resident.get(resident.key) is not resident:
            return  # all KV was lost meanwhile
        if error is None:
            self.accounts.loaded(resident.key)
            self._usual_s += HABIT * (loaded.t - loaded.asked - self._usual_s)
            self._loaded.append(loaded._replace(t=self._clock()))
        else:
            self._failed(self.accounts.failed(resident.key), f"adapter {resident.key!r} cannot be loaded: {error}")

    def _is_free(self, key: str) -> bool:
        return not self.accounts.wanted(key) and self.accounts.state(key) != "loading"

    def _forget(self, key: str) -> None:
        if key in self.accounts.resident:
            self.accounts.evict(key)
        self._leaving.discard(key)
        del self.accounts.known[key], self._adapters[key]
        self._identities.pop(key, None)

    def _drop_evicted(self) -> None:
        evicted = self.accounts.evicted
        while evicted and self._executor is not None:
            self._executor.drop_adapter(evicted.pop())


def _unread(adapter: Adapter, error: OSError) -> str:
    return f"{error.filename or adapter.path}: cannot be read: {error.strerror or error}"


def _step_back() -> None:
    with suppress(OSError):  # only Linux has priorities of threads
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + NICE)


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter under its `name`. `key`: what requests and KV know it by; a later adapter of the same name has another key.
    `created`: when it got its name (Unix seconds)."""

    name: str
    key: str
    adapter: Adapter
    created: int


class Library:
    """The names of the adapters of an engine whose model has `config`. `call` runs an action in the engine's thread; before there
    is one, at once. Written by one thread at a time; any may read.
    """

    def __init__(
        self,
        loader: Loader,
        config: ModelConfig | None,
        max_rank: int = MAX_RANK,
    ):
        self._loader, self._config, self._max_rank = loader, config, max_rank
        self.call: Callable[[Callable[[], object]], object] = lambda action: action()
        self._reserved: tuple[str, ...] = ()
        self._named: dict[str, Named] = {}
        self._versions: dict[str, int] = {}
        self._left: dict[str, Named] = {}

    @property
    def leaving(self) -> list[Named]:
        """Adapters whose name was taken from them, and that requests still want. For any thread."""
        return [named for named in list(self._left.values()) if self._loader.knows(named.key)]

    @property
    def named(self) -> Mapping[str, Named]:
        return self._named

    def reserve(self, names: Sequence[str]) -> None:
        """Let no adapter have any of `names`. Raises ValueError if one has."""
        for name in names:
            if name in self._named:
                raise ValueError(f"the name {name!r} is the model's own, and an adapter's; give one of them another")
        self._reserved = tuple(names)

    def key(self, name: str) -> str | None:
        """What requests for `name` carry; None if there is no such adapter."""
        found = self._named.get(name)
        return None if found is None else found.key

    def open_all(self, found: Mapping[str, Path]) -> dict[str, Adapter]:
        """The adapters in these folders, by name. Raises ValueError that names all that cannot be used, up to `MOST_NAMED`."""
        opened: dict[str, Adapter] = {}
        errors: list[str] = []
        for name, folder in found.items():
            try:
                opened[name] = self.open(name, folder)
            except ValueError as error:
                errors.append(str(error))
        if errors:
            more = f"\nand {len(errors) - MOST_NAMED:,} more" if len(errors) > MOST_NAMED else ""
            raise ValueError("\n".join(errors[:MOST_NAMED]) + more)
        return opened

    def open(self, name: str, folder: str | Path, *, replaces: bool = False) -> Adapter:
        """Look at an adapter that may get this name, from another one if it `replaces` that. Raises ValueError for a bad or used
        name, and for an adapter that this model cannot run (CheckpointError). Its weights are not read."""
        if not NAME.fullmatch(name):
            raise BadName(
                f"adapter name {name[:200]!r}: a name is 1 to 200 letters, digits or . _ : / @ -, and begins with a letter or digit"
            )
        if name in self._reserved:
            raise BadName(f"the name {name!r} is the model's own; give another", used=True)
        self._check_free(name, replaces=replaces)
        if len(self._named) >= MOST and name not in self._named:
            raise ValueError(f"there are {MOST:,} adapters already, the most that are served; remove one first")
        if self._config is None:
            raise ValueError("this executor runs no adapters; take --executor openvino or torch")
        return open_adapter(folder, self._config, self._max_rank)

    def add(self, name: str, adapter: Adapter, *, replaces: bool = False) -> Named:
        """Give an adapter its name, at once taken from another one if it `replaces` that. Raises ValueError if another got it
        meanwhile, or if the executor cannot run the adapter."""
        self._check_free(name, replaces=replaces)
        old = self._named.get(name)
        version = self._versions.get(name, 0) + 1
        key = name if version == 1 else f"{name}{VERSION}{version}"
        self._loader.add(key, adapter)
        self._versions[name] = version
        self._named[name] = named = Named(name, key, adapter, int(time.time()))
        if old is not None:
            self._retire(old)
        return named

    def _retire(self, old: Named) -> None:
        self._left = {named.key: named for named in (*self.leaving, old)}
        self.call(lambda: self._loader.retire(old.key))

    def _check_free(self, name: str, *, replaces: bool) -> None:
        if name in self._named and not replaces:
            raise BadName(f"the name {name!r} is in use; remove that adapter first, or give another", used=True)

    def remove(self, name: str) -> None:
        """Take the name away. Requests that have it already are served; then the adapter goes. KeyError if there is none."""
        self._retire(self._named.pop(name))

    def nearest(self, name: str) -> str:
        """A hint for a name that is not there."""
        alike = [known for known in self._named if known[:1] == name[:1]]
        return nearest(name[:200], alike[:MOST_ALIKE])


def folders(given: Sequence[str], all_of: Path | None) -> dict[str, Path]:
    """Names and folders from `given`, each NAME=FOLDER, and the sub-folders of `all_of`. Raises ValueError for a text that is
    neither, for a name that is given twice, and if `all_of` cannot be read or has no adapters."""
    found: dict[str, Path] = {}
    for text in [given] if isinstance(given, str) else given:
        name, equals, folder = text.partition("=")
        if not (equals and name and folder):
            raise ValueError(f"--adapter {text!r} is not NAME=FOLDER")
        if name in found:
            raise ValueError(f"--adapter {name}: the name is given twice; give each once")
        found[name] = Path(folder)
    if all_of is not None:
        try:
            inside = sorted(path for path in all_of.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            raise ValueError(f"--adapters {all_of}: cannot be read: {error.strerror}") from None
        if not inside:
            raise ValueError(f"--adapters {all_of}: the folder has no sub-folders; each adapter is one")
        if len(inside) + len(found) > MOST:
            raise ValueError(f"--adapters {all_of}: {len(inside):,} adapters, and at most {MOST:,} are served")
        for path in inside:
            if path.name in found:
                raise ValueError(f"--adapters {all_of}: {path.name} is also given with --adapter; give each name once")
            found[path.name] = path
    return found
