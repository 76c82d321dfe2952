"""The pieces in which a prompt's KV is sent: some blocks, with all their layers or with some. `Outgoing` says which pieces are due,
`Arrived` whether the right one came. It knows no executor and no connection.

The blocks are cut into ranges. Ranges begin in the order of their blocks, and the layers of a range are sent in their order. Pieces
of other ranges may be sent between them.
"""

from typing import NamedTuple, Self

from stallfree.transfer.frames import Broken, Header, whole


class Piece(NamedTuple):
    """A number of `blocks` of a prompt from block `first` on, and which `layers` of them (None: all, from a side that moves only
    whole blocks).
    """

    first: int
    blocks: int
    layers: range | None

    @classmethod
    def of(cls, header: Header, most_blocks: int, num_layers: int) -> Self:
        """The piece that a frame's header names. Raises Broken for more than `most_blocks` blocks, and for layers that are not
        among the `num_layers` (0: this side takes only whole blocks).
        """
        first, blocks = whole(header, "first", 2**31), whole(header, "count", most_blocks)
        if "layer" not in header:
            return cls(first, blocks, None)
        layer = whole(header, "layer", num_layers)
        return cls(first, blocks, range(layer, layer + whole(header, "layers", num_layers - layer)))

    @property
    def header(self) -> Header:
        """The fields of a frame's header that name this piece."""
        fields = {"first": self.first, "count": self.blocks}
        return fields if self.layers is None else fields | {"layer": self.layers.start, "layers": len(self.layers)}

    @property
    def end(self) -> int:
        """The block after its last one."""
        return self.first + self.blocks

    @property
    def num_layers(self) -> int | None:
        """The number of its layers; None: all."""
        return None if self.layers is None else len(self.layers)

    def size(self, block_bytes: int, num_layers: int) -> int:
        """Bytes of this piece, if a block has `block_bytes` in all its `num_layers` layers."""
        return self.blocks * (block_bytes if self.layers is None else block_bytes // num_layers * len(self.layers))


class Outgoing:
    """The pieces of a prompt from block `first` on. A block has `block_bytes` in its `num_layers` layers (0: the other side takes
    only whole blocks).

    A range begins once its blocks fill a `frame` of bytes, or with the last block of the prompt or of a token after it. A piece has
    at least `frame` bytes, unless it is a range's last one. It has less than twice as many, unless a layer of one block has more.
    """

    def __init__(self, first: int, block_bytes: int, num_layers: int, frame: int) -> None:
        self._next, self._frame = first, frame
        self._by_layer, self._layers = num_layers > 0, max(1, num_layers)
        self._bytes = block_bytes // self._layers
        self._least, self._most = max(1, frame // block_bytes), max(1, frame // self._bytes)
        """Blocks that fill a frame with all their layers, and with one of them."""
        self._ranges: list[tuple[int, int, int]] = []
        """The ranges that were not sent whole: first block, number of blocks, and layers that were sent."""

    def due(self, upto: int, computed: int | None = None, *, last: bool) -> list[Piece]:
        """The pieces to send now, in order: the blocks before `upto` have their KV in `computed` layers (None: in all). With
        `last`, these are all that the prompt has, or a token after it. No piece is returned twice.
        """
        while (left := upto - self._next) > 0 and (last or left >= self._least):
            self._ranges.append((self._next, min(left, self._most), 0))
            self._next += min(left, self._most)
        pieces, rest = [], []
        for first, blocks, sent in self._ranges:
            ready = sent if first + blocks > upto else self._layers if computed is None else computed
            step = -(-self._frame // (blocks * self._bytes))
            while sent < ready and (ready - sent >= step or ready == self._layers):
                layers = range(sent, min(sent + step, ready))
                pieces.append(Piece(first, blocks, layers if self._by_layer else None))
                sent = layers.stop
            if sent < self._layers:
                rest.append((first, blocks, sent))
        self._ranges = rest
        return pieces


class Arrived:
    """Which of the blocks from `first` up to `end` (exclusive) of a prompt arrived, in how many of their `num_layers` layers (0:
    they come whole).
    """

    def __init__(self, first: int, end: int, num_layers: int) -> None:
        self._next, self._end, self._layers = first, end, max(1, num_layers)
        self._ranges: dict[int, tuple[int, int]] = {}
        """The ranges that did not arrive whole: by first block, the number of blocks, and of layers that arrived."""

    def add(self, piece: Piece) -> None:
        """Note `piece`. Raises Broken unless it has the next blocks, or the next layers of earlier ones."""
        layers = range(self._layers) if piece.layers is None else piece.layers
        blocks, arrived = self._ranges.get(piece.first, (piece.blocks, 0))
        if piece.first not in self._ranges and (piece.first != self._next or not blocks or piece.end > self._end):
            raise Broken(f"blocks {piece.first} to {piece.end} came, expected {self._next} to at most {self._end}")
        if blocks != piece.blocks or layers.start != arrived or not layers:
            came = f"layers {layers.start} to {layers.stop} of {piece.blocks} blocks from {piece.first} on"
            raise Broken(f"{came} came, expected {blocks} blocks and layers from {arrived} on")
        self._next = max(self._next, piece.end)
        self._ranges[piece.first] = blocks, layers.stop
        if layers.stop == self._layers:
            del self._ranges[piece.first]

    def check(self, end: int) -> None:
        """Raises Broken unless everything before block `end` arrived, and nothing after it."""
        if self._next != end:
            raise Broken(f"the last token came after {self._next} blocks of {end}")
        if self._ranges:
            first, (blocks, layers) = next(iter(self._ranges.items()))
            raise Broken(f"the last token came after {layers} of {self._layers} layers of {blocks} blocks from {first} on")
