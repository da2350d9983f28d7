"""Adapters that rescale a weight, for programs that know none of them: rows in scales under the same codes, the rest a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finebits as fb
import tiny_llama as tiny
from finebits.adapters.base import Base, Rescaled
from finebits.build import hosts
from finebits.evaluate.exact import float32
from finebits.export import base as exports
from finebits.export._fold import Folded, folded, foreseen, rescaled
from finebits.export._peft import to_peft
from finebits.interop.peft import export, stock, verify
from finebits.qtensor import QTensor

DORA = fb.DoRA(rank=3, alpha=6.0)
HELD = {  # target -> a format that it holds, the verdict, and the suffixes of what are codes
    "bitsandbytes": (fb.NF(4, 32, "double"), "same", (".weight",)),
    "compressed_tensors": (fb.Int(4, 32, True, "fp32"), "same", (".weight_packed",)),
    "gptq": (fb.Int(4, 32, False, "fp16", "integer"), "ok", (".qweight", ".qzeros")),
}


def tuned(adapter: Any, format: Any, dtype: str = "float32", model: Any = None, **specs: Any) -> Any:
    return tiny.tuned(tiny.plan(adapter, format, fb.Zeros(), dtype, **specs), model)


@pytest.mark.parametrize("format", [fb.Int(8, "row"), fb.NF(4, 64), fb.NF(4, 64, "double"), fb.Int(3, 32, False, "bf16")], ids=str)
def test_rows_are_folded_under_the_same_codes(format: Any) -> None:
    q, x, l = fb.quantize(torch.randn(12, 64), format), torch.randn(5, 64), torch.randn(12)  # noqa: E741
    none = Rescaled(l, None, torch.zeros(12, 0), torch.zeros(0, 64))
    other = rescaled(q, Folded(none, None), "fp32")
    assert torch.equal(other.parts["codes"], q.parts["codes"])
    wanted = fb.IA3().forward({"l": l}, x, Base(q))
    torch.testing.assert_close(torch.nn.functional.linear(x, other), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("to", HELD)
def test_dora_over_codes_is_scales_and_a_plain_lora(to: str, tmp_path: Path) -> None:
    if to != "gptq":
        pytest.importorskip(to)
    format, verdict, suffixes = HELD[to]
    model = tuned(DORA, format, q_proj=fb.Spec(format, adapter=fb.LoRA(rank=2)), k_proj=fb.Spec(format), o_proj=fb.Spec(adapter=DORA))
    export(model, tmp_path / "x", to)
    assert verify(tmp_path / "x", to, model, tiny.batches())["verdict"] == verdict
    if to == "bitsandbytes":
        with float32(model):
            wanted = tiny.logits(model)
        assert float((tiny.logits(stock(tmp_path / "x", to).train()) - wanted).abs().max()) < 1e-3
    for _, host in hosts(model):
        for name in list(host.kinds):
            host.remove(name)
    export(model, tmp_path / "base", to)
    ours, theirs = (load_file(tmp_path / name / "base" / "model.safetensors") for name in ("x", "base"))
    packed = [f"{name}{suffix}" for name, host in hosts(model) if type(host.weight) is not torch.nn.Parameter for suffix in suffixes]
    packed = [key for key in packed if key in ours and ours[key].dtype in (torch.uint8, torch.int32)]
    assert len(packed) == 12 * len(suffixes) and all(torch.equal(ours[key], theirs[key]) for key in packed)


def test_dora_over_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tuned(DORA, fb.Int(4, 32, False, "fp16"))
    export(model, tmp_path / "x", "gguf")
    assert verify(tmp_path / "x", "gguf", model, tiny.batches())["verdict"] in ("same", "ok")


@pytest.mark.parametrize(
    ("dtype", "to", "verdict"), [("float32", "adapter", "same"), ("bfloat16", "adapter", "same"), ("float32", "merged", "ok")]
)
def test_over_a_dense_base_rows_and_columns_are_in_the_weight(dtype: str, to: str, verdict: str, tmp_path: Path) -> None:
    """MiSS beside, which is a product of a shape of its own; rounding to bfloat16 is told apart from a wrong file."""
    down = fb.Spec(fb.NF(4, 32), adapter=fb.IA3("input"))
    model = tuned(DORA, fb.NF(4, 32), dtype, v_proj=fb.Spec(fb.NF(4, 32), adapter=fb.MiSS(rank=8)), down_proj=down)
    export(model, tmp_path / to, to)
    assert verify(tmp_path / to, to, model, tiny.batches())["verdict"] == verdict
    config, _ = to_peft(model, "")
    assert config.r == 8 and not config.use_dora and config.init_lora_weights is True and not config.lora_bias


def test_a_dense_weight_in_16_bits_takes_no_factors_in(tmp_path: Path) -> None:
    """It lies on their grid: times 1.001 and rounded it is what it was."""
    pytest.importorskip("bitsandbytes")
    nf4 = fb.NF(4, 32)
    for dtype, up in (("bfloat16", fb.Spec()), ("bfloat16", fb.Spec(nf4)), ("float32", fb.Spec())):
        plain = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"), fb.Spec(nf4))
        model = tuned(fb.IA3("input"), nf4, dtype, up_proj=up, **plain)
        if dtype == "bfloat16" and up.format is None:
            with pytest.raises(ValueError, match=r"mlp.up_proj is to take in what an adapter rescales and is not quantized: in bfloat16"):
                export(model, tmp_path / "x", "bitsandbytes")
            continue
        export(model, tmp_path / f"{dtype}", "bitsandbytes")
        assert verify(tmp_path / f"{dtype}", "bitsandbytes", model, tiny.batches())["verdict"] in ("same", "ok")


def test_columns_move_to_the_rows_of_the_layer_before(tmp_path: Path) -> None:
    """IA³ as its paper has it, over codes: l of down_proj's inputs is in the scales of up_proj, and gate_proj is left alone."""
    pytest.importorskip("bitsandbytes")
    nf4, plain = fb.NF(4, 32), fb.Spec(fb.NF(4, 32))
    down = fb.Spec(nf4, adapter=fb.IA3("input"))
    model = tuned(fb.IA3(), nf4, q_proj=plain, o_proj=plain, gate_proj=plain, up_proj=plain, down_proj=down)
    export(model, tmp_path / "x", "bitsandbytes")
    result = verify(tmp_path / "x", "bitsandbytes", model, tiny.batches())
    assert result["verdict"] == "same"
    base = load_file(tmp_path / "x" / "base" / "model.safetensors")
    mlp, held = "model.layers.0.mlp.", dict(hosts(model))
    absmax = lambda name: base[f"{mlp}{name}.weight.absmax"].view(held[f"{mlp}{name}"].weight.shape[0], -1)  # noqa: E731
    l = held[f"{mlp}down_proj"].p["default"]["l"].detach()  # noqa: E741
    torch.testing.assert_close(absmax("up_proj"), held[f"{mlp}up_proj"].weight.parts["scale"] * l[:, None])
    for name in ("gate_proj", "down_proj"):
        assert torch.equal(absmax(name), held[f"{mlp}{name}"].weight.parts["scale"])


def test_columns_that_cannot_move_are_refused(tmp_path: Path) -> None:
    model = tuned(fb.IA3("input"), fb.NF(4, 32))
    with pytest.raises(ValueError, match="q_proj: its adapter rescales columns.*adapter and merged hold it"):
        export(model, tmp_path / "x", "bitsandbytes")


def test_biases_are_in_the_base_where_it_has_any(tmp_path: Path) -> None:
    model = tuned(fb.BitFit(), fb.NF(4, 32), model=tiny.fresh(attention_bias=True, mlp_bias=True))
    for to in ("adapter", "merged"):
        export(model, tmp_path / to, to)
        assert verify(tmp_path / to, to, model, tiny.batches())["verdict"] in (("same",) if to == "adapter" else ("same", "ok"))
    name, host = next(iter(hosts(model)))
    written = load_file(tmp_path / "adapter" / "base" / "model.safetensors")[f"{name}.bias"]
    torch.testing.assert_close(written, (host.bias + host.p["default"]["b"]).detach())


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_biases_are_beside_the_lora_where_the_base_has_none(tmp_path: Path) -> None:
    model = tuned(fb.BitFit(), fb.NF(4, 32))
    export(model, tmp_path / "x", "adapter")
    assert verify(tmp_path / "x", "adapter", model, tiny.batches())["verdict"] == "same"
    with float32(model):
        wanted = tiny.logits(model)
    assert float((tiny.logits(stock(tmp_path / "x", "adapter")) - wanted).abs().max()) < 1e-3
    with pytest.raises(ValueError, match="q_proj has no bias in its model, and BitFit adds one"):
        export(model, tmp_path / "y", "merged")


def test_weights_that_lie_the_other_way_in_their_files_are_folded_along_their_rows(tmp_path: Path) -> None:
    """GPT-2's Conv1D: (in, out) in files, stored as such by the target."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from finebits.interop.linears import linearized

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 128, "initializer_range": 0.15}
    gpt2 = linearized(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval())
    kinds = {"attn.c_attn": DORA, "attn.c_proj": fb.BitFit(), "mlp.c_fc": fb.IA3(), "mlp.c_proj": fb.IA3("input")}
    specs = {
        f"transformer.h.{i}.{name}": fb.Spec(fb.NF(4, 32), adapter=kind, init=fb.Zeros()) for i in (0, 1) for name, kind in kinds.items()
    }
    model = tiny.tuned(fb.Plan(specs, model="tiny/gpt2", levers=fb.Levers(dtype="float32")), gpt2)
    export(model, tmp_path / "x", "adapter")
    assert verify(tmp_path / "x", "adapter", model, tiny.batches())["verdict"] == "same"


IN, NF = fb.IA3("input"), fb.NF(4, 32)
FORESEEN: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "rows in scales of their own": ({"q_proj": fb.Spec(NF, adapter=DORA)}, "float32", None),
    "rows under one scale": ({"q_proj": fb.Spec(fb.NF(4, "tensor"), adapter=DORA)}, "float32", "no scale of its own for a row"),
    "columns behind a product": ({"down_proj": fb.Spec(NF, adapter=IN), "up_proj": fb.Spec(NF)}, "float32", None),
    "columns behind attention": ({"o_proj": fb.Spec(NF, adapter=IN), "v_proj": fb.Spec(NF)}, "float32", "no layer before it can take them"),
    "columns of a dense weight": ({"o_proj": fb.Spec(adapter=IN)}, "float32", None),
    "a dense weight of 16 bits": ({"q_proj": fb.Spec(adapter=DORA)}, "bfloat16", "in bfloat16, factors near 1"),
    "a dense neighbour of 16 bits": ({"down_proj": fb.Spec(NF, adapter=IN)}, "bfloat16", "in bfloat16, factors near 1"),
    "a bias alone": ({"q_proj": fb.Spec(NF, adapter=fb.BitFit())}, "float32", None),
}


@pytest.mark.parametrize("case", FORESEEN)
def test_what_cannot_be_folded_is_foreseen_without_values(case: str) -> None:
    """As the export of the trained model then says."""
    specs, dtype, why = FORESEEN[case]
    plan = fb.Plan({f"model.layers.1.{n}": specs[k] for n in tiny.LINEARS if (k := n.rpartition(".")[2]) in specs}, levers=fb.Levers(dtype))
    model = tiny.tuned(plan, tiny.fresh(dtype=getattr(torch, dtype)))
    for scales in ("fp32", "model"):
        found = foreseen(plan, tiny.fresh().to("meta"), scales)
        assert (found is None) == (why is None) and (why is None or why in str(found))
        try:
            folds = folded(model, packed=True)
            for name, fold in folds.items():
                W = model.get_submodule(name).weight
                rescaled(W, fold, "fp32") if isinstance(W, QTensor) else None
        except ValueError as e:
            assert why is not None and why in str(e)
        else:
            assert why is None
    assert foreseen(plan, tiny.fresh().to("meta"), None) is None  # dense, so that anything can be written


def test_a_target_that_is_not_wanted_is_told_of_and_one_that_is_refused() -> None:
    plan = fb.Plan(
        {"model.layers.1.self_attn.o_proj": fb.Spec(NF, adapter=IN)}, costs={"model.layers.1.self_attn.o_proj": {"shape": [64, 64]}}
    )
    (told,) = exports.check_folds(plan, ["adapter"], tiny.fresh().to("meta"))
    assert (
        told.startswith("no export to bitsandbytes, packed (model.layers.1.self_attn.o_proj: IA3 rescales columns")
        and "adapter, merged, peft" in told
    )
    with pytest.raises(
        exports.CannotHold, match="export target bitsandbytes cannot hold this as it is: .*targets that can: adapter, merged, peft"
    ):
        exports.check_folds(plan, ["adapter", "bitsandbytes"], tiny.fresh().to("meta"))
