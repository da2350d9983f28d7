"""Scale stores and layouts: what they hold, what they cost, and that codes are chosen under what they give back."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import finebits as fb
from finebits import registry
from finebits.formats._stores import E4M3, Clustered, Double, Pow2, dyn8
from finebits.formats.base import STORES
from finebits.plan.base import Plan, Spec

STORE = [
    *STORES,
    *(Pow2(r, o) for r in ("floor", "nearest", "ceil", "mse") for o in ("block", "row", "tensor")),
    E4M3(),
    E4M3("block"),
    Double(),
    Double(8, 4),
    Double(3, 16, "min", "bf16"),
    Double(2, 4, "zero"),
    Double(5, 16, "zero", "fp16"),
    Clustered(4),
    Clustered(64),
]
each = pytest.mark.parametrize("store", STORE, ids=str)
ODD = ((5, 168), (2, 3, 100), (1, 16))


def error(W: torch.Tensor, format: object) -> float:
    return float((fb.quantize(W, format).dequantize() - W).norm() / W.norm())


def normal(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def formats(store: object) -> list:
    return [
        fb.NF(4, 32, store),
        fb.NF(3, 16, store, unit=40),
        fb.Int(3, 32, False, store, "integer"),
        fb.Int(4, "row", True, store, "full"),
    ]


@each
def test_price_is_what_is_held(store: object) -> None:
    for format, shape in itertools.product(formats(store), ODD):
        q = fb.quantize(torch.randn(shape), format)
        assert 8 * q.nbytes == q.shape[:-2].numel() * format.storage_bits(*shape[-2:])


@each
def test_codes_are_chosen_under_the_scale_that_decodes(store: object) -> None:
    for format in formats(store):
        W = normal(5, 168)
        q = fb.quantize(W, format)
        scales = format.scales(q.parts, 168)
        assert torch.equal(q.codes(), format.encode(W, scales)) and torch.equal(q.dequantize(), format.decode(q.codes(), scales))
        worse = (format.decode(q.codes() ^ 1, scales) - W).abs() < (q.dequantize() - W).abs() * (1 - 1e-5) - 1e-6
        assert not worse.any()


@each
def test_rows_experts_and_products(store: object) -> None:
    for format in formats(store):
        W = torch.randn(3, 4, 100)
        q = fb.quantize(W, format)
        assert torch.equal(q[1].dequantize(), fb.quantize(W[1], format).dequantize())
        one, w = q[1], q.dequantize()[1]
        assert torch.equal(one[1:3].dequantize(), w[1:3]) and torch.equal(torch.cat([p.dequantize() for p in one.split(3)]), w)
        assert one.new_zeros(6, 100).dequantize().abs().max() < 1e-37  # an exponent byte of 0 is 2^-127
        x = torch.randn(2, 100, requires_grad=True)
        y = torch.nn.functional.linear(x, one)
        y.sum().backward()
        torch.testing.assert_close(y, x @ w.T)
        torch.testing.assert_close(x.grad, w.sum(0).expand(2, -1))


@each
def test_a_shard_of_rows_becomes_whole_again(store: object) -> None:
    q = fb.quantize(normal(6, 96), fb.NF(4, 32, store))
    shards = [q[:3].fsdp_pre_all_gather(None, None, None, None, None), q[3:].fsdp_pre_all_gather(None, None, None, None, None)]
    gathered = tuple(torch.cat(pair) for pair in zip(shards[0][0], shards[1][0], strict=True))
    whole, _ = q.fsdp_post_all_gather(gathered, shards[0][1], torch.float32)
    assert torch.equal(whole.dequantize(), q.dequantize())
    copy = q.new_zeros(6, 96)
    copy.copy_(q)
    assert torch.equal(copy.dequantize(), q.dequantize())


@each
@pytest.mark.parametrize("k", [-3, 5])
def test_a_power_of_two_passes_through(store: object, k: int) -> None:
    W = normal(5, 100)
    if store == E4M3("block"):
        pytest.skip("a bare E4M3 scale has subnormals: it is not scale-free")
    for format in formats(store):
        small, large = fb.quantize(W, format), fb.quantize(2.0**k * W, format)
        assert torch.equal(large.codes(), small.codes()) and torch.equal(large.dequantize(), 2.0**k * small.dequantize())


@each
def test_a_block_of_zeros_stays_zero(store: object) -> None:
    W = normal(4, 100)
    W[:, 32:64] = 0
    W[2] = 0
    for format in (fb.NF(4, 32, store), fb.Int(3, 32, False, store, "integer"), fb.Int(4, 32, True, store, "full")):
        w = fb.quantize(W, format).dequantize()
        assert (w[:, 32:64] == 0).all() and (w[2] == 0).all()
    assert (fb.quantize(torch.zeros(2, 40), fb.NF(4, 32, store)).dequantize() == 0).all()


@each
def test_json_both_ways(store: object) -> None:
    plan = Plan({"a": Spec(fb.NF(4, 32, store)), "b": Spec(fb.Int(2, "row", False, store, "integer"))})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.hash == plan.hash


def test_names_in_a_recipe() -> None:
    read = lambda **fields: registry.from_json("formats", {"paper": "nf"} | fields)  # noqa: E731
    assert read(scale="pow2") == fb.NF(scale=Pow2()) and read(scale={"paper": "double", "group": 64}) == fb.NF(scale=Double(8, 64))
    assert read(bits=4, block=64, scale="fp32") == fb.NF(4, block=64)
    with pytest.raises(ValueError, match="can be fp32, fp16, bf16, pow2"):
        read(scale="fp9")
    with pytest.raises(ValueError, match="groop.*group"):
        read(scale={"paper": "double", "groop": 64})


def test_dyn8() -> None:
    values = dyn8()
    assert len(values) == len(set(values)) == 256 and list(values) == sorted(values)
    assert values[0] == pytest.approx(-0.99297, abs=1e-5) and values[-1] == 1
    assert min(v for v in values if v > 0) == pytest.approx(5.5e-7)


def test_bits_of_the_grids_of_lq_lora() -> None:
    price = lambda b, b0, b1, B0, B1: fb.NF(b, B0, Double(b0, B1, "min", b1)).storage_bits(64, 16384) / (64 * 16384)  # noqa: E731
    grid = lambda widths: itertools.product(widths, widths, ("bf16", "fp16", "fp32"), (16, 32, 64), (16, 64, 256))  # noqa: E731
    size = {"bf16": 16, "fp16": 16, "fp32": 32}
    for widths, count in (((2, 3, 4, 8), 432), ((2, 3, 4), 243)):
        prices = {c: price(*c) for c in grid(widths)}
        assert len(prices) == count and min(prices.values()) == pytest.approx(2.032, abs=1e-3)
        for (b, b0, b1, B0, B1), bits in prices.items():
            assert bits == pytest.approx(b + b0 / B0 + size[b1] / (B0 * B1) + 32 / (64 * 16384))
    assert max(price(*c) for c in grid((2, 3, 4, 8))) == pytest.approx(8.625, abs=1e-3)
    assert price(4, 8, "fp32", 64, 256) == pytest.approx(4.127, abs=1e-3) and price(3, 8, "fp32", 64, 256) == pytest.approx(3.127, abs=1e-3)


def test_bits_of_double_quantization() -> None:
    format = fb.NF(4, 64, "double")
    assert format.storage_bits(4096, 16384) / (4096 * 16384) == pytest.approx(4.127, abs=1e-3)
    assert format.storage_bits(4096, 4096) / 4096**2 == pytest.approx(4 + 8 / 64 + 32 / 4096, abs=1e-5)  # a row has 64 blocks: 4.1328


@pytest.mark.parametrize("bits,late,own", [(8, 0.09227, 0.09226), (4, 0.09408, 0.09232), (2, 0.1289, 0.09655)])
def test_codes_under_the_first_scale_would_be_worse(bits: int, late: float, own: float) -> None:
    W, format = normal(1, 65536), fb.NF(4, 64, Double(bits, 256, "min"))
    parts, ideal = format.fit(W), format.ideal(W)
    scales = format.scales(parts, 65536)
    after = lambda codes: float((format.decode(codes, scales) - W).norm() / W.norm())  # noqa: E731
    assert after(format.encode(W, scales)) == pytest.approx(own, rel=0.02)
    assert after(format.encode(W, ideal)) == pytest.approx(late, rel=0.08)
    assert after(format.encode(W, scales)) <= after(format.encode(W, ideal))


def test_double_quantization_costs_a_thousandth() -> None:
    W = normal(256, 256)
    assert error(W, fb.NF(4, 64, "double")) <= 1.001 * error(W, fb.NF(4, 64))


def test_shared_scales() -> None:
    W = normal(256, 1024) * (0.7 * normal(256, 1, 1)).exp()
    free = error(W, fb.NF(4, 64))
    clustered = [error(W, fb.NF(4, 64, Clustered(K))) for K in (4, 16, 64, 256)]
    multiplied = [error(W, fb.NF(4, 64, Double(b, 16, "zero"))) for b in (2, 4, 6)]
    neighbours = [error(W, fb.NF(4, 64 * k)) for k in (2, 4, 8)]
    assert free == pytest.approx(0.0923, rel=0.01)
    assert clustered == sorted(clustered, reverse=True) and multiplied == sorted(multiplied, reverse=True)
    assert [x / free for x in clustered] == pytest.approx([0.1143 / 0.0923, 0.0959 / 0.0923, 0.0944 / 0.0923, 0.0930 / 0.0923], rel=0.06)
    assert all(x <= bound for x, bound in zip(multiplied, (0.1028, 0.0958, 0.0935), strict=True))
    assert clustered[2] < neighbours[0] and clustered[2] < multiplied[0]  # 16 to 64 clusters win below .1 bit a weight
    bits = lambda scale: fb.NF(4, 64, scale).scale_bits(1024) / 1024  # noqa: E731
    assert [bits(Clustered(K)) for K in (4, 16, 64, 256)] == [0.03125, 0.0625, 0.09375, 0.125]
    assert [bits(Double(b, 16, "zero")) for b in (2, 4, 6)] == [0.0625, 0.09375, 0.125]


def test_exponents_by_hand() -> None:
    scale = torch.tensor([[1.0, 1.1, 1.4, 1.5, 2.0, 0.0, 2.0**-130]])
    for rounding, wanted in {"floor": [0, 0, 0, 0, 1], "ceil": [0, 1, 1, 1, 1], "nearest": [0, 0, 0, 1, 1]}.items():
        store = Pow2(rounding)
        parts = store.put(scale, lambda s: s)
        assert (parts["scale"].int() - 127)[0].tolist() == [*wanted, -127, -127]
        assert store.get(parts)[0, :5].tolist() == [2.0**e for e in wanted]
        ratio = Pow2(rounding, "row").put(scale, lambda s: s)
        assert ratio["scale_top"].tolist() == [[2.0]] and ratio["scale"][0, 0] == 1 and ratio["scale"][0, 4] == 0
    assert Pow2("ceil", "row").put(scale, lambda s: s)["scale"][0, 1] == 1  # Δmax / 2^⌈log2(2/1.1)⌉ = 1: narrower


def test_what_stores_refuse() -> None:
    W = torch.full((2, 64), 1e5)
    with pytest.raises(ValueError, match="e4m3"):
        fb.quantize(W, fb.NF(4, 32, E4M3("block")))
    with pytest.raises(ValueError, match="fp16"):
        fb.quantize(W, fb.NF(4, 32, Double(4, 2, "zero", "fp16")))
    for bad in (lambda: Double(4), lambda: Double(9, 16, "min"), lambda: Clustered(3), lambda: Pow2("up"), lambda: Double(offset="max")):
        with pytest.raises((ValueError, TypeError)):
            bad()
    with pytest.raises(ValueError, match="one scale a matrix"):
        fb.NF(4, "tensor", "pow2")
    with pytest.raises(ValueError, match="unit"):
        fb.NF(4, "row", unit=64)


@pytest.mark.parametrize(
    "format", [fb.NF(4, 64, unit=80), fb.NF(4, 64, unit=72), fb.Int(3, 32, False, unit=40), fb.NF(4, 64, "pow2", unit=96)], ids=str
)
def test_no_block_leaves_its_head(format: fb.NF) -> None:
    unit = format.unit
    W = normal(6, 4 * unit + 10)
    loud = W.clone()
    loud[:, unit : 2 * unit] *= 1000
    a, b = fb.quantize(W, format).dequantize(), fb.quantize(loud, format).dequantize()
    assert torch.equal(a[:, :unit], b[:, :unit]) and torch.equal(a[:, 2 * unit :], b[:, 2 * unit :])
    alone = fb.quantize(W[:, unit : 2 * unit], format).dequantize()
    assert torch.equal(a[:, unit : 2 * unit], alone)
    assert format.n_blocks(4 * unit + 10) == 4 * -(-unit // format.block) + 1


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    W = normal(9, 100)
    todo = [
        fb.NF(4, 32, "pow2"),
        fb.NF(4, 32, "double"),
        fb.Int(4, "tensor", False, "fp16", "integer"),
        fb.Int(4, 16, False, "e4m3", "integer"),
    ]
    whole = [fb.quantize(W, f).dequantize() for f in todo]
    monkeypatch.setattr("finebits.formats.base.SLAB", 150)
    assert all(torch.equal(fb.quantize(W, f).dequantize(), w) for f, w in zip(todo, whole, strict=True))


def test_plans_made_before_there_were_stores_are_the_same() -> None:
    assert registry.to_json(fb.NF(4, 64)) == {"paper": "nf", "bits": 4, "block": 64, "scale": "fp32"}
    assert registry.to_json(fb.Int(4, 64)) == {"paper": "int", "bits": 4, "block": 64, "symmetric": True, "scale": "fp32"}
    assert registry.to_json(fb.NF(unit=80))["unit"] == 80 and registry.from_json("formats", registry.to_json(fb.NF(unit=80))) == fb.NF(
        unit=80
    )
