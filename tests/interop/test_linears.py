"""Products with a matrix that are not called nn.Linear are handled as linears are, and written as their models have them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import architectures
import finebits as fb
from classifiers import pictures
from finebits.build import hosts
from finebits.export.base import CannotHold, check_plan
from finebits.interop.hf import load, load_planned
from finebits.interop.linears import linearized
from finebits.interop.peers import qlora
from finebits.interop.peft import export, stock, verify
from finebits.interop.planning import plan_model
from finebits.linears import as_stored, inputs_first, multiplies
from finebits.qtensor import QTensor

KINDS = {"gpt2": "c_attn", "openai-gpt": "c_fc", "falcon": "query_key_value", "phi3": "gate_up_proj"}
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(path, kind, **more):
    """A model of this kind in 4 bits under LoRA, after three steps of Adam."""
    architectures.folder(path, kind, architectures.MORE[kind])
    given = dict(formats=(fb.NF(4, 32),), init=fb.LoftQ(), adapter=fb.LoRA(rank=3, alpha=5.0), target_modules="all-linear")
    model, tokenizer = load_planned(plan_model(path, None, None, architectures.settings(**given | more)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, 2e-2), []
    for _ in range(3):
        losses.append(float(architectures.step(model, architectures.batch())))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    return model.eval(), tokenizer


def logits(model):
    with torch.no_grad():
        return model(input_ids=architectures.batch()["input_ids"][1:], use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_and_exported_to_stock_libraries(kind, tmp_path):
    model, tokenizer = trained(tmp_path / "model", kind)
    turned = {name for name, host in hosts(model) if inputs_first(host)}
    assert bool(turned) == (kind in ("gpt2", "openai-gpt"))
    assert all(isinstance(host.weight, QTensor) and host.active for _, host in hosts(model))
    wanted = logits(model)

    fb.save(model, tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    assert torch.equal(logits(again), wanted)
    assert {name for name, host in hosts(again) if inputs_first(host)} == turned

    batches = [architectures.batch()]
    export(model, tmp_path / "adapter", "adapter", tokenizer)
    assert verify(tmp_path / "adapter", "adapter", model, batches, tolerance=1e-4)["verdict"] == "same"
    torch.testing.assert_close(logits(stock(tmp_path / "adapter", "adapter").eval()), wanted, rtol=1e-4, atol=1e-4)

    export(model, tmp_path / "merged", "merged", tokenizer)
    verify(tmp_path / "merged", "merged", model, batches)
    own, theirs = load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "model/model.safetensors")
    assert {k: t.shape for k, t in own.items()} == {k: t.shape for k, t in theirs.items()}  # as its own library saves it


def test_peft_is_told_which_way_weights_lie(tmp_path):
    for kind in ("gpt2", "falcon"):
        model, _ = trained(tmp_path / kind, kind)
        export(model, tmp_path / f"{kind}-out", "adapter")
        config = json.loads((tmp_path / f"{kind}-out/adapter_config.json").read_text())
        assert config["fan_in_fan_out"] == (kind == "gpt2")


def test_codes_of_weights_that_lie_the_other_way_are_refused_while_planning(tmp_path):
    architectures.folder(tmp_path, "gpt2", {})
    plan = plan_model(
        tmp_path, None, None, architectures.settings(formats=(fb.Int(4, 32, scale="fp16"),), target_modules=["c_attn", "c_fc"])
    )
    check_plan(plan, ["adapter", "merged"])
    with pytest.raises(CannotHold, match=r"gptq holds codes .*c_attn as \(32, 96\): targets that can: adapter, merged"):
        check_plan(plan, ["adapter", "gptq"])
    model, _ = load_planned(plan)
    with pytest.raises(fb.errors.Invalid, match=r"h.0.attn.c_attn is \(32, 96\) in files of its model"):
        export(model, tmp_path / "out", "gptq")
    dense = replace(plan, modules={n: replace(s, format=None) for n, s in plan.modules.items()})
    check_plan(dense, ["gptq"])


def test_a_library_that_looks_for_one_class_does_not_find_another(tmp_path):
    """transformers' bitsandbytes leaves Falcon's layers alone: its codes would not be read. The others read them."""
    architectures.folder(tmp_path, "falcon", {"hidden_size": 64})
    plan = plan_model(tmp_path, None, None, architectures.settings(formats=(fb.NF(4, 64),), target_modules=["query_key_value"]))
    with pytest.raises(
        CannotHold, match=r"bitsandbytes is read by libraries that look for nn.Linear, and .*query_key_value is a FalconLinear"
    ):
        check_plan(plan, ["bitsandbytes"])
    model, _ = load_planned(plan)
    with pytest.raises(fb.errors.Invalid, match="nn.Linear alone, and .*query_key_value is a FalconLinear: export adapter or merged"):
        export(model, tmp_path / "out", "bitsandbytes")
    with pytest.raises(fb.errors.Invalid, match="would leave a FalconLinear in 16 bits"):
        qlora(tmp_path, plan.modules, torch.float32)
    plan = plan_model(
        tmp_path, None, None, architectures.settings(formats=(fb.Int(4, 32, scale="fp16"),), target_modules=["query_key_value"])
    )
    check_plan(plan, ["adapter", "merged", "gptq", "compressed_tensors"])


@pytest.mark.parametrize(
    ("kind", "fused", "out"),
    [("phi3", "qkv_proj", "o_proj"), ("falcon", "query_key_value", "dense"), ("gpt2", "c_attn", "attn.c_proj")],
)
def test_blocks_stay_within_a_head(kind, fused, out, tmp_path):
    """Heads lie along the rows of a fused projection of q, k and v, and along the columns of the output projection: what one head holds moves no
    other's codes."""
    wide = dict.fromkeys(("hidden_size", "n_embd"), 128)
    architectures.folder(tmp_path, kind, {k: v for k, v in wide.items() if k in ("n_embd" if kind == "gpt2" else "hidden_size")})
    given = architectures.settings(formats=(fb.NF(4, 64),), planner=fb.BlockSize(), target_modules=[fused, out])
    plan, size = plan_model(tmp_path, None, None, given), 32
    for name, spec in plan.modules.items():
        assert getattr(spec.format, "unit", None) == (size if name.endswith(out) else None), name
        m, n = plan.costs[name]["shape"]
        W = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
        V, head = W.clone(), slice(size, 2 * size)
        view = (lambda t: t) if name.endswith(out) else (lambda t: t.T)  # noqa: E731
        view(V)[:, head] *= 9
        before, after = (view(fb.quantize(t, spec.format).dequantize()) for t in (W, V))
        others = [i for i in range(before.shape[1]) if not size <= i < 2 * size]
        assert torch.equal(before[:, others], after[:, others]) and not torch.equal(before[:, head], after[:, head])


def test_what_cuts_pictures_into_patches_is_a_linear(tmp_path):
    """Where it is named: planned, trained, saved, and exported as the convolution that it is."""
    pictures(tmp_path / "vit")
    given = dict(formats=(fb.NF(4, 16),), init=fb.LoftQ(), adapter=fb.LoRA(rank=3, alpha=5.0))
    name = "vit.embeddings.patch_embeddings.projection"
    assert name not in plan_model(tmp_path / "vit", None, None, architectures.settings(**given, target_modules="all-linear")).modules
    plan = plan_model(tmp_path / "vit", None, None, architectures.settings(**given, target_modules=["projection", "q_proj"]))
    assert plan.costs[name]["shape"] == [plan.costs[name]["stored"][0], 16] and plan.costs[name]["stored"][1:] == [1, 4, 4]
    model, processor = load_planned(plan)
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, losses = torch.arange(6) % 2, []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 2e-2)
    for _ in range(3):
        losses.append(model(pixel_values=x, labels=labels).loss)
        losses[-1].backward()
        assert dict(hosts(model))[name].p["default"]["B"].grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    wanted = model.eval()(pixel_values=x).logits.detach()
    fb.save(model, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")[0](pixel_values=x).logits, wanted)
    for to in ("adapter", "merged"):
        export(model, tmp_path / to, to)
        row = verify(tmp_path / to, to, model, [{"pixel_values": x, "labels": labels}], tolerance=1e-4)
        assert row["verdict"] == ("same" if to == "adapter" else row["verdict"])
    torch.testing.assert_close(stock(tmp_path / "adapter", "adapter").eval()(pixel_values=x).logits, wanted, rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "merged/model.safetensors")[f"{name}.weight"].shape == (32, 1, 4, 4)


@pytest.mark.parametrize("conv", [torch.nn.Conv2d(3, 5, (2, 3), (2, 3)), torch.nn.Conv1d(4, 6, 3, 3, bias=False)], ids=str)
def test_a_convolution_side_by_side_is_the_same_as_a_linear(conv):
    x = torch.randn(2, conv.in_channels, *(9, 11)[: len(conv.kernel_size)], generator=torch.Generator().manual_seed(0))
    wanted = conv(x)
    model = linearized(torch.nn.Sequential(conv))
    torch.testing.assert_close(model(x), wanted)
    host = fb.Adapted.over(model[0])
    host.add("default", fb.LoRA(rank=2), torch.Generator().manual_seed(0), {"B": torch.ones(host.out_features, 2)})
    merged = as_stored(host, host.stack().weight)
    torch.testing.assert_close(model(x), getattr(torch.nn.functional, f"conv{merged.ndim - 2}d")(x, merged, conv.bias, conv.stride))


class Spelled(torch.nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Noisy(torch.nn.Linear):
    def forward(self, x):
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training))


class Halved(torch.nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.share = 0.5

    def forward(self, x):
        return super().forward(x) * self.share


def test_a_subclass_is_a_linear_where_its_forward_is_one():
    before = torch.random.get_rng_state()
    x, linear = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), Spelled(4, 3)
    torch.random.set_rng_state(before)
    wanted = linear(x)
    assert multiplies(linear) and not multiplies(Noisy(4, 3)) and not multiplies(Halved(4, 3)) and not multiplies(torch.nn.LayerNorm(3))
    assert torch.equal(fb.Adapted.over(linear)(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(linear(x), wanted)
    for other in (Noisy(4, 3), Halved(4, 3)):
        with pytest.raises(fb.errors.WrongType, match=f"is a {type(other).__name__}"):
            fb.Adapted.over(other)
    odd = Spelled(4, 3)
    odd.share = 0.5  # what its forward might read one day
    assert not multiplies(odd)


def test_a_wrong_name_and_a_rank_beyond_a_matrix_are_said(tmp_path):
    folder = architectures.folder(tmp_path, "gpt2", {})
    plan = lambda **more: fb.plan_model(folder, None, fast=True, max_length=16, **more)  # noqa: E731
    with pytest.raises(fb.errors.Invalid, match="names q_proj, and no linear of the model ends so: they end in c_attn, c_proj, c_fc"):
        plan(target_modules=["q_proj"])
    with pytest.raises(fb.errors.Invalid, match="matches no linear of the model: they end in c_attn, c_proj, c_fc"):
        plan(target_modules="q_proj")
    assert any("rank 40 is more than the 32" in notice for notice in plan(rank=40).notices)
    assert not any("is more than the" in notice for notice in plan(rank=2).notices)
    with pytest.raises(fb.errors.Invalid, match="adapter.rank is 500, and the longest side of a matrix is"):
        plan(rank=500)
