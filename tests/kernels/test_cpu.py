"""The native CPU bodies against the reference, on every instruction set of this machine."""

import multiprocessing
import threading
from statistics import NormalDist

import pytest
import torch

from finebits.blocks import n_blocks, row_bytes
from finebits.kernels import Rounding, Table, cpu, reference
from finebits.kernels.cpu import binding, products
from finebits.kernels.cpu import rounding as encoding
from variants import crossed

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

LEVELS = range(binding.library().finebits_level() + 1) if cpu.available() is None else []
BITS = (2, 3, 4, 8)
SHAPES = [  # (*e, m, n), block
    ((1, 16), 16),
    ((7, 129), 16),
    ((5, 300), 17),
    ((3, 333), 20),
    ((9, 1001), 64),
    ((33, 256), 64),
    ((2, 2500), 100),
    ((3, 640), 48),
    ((4, 96), 1000),
    ((2, 3, 5, 130), 32),
]
LARGE = [((100, 256), 64), ((50, 576), 64), ((49, 1024), 128), ((33, 2304), 192), ((5, 64), 64), ((301, 130), 32)]
MODES = [("absmax", False), ("absmax", True), ("minmax", True)]


@pytest.fixture(params=LEVELS, ids=lambda i: cpu.LEVELS[i])
def level(request, monkeypatch):
    monkeypatch.setattr(binding, "level", lambda: request.param)
    return request.param


def quantiles(bits):
    """2**bits sorted levels in [-1, 1] with zero among them."""
    q = torch.tensor([NormalDist().inv_cdf((i + 0.5) / 2**bits) for i in range(2**bits)])
    q[2 ** (bits - 1)] = 0
    return q / q.abs().max()


def rounding(bits, block, mode="absmax", store="fp32", uniform=False):
    codes, g = torch.arange(2**bits, dtype=torch.uint8), torch.Generator().manual_seed(bits)
    if mode == "minmax":
        return Rounding(mode, 2**bits - 1, store, True, 0, torch.empty(0), codes, bits, block)
    if uniform:
        order = (codes.int() - 2 ** (bits - 1)).to(torch.uint8) & (2**bits - 1)
        return Rounding(mode, 2 ** (bits - 1) - 0.5, store, True, -(2 ** (bits - 1)), torch.empty(0), order, bits, block)
    q = quantiles(bits)
    return Rounding(mode, 1.0, store, False, 0, (q[1:] + q[:-1]) / 2, codes[torch.randperm(2**bits, generator=g)], bits, block)


def table(shape, bits, block, store=torch.float32, shift=False, seed=0):
    *lead, n = shape
    g = torch.Generator().manual_seed(seed)
    k = n_blocks(n, block)
    codes = torch.randint(0, 256, (*lead, row_bytes(n, bits)), generator=g, dtype=torch.uint8)
    scale = (torch.rand(*lead, k, generator=g) + 0.1).to(store)
    return Table(codes, scale, torch.randn(*lead, k, generator=g) if shift else None, quantiles(bits), bits, block, n)


def weight(shape, seed=0):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    W[..., 0, : shape[-1] // 2] = 0
    W[..., -1, 3] = 1e-41
    return W


@pytest.mark.parametrize("bits, shape, block, mode, uniform", crossed(range(1, 9), SHAPES, MODES))
def test_quantize_is_the_reference_bit_for_bit(level, shape, block, bits, mode, uniform):
    for dtype, store in [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")]:
        r, W = rounding(bits, block, mode, store, uniform), weight(shape).to(dtype)
        for ours, theirs in zip(cpu.quantize(W, r), reference.quantize(W, r)):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


def test_quantize_of_special_values(level):
    W = weight((6, 200))
    W[0, 3], W[1, 70], W[2, 199], W[3, 5] = torch.inf, -torch.inf, torch.nan, 3e38
    W[4] = torch.nan
    W[5] = 1e-39
    for bits in BITS:
        for r in (rounding(bits, 64), rounding(bits, 64, uniform=True)):
            for ours, theirs in zip(cpu.quantize(W, r)[:2], reference.quantize(W, r)[:2]):
                assert torch.equal(ours, theirs)


def test_values_on_a_midpoint_round_as_the_reference_rounds_them(level):
    for bits in BITS:
        r = rounding(bits, 512)
        W = torch.cat([r.mids, r.mids.nextafter(torch.tensor(2.0)), r.mids.nextafter(torch.tensor(-2.0)), torch.tensor([1.0])])[None]
        assert torch.equal(cpu.quantize(W, r)[0], reference.quantize(W, r)[0])
        u = rounding(bits, 512, uniform=True)._replace(peak=1.0)
        W = torch.arange(-u.peak, u.peak, 0.25)[None]
        assert torch.equal(cpu.quantize(W, u)[0], reference.quantize(W, u)[0])


def test_quantize_of_a_view(level, monkeypatch):
    monkeypatch.setattr(encoding, "COPIED_BYTES", 4096)
    for W in (weight((130, 70)).mT, weight((3, 130, 70)).mT, weight((40, 200))[:, 8:150]):
        for ours, theirs in zip(cpu.quantize(W, rounding(4, 32))[:2], reference.quantize(W, rounding(4, 32))[:2]):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits, shape, block, shift", crossed(range(1, 9), SHAPES, (False, True)))
def test_dequantize_is_the_reference_bit_for_bit(level, shape, block, bits, shift):
    for store in binding.DTYPES:
        t = table(shape, bits, block, store, shift)
        for dtype in binding.DTYPES:
            expected = reference.dequantize(t, dtype)
            assert torch.equal(cpu.dequantize(t, dtype), expected)
            out = torch.empty_like(expected)
            assert cpu.dequantize(t, dtype, out=out) is out and torch.equal(out, expected)


def test_dequantize_keeps_subnormal_numbers_and_nan(level):
    t = table((3, 200), 4, 64)
    t.scale[0] *= 1e-38
    t.scale[1] *= torch.inf
    for dtype in binding.DTYPES:
        assert torch.equal(cpu.dequantize(t, dtype).nan_to_num(7), reference.dequantize(t, dtype).nan_to_num(7))


def error(y, x, W):
    """Relative to the size of the terms, so that a sum that cancels says nothing."""
    x = x.double()
    return ((y.double() - x @ W).norm() / (x.abs() @ W.abs()).norm()).item()


@pytest.mark.parametrize("bits, shape, block, transposed", crossed(BITS, SHAPES[:-1], (False, True)))
def test_linear_is_as_close_to_the_product_as_the_reference(level, shape, block, bits, transposed):
    fp32, fp16, bf16 = (torch.float32, 1e-6), (torch.float16, 5e-5), (torch.bfloat16, 1e-4)
    cases = [(False, 1, torch.float32, bf16), (True, 3, torch.bfloat16, bf16), (False, 13, torch.float16, bf16)]
    cases += [(True, 2, torch.float32, fp32), (False, 5, torch.float32, fp16), (True, 130, torch.float32, fp32)]
    for shift, tokens, store, (dtype, slack) in cases:
        t = table(shape, bits, block, store, shift)
        W = reference.dequantize(t, torch.float32).double()
        x = torch.randn(tokens, shape[0] if transposed else shape[1], generator=torch.Generator().manual_seed(1))
        x = x.to(dtype)
        y, expected = cpu.linear(x, t, transposed), reference.linear(x, t, transposed)
        assert y.dtype == dtype and y.shape == expected.shape
        few = y.numel() < 8  # nothing to average over: each may round the other way
        assert error(y, x, W if transposed else W.mT) <= error(expected, x, W if transposed else W.mT) + slack * (5 if few else 1)


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.float16, 5e-5)])
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_few_tokens_on_packed_codes(level, bits, dtype, slack):
    for (m, n), block, store in [
        ((5, 64), 32, torch.float32),
        ((9, 700), 64, torch.bfloat16),
        ((6, 514), 192, torch.float16),
        ((33, 128), 128, torch.float32),
    ]:
        t = table((m, n), bits, block, store, shift=n == 700)
        W = reference.dequantize(t, torch.float32).double().mT
        for tokens in (1, 2, 3, 4, 5):
            x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(tokens)) * torch.logspace(-3, 3, n)
            x = x.to(dtype)
            assert error(cpu.linear(x, t), x, W) <= error(reference.linear(x, t, False), x, W) + slack


@pytest.mark.parametrize("bits", (5, 6, 8))
@pytest.mark.parametrize("first, same", [(0.0, 0), (-127.0, 1), (-15.0, 3)])
def test_levels_that_lie_one_apart(level, bits, first, same):
    """The last of them may be the same: integers that are symmetric leave codes over."""
    count = 2**bits
    levels = first + torch.arange(float(count)).clamp(max=count - 1 - same)
    for (m, n), block, shift in [((5, 64), 32, False), ((9, 700), 64, True), ((6, 514), 192, False), ((3, 96), 17, True)]:
        t = table((m, n), bits, block, torch.bfloat16, shift)._replace(levels=levels)
        for dtype in binding.DTYPES:
            assert torch.equal(cpu.dequantize(t, dtype), reference.dequantize(t, dtype))
        W = reference.dequantize(t, torch.float32).double().mT
        for tokens, dtype in [(1, torch.float32), (1, torch.bfloat16), (4, torch.float16), (3, torch.float32), (9, torch.bfloat16)]:
            x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            slack = {torch.float32: 1e-6, torch.float16: 5e-5, torch.bfloat16: 1e-4}[dtype]
            assert error(cpu.linear(x, t), x, W) <= error(reference.linear(x, t, False), x, W) + slack


def test_numbers_that_integers_do_not_hold(level):
    t, x = table((7, 256), 4, 64), torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    for value in (torch.inf, torch.nan):
        v = x.clone()
        v[0, 70] = value
        for dtype in (torch.float32, torch.bfloat16):
            torch.testing.assert_close(
                cpu.linear(v.to(dtype), t), reference.linear(v.to(dtype), t, False), equal_nan=True, rtol=0.02, atol=0.02
            )
    tiny = (x * 1e-38).bfloat16()
    assert cpu.linear(tiny, t).abs().max() < 1e-35
    assert torch.equal(cpu.linear(torch.zeros_like(x), t), torch.zeros(1, 7))


@pytest.mark.parametrize("transposed", [False, True])
def test_some_tokens_in_float32(level, transposed):
    for m, n, block, bits in [(100, 576, 64, 4), (35, 301, 16, 3), (49, 520, 100, 8), (289, 64, 32, 2)]:
        t = table((m, n), bits, block, torch.bfloat16, shift=bits == 3)
        W = reference.dequantize(t, torch.float32).double()
        W = W if transposed else W.mT
        for tokens in (5, 6, 17, 200):
            x = torch.randn(tokens, len(W), generator=torch.Generator().manual_seed(tokens))
            assert error(cpu.linear(x, t, transposed), x, W) <= error(reference.linear(x, t, transposed), x, W) + 1e-6


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("tokens", range(1, 28))
def test_every_number_of_tokens(level, bits, tokens):
    t, x = table((35, 700), bits, 64, shift=True), torch.randn(tokens, 700, dtype=torch.bfloat16)
    W = reference.dequantize(t, torch.float32).double().mT
    assert error(cpu.linear(x, t, False), x, W) <= error(reference.linear(x, t, False), x, W) + 1e-4


@pytest.mark.parametrize("bits, shape, block, transposed", crossed(BITS, LARGE, (False, True)))
def test_bfloat16_products_of_many_tokens(level, shape, block, bits, transposed):
    cases = [(torch.float32, False, (9, 16, 48)), (torch.bfloat16, True, (17, 64)), (torch.float16, False, (33, 65, 130))]
    for store, shift, counts in cases:
        t = table(shape, bits, block, store, shift)
        W = reference.dequantize(t, torch.float32).double()
        W = W if transposed else W.mT
        for tokens in counts:
            x = torch.randn(tokens, len(W), generator=torch.Generator().manual_seed(tokens)).bfloat16()
            assert error(cpu.linear(x, t, transposed), x, W) <= error(reference.linear(x, t, transposed), x, W) + 1e-4


@pytest.mark.parametrize("tokens", [5, 8, 9, 64, 65])
@pytest.mark.parametrize("block", [48, 64])
def test_bfloat16_dot_products_take_every_number_of_tokens(level, block, tokens):
    """They round the weight to bfloat16, here to 1, so that its differences cancel; float32 is several times as slow there."""
    if cpu.LEVELS[level] != "avx512":
        pytest.skip("the other instruction sets multiply in float32")
    levels = torch.tensor([1 + 2**-9, 1.0]).repeat(8)
    t = Table(torch.full((20, 96), 0x10, dtype=torch.uint8), torch.ones(20, n_blocks(192, block)), None, levels, 4, block, 192)
    x = torch.tensor([1.0, -1.0]).repeat(tokens, 96).bfloat16()
    assert torch.equal(cpu.linear(x, t), torch.zeros(tokens, 20, dtype=torch.bfloat16))


@pytest.mark.parametrize("transposed", [False, True])
def test_more_tokens_than_one_pass(level, transposed):
    t = table((40, 192), 4, 64)
    x = torch.randn(1100, 40 if transposed else 192).bfloat16()
    parts = torch.cat([cpu.linear(v, t, transposed) for v in x.split(110)])
    torch.testing.assert_close(cpu.linear(x, t, transposed), parts, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_panels_for_the_product_of_torch(level, transposed, monkeypatch):
    monkeypatch.setattr(products, "most_tokens", lambda dtype: 0)
    monkeypatch.setattr(products, "PANEL_BYTES", 8192)
    for dtype in binding.DTYPES:
        t, x = table((300, 136), 3, 16, shift=True), torch.randn(50, 300 if transposed else 136).to(dtype)
        W = reference.dequantize(t, torch.float32).double()
        W = W if transposed else W.mT
        assert error(cpu.linear(x, t, transposed), x, W) <= error(reference.linear(x, t, transposed), x, W) + 1e-4


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_broadcast_as_in_matmul(level, transposed):
    t = table((2, 3, 6, 96), 4, 32)
    inputs = 6 if transposed else 96
    for lead in [(), (5,), (3, 5), (2, 3, 5), (4, 2, 3, 1), (2, 1, 40)]:
        x = torch.randn(*lead, inputs)
        torch.testing.assert_close(cpu.linear(x, t, transposed), reference.linear(x, t, transposed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_panels_and_views_change_nothing(level, tokens, monkeypatch):
    t, x = table((300, 130), 3, 16, shift=True), torch.randn(130, tokens).mT
    for transposed, v in ((False, x), (True, torch.randn(300, tokens).mT)):
        whole = cpu.linear(v, t, transposed)
        with monkeypatch.context() as m:
            m.setattr(products, "PANEL_BYTES", 8192)
            torch.testing.assert_close(cpu.linear(v, t, transposed), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 96), (96,), (2, 40, 96)])
def test_gradient_of_x(level, shape):
    for t in (table((7, 96), 4, 32), table((3, 1, 7, 96), 2, 32)):
        x = torch.randn(*shape, requires_grad=True)
        y = cpu.linear(x, t, False)
        g = torch.randn_like(y)
        expected = torch.autograd.grad(reference.linear(x, t, False), x, g)
        torch.testing.assert_close(torch.autograd.grad(y, x, g), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_scale_goes_through_the_reference(level):
    t = table((7, 96), 4, 32)
    t = t._replace(scale=t.scale.requires_grad_())
    cpu.linear(torch.randn(2, 96), t, False).sum().backward()
    assert t.scale.grad is not None


def test_no_thread_count_changes_a_bit(level):
    before = torch.get_num_threads()
    t, x = table((513, 1000), 4, 64), torch.randn(9, 1000, dtype=torch.bfloat16)
    W = weight((400, 700))
    even, many = table((513, 1024), 4, 64), torch.randn(70, 1024, dtype=torch.bfloat16)

    def all_jobs():
        products = [cpu.linear(many[:n], even) for n in (1, 10, 40, 70)] + [cpu.linear(many[:n, :513], even, True) for n in (1, 40)]
        products += cpu.linear(x, t), cpu.linear(x[:, :513], t, True)
        return *products, cpu.dequantize(t, torch.bfloat16), *cpu.quantize(W, rounding(4, 64))[:2]

    try:
        torch.set_num_threads(1)
        alone = all_jobs()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(alone, all_jobs()))
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once(level):
    t, xs = table((200, 512), 4, 64), [torch.randn(50, 512).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    expected, wrong = [cpu.linear(x, t) for x in xs], []

    def work():
        for _ in range(20):
            if not all(torch.equal(cpu.linear(x, t), y) for x, y in zip(xs, expected)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def raw(*tensors):
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors]


def in_child(t, x, queue):
    # None of torch's own operators: their threads do not live in a forked child.
    queue.put(raw(cpu.linear(x, t), cpu.dequantize(t, torch.float32)))


def test_a_forked_child_still_runs(level):
    t, x = table((600, 100), 4, 64), torch.randn(3, 100, dtype=torch.bfloat16)
    expected, context = raw(cpu.linear(x, t), cpu.dequantize(t, torch.float32)), multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(t, x, queue), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=30) == expected
    finally:
        child.kill()


def test_a_kept_table_follows_its_tensors_where_they_move(level):
    t, x = table((7, 96), 4, 32), torch.randn(2, 96)
    before = cpu.linear(x, t)
    t.codes.share_memory_()
    t.scale.share_memory_().mul_(2)
    torch.testing.assert_close(cpu.linear(x, t), 2 * before)
    torch.testing.assert_close(cpu.linear(x, t._replace(scale=t.scale / 2)), before)


def test_wrong_shapes_are_refused():
    t = table((7, 96), 4, 32)
    with pytest.raises(ValueError, match="96 columns"):
        cpu.linear(torch.randn(2, 95), t)
    with pytest.raises(ValueError, match="bytes a row"):
        cpu.dequantize(t._replace(n=98), torch.float32)
    with pytest.raises(ValueError, match="scales"):
        cpu.dequantize(t._replace(block=64), torch.float32)
    with pytest.raises(ValueError, match="out must be"):
        cpu.dequantize(t, torch.float32, out=torch.empty(7, 95))
