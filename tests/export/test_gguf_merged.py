"""A merged GGUF file is base plus update in the types of llama.cpp's mixes, as the gguf package and transformers read it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny_llama as tiny
from finebits.build import hosts
from finebits.evaluate.exact import float32
from finebits.export._mixes import BLOCKS, MIXES, kind_of, more_bits
from finebits.export.base import CannotHold, Extras, VerificationFailed, check_plan, target
from finebits.interop.peft import export, stock, verify
from finebits.layouts.gguf import block_of, rounded

gguf = pytest.importorskip("gguf")


def tuned(**more: Any) -> Any:
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2}
    return tiny.tuned(tiny.plan(dtype="bfloat16"), tiny.fresh(dtype=torch.bfloat16, **(sizes | more)))


def tensors(folder: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(folder / "model.gguf").tensors}


def test_its_types_and_bytes_are_the_mix_of_base_plus_update(tmp_path: Path) -> None:
    model = tuned()
    row = export(model, tmp_path / "x", "gguf:q4_k_m")
    assert row["bytes"] == (tmp_path / "x" / "model.gguf").stat().st_size == target("gguf:q4_k_m").files(model, Extras())["model.gguf"].size
    assert row["note"].startswith("tensors that fell back: 1 of rows of 288, no whole blocks of 256, are ")
    assert (
        "1 of rows of 288, no whole blocks of 256, are Q8_0 for Q6_K" in row["note"]
        and row["note"] in (tmp_path / "x" / "README.md").read_text()
    )
    held = tensors(tmp_path / "x")
    kinds = {name: t.tensor_type.name for name, t in held.items()}
    assert kinds["output.weight"] == "Q6_K" and kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert {kinds[f"blk.{i}.attn_v.weight"] for i in range(2)} == {"Q4_K", "Q6_K"}  # layer 1 is behind 7/8 of two
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    host = dict(hosts(model))["model.layers.1.mlp.up_proj"]
    p = host.p["default"]
    W = host.weight.dequantize(torch.bfloat16).float() + host.kinds["default"].s * p["B"].float() @ p["A"].float()
    assert np.array_equal(held["blk.1.ffn_up.weight"].data, rounded(W.detach(), "Q4_K"))
    said = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "x" / "model.gguf").fields.items()}
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M and said["general.architecture"] == "llama"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mix", ["f16", "q8_0"])
def test_transformers_computes_what_was_trained(mix: str, tied: bool, tmp_path: Path) -> None:
    """But for the rounding: 11 bits, or 8."""
    model = tuned(tie_word_embeddings=tied, hidden_size=64, intermediate_size=96)
    row = export(model, tmp_path / "x", f"gguf:{mix}")
    with float32(model):
        wanted = tiny.logits(model)
    got = tiny.logits(stock(tmp_path / "x", f"gguf:{mix}"))
    assert float((got - wanted).std() / wanted.std()) < {"f16": 0.005, "q8_0": 0.2}[mix]
    assert ("output.weight" in tensors(tmp_path / "x")) != tied
    result = verify(tmp_path / "x", f"gguf:{mix}", model, tiny.batches())
    assert (
        result["verdict"] == {"f16": "ok", "q8_0": "rounded"}[mix]
        and result["bytes"] == row["bytes"]
        and result["reader"] == "transformers, gguf"
    )


def test_a_wrong_file_is_found(tmp_path: Path) -> None:
    model = tuned(hidden_size=64, intermediate_size=96)
    export(model, tmp_path / "x", "gguf:q8_0")
    export(tiny.tuned(tiny.plan(dtype="bfloat16"), tiny.fresh(dtype=torch.bfloat16), seed=2), tmp_path / "y", "gguf:q8_0")
    (tmp_path / "y" / "model.gguf").replace(tmp_path / "x" / "model.gguf")  # another update over the same base
    with pytest.raises(VerificationFailed, match=r"KL [\d.]+ \(at most 0.02\)"):
        verify(tmp_path / "x", "gguf:q8_0", model, tiny.batches())
    (tmp_path / "x" / "model.gguf").unlink()
    with pytest.raises(VerificationFailed, match="holds no model.gguf"):
        verify(tmp_path / "x", "gguf:q8_0", model, tiny.batches())


# llama_tensor_get_type of llama.cpp (November 2026), by hand, of 16 layers with 8 heads over 2
RULE = [
    ("q4_k_m", "blk.0.attn_v.weight", 512, "Q6_K"),
    ("q4_k_m", "blk.2.attn_v.weight", 512, "Q4_K"),
    ("q4_k_m", "blk.4.ffn_down.weight", 512, "Q6_K"),
    ("q4_k_m", "blk.4.ffn_up.weight", 512, "Q4_K"),
    ("q4_k_m", "blk.4.ffn_up.weight", 576, "Q5_0"),
    ("q4_k_m", "blk.4.ffn_up.weight", 500, "F16"),
    ("q4_k_m", "output.weight", 512, "Q6_K"),
    ("q4_k_m", "output.weight", 576, "Q8_0"),
    ("q4_k_m", "token_embd.weight", 512, "Q4_K"),
    ("q4_k_s", "blk.3.attn_v.weight", 512, "Q5_K"),
    ("q4_k_s", "blk.2.ffn_down.weight", 512, "Q4_K"),
    ("q5_k_m", "blk.15.ffn_down.weight", 512, "Q6_K"),
    ("q5_k_m", "blk.3.ffn_down.weight", 576, "Q5_1"),
    ("q3_k_m", "blk.1.attn_v.weight", 512, "Q5_K"),
    ("q3_k_m", "blk.9.attn_output.weight", 512, "Q4_K"),
    ("q3_k_m", "blk.0.ffn_down.weight", 512, "Q5_K"),
    ("q3_k_s", "blk.0.ffn_down.weight", 576, "Q4_0"),
    ("q2_k", "blk.0.attn_v.weight", 512, "Q4_K"),
    ("q2_k", "blk.0.attn_output.weight", 512, "Q3_K"),
    ("q8_0", "output.weight", 512, "Q8_0"),
    ("q4_0", "output.weight", 544, "Q8_0"),
    ("q4_0", "output.weight", 512, "Q6_K"),
    ("f16", "output.weight", 500, "F16"),
]


@pytest.mark.parametrize("mix,name,n,kind", RULE)
def test_types_follow_the_published_rule(mix: str, name: str, n: int, kind: str) -> None:
    config = SimpleNamespace(num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2, model_type="llama")
    found, _ = kind_of(mix, name, (64, n), config, tied=False)
    assert found == kind


def test_a_table_that_is_the_head_has_its_bits() -> None:
    config = SimpleNamespace(num_hidden_layers=80, num_attention_heads=8, num_key_value_heads=1, model_type="llama")
    kinds = [kind_of("q4_k_m", "token_embd.weight", (64, 512), config, tied)[0] for tied in (True, False)]
    assert kinds == ["Q6_K", "Q4_K"]
    assert kind_of("q4_k_m", "blk.11.attn_v.weight", (64, 512), config, False)[0] == "Q5_K" and not more_bits(11, 80)  # of 70B models
    assert kind_of("q2_k", "blk.3.attn_norm.weight", (512,), config, False)[0] == "F32"


def test_all_mixes_are_llama_cpps() -> None:
    for name, mix in MIXES.items():
        assert hasattr(gguf.LlamaFileType, f"MOSTLY_{name.upper()}") and mix.kind in BLOCKS
    assert {kind: block_of(kind) for kind in BLOCKS} == BLOCKS


def test_what_cannot_be_merged_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a merged GGUF file is of f16, .* and gguf:q9 was asked for"):
        target("gguf:q9")
    with pytest.raises(ValueError, match="export target merged has no types, and merged:f16 was asked for"):
        target("merged:f16")
    with pytest.raises(CannotHold, match="export target gguf:q4_k_m cannot hold this as it is: GGUF is written of llama.* and this is opt"):
        check_plan(tiny.plan(), ["gguf:q4_k_m"], {"model_type": "opt"})
    model = tuned(hidden_size=64, intermediate_size=96)
    next(iter(dict(hosts(model)).values())).p["default"]["B"].data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight: the weight holds"):
        export(model, tmp_path / "x", "gguf:q8_0")
    assert not (tmp_path / "x").exists()


def test_columns_count_as_their_inputs_are_large(tmp_path: Path) -> None:
    """The error of outputs on inputs of such sizes is less than without, in super-blocks and in plain blocks; all alike is none."""
    W, d = torch.randn(16, 256), torch.randn(256).mul(2).exp()
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q4_0", "Q5_1"):
        read = lambda data, kind=kind: torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))  # noqa: E731
        error = lambda data: float(((read(data) - W).square() * d).sum())  # noqa: E731
        assert error(rounded(W, kind, d)) < 0.9 * error(rounded(W, kind))
        assert np.array_equal(rounded(W, kind, torch.ones(256)), rounded(W, kind))
    model = tuned(intermediate_size=512)
    measured = {name: torch.rand(host.weight.shape[1]) ** 4 for name, host in hosts(model)}
    export(model, tmp_path / "x", "gguf:q4_k_m", importance=measured)
    export(model, tmp_path / "y", "gguf:q4_k_m")
    x, y = tensors(tmp_path / "x"), tensors(tmp_path / "y")
    same = {name for name in x if np.array_equal(x[name].data, y[name].data)}
    assert {n for n in x if n.startswith("blk.") and "norm" not in n}.isdisjoint(same) and {
        "output.weight",
        "blk.0.attn_norm.weight",
    } <= same
