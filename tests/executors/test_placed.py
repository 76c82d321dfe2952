"""Instances compute what one rank computes, wherever the KV of each token is, and whichever of them take part."""

import queue
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Work
from stallfree.executors.torch.slots import Kept, Slots, mixed
from tests.models import write_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from stallfree.executors.torch.parallel import Alone
from stallfree.executors.torch.placed import Members, Piece
from stallfree.executors.torch.runner import Runner
from tests.executors.test_openvino import GPT_OSS
from tests.executors.test_parallel import EXACT

INSTANCES, ROOM, LENGTH = 3, 160, 60
FAMILIES = {
    "llama": ("llama", {}),
    "window": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 20}),
    "sinks": ("gpt_oss", GPT_OSS),
}


class Received:
    def __init__(self, box, tensor):
        self.box, self.tensor = box, tensor

    def wait(self):
        self.tensor.copy_(self.box.get(timeout=60))


class Threads(Members):
    """Members of one process: each is a thread. `boxes`: a queue for each pair of instances."""

    def __init__(self, number, ranks, boxes):
        super().__init__(number, ranks)
        self._boxes = boxes

    def exchange(self, sent, received):
        own = self.ranks[self.number]
        for member, tensor in sent.items():
            if tensor.numel():
                self._boxes[own, self.ranks[member]].put(tensor.clone())
        return [Received(self._boxes[self.ranks[m], own], tensor) for m, tensor in received.items() if tensor.numel()]


class Instances:
    """Instances as threads, with the slots that a cluster keeps for them."""

    def __init__(self, checkpoint):
        self.runners = [runner(checkpoint, ROOM) for _ in range(INSTANCES)]
        self.boxes = {(a, b): queue.Queue() for a in range(INSTANCES) for b in range(INSTANCES)}
        self.slots = Slots([ROOM] * INSTANCES)

    def run(self, members, parts):
        """Logits of all tokens of the parts: (work, how many of its tokens each instance keeps)."""
        pasts = [{m: kept_of(self.slots, work.id, m) for m in members} for work, _ in parts]
        owners = [[members.index(m) for m in self.slots.keep(work.id, work.start, kept)] for work, kept in parts]
        rows = range(sum(work.count for work, _ in parts))

        def run(number):
            member = members[number]
            pieces = [
                Piece(
                    work,
                    [past[m].positions for m in members],
                    own,
                    past[member].slots,
                    kept_of(self.slots, work.id, member).slots[len(past[member].slots) :],
                )
                for (work, _), past, own in zip(parts, pasts, owners, strict=True)
            ]
            return self.runners[member].run_placed(Threads(number, members, self.boxes), pieces, rows)

        with ThreadPoolExecutor(len(members)) as pool:
            first, *others = list(pool.map(run, range(len(members))))
        assert not any(len(logits) for logits in others)
        return first.numpy()

    def move(self, id, target):
        sources, into = self.slots.move(id, target)
        for source, slots in sources.items():
            own, into = into[: len(slots)], into[len(slots) :]
            self.runners[target].write_slots(own, self.runners[source].read_slots(slots))


def kept_of(slots, id, instance):
    kept = slots.of(id).get(instance, Kept())
    return Kept(list(kept.positions), list(kept.slots))


def runner(checkpoint, room):
    made = Runner(checkpoint, EXACT, Alone(), range(checkpoint.config.num_layers), torch.device("cpu"))
    made.allocate(room // 16)
    return made


def token(id, position):
    return (17 * int(id) + 7 * position) % 150 + 3


@pytest.fixture(scope="module", params=FAMILIES)
def expected(request, tmp_path_factory):
    """A checkpoint, and the logits of one rank for each request."""
    folder = tmp_path_factory.mktemp("placed")
    family, config = FAMILIES[request.param]
    write_folder(folder, family, **config)
    checkpoint = open_checkpoint(folder)
    alone, logits = runner(checkpoint, 64), {}
    for id in "012":
        tokens = tuple(token(id, position) for position in range(LENGTH))
        work = Work(id, 0, LENGTH, True, False, tokens, tuple(range(4)), None, "", (), ())
        logits[id] = alone.run([work], range(LENGTH)).numpy()
    return Instances(checkpoint), logits


@st.composite
def schedules(draw):
    """Iterations on any members, of chunks and decodes of up to three requests, with moves and preemptions between them."""
    held, steps = {id: dict.fromkeys(range(INSTANCES), 0) for id in "012"}, []
    for _ in range(draw(st.integers(1, 7))):
        id = draw(st.sampled_from("012"))
        kind = draw(st.sampled_from(("iteration", "iteration", "iteration", "move", "drop")))
        if kind != "iteration":
            target = draw(st.integers(0, INSTANCES - 1))
            steps.append((kind, id, target))
            computed = sum(held[id].values())
            held[id] = dict.fromkeys(range(INSTANCES), 0) | ({target: computed} if kind == "move" else {})
            continue
        members = draw(st.sets(st.integers(0, INSTANCES - 1), min_size=1))
        chosen = draw(st.sets(st.sampled_from("012"), min_size=1))
        members |= {member for id in chosen for member, count in held[id].items() if count}
        parts = []
        for id in sorted(chosen):
            start = sum(held[id].values())
            if start == LENGTH:
                continue
            decode = start > 0 and draw(st.booleans())
            owners = draw(st.lists(st.sampled_from(sorted(members)), min_size=1, max_size=1 if decode else LENGTH - start))
            counts = {member: owners.count(member) for member in sorted(set(owners))}
            parts.append((id, start, decode, counts))
            for member, count in counts.items():
                held[id][member] += count
        if parts:
            steps.append(("iteration", sorted(members), parts))
    return steps


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=schedules())
def test_any_placement_and_any_change_of_groups_give_the_logits_of_one_rank(expected, steps):
    instances, logits = expected
    for kind, which, what in steps:
        if kind == "move":
            instances.move(which, what)
        elif kind == "drop":
            instances.slots.drop(which)
        else:
            parts = [
                (
                    Work(id, start, n, True, decode, tuple(token(id, p) for p in range(start, start + n)), (), None, "", (), ()),
                    counts,
                )
                for id, start, decode, counts in what
                for n in [sum(counts.values())]
            ]
            right = np.concatenate([logits[work.id][work.start : work.start + work.count] for work, _ in parts])
            assert np.abs(right - instances.run(which, parts)).max() < 1e-4
    for id in "012":
        positions = [position for kept in instances.slots.of(id).values() for position in kept.positions]
        assert sorted(positions) == list(range(len(positions)))
        instances.slots.drop(id)
    assert all(instances.slots.free(member) == ROOM for member in range(INSTANCES))


def test_equal_counts_give_stripes_and_unequal_ones_are_mixed_evenly():
    assert mixed({0: 2, 1: 2}) == [0, 1, 0, 1]
    assert mixed({0: 3, 2: 1}) == [0, 0, 2, 0]


def test_slots_that_are_not_there_are_refused_and_nothing_changes():
    slots = Slots([4, 4])
    slots.keep("a", 0, {0: 3})
    with pytest.raises(ValueError, match="instance 0 has 1 free slots, not 2"):
        slots.keep("a", 3, {0: 2})
    with pytest.raises(ValueError, match="KV of 3 tokens, so position 5 is not its next"):
        slots.keep("a", 5, {1: 1})
    slots.keep("b", 0, {1: 3})
    with pytest.raises(ValueError, match="instance 1 has 1 free slots, not 3 for request a"):
        slots.move("a", 1)
    assert [slots.free(0), slots.free(1)] == [1, 1]
