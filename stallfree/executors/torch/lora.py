"""What adapters add to a product: for each row x of a batch, B (A x) of its adapter, whose weights lie in the layer's KV blocks.

On a GPU two Triton kernels compute the segmented products of all rows, for any mix of adapters and ranks (Punica, Chen et al. 2023,
arXiv 2310.18547; S-LoRA, Sheng et al. 2023, arXiv 2311.03285). Elsewhere torch computes them run by run, which is also the
reference. It knows the places of weights (`adapters`), and no layers.
"""

import torch

from stallfree.checkpoint.adapter import MODULES
from stallfree.executors.torch.adapters import Adapted, Site
from stallfree.executors.torch.attention import Cache

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for processors comes without it
    triton = None

RANKS = 16
"""Ranks that a program computes at once: the fewest that tensor cores take."""
PROGRAMS = 512
"""The input of A is split until there are so many programs, a few for each processor of a large GPU."""
MOST_SPLITS = 16
WIDTH = 4
"""Lines of the output that a program computes."""


def adapt(adapted: Adapted, name: str, x: torch.Tensor, y: torch.Tensor, cache: Cache) -> None:
    """Add to `y` [tokens, outputs side by side] what the adapters add at the site `name`, whose input is `x` [tokens, inputs]."""
    if name not in adapted.changed:
        return
    (_adapt if x.is_cuda else reference)(adapted, adapted.packing.sites[name], x, y, cache)


def reference(adapted: Adapted, site: Site, x: torch.Tensor, y: torch.Tensor, cache: Cache) -> None:
    """`adapt`, run by run."""
    line = adapted.packing.line
    for first, count, slot in adapted.runs.T.tolist():
        if slot < 0:
            continue
        rank, number, *starts = adapted.metas[slot].tolist()
        blocks, at = adapted.tables[slot, :number], 0
        lines = torch.cat([of.view(torch.uint8).flatten(1)[blocks].flatten() for of in cache]).view(x.dtype).view(-1, line)
        for module, out in enumerate(site.outs, site.first):
            a, b = starts[2 * module : 2 * module + 2]
            if a >= 0:
                inward, outward = (
                    lines[begin : begin + rank * adapted.packing.lines(width)].view(rank, -1)[:, :width]
                    for begin, width in ((a, site.inner), (b, out))
                )
                y[first : first + count, at : at + out] += (x[first : first + count] @ inward.T) @ outward
            at += out


if triton is not None:

    @triton.jit
    def _lines(pages, table, number, blocks, values_at, PIECE: tl.constexpr, LINE: tl.constexpr, real):
        """The addresses of lines by their `number`."""
        piece = number // (PIECE // LINE)
        block = tl.load(table + piece % blocks, mask=real, other=0).to(tl.int64)
        return pages + block * PIECE + (number % (PIECE // LINE)) * LINE + tl.where(piece >= blocks, values_at, 0)

    PLAIN = ["runs_row", "tokens", "ranks", "table_width", "first_module"]
    """Arguments for whose values kernels are not specialised, because each specialisation is another compilation."""

    @triton.jit(do_not_specialize=PLAIN)
    def _shrink(
        x, pages, shrunk, runs, metas, tables, runs_row, inner, x_row, values_at, tokens, ranks, table_width, first_module,
        META: tl.constexpr, PIECE: tl.constexpr, LINE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    ):  # fmt: skip
        """A x for one run, one module and one part of the input: into `shrunk` [splits, modules, tokens, ranks]."""
        run, module, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        slot = tl.load(runs + 2 * runs_row + run)
        if slot >= 0:
            start = tl.load(metas + slot * META + 2 + 2 * (first_module + module))
            if start >= 0:
                first, count = tl.load(runs + run), tl.load(runs + runs_row + run)
                rank, blocks = tl.load(metas + slot * META), tl.load(metas + slot * META + 1)
                row, at, lines = tl.arange(0, ROWS), tl.arange(0, LINE), tl.cdiv(inner, LINE)
                each = tl.cdiv(lines, tl.num_programs(2))
                real = row < count
                x_at = x + (first + row)[:, None] * x_row + at[None, :]
                to = shrunk + ((split * tl.num_programs(1) + module) * tokens + first + row)[:, None] * ranks
                for low in range(0, rank, RANKS):
                    own = low + tl.arange(0, RANKS)
                    sums = tl.zeros([ROWS, RANKS], tl.float32)
                    for line in range(split * each, tl.minimum((split + 1) * each, lines)):
                        place = _lines(
                            pages,
                            tables + slot * table_width,
                            start + own * lines + line,
                            blocks,
                            values_at,
                            PIECE,
                            LINE,
                            own < rank,
                        )
                        a = tl.load(place[None, :] + at[:, None], mask=(own < rank)[None, :], other=0.0)
                        inside = real[:, None] & (line * LINE + at < inner)[None, :]
                        sums = tl.dot(tl.load(x_at + line * LINE, mask=inside, other=0.0), a, sums, input_precision="ieee")
                    tl.store(to + own[None, :], sums, mask=real[:, None] & (own < rank)[None, :])

    @triton.jit(do_not_specialize=[*PLAIN, "out_a", "out_b", "out_c", "splits"])
    def _expand(
        y, pages, shrunk, runs, metas, tables, runs_row, out_a, out_b, out_c, y_row, values_at, tokens, ranks, table_width,
        first_module, splits,
        META: tl.constexpr, PIECE: tl.constexpr, LINE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """Add B (A x) to `WIDTH` lines of one module's output, for one run. The splits are added in order."""
        run, module, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        slot = tl.load(runs + 2 * runs_row + run)
        out = tl.where(module == 0, out_a, tl.where(module == 1, out_b, out_c))
        if (slot >= 0) & (part * WIDTH * LINE < out):
            start = tl.load(metas + slot * META + 3 + 2 * (first_module + module))
            if start >= 0:
                first, count = tl.load(runs + run), tl.load(runs + runs_row + run)
                rank, blocks = tl.load(metas + slot * META), tl.load(metas + slot * META + 1)
                row, at, lines = tl.arange(0, ROWS), tl.arange(0, LINE), tl.cdiv(out, LINE)
                real = row < count
                begin = tl.where(module == 0, 0, tl.where(module == 1, out_a, out_a + out_b))
                y_at = y + (first + row)[:, None] * y_row + begin + at[None, :]
                for line in range(part * WIDTH, tl.minimum((part + 1) * WIDTH, lines)):
                    inside = real[:, None] & (line * LINE + at < out)[None, :]
                    sums = tl.load(y_at + line * LINE, mask=inside, other=0.0).to(tl.float32)
                    for low in range(0, rank, RANKS):
                        own = low + tl.arange(0, RANKS)
                        known = real[:, None] & (own < rank)[None, :]
                        hidden = tl.zeros([ROWS, RANKS], tl.float32)
                        for split in range(splits):
                            of = shrunk + ((split * tl.num_programs(1) + module) * tokens + first + row)[:, None] * ranks
                            hidden += tl.load(of + own[None, :], mask=known, other=0.0)
                        place = _lines(
                            pages,
                            tables + slot * table_width,
                            start + own * lines + line,
                            blocks,
                            values_at,
                            PIECE,
                            LINE,
                            own < rank,
                        )
                        b = tl.load(place[:, None] + at[None, :], mask=(own < rank)[:, None], other=0.0)
                        sums = tl.dot(hidden.to(b.dtype), b, sums, input_precision="ieee")
                    tl.store(y_at + line * LINE, sums.to(y.dtype.element_ty), mask=inside)


def _adapt(adapted: Adapted, site: Site, x: torch.Tensor, y: torch.Tensor, cache: Cache) -> None:
    packing, (keys, values) = adapted.packing, cache
    pages = keys.view(torch.uint8).view(-1).view(x.dtype)
    values_at = (values.data_ptr() - keys.data_ptr()) // x.itemsize
    num_runs, modules, tokens = adapted.runs.shape[1], len(site.outs), len(x)
    splits = max(1, min(PROGRAMS // (num_runs * modules), packing.lines(site.inner) // 2, MOST_SPLITS))
    ranks = triton.cdiv(adapted.rank, RANKS) * RANKS
    shrunk = torch.empty(splits, modules, tokens, ranks, dtype=torch.float32, device=x.device)
    shape = {
        "META": 2 + 2 * len(MODULES), "PIECE": packing.piece, "LINE": packing.line, "RANKS": RANKS,
        "ROWS": max(RANKS, adapted.height), "num_warps": 4 if adapted.height > RANKS else 2,
    }  # fmt: skip
    places = (adapted.runs, adapted.metas, adapted.tables, adapted.runs.stride(0))
    more = (values_at, tokens, ranks, adapted.tables.shape[1], site.first)
    _shrink[(num_runs, modules, splits)](x, pages, shrunk, *places, site.inner, x.stride(0), *more, **shape)
    parts = triton.cdiv(packing.lines(max(site.outs)), WIDTH)
    outs = (*site.outs, 0, 0)[:3]
    _expand[(num_runs, modules, parts)](y, pages, shrunk, *places, *outs, y.stride(0), *more, splits, **shape, WIDTH=WIDTH)
