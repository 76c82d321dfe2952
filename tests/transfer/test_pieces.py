"""Which pieces of a prompt's KV are sent when, and which are accepted."""

import random

import pytest

from stallfree.transfer.frames import Broken
from stallfree.transfer.pieces import Arrived, Outgoing, Piece

BLOCK = 48
"""Bytes of a block."""


def test_layers_leave_once_they_fill_a_frame_and_the_rest_at_the_end():
    outgoing = Outgoing(0, BLOCK, 6, frame=100)  # a layer of 6 blocks has 48 bytes
    due = [outgoing.due(6, layers, last=True) for layers in (1, 2, 3, 4, 5, 6)]
    assert [[], [], [Piece(0, 6, range(3))], [], [], [Piece(0, 6, range(3, 6))]] == due
    assert [] == outgoing.due(6, last=True)


def test_a_layer_that_is_larger_than_a_frame_is_sent_range_by_range():
    outgoing = Outgoing(0, BLOCK, 2, frame=100)  # a layer of 4 blocks has 96 bytes
    assert [] == outgoing.due(10, 0, last=True)
    assert [] == outgoing.due(10, 1, last=True)
    pieces = outgoing.due(10, 2, last=True)
    assert [Piece(first, blocks, range(2)) for first, blocks in ((0, 4), (4, 4), (8, 2))] == pieces
    outgoing = Outgoing(0, BLOCK, 2, frame=96)
    assert [Piece(0, 4, range(1)), Piece(4, 4, range(1))] == outgoing.due(10, 1, last=True)
    assert [Piece(0, 4, range(1, 2)), Piece(4, 4, range(1, 2)), Piece(8, 2, range(2))] == outgoing.due(10, 2, last=True)


def test_whole_blocks_leave_in_full_frames_until_the_last():
    outgoing = Outgoing(1, BLOCK, 0, frame=2 * BLOCK)
    assert [] == outgoing.due(2, last=False)
    assert [Piece(1, 2, None), Piece(3, 2, None)] == outgoing.due(6, last=False)
    assert [Piece(5, 2, None), Piece(7, 1, None)] == outgoing.due(8, last=True)


def test_layers_that_an_iteration_could_not_send_follow_when_their_blocks_are_computed_again():
    outgoing = Outgoing(0, BLOCK, 4, frame=BLOCK)
    assert [Piece(0, 2, range(2))] == outgoing.due(2, 2, last=False)  # then the iteration ends without a result
    assert [] == outgoing.due(1, last=False)
    assert [] == outgoing.due(2, 1, last=False)
    assert [Piece(0, 2, range(2, 4))] == outgoing.due(2, 4, last=False)


@pytest.mark.parametrize("seed", range(20))
def test_every_layer_of_every_block_is_sent_once_and_accepted_in_any_run(seed):
    rng = random.Random(seed)
    layers, frame = rng.choice((0, 1, 3, 8)), rng.randrange(1, 2000)
    first, end = rng.randrange(3), rng.randrange(3, 60)
    outgoing, arrived = Outgoing(first, BLOCK, layers, frame), Arrived(first, end, layers)
    sent, upto = [], first
    while upto < end:
        upto = min(end, upto + rng.randrange(1, 20))
        told = sorted(rng.sample(range(1, layers + 1), rng.randrange(layers + 1)))
        for piece in [piece for number in (*told, None) for piece in outgoing.due(upto, number, last=upto == end)]:
            arrived.add(Piece.of(piece.header, 100, layers))
            sent += [(block, layer) for layer in piece.layers or range(1) for block in range(piece.first, piece.end)]
            share = BLOCK // max(1, layers)
            assert piece.size(BLOCK, layers) < 2 * max(frame, share)
    assert sorted(sent) == [(block, layer) for block in range(first, end) for layer in range(max(1, layers))]
    arrived.check(end)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([Piece(1, 2, range(4))], "blocks 1 to 3 came, expected 0 to at most 5"),
        ([Piece(0, 6, range(4))], "blocks 0 to 6 came, expected 0 to at most 5"),
        ([Piece(0, 0, range(4))], "blocks 0 to 0 came"),
        ([Piece(0, 2, range(4)), Piece(0, 2, range(4))], "blocks 0 to 2 came, expected 2 to at most 5"),
        (
            [Piece(0, 2, range(2)), Piece(0, 2, None)],
            "layers 0 to 4 of 2 blocks from 0 on came, expected 2 blocks and layers from 2",
        ),
        ([Piece(0, 2, range(1, 4))], "layers 1 to 4 of 2 blocks from 0 on came, expected 2 blocks and layers from 0"),
        ([Piece(0, 2, range(2)), Piece(0, 2, range(3, 4))], "expected 2 blocks and layers from 2"),
        ([Piece(0, 2, range(2)), Piece(0, 2, range(1, 3))], "expected 2 blocks and layers from 2"),
        ([Piece(0, 2, range(2)), Piece(0, 3, range(2, 4))], "of 3 blocks from 0 on came, expected 2 blocks"),
        ([Piece(0, 2, range(2)), Piece(1, 1, range(2, 4))], "blocks 1 to 2 came"),
        ([Piece(0, 2, range(2, 2))], "layers 2 to 2"),
        ([Piece(0, 2, range(0))], "layers 0 to 0"),
    ],
)
def test_a_piece_that_is_not_the_next_one_is_refused_with_what_was_expected(pieces, says):
    arrived = Arrived(0, 5, 4)
    for piece in pieces[:-1]:
        arrived.add(piece)
    with pytest.raises(Broken, match=says):
        arrived.add(pieces[-1])


def test_a_prompt_of_which_something_is_missing_is_refused():
    arrived = Arrived(0, 5, 4)
    arrived.add(Piece(0, 3, range(2)))
    with pytest.raises(Broken, match="after 3 blocks of 5"):
        arrived.check(5)
    arrived.add(Piece(3, 2, None))
    with pytest.raises(Broken, match="after 2 of 4 layers of 3 blocks from 0 on"):
        arrived.check(5)
    arrived.add(Piece(0, 3, range(2, 4)))
    arrived.check(5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"first": 0, "count": 11}, "count is '11', expected a whole number from 0 to 10"),
        ({"first": -1, "count": 1}, "first is '-1'"),
        ({"first": 0, "count": 1, "layer": 5, "layers": 1}, "layer is '5', expected a whole number from 0 to 4"),
        ({"first": 0, "count": 1, "layer": 3, "layers": 2}, "layers is '2', expected a whole number from 0 to 1"),
        ({"first": 0, "count": 1, "layer": None, "layers": 2}, "layer is 'None'"),
        ({"first": 0, "count": 1, "layer": 0}, "layers is 'None'"),
        ({"first": 0, "count": 1, "layer": True, "layers": 1}, "layer is 'True'"),
    ],
)
def test_a_header_that_names_no_piece_is_refused(fields, says):
    with pytest.raises(Broken, match=says):
        Piece.of(fields, 10, 4)
