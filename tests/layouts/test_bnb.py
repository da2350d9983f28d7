"""bitsandbytes itself reads what we write, and we read what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

import finebits as fb
from finebits.formats._stores import Double, dyn8
from finebits.formats.fp4 import FP4
from finebits.layouts.bnb import from_bnb, to_bnb

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

KINDS = {"nf4": lambda block, scale="fp32": fb.NF(4, block, scale), "fp4": lambda block, scale="fp32": FP4(block, "bnb", scale)}
both = pytest.mark.parametrize("kind", KINDS)


def saved(W: torch.Tensor, kind: str, block: int, double: bool, storage: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    """The state dict of a Linear4bit that bitsandbytes quantized, through a safetensors file."""
    data, state = functional.quantize_4bit(W, blocksize=block, compress_statistics=double, quant_type=kind, quant_storage=storage)
    layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, compress_statistics=double, quant_type=kind)
    stats = state.as_dict(packed=True)
    layer.weight = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu", module=layer)
    return load(save({k: v.contiguous().clone() for k, v in layer.state_dict().items()}))


def by_bnb(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Dequantized by bitsandbytes from the tensors of a file."""
    stats = {k.removeprefix("weight."): v.clone() for k, v in tensors.items() if k != "weight"}
    state = functional.QuantState.from_dict(stats, device="cpu")
    return functional.dequantize_4bit(tensors["weight"], state)


def params4bit(q: fb.QTensor) -> torch.nn.Parameter:
    """What we write, as the parameter of its Linear4bit."""
    tensors = to_bnb(q)
    stats = {k.removeprefix("weight."): v for k, v in tensors.items() if k != "weight"}
    return bnb.nn.Params4bit.from_prequantized(tensors["weight"], stats, device="cpu")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for k in a:
        if "quant_state" in k:
            assert json.loads(bytes(a[k].tolist())) == json.loads(bytes(b[k].tolist()))
        else:
            assert torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype, k


def test_tables_are_its_tables() -> None:
    assert torch.equal(functional.create_dynamic_map(), torch.tensor(dyn8()))
    for kind, format in KINDS.items():
        assert torch.equal(functional.get_4bit_type(kind, device="cpu"), torch.tensor(format(64).levels()))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_checkpoint_is_read_and_written_again_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    tensors = saved(torch.randn(6, 192).to(dtype), kind, 64, False)
    q = from_bnb(tensors)
    assert q.dtype == dtype and q.format == KINDS[kind](64)
    assert torch.equal(q.dequantize(), by_bnb(tensors))
    same(to_bnb(q), tensors)


@both
def test_our_weight_is_read_by_its_linear(kind: str) -> None:
    q = fb.quantize(torch.randn(8, 256), KINDS[kind](64))
    layer = bnb.nn.Linear4bit(256, 8, bias=False, quant_type=kind)
    layer.weight = params4bit(q)
    same(dict(layer.state_dict()), to_bnb(q))
    x = torch.randn(3, 256, requires_grad=True)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, q), rtol=1e-5, atol=1e-5)
    assert torch.equal(functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), q.dequantize())


@both
def test_zero_and_negative_zero_keep_their_codes(kind: str) -> None:
    W = torch.randn(2, 64)
    W[0, ::3], W[1] = 0.0, -0.0
    tensors = saved(W, kind, 64, False)
    same(to_bnb(from_bnb(tensors)), tensors)


@both
@pytest.mark.parametrize("shape", [(8, 32 * 64), (300, 64), (2, 256 * 64), (3, 512 * 32)])
def test_nested_state_where_rows_and_groups_agree(kind: str, shape: tuple[int, int]) -> None:
    block = 32 if shape[1] == 512 * 32 else 64
    tensors = saved(torch.randn(shape), kind, block, True)
    q = from_bnb(tensors)
    assert isinstance(q.format.scale, Double)
    assert torch.equal(q.dequantize(), by_bnb(tensors))
    same(to_bnb(q), tensors)
    flat = from_bnb(tensors, expand=True)
    assert flat.format == KINDS[kind](block) and torch.equal(flat.dequantize(), q.dequantize())
    assert 8 * q.nbytes == q.format.storage_bits(*shape)


def test_nested_groups_over_row_ends_are_refused_with_the_way_out() -> None:
    tensors = saved(torch.randn(10, 3 * 64), "nf4", 64, True)
    with pytest.raises(ValueError, match="expand=True"):
        from_bnb(tensors)
    assert torch.equal(from_bnb(tensors, expand=True).dequantize(), by_bnb(tensors))


def test_our_own_nesting_is_written_only_where_it_is_theirs() -> None:
    long = fb.quantize(torch.randn(2, 256 * 32), fb.NF(4, 32, "double"))
    assert torch.equal(by_bnb(to_bnb(long)), long.dequantize())
    q = fb.quantize(torch.randn(4, 256), fb.NF(4, 64, "double"))
    with pytest.raises(ValueError, match="expand=True"):
        to_bnb(q)
    assert torch.equal(by_bnb(to_bnb(q, expand=True)), q.dequantize())
    with pytest.raises(ValueError, match="256 float32"):
        to_bnb(fb.quantize(torch.randn(4, 256), fb.NF(4, 64, Double(8, 16))))


@pytest.mark.parametrize("scale", ["fp16", "bf16", "pow2", "e4m3", "clustered", Double(4, 16, "min")])
def test_other_stores_are_written_as_the_scales_that_they_are(scale: object) -> None:
    q = fb.quantize(torch.randn(4, 256), fb.NF(4, 64, scale))
    assert torch.equal(by_bnb(to_bnb(q)), q.dequantize())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_may_be_viewed_as_another_dtype(storage: torch.dtype) -> None:
    tensors = saved(torch.randn(6, 128), "nf4", 64, False, storage)
    same(to_bnb(from_bnb(tensors)) | {"weight": tensors["weight"]}, tensors)
    assert torch.equal(from_bnb(tensors).dequantize(), by_bnb(tensors))


def test_a_row_of_odd_length_alone() -> None:
    W = torch.randn(1, 77)
    data, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    tensors = {"weight": data} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    q = from_bnb(tensors)
    assert q.shape == (1, 77) and q.parts["scale"].shape == (1, 2)
    assert torch.equal(to_bnb(q)["weight"][:38], data[:38]) and int(to_bnb(q)["weight"][38]) >> 4 == int(data[38]) >> 4


def test_blocks_over_row_ends_are_refused() -> None:
    tensors = saved(torch.randn(4, 96), "nf4", 64, False)
    with pytest.raises(ValueError, match="rows of 96"):
        from_bnb(tensors)
    with pytest.raises(ValueError, match="rows of 96"):
        to_bnb(fb.quantize(torch.randn(4, 96), fb.NF(4, 64)))


@pytest.mark.parametrize("format", [fb.NF(3, 64), FP4(64, "ocp"), fb.Int(4, 64), fb.NF(4, 48), fb.NF(4, "row")], ids=str)
def test_what_it_has_not_is_refused(format: object) -> None:
    with pytest.raises(ValueError, match="bitsandbytes"):
        to_bnb(fb.quantize(torch.randn(4, 192), format))


def test_a_foreign_table_is_refused() -> None:
    tensors = saved(torch.randn(4, 64), "nf4", 64, False)
    tensors["weight.quant_map"] = tensors["weight.quant_map"] * 1.001
    with pytest.raises(ValueError, match="quant_map"):
        from_bnb(tensors)
    with pytest.raises(ValueError, match="no 4-bit weight"):
        from_bnb({"weight": torch.zeros(3)})


def test_its_nested_layout_takes_4_127_bits() -> None:
    m, n = 64, 4096
    tensors = saved(torch.randn(m, n), "nf4", 64, True)
    held = sum(tensors[k].nbytes for k in ("weight", "weight.absmax", "weight.nested_absmax"))
    assert 8 * held / (m * n) == pytest.approx(4.127, abs=1e-3)
