"""`grouped`: rows of different adapters, of every rank, through one layer, over factors in pages of a pool.

S-LoRA: Serving Thousands of Concurrent LoRA Adapters.  Sheng et al., MLSys 2024.  arXiv:2311.03285v3, section 5.3 (MBGMV, MBGMM).

    shrink    h (t, r) = x (t, n) Aᵀ            a program: rows of one adapter, some vectors of its A
    expand    y (t, m) += s · h Bᵀ              a program: rows of one adapter, some columns of y

A program finds its vectors where they lie: the pieces of both factors are told to the device in words, once for an adapter, and the rows of a
step in tiles of four words (first row, row after the last, where the adapter's words begin, its rank) for every module. No rank is padded but to
the vectors of a tile. Few rows multiply in float32 lanes, many in tensor cores, where h is rounded to x.dtype as it is between two products of
torch.

Bytes: every factor once for each tile of rows; x once for every LINES vectors of A; y twice; h, in float32, written once and read for every COLS
columns.

Deviations: a factor's vectors are found by its pieces, not by a page each (a page holds many).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finebits.kernels.cuda.language import dot, rounded
from finebits.kernels.cuda.launch import FLOATS, launch, on, power
from finebits.kernels.laid import Group, Groups, Laid, Resident

FEW = 4  # rows of an adapter that are multiplied in lanes, where no adapter has more
MANY = 16  # rows of a tile of tensor cores
LINES = 16  # vectors of a tile
HEAD = 3  # words before an adapter's pieces: its scale, and how many pieces A and B have


@triton.jit
def _vectors(words, at, count, line, length):
    """Where these vectors begin in the pool, of a factor in `count` pieces (first element, vectors) from words[at] on."""
    found = line.to(tl.int64) * 0
    first = at * 0
    for piece in range(count.to(tl.int32)):
        begin = tl.load(words + at)
        vectors = tl.load(words + at + 1)
        inside = (line >= first) & (line < first + vectors)
        found = tl.where(inside, begin + (line - first) * length, found)
        first += vectors
        at += 2
    return found


@triton.jit
def _shrink(h, x, pages, words, tiles, n, width, ROWS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, HEAD: tl.constexpr):
    """h (t, width) = x (t, n) Aᵀ, for ROWS rows and LINES vectors; programs: tiles of rows, of vectors."""
    tile = tiles + tl.program_id(0) * 4
    row = tl.load(tile) + tl.arange(0, ROWS)
    stop = tl.load(tile + 1)
    at = tl.load(tile + 2)
    rank = tl.load(tile + 3)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    if tl.program_id(1) * LINES < rank:
        start = _vectors(words, at + HEAD, tl.load(words + at + 1), line, n)
        acc = tl.zeros((ROWS, LINES), tl.float32)
        for begin in range(0, n, COLS):
            col = begin + tl.arange(0, COLS)
            v = tl.load(x + row[:, None] * n + col[None, :], mask=(row < stop)[:, None] & (col < n)[None, :], other=0.0)
            a = tl.load(pages + start[:, None] + col[None, :], mask=(line < rank)[:, None] & (col < n)[None, :], other=0.0)
            if ROWS < 16:
                acc += tl.sum(v.to(tl.float32)[:, None, :] * a.to(tl.float32)[None, :, :], 2)
            else:
                acc += dot(v, tl.trans(a))
        tl.store(h + row[:, None] * width + line[None, :], acc, mask=(row < stop)[:, None] & (line < rank)[None, :])


@triton.jit
def _expand(y, h, pages, words, tiles, m, width, ROWS: tl.constexpr, LINES: tl.constexpr, COLS: tl.constexpr, HEAD: tl.constexpr):
    """y (t, m) += s · h Bᵀ, for ROWS rows and COLS columns; programs: tiles of rows, of columns."""
    tile = tiles + tl.program_id(0) * 4
    row = tl.load(tile) + tl.arange(0, ROWS)
    stop = tl.load(tile + 1)
    at = tl.load(tile + 2)
    rank = tl.load(tile + 3).to(tl.int32)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if rank > 0:
        scale = tl.load(words + at).to(tl.int32).to(tl.float32, bitcast=True)
        pieces = at + HEAD + 2 * tl.load(words + at + 1)
        count = tl.load(words + at + 2)
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for begin in range(0, rank, LINES):
            line = begin + tl.arange(0, LINES)
            start = _vectors(words, pieces, count, line, m)
            b = tl.load(pages + start[:, None] + col[None, :], mask=(line < rank)[:, None] & (col < m)[None, :], other=0.0)
            c = tl.load(h + row[:, None] * width + line[None, :], mask=(row < stop)[:, None] & (line < rank)[None, :], other=0.0)
            if ROWS < 16:
                acc += tl.sum(c[:, :, None] * b.to(tl.float32)[None, :, :], 1)
            else:
                acc += dot(rounded(c, b.dtype), b)
        to = y + row[:, None] * m + col[None, :]
        mask = (row < stop)[:, None] & (col < m)[None, :]
        tl.store(to, rounded(tl.load(to, mask=mask, other=0.0).to(tl.float32) + scale * acc, y.dtype.element_ty), mask=mask)


class Placed(NamedTuple):
    """Groups of a step as the device has them: the pool, words of all their adapters, tiles of rows (modules, tiles, 4) and how many rows one
    has, and by module its place among them and the largest rank."""

    pages: Tensor
    words: Tensor
    tiles: Tensor
    rows: int
    at: dict[str, tuple[int, int]]


def words_of(laid: Laid) -> list[int]:
    """Scale, pieces of A, pieces of Bᵀ, and (first element in the pool, vectors) of each.

    >>> pages = torch.zeros(3, 8)
    >>> words_of(Laid((pages[1, :4].view(1, 4),), (pages[1, 4:6].view(1, 2), pages[2, :2].view(1, 2)), 1.0))[1:]
    [1, 2, 8, 1, 12, 1, 16, 1]
    """
    (scale,) = struct.unpack("<i", struct.pack("<f", laid.s))
    return [scale, len(laid.A), len(laid.B), *(word for p in (*laid.A, *laid.B) for word in (p.storage_offset(), len(p)))]


def _told(adapter: Resident) -> tuple[Tensor, dict[str, int]]:
    """Words of an adapter over all its modules, and where those of each begin."""
    kept = adapter.__dict__
    if "told" not in kept:
        words, begins = list[int](), dict[str, int]()
        for module, laid in adapter.at.items():
            begins[module] = len(words)
            words += words_of(laid)
        kept["told"] = torch.tensor(words), begins
    return kept["told"]


def placed(groups: Groups, device: torch.device, half: bool) -> Placed:
    """Of the groups that have an adapter; some has."""
    mine = [(group, group.adapter) for group in groups if group.adapter is not None]
    rows = max(group.stop - group.start for group, _ in mine)
    rows = MANY if half and rows > FEW else min(power(rows), FEW)
    told, bases, size = list[Tensor](), dict[int, int](), 0
    for _, adapter in mine:
        if id(adapter) not in bases:
            told.append(_told(adapter)[0])
            bases[id(adapter)] = size
            size += len(told[-1])
    tiles, at = list[list[tuple[int, int, int, int]]](), dict[str, tuple[int, int]]()
    for module in dict.fromkeys(module for _, adapter in mine for module in adapter.at):
        of, most = list[tuple[int, int, int, int]](), 0
        for group, adapter in mine:
            laid = adapter.at.get(module)
            begin, rank = (0, 0) if laid is None else (bases[id(adapter)] + _told(adapter)[1][module], laid.rank)
            of += [(start, group.stop, begin, rank) for start in range(group.start, group.stop, rows)]
            most = max(most, rank)
        at[module] = len(tiles), most
        tiles.append(of)
    pool = next(iter(mine[0][1].at.values())).A[0]
    pages = pool.new_empty(0).set_(pool.untyped_storage())
    return Placed(pages, torch.cat(told).to(device), torch.tensor(tiles, dtype=torch.long).to(device), rows, at)


def grouped(x: Tensor, y: Tensor, groups: Groups, module: str) -> Sequence[Group]:
    """y (t, m) += s·(x Aᵀ) Bᵀ in place, of the rows of x (t, n) that are an adapter's over this module. Nothing is left."""
    laid = next((group.adapter.at[module] for group in groups if group.adapter is not None and module in group.adapter.at), None)
    if laid is None:
        return ()
    if not (x.dtype == y.dtype == laid.A[0].dtype and x.dtype in FLOATS and x.is_contiguous() and y.is_contiguous()):
        return groups
    kept = groups.__dict__
    if "placed" not in kept:
        kept["placed"] = placed(groups, x.device, x.dtype != torch.float32)
    it: Placed = kept["placed"]
    place, rank = it.at[module]
    tiles, n, m = it.tiles[place], x.shape[1], y.shape[1]
    lines = -(-rank // LINES)
    h = torch.empty(len(x), lines * LINES, dtype=torch.float32, device=x.device)
    cols = 128 if it.rows < MANY else 64
    with on(x.device):
        constants = (it.rows, LINES, cols, HEAD)
        launch(_shrink, (len(tiles), lines, 1), (h, x, it.pages, it.words, tiles), (n, lines * LINES), constants, num_warps=4)
        launch(_expand, (len(tiles), -(-m // cols), 1), (y, h, it.pages, it.words, tiles), (m, lines * LINES), constants, num_warps=4)
    return ()
