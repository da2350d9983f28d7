"""The Triton bodies against the reference: on a GPU where there is one, else under Triton's interpreter in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from finebits import kernels  # noqa: E402
from finebits.blocks import n_blocks, row_bytes  # noqa: E402
from finebits.kernels import cuda, reference  # noqa: E402
from finebits.kernels.cuda import decode, fragments  # noqa: E402
from finebits.kernels.laid import Group, Groups  # noqa: E402
from finebits.kernels.table import Rounding, Table  # noqa: E402
from finebits.merging.base import Factors  # noqa: E402
from finebits.serve.grouped import lay  # noqa: E402
from finebits.serve.grouped import reference as by_row  # noqa: E402
from finebits.serve.pages import Pool  # noqa: E402
from variants import crossed  # noqa: E402

RUNS = cuda.available() is None
DEVICE = "cpu" if cuda.INTERPRETED else "cuda"
needs_body = pytest.mark.skipif(not RUNS, reason=f"{cuda.available()}; the interpreter runs these tests in a process of its own")
BITS = (2, 3, 4, 8)
# (*e, m, n), block: whole units; a short last block; odd n; blocks across bytes; experts; one block a row.
SHAPES = [((5, 128), 64), ((3, 104), 32), ((3, 37), 16), ((2, 50), 19), ((2, 3, 48), 16), ((4, 70), 128)]

# Odd all over; blocks across bytes; experts; one scale a group of columns; several scales a group; both for experts.
LINEAR = [((5, 37), 16, 1), ((3, 50), 19, 3), ((2, 3, 48), 16, 2), ((19, 320), 64, 1), ((20, 192), 48, 9), ((2, 8, 64), 32, 2)]


@pytest.mark.skipif(RUNS, reason="the tests below run here")
def test_interpreted(request):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider", __file__]
    command += ["-m", request.config.option.markexpr]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1", "FINEBITS_SHAPES": "off"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_nothing_wraps_what_triton_compiles():
    assert fragments._fragments.fn.__globals__ is vars(fragments)  # a wrapper's globals have no `tl`


def test_without_triton_the_body_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "cuda", cuda)  # put back at the end, as are the modules
    for name in [name for name in sys.modules if name.startswith("finebits.kernels.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert importlib.import_module("finebits.kernels.cuda").available() == "triton is not installed"


def uneven(bits: int) -> torch.Tensor:
    """Sorted levels with no pattern that a decoder could get right by luck."""
    return (torch.randn(2**bits, generator=torch.Generator().manual_seed(bits)).sort().values).float()


def rounding(bits: int, block: int, mode: str, store: str, uniform: bool) -> Rounding:
    levels = uneven(bits)
    order = torch.randperm(2**bits, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    first = 0 if mode == "minmax" else -(2 ** (bits - 1))
    peak = 2.0**bits - 1 if mode == "minmax" else 2.0 ** (bits - 1) - 1 if uniform else 1.7
    return Rounding(mode, peak, store, uniform, first, (levels[1:] + levels[:-1]) / 2, order, bits, block)


def table(shape: tuple[int, ...], block: int, bits: int, store: torch.dtype, shifted: bool) -> Table:
    g = torch.Generator().manual_seed(sum(shape) + bits)
    *lead, n = shape
    k = n_blocks(n, block)
    codes = torch.randint(0, 256, (*lead, row_bytes(n, bits)), generator=g, dtype=torch.uint8)
    scale = (torch.rand(*lead, k, generator=g) + 0.1).to(store)
    shift = torch.randn(*lead, k, generator=g) if shifted else None
    return Table(codes, scale, shift, uneven(bits), bits, block, n)


def moved(values):
    return type(values)(*(v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Bit for bit, NaN included."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = torch.uint8 if a.element_size() == 1 else torch.int16 if a.element_size() == 2 else torch.int32
    different = (a.cpu().contiguous().view(bits) != b.contiguous().view(bits)).sum().item()
    assert different == 0


@needs_body
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape, block", SHAPES)
def test_dequantize_is_the_reference(shape, block, bits):
    for store, shifted, dtype in [
        (torch.float32, False, torch.bfloat16),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, True, torch.float16),
    ]:
        t = table(shape, block, bits, store, shifted)
        same(cuda.dequantize(moved(t), dtype), reference.dequantize(t, dtype))


@needs_body
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape, block", SHAPES)
def test_quantize_is_the_reference(shape, block, bits):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    W.view(-1)[:block].abs_().mul_(1e-30)
    W[..., -1, :] = 0
    for dtype, mode, store, uniform in [
        (torch.float32, "absmax", "fp32", False),
        (torch.bfloat16, "absmax", "bf16", True),
        (torch.float16, "minmax", "fp16", True),
        (torch.float32, "minmax", "bf16", False),
    ]:
        r = rounding(bits, block, mode, store, uniform)
        got, want = cuda.quantize(W.to(dtype).to(DEVICE), moved(r)), reference.quantize(W.to(dtype), r)
        for a, b in zip(got, want):
            assert (a is None) == (b is None)
            if a is not None:
                same(a, b)


@needs_body
@pytest.mark.parametrize("block", [16, 19])
def test_quantize_counts_nan_and_infinity_as_the_reference(block):
    W = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    W[0, 3], W[1, 20], W[2, 47], W[0, 40] = torch.nan, torch.inf, -torch.inf, torch.nan
    W[2, :block] = torch.nan
    for mode in ("absmax", "minmax"):
        r = rounding(4, block, mode, "fp32", False)
        for a, b in zip(cuda.quantize(W.to(DEVICE), moved(r)), reference.quantize(W, r)):
            assert b is None or torch.equal(a.cpu().nan_to_num(1.5, 2.5, 3.5), b.nan_to_num(1.5, 2.5, 3.5))


@needs_body
@pytest.mark.parametrize("shape, block, tokens, transposed, bits", crossed(LINEAR, (False, True), BITS))
def test_linear_is_the_reference(shape, block, tokens, transposed, bits):
    """Against the float32 product of exact weights: a half's own rounding is the only difference allowed."""
    *experts, m, n = shape
    combinations = [
        (torch.float32, torch.float16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.bfloat16, True),
    ]
    if cuda.INTERPRETED:  # it is slow: one of them, not the same for all
        combinations = combinations[(bits + n // 16) % 3 :][:1]
    for dtype, store, shifted in combinations:
        t = table(shape, block, bits, store, shifted)
        x = torch.randn(*experts, tokens, m if transposed else n, generator=torch.Generator().manual_seed(n)).to(dtype)
        want = reference.linear(x.double().float(), t, transposed)
        got = cuda.linear(x.to(DEVICE), moved(t), transposed)
        assert got.dtype == dtype and got.shape == want.shape
        error = (got.cpu().float() - want).norm() / want.norm()
        assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype], error


@needs_body
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [64, 16])
def test_fragments_put_every_weight_in_its_place(block, bits):
    """One-hot x reads W itself: a wrong place in a permutation cannot hide in a sum."""
    t = table((16, 128), block, bits, torch.float32, True)
    W = reference.dequantize(t, torch.float32)
    for start in range(0, 128, 32):
        got = cuda.linear(torch.eye(128, dtype=torch.float16, device=DEVICE)[start : start + 32], moved(t), False)
        torch.testing.assert_close(got.cpu().float(), W.mT[start : start + 32], rtol=2e-3, atol=2e-3)
    got = cuda.linear(torch.eye(16, dtype=torch.float16, device=DEVICE), moved(t), True)
    torch.testing.assert_close(got.cpu().float(), W, rtol=2e-3, atol=2e-3)


def execute(ptx: str, registers: dict[str, int]) -> dict[str, int]:
    """Runs the few PTX instructions that the decoders are made of."""

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    def prmt(a: int, b: int, selector: int) -> int:
        pool, out = (b << 32 | a).to_bytes(8, "little"), []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = pool[nibble & 7]
            out.append((255 if byte > 127 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    def lop3(a: int, b: int, c: int, table: int) -> int:
        return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))

    run = {"and.b32": int.__and__, "or.b32": int.__or__, "shr.u32": int.__rshift__, "prmt.b32": prmt, "lop3.b32": lop3}
    for line in ptx.strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name and name != ".reg":
            to, *arguments = (part.strip() for part in rest.split(","))
            registers[to] = run[name](*map(value, arguments))
    return registers


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_decoders_look_levels_up(bits):
    """The interpreter runs a look-up in place of the decoders' PTX; here the PTX itself is run."""
    g = torch.Generator().manual_seed(bits)
    levels = torch.randint(0, 2**16, (16,), generator=g).tolist()
    ptx = {2: decode._DECODE_2, 3: decode._DECODE_3, 4: decode._DECODE_4}[bits].value
    pairs = ((0, 2), (4, 6), (1, 3), (5, 7)) if bits == 3 else ((0, 1), (2, 3), (4, 5), (6, 7))
    quads = range(2**bits // 4)
    low = [sum((levels[4 * q + i] & 255) << 8 * i for i in range(4)) for q in quads]
    high = [sum((levels[4 * q + i] >> 8) << 8 * i for i in range(4)) for q in quads]
    for _ in range(20):
        codes = torch.randint(0, 2**bits, (8,), generator=g).tolist()
        word = sum(code << 4 * i for i, code in enumerate(codes))
        done = execute(ptx, {f"${4 + i}": v for i, v in enumerate([word, *low, *high])})
        assert [done[f"${i}"] for i in range(4)] == [levels[codes[a]] | levels[codes[b]] << 16 for a, b in pairs]


@needs_body
def test_linear_broadcasts_as_matmul():
    t = table((2, 5, 48), 16, 4, torch.float32, False)
    for lead in [(48,), (3, 48), (4, 1, 3, 48)]:
        x = torch.randn(*lead, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(cuda.linear(x.to(DEVICE), moved(t), False).cpu(), reference.linear(x, t, False), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="48 columns"):
        cuda.linear(torch.zeros(3, 47, device=DEVICE), moved(t), False)


@needs_body
@pytest.mark.parametrize("sizes", [(1, 2, 1), (3, 21, 1)], ids=["few", "many"])
@pytest.mark.parametrize("dtype, far", [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_rows_of_different_adapters_are_the_reference_s(sizes, dtype, far):
    """Adapters of ranks 1, 33 and 6, in pieces all over the pool, one without the second module; rows of nobody stay as they are."""
    g, pool = torch.Generator().manual_seed(0), Pool(60, 200, dtype, DEVICE)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    both = lambda r: {"q": Factors(draw(45, r), draw(r, 37) / 6, 0.5), "v": Factors(draw(20, r), draw(r, 37) / 6, 2.0)}  # noqa: E731
    spare = pool.take(3, "spare")
    laid = [lay(both(33), pool, 0)]
    pool.give(spare)  # pages need not be in order
    laid += [lay(both(1), pool, 1), lay({"q": both(6)["q"]}, pool, 2)]
    ends = [sum(sizes[:i]) for i in range(4)]
    rows = [Group(ends[0], ends[1], laid[1]), Group(ends[1], ends[2], laid[0]), Group(ends[2], ends[3], laid[2])]
    groups, t = Groups([*rows, Group(ends[3], ends[3] + 2, None)]), ends[3] + 2
    x = draw(t, 37).to(DEVICE, dtype)
    for module, m in (("q", 45), ("v", 20), ("nowhere", 8)):
        y = draw(t, m).to(DEVICE, dtype)
        want, got = by_row(x.float(), y.float(), groups, module), y.clone()
        assert len(cuda.grouped(x, got, groups, module)) == 0
        assert float((got.float() - want).norm() / want.norm()) < far
        assert torch.equal(got[ends[3] :], y[ends[3] :]) and (module != "nowhere" or torch.equal(got, y))
    strided = draw(t, 74).to(DEVICE, dtype)[:, ::2]
    assert cuda.grouped(strided, y, groups, "q") is groups  # left to torch
