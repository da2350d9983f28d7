"""Checkpoints that are quantized: their own libraries, or readers written from the layout's description alone, find the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import finebits as fb
from architectures import MORE, folder
from finebits.build import hosts
from finebits.formats.int import Int
from finebits.init.zeros import Zeros
from finebits.interop.checkpoint import Tensors
from finebits.interop.coded import Unreadable, coded
from finebits.interop.hf import load_planned
from finebits.interop.linears import linearized
from finebits.interop.planning import Settings, plan_model
from finebits.layouts.compressed_tensors import to_compressed
from finebits.layouts.gptq import to_gptq
from finebits.qtensor import QTensor
from tiny_llama import fresh, worded

UP = "model.layers.0.mlp.up_proj"


def read(tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The plain weights behind tensors."""
    held = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    found = coded(held, {} if config is None else {"quantization_config": config}, lambda name: tensors[name])
    plain = {k: c.plain({role: tensors[name] for role, name in c.parts.items()}) for k, c in found.items()}
    assert all(plain[k].shape == c.shape and plain[k].dtype == torch.float32 for k, c in found.items())
    return plain


def rewrite(folder: Path, change: Any, config: dict[str, Any] | None) -> Path:
    """Hold the matrices of a saved model as `change(name, tensor) -> tensors` says."""
    out: dict[str, torch.Tensor] = {}
    for k, v in load_file(folder / "model.safetensors").items():
        out |= change(k, v) if v.ndim == 2 and "_proj" in k else {k: v}
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(said | {"quantization_config": config}))
    return folder


def dense(folder: Path, kind: str) -> None:
    """A model of one layer whose matrices are whole tiles and blocks, saved."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 32,
    }
    more = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32} if kind == "qwen3_moe" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **more, num_key_value_heads=1, pad_token_id=0))
    model.bfloat16().save_pretrained(folder)


def as_stock(folder: Path, **more: Any) -> None:
    """Every parameter in bfloat16 is that of a model that transformers loads and dequantizes."""
    from transformers import AutoModelForCausalLM

    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
    stock = stock.dequantize() if getattr(stock, "is_quantized", False) else stock
    tensors = Tensors(folder)
    assert tensors.notices and "quantized already" in tensors.notices[0]
    for name, p in linearized(stock).named_parameters():
        assert torch.equal(tensors[name].bfloat16(), p.bfloat16()), name


@pytest.mark.parametrize("how", ["nf4", "nf4 double", "fp4", "int8"])
def test_what_bitsandbytes_saved(how: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dense(tmp_path / "dense", "llama")
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=how[:3], bnb_4bit_use_double_quant="double" in how, bnb_4bit_compute_dtype=torch.bfloat16
    )
    config = BitsAndBytesConfig(load_in_8bit=True) if how == "int8" else four
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "q"
    )
    as_stock(tmp_path / "q")


def test_blocks_of_bitsandbytes_that_run_over_the_ends_of_rows() -> None:
    """Element by element: its own dequantization on a CPU (0.50) takes such blocks to end with the row, which its quantization does not."""
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(3, 96)
    data, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    held = {"a.weight": data} | {f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    codes = [c for byte in data.flatten().tolist() for c in (byte >> 4, byte & 15)][: W.numel()]
    right = [float(state.code[c] * state.absmax[i // 64]) for i, c in enumerate(codes)]
    found = read(held)["a.weight"]
    assert found.flatten().tolist() == right and float((found - W).norm() / W.norm()) < 0.12


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_float8_in_tiles(kind: str, tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config

    dense(tmp_path, kind)

    def tiles(name: str, W: torch.Tensor) -> dict[str, torch.Tensor]:
        W = W.float()
        scale = W.unflatten(1, (-1, 32)).unflatten(0, (-1, 32)).abs().amax((1, 3)) / 448
        codes = W / scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    config = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    as_stock(rewrite(tmp_path, tiles, config), quantization_config=FineGrainedFP8Config(dequantize=True))


def test_a_short_last_tile_is_as_wide_as_config_says() -> None:
    W = torch.randn(5, 6)
    scale = torch.rand(2, 2) + 0.5
    held = {"a.weight": W.to(torch.float8_e4m3fn), "a.weight_scale_inv": scale}
    right = torch.stack([torch.stack([held["a.weight"][i, j].float() * scale[i // 4, j // 4] for j in range(6)]) for i in range(5)])
    assert torch.equal(read(held, {"quant_method": "fp8", "weight_block_size": [4, 4]})["a.weight"], right)
    with pytest.raises(Unreadable, match="none of a tensor, its rows, blocks or tiles"):
        read(held, {"quant_method": "fp8"})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_scales_of_tensors_rows_and_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, s = (torch.randn(6, 8) * 20).to(dtype), torch.rand(shape) + 0.5
    per_row = s.reshape(6, -1).repeat_interleave(8 // (4 if shape == (6, 4) else 1), 1) if s.numel() > 1 else s.reshape(())
    right = q.float() * per_row
    for end in ("_scale", "_scale_inv"):
        assert torch.equal(read({"a.weight": q, f"a.weight{end}": s})["a.weight"], right)
    if shape == (6, 1):
        z = torch.randint(-3, 3, (6, 1), dtype=torch.int8)
        assert torch.equal(read({"a.weight": q, "a.weight_scale": s, "a.weight_zero_point": z})["a.weight"], (q.float() - z) * s)


def test_powers_of_two_in_a_byte_and_pairs_of_four_bit_floats() -> None:
    exponents = torch.randint(120, 130, (2, 2), dtype=torch.uint8)
    q = torch.randn(2, 64).to(torch.float8_e4m3fn)
    found = read({"a.weight": q, "a.weight_scale_inv": exponents}, {"quant_method": "mxfp8"})["a.weight"]
    assert torch.equal(found, q.float() * 2.0 ** (exponents.float() - 127).repeat_interleave(32, 1))
    pairs = torch.tensor([[0x21, -0x7F]], dtype=torch.int8)  # 0x21 -> .5, 1; 0x81 -> .5, −0
    found = read({"a.weight": pairs, "a.weight_scale_inv": torch.tensor([[2.0]])}, {"quant_method": "fp8"})["a.weight"]
    assert found.tolist() == [[1.0, 2.0, 1.0, -0.0]]


def test_mxfp4_experts_as_transformers_unpacks_them() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8), torch.randint(118, 130, (3, 8, 2), dtype=torch.uint8)
    found = read({"a.gate_up_proj_blocks": blocks, "a.gate_up_proj_scales": scales}, {"quant_method": "mxfp4"})["a.gate_up_proj"]
    assert torch.equal(found.bfloat16(), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.filterwarnings("ignore")
def test_of_experts_in_codes_one_is_read_alone(tmp_path: Path) -> None:
    folder(tmp_path, "gpt_oss", MORE["gpt_oss"])
    held, gen = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    wanted = {}
    for name in [n for n in held if n.endswith("gate_up_proj")]:
        count, n, m = held.pop(name).shape
        held[f"{name}_blocks"] = torch.randint(0, 256, (count, m, n // 32, 16), dtype=torch.uint8, generator=gen)
        held[f"{name}_scales"] = torch.randint(118, 130, (count, m, n // 32), dtype=torch.uint8, generator=gen)
        wanted[name] = read({k: held[k] for k in (f"{name}_blocks", f"{name}_scales")}, {"quant_method": "mxfp4"})[name]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    tensors = Tensors(tmp_path)
    for name, whole in wanted.items():
        for e, one in enumerate(whole):
            assert torch.equal(tensors[f"{name}.{e}.weight"], one.T) and tensors.sources[f"{name}.{e}.weight"].at == e


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["in order", "in activation order"])
def test_gptq_of_any_width_and_order(bits: int, order: str) -> None:
    """One bit at a time: a code's i-th bit is bit (bits·row + i) of the column of words."""
    n, m, group = 64, 32, 16
    gen = torch.Generator().manual_seed(bits)
    q, z = torch.randint(0, 2**bits, (n, m), generator=gen), torch.randint(1, 2**bits, (n // group, m), generator=gen)
    s = torch.rand((n // group, m), generator=gen).half()
    g = torch.arange(n) // group
    g = g[torch.randperm(n, generator=gen)] if order != "in order" else g

    def words(codes: torch.Tensor) -> torch.Tensor:  # (n, m) -> (n·bits/32, m)
        out = []
        for column in codes.T.tolist():
            whole = sum(c << (bits * i) for i, c in enumerate(column))
            out.append(
                [(w - 2**32 if w >= 2**31 else w) for w in (whole >> (32 * i) & 0xFFFFFFFF for i in range(len(column) * bits // 32))]
            )
        return torch.tensor(out, dtype=torch.int32).T.contiguous()

    held = {"a.qweight": words(q), "a.qzeros": words(z.T - 1).T.contiguous(), "a.scales": s, "a.g_idx": g.int()}
    right = torch.stack([s[g[i]].float() * (q[i] - z[g[i]]) for i in range(n)], 1)
    config = {"quant_method": "gptq", "bits": bits, "sym": False}
    assert torch.equal(read(held, config)["a.weight"], right)
    held["a.qzeros"] = words(z.T).T.contiguous()
    assert torch.equal(read(held, config | {"checkpoint_format": "gptq_v2"})["a.weight"], right)
    with pytest.raises(Unreadable, match="marlin"):
        read(held, config | {"checkpoint_format": "marlin"})


def test_awq_column_by_column() -> None:
    n, m, group = 32, 16, 8
    gen = torch.Generator().manual_seed(0)
    q, z = torch.randint(0, 16, (n, m), generator=gen), torch.randint(0, 16, (n // group, m), generator=gen)
    s = torch.rand((n // group, m), generator=gen).half()

    def words(codes: torch.Tensor) -> torch.Tensor:
        out = []
        for row in codes.tolist():
            each = [sum(row[8 * w + c] << (4 * i) for i, c in enumerate((0, 2, 4, 6, 1, 3, 5, 7))) for w in range(m // 8)]
            out.append([w - 2**32 if w >= 2**31 else w for w in each])
        return torch.tensor(out, dtype=torch.int32)

    held = {"a.qweight": words(q), "a.qzeros": words(z), "a.scales": s}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    right = torch.stack([s[i // group].float() * (q[i] - z[i // group]) for i in range(n)], 1)
    assert torch.equal(read(held, config)["a.weight"], right)
    with pytest.raises(Unreadable, match="version gemm"):
        read(held, config | {"version": "gemv"})


@pytest.mark.parametrize("how", ["4 bits", "8 bits", "zero points", "nvfp4", "float8", "int8"])
def test_what_compressed_tensors_packs(how: str) -> None:
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    W = torch.randn(16, 64)
    bits = 8 if how in ("8 bits", "float8", "int8") else 4
    name = {"nvfp4": "nvfp4-pack-quantized", "float8": "float-quantized", "int8": "int-quantized"}.get(how, "pack-quantized")
    top = {"nvfp4": 6.0, "float8": 448.0}.get(how, 2 ** (bits - 1) - 1)
    groups: dict[str, Any] = {"strategy": "tensor_group" if how == "nvfp4" else "group", "group_size": 16}
    groups = {"strategy": "channel"} if how in ("float8", "int8") else groups
    kind = "float" if how in ("nvfp4", "float8") else "int"
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=how != "zero points", **groups)
    state = {"weight": W, "weight_scale": W.unflatten(1, (-1, groups.get("group_size", 64))).abs().amax(2) / top}
    if how == "nvfp4":
        state |= {"weight_global_scale": torch.tensor([100.0])}
        state["weight_scale"] = (state["weight_scale"] * 100).to(torch.float8_e4m3fn).float()
    if how == "zero points":
        state["weight_zero_point"] = torch.randint(-3, 3, (16, 4), dtype=torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=name)
    compressor = BaseCompressor.get_value_from_registry(name)
    packed = {k: v.contiguous() for k, v in compressor.compress(state, scheme).items() if v is not None}
    right = compressor.decompress(dict(packed), scheme)["weight"]
    found = read({f"a.{k}": v for k, v in packed.items()}, {"quant_method": "compressed-tensors"})["a.weight"]
    torch.testing.assert_close(found.to(right.dtype), right, rtol=1e-6, atol=1e-6)


def test_compressed_tensors_in_activation_order() -> None:
    held = {f"a.{k}": v for k, v in to_compressed(fb.quantize(torch.randn(4, 64), Int(4, 16, True, "fp32", "full"))).items()}
    scale, plain = held["a.weight_scale"], read(held)["a.weight"]
    order = (torch.arange(64) // 16)[torch.randperm(64)]
    right = plain / scale.repeat_interleave(16, 1) * scale[:, order]
    torch.testing.assert_close(read(held | {"a.weight_g_idx": order.int()})["a.weight"], right)


def test_codes_that_a_format_holds_are_kept_bit_by_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    worded(tmp_path, dtype=torch.bfloat16)

    def four(name: str, W: torch.Tensor) -> dict[str, torch.Tensor]:
        data, state = functional.quantize_4bit(W, blocksize=32, quant_type="nf4")
        return {name: data} | {f"{name}.{k}": v.clone() for k, v in state.as_dict(packed=True).items()}

    rewrite(tmp_path, four, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    given = Settings(
        formats=(fb.NF(4, 32, "fp32"),), adapter=fb.LoRA(rank=2), init=Zeros(), objective="weight", dtype="float32", max_length=8
    )
    plan = plan_model(tmp_path, None, None, given)
    assert "Notice" in plan.summary() and "bitsandbytes 4-bit" in plan.notices[0]
    model, held = load_planned(plan)[0], load_file(tmp_path / "model.safetensors")
    weight = dict(hosts(model))[UP].weight
    data = held[f"{UP}.weight"].view(-1)
    assert isinstance(weight, QTensor) and torch.equal(weight.codes().view(-1), torch.stack([data >> 4, data & 15], -1).view(-1))
    assert torch.equal(weight.format.scales(weight.parts, 64).scale.view(-1), held[f"{UP}.weight.absmax"])


@pytest.mark.parametrize(
    "config,reason",
    [
        ({"quant_method": "torchao"}, "quantized with torchao, which is not read here"),
        ({"bits": 4, "group_size": 64}, "quantized with an unnamed method"),
        ({"quant_method": "gptq", "bits": 4}, "quantized with gptq, and the files hold none in its layout"),
    ],
)
def test_what_is_not_known_is_refused_while_planning(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda k, v: {k: v}, config)
    with pytest.raises(Unreadable, match=reason) as e:
        plan_model(tmp_path, None, None, Settings(objective="weight"))
    assert e.value.code == 2


def test_words_without_a_config_and_parts_that_are_missing_are_refused() -> None:
    held = to_gptq(fb.quantize(torch.randn(16, 64), Int(4, 32, scale="fp16")))
    with pytest.raises(Unreadable, match="no quantization_config"):
        read({f"a.{k}": v for k, v in held.items()})
    with pytest.raises(Unreadable, match="the files have no a.scales"):
        read({f"a.{k}": v for k, v in held.items() if k != "scales"}, {"quant_method": "gptq", "bits": 4})
