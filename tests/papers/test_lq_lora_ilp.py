"""LQ-LoRA's grid to the byte, its program against simpler solvers, and the published sizes that the planner's arithmetic must give."""

from __future__ import annotations

import math

import pytest
import torch

import finebits as fb
from finebits.plan import memory
from finebits.plan.base import Option, Spec
from finebits.plan.knapsack import total
from finebits.plan.levers import Workload
from finebits.planners.lq_lora_ilp import NF3_LIKE, NF4_LIKE, LQLoRAILP, bits, config, configs, grid
from finebits.planners.uniform import Uniform
from tiny_llama import geometry_of, llama_config


def test_the_grids() -> None:
    assert len(set(grid())) == 432 and len(set(grid("paper"))) == 243 and set(grid("paper")) < set(grid())
    stored = [bits(*c) for c in configs()]
    assert min(stored) == pytest.approx(2.032, abs=5e-4) and max(stored) == pytest.approx(8.625)
    assert bits(*NF4_LIKE) == pytest.approx(4.127, abs=5e-4) and bits(*NF3_LIKE) == pytest.approx(3.127, abs=5e-4)


def test_the_storage_formula_to_the_byte() -> None:
    """Rows of 16384 columns hold whole groups of every configuration: what is held is the formula and one offset of four bytes a matrix."""
    m, n = 2, 16384
    for c, f in zip(configs(), grid(), strict=True):
        assert f.storage_bits(m, n) == m * n * bits(*c) + 32
    W = torch.randn(m, n)
    for c in ((4, 8, "fp32", 64, 256), (3, 4, "bf16", 32, 64), (2, 2, "fp16", 16, 16), (8, 3, "bf16", 64, 16)):
        held = fb.quantize(W, config(*c)).nbytes
        assert 8 * held == m * n * bits(*c) + 32


def sensitive(modules: int, seed: int = 0) -> tuple[dict[str, list[Option]], int]:
    gen = torch.Generator().manual_seed(seed)
    formats = [config(b, b0, "bf16", B0, 64) for b in (2, 3, 4) for b0 in (4, 8) for B0 in (16, 64)]
    found = {}
    for i in range(modules):
        W = torch.randn(8, 1024, generator=gen) * math.exp(float(torch.randn((), generator=gen)))
        lost = [(W - fb.quantize(W, f).dequantize()).square().sum() for f in formats]
        found[f"m{i}"] = [Option(Spec(f), f.storage_bits(8, 1024) // 8, float(e)) for f, e in zip(formats, lost, strict=True)]
    return found, modules * 8 * 1024


def test_the_program_against_greedy_and_uniform() -> None:
    made, weights = sensitive(12)
    for target in (2.5, 3.0, 3.5):
        budget = int(target * weights / 8)
        exact, near, same = (total(p(made, budget))[1] for p in (LQLoRAILP(), fb.Lagrange(), Uniform()))
        assert exact <= near + 1e-9 <= 1.02 * exact and near < 0.8 * same
        assert exact == pytest.approx(total(fb.DP()(made, budget))[1], rel=1e-9)


# -- published arithmetic


def decoder(layers: int, hidden: int, inner: int, heads: int, kv: int, vocabulary: int) -> tuple[dict, memory.Geometry]:
    """Shapes of a Llama's linears, and its geometry."""
    return geometry_of(llama_config(layers, hidden, inner, heads, kv, vocabulary), fb.LoRA(rank=16))


def test_four_bits_and_double_quantization_at_block_64() -> None:
    f = fb.NF(4, 64, "double")
    assert f.storage_bits(4096, 16384) / (4096 * 16384) == pytest.approx(4.127, abs=1e-3)
    assert fb.NF(4, 64).storage_bits(4096, 4096) / 4096**2 == 4.5


def work(**more: object) -> Workload:
    given = dict(
        dtype="bfloat16", per_device_train_batch_size=1, gradient_accumulation_steps=16, max_length=512, gradient_checkpointing=True
    )
    return Workload.of(given | dict(loss_chunk=512, device="cuda") | more)


def test_65b_in_48_gb() -> None:
    """QLoRA's headline, by this library's memory model: NF4 with double quantization, LoRA of rank 64 on all linears, rows of 512 tokens."""
    shapes, g = decoder(80, 8192, 22016, 64, 64, 32000)
    weights = sum(m * n for m, n in shapes.values())
    assert weights == 64_760_053_760 and weights + 2 * g.embeddings + g.other == pytest.approx(65.3e9, rel=0.001)
    linears = sum(fb.NF(4, 64, "double").storage_bits(m, n) // 8 for m, n in shapes.values())
    assert 8 * linears / weights == pytest.approx(4.13, abs=0.01)
    adapters = sum(fb.LoRA(rank=64).size(m, n) for m, n in shapes.values())
    peak = sum(memory.terms(g, linears, memory.Trained(adapters, 0, 64), work()).values())
    rank16 = sum(memory.terms(g, linears, memory.Trained(adapters // 4, 0, 16), work()).values())
    assert rank16 < 48e9 and linears < 33.5e9
    # float32 adapters with float32 Adam of rank 64 take 16 bytes a number; bfloat16 adapters under paged 8-bit Adam, six
    assert peak - 16 * adapters + 6 * adapters < 48e9


def test_a_2_75_bit_70b_in_27_gb() -> None:
    """LQ-LoRA, Table 3: 2.75 bits a weight, embeddings and head in 16 bits, factors of rank 64 in 8 bits."""
    shapes, g = decoder(80, 8192, 28672, 64, 8, 32000)
    weights = sum(m * n for m, n in shapes.values())
    factors = sum(64 * (m + n) for m, n in shapes.values())
    whole = 2.75 * weights / 8 + 2 * (g.embeddings + g.head + g.other) + factors
    assert weights == 68_451_041_280 and 25e9 < whole < 27e9
    assert 2.75 + 8 * factors / weights == pytest.approx(2.85, abs=0.01)
    specs = [Spec(f) for f in grid() if f.bits < 8][::9]
    menu = {name: [Option(s, s.format.storage_bits(*shape) // 8, 4.0**-s.format.bits) for s in specs] for name, shape in shapes.items()}
    choice = fb.Lagrange()(menu, int(2.75 * weights / 8))
    assert 2.74 < 8 * total(choice)[0] / weights <= 2.75


def test_llama_8b_in_8_gib() -> None:
    """The arithmetic of an 8 GiB plan for Llama-3.1-8B at 2,048 tokens: linears 0.8125·b GiB, adapters 0.16, block inputs 0.50, and so on."""
    gib = 2**30
    shapes, g = decoder(32, 4096, 14336, 32, 8, 128256)
    weights = sum(m * n for m, n in shapes.values())
    trained = sum(fb.LoRA(rank=16).size(m, n) for m, n in shapes.values())
    assert weights == 6_979_321_856 and weights / 8 / gib == pytest.approx(0.8125, rel=1e-4)
    assert trained == 41_943_040 and 4 * trained / gib == pytest.approx(0.16, abs=0.005)
    terms = memory.terms(g, 0, memory.Trained(trained, 0, 16), work(max_length=2048, loss_chunk=256))
    assert terms["block inputs"] / gib == pytest.approx(0.50, abs=0.02) and terms["gradients"] / gib == pytest.approx(0.16, abs=0.005)
    assert terms["runtime"] / gib == pytest.approx(0.85, abs=0.005)
    assert terms["one block"] / gib == pytest.approx(0.62, rel=0.35)
    left = 8 * gib * 0.95 - sum(terms.values())
    assert 8 * left / weights == pytest.approx(4.0, abs=0.5)  # bits a weight that 8 GiB leave with a 16-bit head and embeddings
