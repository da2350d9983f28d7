"""Jobs of a program against what they are in torch, on every instruction set of this machine."""

import pytest
import torch
import torch.nn.functional as F

import finebits as fb
from finebits.errors import Invalid
from finebits.kernels.cpu import LEVELS, binding, program

if program.body() is None:
    pytest.skip("the CPU kernels are not compiled, or were before they had this", allow_module_level=True)


@pytest.fixture(params=range(binding.library().finebits_level() + 1), ids=lambda i: LEVELS[i])
def level(request, monkeypatch):
    monkeypatch.setattr(program, "level", lambda: request.param)
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def done(job, *args):
    made = program.Program()
    getattr(made, job)(*args)
    made.run()
    made.run()  # buffers stay: again is the same, but for what adds up
    return made


@pytest.mark.parametrize(("rows", "n"), [(1, 576), (3, 20), (2, 7)])
def test_norm(level, rows, n):
    x, w, y = drawn(rows, n), drawn(n, seed=1), torch.empty(rows, n)
    done("norm", x, y, w, 1e-5)
    torch.testing.assert_close(y, F.rms_norm(x, (n,), w, 1e-5), atol=1e-5, rtol=1e-5)
    heads = drawn(rows, 4 * n)
    wanted = F.rms_norm(heads.view(rows, 4, n), (n,), w, 1e-5).view(rows, -1)
    made = program.Program()
    made.norm(heads, heads, w, 1e-5)  # of every head, in place
    made.run()
    torch.testing.assert_close(heads, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", program.ACTS)
@pytest.mark.parametrize(("rows", "n"), [(1, 1536), (3, 21), (2, 5000)])
def test_gate(level, rows, n, act):
    own = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}[act]
    both, y = 20 * drawn(rows, 2 * n), torch.empty(rows, n)
    g, u = both[:, :n], both[:, n:]
    g[0, :3] = torch.tensor([-200.0, 200.0, torch.nan])
    done("gate", g, u, y, act)
    torch.testing.assert_close(y, own(g) * u, atol=2e-5, rtol=2e-6, equal_nan=True)
    done("gate", g, None, y, act)
    torch.testing.assert_close(y, own(g), atol=2e-6, rtol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "m", "n"), [(1, 50, 576), (3, 7, 1030), (2, 1, 5)])
def test_dense(level, b, m, n, dtype):
    x, W, y = drawn(b, n), drawn(m, n, seed=1).to(dtype), torch.empty(b, m)
    done("dense", x, W, y)
    torch.testing.assert_close(y, x @ W.float().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", [fb.NF(4), fb.Int(4, block=32), fb.NF(3, block=32), fb.NF(2), fb.Int(8)])
@pytest.mark.parametrize("near", [False, True])
def test_product_exactly_or_as_near_as_16_bits(level, format, near):
    W, x, y = fb.quantize(drawn(50, 576), format), drawn(2, 576, seed=1), torch.empty(2, 50)
    table = W.table()
    assert table is not None
    done("product", x, table, y, near)
    wanted = x.double() @ W.dequantize(torch.float32).double().T
    off = (y - wanted).abs().max() / wanted.abs().max()
    assert off < (1e-6 if not near else 1e-4 if LEVELS[level] != "avx512" else 2e-2)


def test_low_rank_and_add(level):
    x, y, L, R, b = drawn(3, 40), drawn(3, 30, seed=1), drawn(30, 4, seed=2), drawn(4, 40, seed=3), drawn(30, seed=4)
    wanted, made = y + x @ R.T @ L.T + b + 1, program.Program()
    made.low_rank(x, y, L, R)
    made.add(b, y)
    made.add(torch.ones(3, 30), y)
    made.run()
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("turned", "width"), [(64, 64), (16, 24), (6, 6)])
def test_a_step_of_attention(level, turned, width):
    b, heads, kv, t = 2, 6, 3, 9
    q, k, v = drawn(b, heads * width), drawn(b, kv * width, seed=1), drawn(b, kv * width, seed=2)
    store, before = drawn(b, 2, t + 3, kv, width, seed=3), torch.tensor([t, 4])
    angle = drawn(t + 3, turned // 2, seed=4).repeat(1, 2)
    cos, sin, lengths, out = angle.cos(), angle.sin(), before.clone(), torch.empty(b, heads * width)

    def turn(x, count):
        x = x.view(b, count, width).clone()
        for r, at in enumerate((before - 1).tolist()):
            y = x[r, :, :turned]
            a, c = y.chunk(2, -1)
            x[r, :, :turned] = y * cos[at] + torch.cat([-c, a], -1) * sin[at]
        return x

    turned_q, turned_k, expected = turn(q, heads), turn(k, kv), store.clone()
    wanted = []
    for r, n in enumerate(before.tolist()):
        expected[r, 0, n - 1], expected[r, 1, n - 1] = turned_k[r], v.view(b, kv, width)[r]
        keys, values = (expected[r, i, :n].transpose(0, 1)[None] for i in (0, 1))
        wanted.append(F.scaled_dot_product_attention(turned_q[r][None, :, None], keys, values, enable_gqa=True).flatten())
    made = program.Program()
    made.rotate(q, heads, cos, sin, lengths)
    made.rotate(k, kv, cos, sin, lengths)
    made.attend(q, k, v, out, store, torch.arange(b)[:, None], lengths, heads, width**-0.5)
    made.run()
    torch.testing.assert_close(out, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(store, expected, atol=1e-6, rtol=1e-6)


def test_what_does_not_lie_together_is_refused():
    with pytest.raises(Invalid, match="does not lie together"):
        program.Program().add(torch.ones(4, 6).T, torch.ones(6, 4))
