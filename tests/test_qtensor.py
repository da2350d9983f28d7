"""The quantized tensor: a weight with the right shape, the packed bytes and nothing else."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.qtensor import QTensor, dense, format_of, key, nbytes
from variants import formats

M, N = 12, 70
FORMATS = formats((32,), scale=("fp32", "bf16"))
every = pytest.mark.parametrize("format", FORMATS, ids=str)


def weight(format: Any = None, *lead: int, dtype: torch.dtype = torch.float32) -> QTensor:
    return fb.quantize(torch.randn(*lead, M, N).to(dtype), format or fb.NF(3, block=32))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert isinstance(a, QTensor) and isinstance(b, QTensor)
    assert a.shape == b.shape and a.dtype == b.dtype and a.format == b.format and a.parts.keys() == b.parts.keys()
    assert all(torch.equal(a.parts[k], b.parts[k]) for k in a.parts)


# Cutting and copying ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [fb.NF(4), fb.NVFP4(), fb.VQ()], ids=lambda f: type(f).__name__)
def test_what_has_no_values_is_no_weight(format: Any) -> None:
    for W, says in (
        (torch.zeros(0, 64), r"is \(0, 64\)"),
        (torch.zeros(8, 0), r"is \(8, 0\)"),
        (torch.empty(8, 64, device="meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=f"a matrix of values is quantized, .*{says}"):
            fb.quantize(W, format)
    with pytest.raises(TypeError, match=r"is quantized already \(.*\): dequantize it first"):
        fb.quantize(fb.quantize(torch.randn(8, 64), fb.NF(4)), format)


@every
def test_rows_can_be_cut(format: Any) -> None:
    q = weight(format)
    w = q.dequantize()
    for got, expected in (
        (q[3:7], w[3:7]), (q[-2:], w[-2:]), (q[::3], w[::3]), (q[2:5, :], w[2:5, :]), (q[5], w[5]),
        *zip(q.split(5), w.split(5), strict=True), *zip(q.chunk(4), w.chunk(4), strict=True),
    ):  # fmt: skip
        assert isinstance(got, QTensor) and got.shape == expected.shape
        assert torch.equal(got.dequantize(), expected)
    once = sum(p.nbytes for k, p in q.parts.items() if k in format.shared)
    assert q[3:7].nbytes == (q.nbytes - once) * 4 // 12 + once


def test_a_cut_is_a_view_of_the_same_bytes() -> None:
    q = weight()
    assert q[3:].parts["codes"].untyped_storage().data_ptr() == q.parts["codes"].untyped_storage().data_ptr()


@every
def test_experts_can_be_taken(format: Any) -> None:
    q = weight(format, 4)
    w = q.dequantize()
    assert torch.equal(q[2].dequantize(), w[2]) and torch.equal(q.select(0, -1).dequantize(), w[-1])
    assert torch.equal(q[1:3].dequantize(), w[1:3]) and torch.equal(q[3][2:5].dequantize(), w[3][2:5])
    assert torch.equal(q[:, 4:6].dequantize(), w[:, 4:6])
    assert [tuple(e.shape) for e in q.split(1)] == [(1, M, N)] * 4
    x = torch.randn(5, N)
    torch.testing.assert_close(F.linear(x, q[2]), F.linear(x, w[2]))
    with pytest.raises(ValueError, match="select one expert"):
        F.linear(x, q)


@pytest.mark.parametrize(
    "cut", [lambda q: q[:, 3:5], lambda q: q[..., 0], lambda q: q.select(1, 2), lambda q: q.split(3, 1), lambda q: q[:, ::2]]
)
def test_columns_cannot_be_cut(cut: Callable) -> None:
    with pytest.raises(NotImplementedError, match="columns"):
        cut(weight())


@every
def test_copies_are_equal_and_apart(format: Any) -> None:
    q = weight(format)
    for twin in (q.clone(), copy.deepcopy(q), q.to("cpu", copy=True)):
        same(twin, q)
        assert all(twin.parts[k].data_ptr() != q.parts[k].data_ptr() for k in q.parts)
    same(q.detach(), q)
    p = nn.Parameter(q, requires_grad=False)
    twin = copy.deepcopy(p)
    assert isinstance(twin, nn.Parameter) and not twin.requires_grad
    same(twin.data, q)


def test_deepcopy_keeps_ties() -> None:
    a, b = nn.Linear(N, M), nn.Linear(N, M)
    a.weight = b.weight = nn.Parameter(weight(), requires_grad=False)
    twin = copy.deepcopy(nn.ModuleList([a, b]))
    assert twin[0].weight is twin[1].weight and twin[0].weight is not a.weight


def test_to_dtype_keeps_the_parts() -> None:
    q = weight()
    for low in (q.to(torch.bfloat16), q.bfloat16(), nn.Parameter(q, requires_grad=False).to(torch.bfloat16)):
        assert low.dtype == torch.bfloat16 and low.dequantize().dtype == torch.bfloat16
        assert low.parts["scale"].dtype == q.parts["scale"].dtype and low.nbytes == q.nbytes
        assert torch.equal(low.float().dequantize(), q.dequantize())
    module = nn.Linear(N, M)
    module.weight = nn.Parameter(q, requires_grad=False)
    module.half()
    assert isinstance(module.weight, QTensor) and module.weight.dtype == torch.float16
    assert torch.equal(module.weight.dequantize(torch.float32), q.dequantize())


def test_copy_takes_its_own_kind_only() -> None:
    q, other = weight(), weight()
    q.copy_(other)
    same(q, other)
    for wrong in (torch.randn(M, N), weight(fb.NF(4, block=32)), weight()[:3]):
        with pytest.raises(NotImplementedError, match="quantize the source"):
            q.copy_(wrong)


def test_zeros_like_it_are_quantized_zeros() -> None:
    q = weight()
    z = q.new_zeros(4, N)
    assert isinstance(z, QTensor) and z.shape == (4, N) and torch.isfinite(z.dequantize()).all()
    same(torch.zeros_like(q), q.new_zeros(M, N))


def test_memory_can_be_shared() -> None:
    q = weight()
    assert not q.is_shared()
    assert q.share_memory_() is q and q.is_shared()
    module = nn.Linear(N, M)
    module.weight = nn.Parameter(weight(), requires_grad=False)
    module.share_memory()
    assert module.weight.is_shared()


# Bytes --------------------------------------------------------------------------------------------------------------------------------


@every
def test_bytes_are_those_of_the_parts(format: Any) -> None:
    q = weight(format)
    assert q.nbytes == sum(p.untyped_storage().nbytes() for p in q.parts.values()) == nbytes(q)
    assert q.bits_per_weight == 8 * q.nbytes / (M * N)
    assert q.numel() == M * N and nbytes(torch.zeros(3, 4)) == 48


def test_it_says_what_it_is() -> None:
    assert "NF(bits=3" in repr(weight()) and "bits per weight" in repr(nn.Parameter(weight(), requires_grad=False))


@every
def test_a_format_is_one_line(format: Any) -> None:
    assert format_of(key(format)) == format and "\n" not in key(format)


# Files --------------------------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("parameter", [False, True])
def test_torch_files_hold_it_without_code(format: Any, parameter: bool) -> None:
    q: Any = weight(format, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save({"w": nn.Parameter(q, requires_grad=False) if parameter else q}, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)["w"]
    assert isinstance(back, nn.Parameter) == parameter
    same(back.data if parameter else back, q)


def test_a_file_cannot_name_anything_but_a_format() -> None:
    file = io.BytesIO()
    q = weight()
    torch.save({"w": q}, file)
    raw = file.getvalue()
    assert b"nf" in raw
    with pytest.raises(ValueError, match="format"):
        format_of(json.dumps({"paper": "os.system"}))


@every
def test_safetensors_hold_its_parts(format: Any, tmp_path: Path) -> None:
    q = weight(format)
    save_file(q.parts, tmp_path / "w.safetensors", {"format": key(q.format)})
    back = QTensor(load_file(tmp_path / "w.safetensors"), q.format, q.shape, q.dtype)
    same(back, q)


# The product --------------------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shape", [(N,), (1, N), (7, N), (2, 3, N), (0, N)], ids=str)
def test_product_and_gradient_are_the_dense_ones(format: Any, shape: tuple[int, ...]) -> None:
    q, b = weight(format), torch.randn(M)
    x = torch.randn(shape).requires_grad_()
    y = x.detach().clone().requires_grad_()
    got, expected = F.linear(x, q, b), F.linear(y, q.dequantize(), b)
    torch.testing.assert_close(got, expected)
    g = torch.randn(got.shape)
    got.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, y.grad)


def test_second_derivatives() -> None:
    q = fb.quantize(torch.randn(3, 5), fb.NF(3))
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.linear(x, q), (x,))
    assert torch.autograd.gradgradcheck(lambda x: F.linear(x, q).square(), (x,))


def test_inputs_that_are_not_contiguous() -> None:
    q, x = weight(), torch.randn(N, 4, 3).permute(2, 1, 0)
    torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))
    x = torch.randn(N)[None, None].expand(2, 5, N)
    torch.testing.assert_close(F.linear(x, q), F.linear(x, q.dequantize()))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_dtype_of_the_product_is_the_inputs_or_autocasts(low: torch.dtype) -> None:
    q, x, b = weight(), torch.randn(4, N), torch.randn(M)
    assert F.linear(x.to(low), q).dtype == low
    assert F.linear(x.to(low), q.bfloat16()).dtype == low
    with torch.autocast("cpu", low):
        y = F.linear(x.requires_grad_(), q, b)
        assert y.dtype == F.linear(x, q.dequantize(), b).dtype == low
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), F.linear(x, q.dequantize(), b), rtol=0.05, atol=0.2)


def kept(run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What autograd saves while `run` runs."""
    found: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        run()
    return found


@every
def test_autograd_keeps_nothing_beside_the_packed_parts(format: Any) -> None:
    q, x = weight(format), torch.randn(9, N, requires_grad=True)
    assert not kept(lambda: F.linear(x, q))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_host_keeps_activations_and_no_weight(autocast: bool) -> None:
    linear = nn.Linear(256, 128)
    host = fb.build(nn.Sequential(linear), Plan({"0": Spec(format=fb.NF(4), adapter=fb.LoRA(rank=2))}))
    q, x = linear.weight, torch.randn(3, 256, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in q.parts.values()}

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return host(x)

    extra = sum(t.nbytes for t in kept(run) if t.untyped_storage().data_ptr() not in own)
    assert extra < 128 * 256 / 4, "a dense or unpacked copy of the weight was saved"


def test_vmap_over_inputs() -> None:
    q, x = weight(), torch.randn(6, 4, N)
    torch.testing.assert_close(torch.vmap(lambda row: F.linear(row, q))(x), F.linear(x, q.dequantize()))
    torch.testing.assert_close(torch.vmap(lambda row: F.linear(row, q), in_dims=1)(x), F.linear(x.movedim(1, 0), q.dequantize()))


# What it does not do ------------------------------------------------------------------------------------------------------------------

SENTENCE = r"call \.dequantize\(\) if a dense copy is really meant"


@pytest.mark.parametrize(
    "use",
    [
        lambda q: q + 1, lambda q: q * q, lambda q: q.T, lambda q: q.sum(), lambda q: torch.cat([q, q]), lambda q: torch.randn(3, M) @ q,
        lambda q: q.float() @ torch.randn(N), lambda q: q.transpose(0, 1), lambda q: F.embedding(torch.tensor([1]), q, max_norm=1.0),
        lambda q: q.zero_(), lambda q: torch.equal(q, q), lambda q: q.view(N, M), lambda q: q.new_zeros(N, M),
    ],
)  # fmt: skip
def test_what_it_cannot_do_it_says(use: Callable) -> None:
    with pytest.raises((NotImplementedError, RuntimeError, TypeError), match="QTensor"):
        use(weight())


def test_the_sentence() -> None:
    with pytest.raises(NotImplementedError, match=r"QTensor has no aten\.add\.Tensor; " + SENTENCE):
        weight() + 1
    with pytest.raises(NotImplementedError, match="not its input"):
        F.linear(weight(), torch.randn(5, N))
    with pytest.raises(ValueError, match="71 features"):
        F.linear(torch.randn(2, 71), weight())
    with pytest.raises(NotImplementedError, match="viewed"):
        weight().view(N, M)


def test_dense_is_the_one_way_to_a_dense_copy() -> None:
    q = weight()
    assert torch.equal(dense(q), q.dequantize()) and dense(q, torch.bfloat16).dtype == torch.bfloat16
    w = torch.randn(2)
    assert dense(w) is w


# In a Hugging Face model --------------------------------------------------------------------------------------------------------------


def test_a_built_model_is_saved_by_save_pretrained(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    fb.build(model, Plan({n: Spec(format=fb.NF(3), adapter=fb.LoRA(rank=2)) for n in names}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    files = [load_file(f) for f in tmp_path.glob("*.safetensors")]
    written = {k: v for f in files for k, v in f.items()}
    state = model.state_dict()
    for name in names:
        assert torch.equal(written[f"{name}.weight.codes"], state[f"{name}.weight.codes"])
        assert torch.equal(written[f"{name}.p.default.A"], state[f"{name}.p.default.A"])


# bitsandbytes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 128), (3, 64), (16, 192)], ids=str)
def test_nf4_is_bitsandbytes_nf4(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(shape)
    theirs, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    q = fb.quantize(W, fb.NF(4, block=64))
    codes = torch.stack([theirs.flatten() >> 4, theirs.flatten() & 15], 1).view(shape)
    assert torch.equal(codes, q.codes())
    assert torch.equal(state.absmax.view(shape[0], -1), q.parts["scale"])
    torch.testing.assert_close(functional.dequantize_4bit(theirs, state), q.dequantize(), rtol=0, atol=1e-6)


# Compiled: in a process of its own ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(plain: Callable[..., str]) -> dict[str, Any]:
    return json.loads(plain("compiled.py").splitlines()[-1])


@pytest.mark.parametrize("name", ["nf3", "int8", "int4 asymmetric"])
def test_compiled_whole_it_equals_eager(compiled: dict[str, Any], name: str) -> None:
    assert compiled[name]["forward"] < 1e-5 and compiled[name]["gradient"] < 1e-5


def test_compiled_autograd_keeps_no_dense_and_no_unpacked_copy(compiled: dict[str, Any]) -> None:
    assert compiled["saved"]["own"] > 0
    assert compiled["saved"]["extra"] < compiled["saved"]["unpacked"] / 4


def test_autocast_gives_the_same_dtype_eager_and_compiled(compiled: dict[str, Any]) -> None:
    assert compiled["autocast"] == ["torch.bfloat16"] * 4


def test_an_adapted_host_compiles_whole_with_dynamic_rows(compiled: dict[str, Any]) -> None:
    assert compiled["host"]["error"] < 1e-4 and compiled["host"]["graphs"] <= 3


def test_adapters_that_look_into_the_weight_are_one_graph(compiled: dict[str, Any]) -> None:
    assert all(error < 1e-4 for error in compiled["adapters"].values()), compiled["adapters"]


def test_the_kernels_see_the_parts_that_are_there() -> None:
    q = fb.quantize(torch.randn(M, N), fb.NF(4, block=16))
    assert q.table() is q.table()
    before, x = q.dequantize(), torch.randn(2, N)
    q.parts["scale"] = 2 * q.parts["scale"]
    torch.testing.assert_close(F.linear(x, q), 2 * x @ before.mT)
