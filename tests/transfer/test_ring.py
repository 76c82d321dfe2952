"""Shared memory: who can attach it, and which parts of it are free."""

import os
import random
from collections import deque

import pytest

from stallfree.transfer import ring
from stallfree.transfer.ring import Ring, Room, attach


def test_what_one_writes_the_other_reads_and_no_file_is_left():
    shared = Ring(1 << 16)
    other = attach(shared.offer)
    shared.unlink()
    other[100:105] = b"hello"
    assert b"hello" == bytes(shared.memory[100:105])
    assert not (ring.FOLDER / shared.offer["name"]).exists()
    assert attach(shared.offer) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../etc/passwd"},
        {"name": "stallfree-" + "0" * 32},
        {"name": None},
        {"size": 1},
        {"mark": "00" * 16},
        {"mark": None},
    ],
)
def test_what_is_not_the_memory_that_was_offered_is_not_attached(changes):
    shared = Ring(1 << 16)
    assert attach(shared.offer | changes) is None
    shared.unlink()
    assert attach(None) is None


def test_a_link_to_another_file_is_not_followed(tmp_path):
    shared = Ring(1 << 16)
    name = "stallfree-" + "a" * 32
    os.symlink(ring.FOLDER / shared.offer["name"], ring.FOLDER / name)
    try:
        assert attach(shared.offer | {"name": name}) is None
    finally:
        os.unlink(ring.FOLDER / name)
        shared.unlink()


def test_where_there_is_no_shared_memory_nothing_is_offered(monkeypatch):
    monkeypatch.setattr(ring, "FOLDER", ring.Path("/nonexistent"))
    assert Ring().offer is None


def test_pieces_never_overlap_and_all_of_it_is_used():
    draw, room, taken, full = random.Random(0), Room(1000), deque(), 0
    for _ in range(10_000):
        size = draw.choice([1, 10, 100, 400, 1000])
        at = room.take(size)
        if at is None:
            full += 1
            assert taken
            taken.popleft()
            room.free()
            continue
        assert 0 <= at <= 1000 - size
        assert all(at + size <= begin or end <= at for begin, end in taken)
        taken.append((at, at + size))
    assert full > 100
    for _ in range(len(taken)):
        room.free()
    with pytest.raises(IndexError):
        room.free()


@pytest.mark.parametrize("number", [0, 1001])
def test_what_can_never_fit_is_not_taken(number):
    assert Room(1000).take(number) is None
