import json
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits import files, store
from finebits.build import build, hosts
from finebits.qtensor import QTensor
from forked import forked


def same(a, b) -> None:
    """Bit for bit, in state dict, forward and structure."""
    x, y = a.state_dict(), b.state_dict()
    assert list(x) == list(y)
    for k in x:
        assert x[k].dtype == y[k].dtype and torch.equal(x[k].reshape(-1).view(torch.uint8), y[k].reshape(-1).view(torch.uint8)), k
    assert torch.equal(tiny.logits(a), tiny.logits(b))
    for (n, h), (m, g) in zip(hosts(a), hosts(b), strict=True):
        assert (n, h.kinds, h.active, h.dropout) == (m, g.kinds, g.active, g.dropout)
        assert type(h.weight) is type(g.weight) and h.weight.dtype == g.weight.dtype
        assert {k: p.requires_grad for k, p in h.named_parameters()} == {k: p.requires_grad for k, p in g.named_parameters()}


PLANS = {
    "loftq": lambda: tiny.plan(),
    "bf16": lambda: tiny.plan(dtype="bfloat16", format=fb.NF(3, block=48, scale="bf16")),
    "int8 asymmetric": lambda: tiny.plan(format=fb.Int(8, block=16, symmetric=False), init=fb.Zeros()),
    "gated": lambda: tiny.plan(fb.Gated(rank=3, alpha=5.0)),
    "dense": lambda: tiny.plan(fb.LoRA(rank=2, alpha=3.0, scaling="rslora"), format=None, init=fb.Zeros()),
    "moved dense base": lambda: tiny.plan(format=None, init=fb.LoftQ(steps=1, order="svd"), dtype="bfloat16"),
    "shared and drawn": lambda: tiny.plan(fb.VeRA(rank=6), init=fb.Zeros(), o_proj=fb.Spec(fb.NF(3), adapter=fb.PaCA(rank=5))),
    "mixed": lambda: tiny.plan(q_proj=fb.Spec(format=fb.Int(4)), v_proj=fb.Spec(adapter=fb.Gated(rank=5))),
}


@pytest.mark.parametrize("kind", PLANS)
def test_load_after_save_is_the_identity(kind, tmp_path):
    plan = PLANS[kind]()
    model = tiny.tuned(plan)
    store.save(model, tmp_path / "a")
    saved = store.read(tmp_path / "a")
    assert saved.plan == plan
    other = tiny.fresh(dtype=getattr(torch, plan.levers.dtype))
    back = store.apply(other, saved)
    same(model, back)
    assert back.finebits.plan == plan
    store.save(back, tmp_path / "b")
    for file in ("adapter.safetensors", "base.safetensors", "plan.json", "finebits.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("format", [fb.NF(4, 32, "double"), fb.VQ(M=1, K=16, g=4), fb.Int(4, "tensor"), fb.NVFP4()], ids=str)
def test_parts_that_a_whole_matrix_shares_come_back(format, tmp_path):
    model = tiny.tuned(tiny.plan(format=format, init=fb.Zeros()))
    store.save(model, tmp_path / "a")
    states, back = model.state_dict(), store.apply(tiny.fresh(), store.read(tmp_path / "a"))
    assert states.keys() == back.state_dict().keys() and all(torch.equal(v, states[k]) for k, v in back.state_dict().items())
    assert torch.equal(tiny.logits(model), tiny.logits(back))


def test_saved_bases_need_no_weights_of_the_model(tmp_path):
    model = tiny.tuned(tiny.plan())
    store.save(model, tmp_path / "a")
    saved = store.read(tmp_path / "a")
    assert set(saved.bases) == set(tiny.names())
    other = tiny.fresh()
    for name in saved.bases:
        linear = other.get_submodule(name)
        linear.weight = torch.nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    same(model, store.apply(other, saved))


def test_several_adapters_their_order_and_dropout(tmp_path):
    model = tiny.tuned(replace(tiny.plan(), levers=fb.Levers(dropout=0.1)))
    host = dict(hosts(model))["model.layers.0.mlp.up_proj"]
    host.add("second", fb.Gated(rank=2), torch.Generator().manual_seed(9), {"gate": torch.ones(2)})
    host.active = ["second", "default"]
    store.save(model, tmp_path / "a")
    same(model, store.apply(tiny.fresh(), store.read(tmp_path / "a")))


def test_adapters_frozen_for_inference_are_saved(tmp_path):
    model = tiny.tuned(tiny.plan()).requires_grad_(False)
    store.save(model, tmp_path / "a")
    back = store.apply(tiny.fresh(), store.read(tmp_path / "a"))
    assert torch.equal(tiny.logits(model), tiny.logits(back))


@pytest.mark.parametrize("what", ["bias", "a gain that the user trains", "the embeddings"])
def test_tensors_outside_of_adapters_that_were_tuned_are_saved(what, tmp_path):
    model, kind = tiny.tuned(tiny.plan(), tiny.fresh(attention_bias=True)), {"attention_bias": True}
    name = {"bias": "model.layers.1.self_attn.k_proj.bias", "the embeddings": "model.embed_tokens.weight"}.get(what, "model.norm.weight")
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.mul_(1.25).add_(0.01)
    parameter.requires_grad_(what != "bias")
    store.save(model, tmp_path / "a")
    saved = store.read(tmp_path / "a")
    assert set(saved.tuned) == {name}
    same(model, store.apply(tiny.fresh(**kind), saved))
    for wrong in ({"model.nothing": parameter.detach()}, {name: parameter.detach()[:5]}):
        with pytest.raises(ValueError, match="another model"):
            store.apply(tiny.fresh(**kind), replace(saved, tuned=wrong))
    (tmp_path / "a" / store.TUNED).unlink()
    with pytest.raises(ValueError, match="tuned.safetensors"):
        store.read(tmp_path / "a")


def test_a_dtype_that_is_changed_later_tunes_nothing(tmp_path):
    model = tiny.tuned(tiny.plan(dtype="bfloat16")).float()
    store.save(model, tmp_path / "a")
    assert not (tmp_path / "a" / store.TUNED).exists()


def test_stock_safetensors_reads_the_files(tmp_path):
    from safetensors.torch import load_file

    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    store.save(model, tmp_path / "a")
    base, adapter = load_file(tmp_path / "a" / "base.safetensors"), load_file(tmp_path / "a" / "adapter.safetensors")
    for name, host in hosts(model):
        assert isinstance(host.weight, QTensor)
        assert torch.equal(base[f"{name}.weight.codes"], host.weight.parts["codes"])
        assert torch.equal(adapter[f"{name}.default.A"], host.p["default"]["A"]) and adapter[f"{name}.default.A"].dtype == torch.float32


def test_a_model_without_a_plan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="carries no plan"):
        store.save(tiny.fresh(), tmp_path / "a")


def test_saved_from_another_model(tmp_path):
    store.save(tiny.tuned(tiny.plan()), tmp_path / "a")
    saved = store.read(tmp_path / "a")
    with pytest.raises(ValueError, match="no such module"):
        store.apply(torch.nn.Sequential(torch.nn.Linear(3, 3)), saved)
    with pytest.raises(ValueError, match=r"q_proj.weight was saved as \(64, 64\)"):
        store.apply(_narrower(), saved)


def _narrower():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4))


# Bad files ------------------------------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (Path("exploded").write_text, ("",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.pkl"])
def test_a_pickle_offered_as_an_adapter_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(pickle.dumps(Bomb()))
    for offered in (tmp_path / "a", tmp_path / "a" / name):
        with pytest.raises(ValueError, match="is a pickle, which can run code"):
            store.read(offered)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("write", [lambda f: f.write_bytes(pickle.dumps(Bomb())), lambda f: torch.save({"x": torch.ones(2)}, f)])
def test_a_pickle_under_a_safe_name_is_refused(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.save(tiny.tuned(tiny.plan()), tmp_path / "a")
    file = tmp_path / "a" / "adapter.safetensors"
    write(file)
    _bless(tmp_path / "a")
    with pytest.raises(ValueError, match=r"adapter\.safetensors is a pickle"):
        store.read(tmp_path / "a")
    assert not (tmp_path / "exploded").exists()


def _bless(folder: Path) -> None:
    """The manifest of someone who means harm: every hash is right."""
    manifest = json.loads((folder / "finebits.json").read_text())
    manifest["sha256"] = {f: store.sha256(folder / f) for f in manifest["sha256"]}
    (folder / "finebits.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("file", ["adapter.safetensors", "base.safetensors", "plan.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named(file, damage, tmp_path):
    store.save(tiny.tuned(tiny.plan()), tmp_path / "a")
    path = tmp_path / "a" / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes({"flip": raw, "cut": raw[: len(raw) // 3], "remove": b""}[damage])
    if damage == "remove":
        path.unlink()
    with pytest.raises(ValueError, match=rf"{file} is damaged|has no {file}"):
        store.read(tmp_path / "a")


@pytest.mark.parametrize("cut", [0, 4, 20, 2000])
def test_a_cut_file_with_a_right_hash_is_named(cut, tmp_path):
    store.save(tiny.tuned(tiny.plan()), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    _bless(tmp_path / "a")
    with pytest.raises(ValueError, match=r"adapter\.safetensors is not a tensor file"):
        store.read(tmp_path / "a")


def test_parts_of_another_shape_are_refused(tmp_path):
    store.save(tiny.tuned(tiny.plan()), tmp_path / "a")
    saved = store.read(tmp_path / "a")
    parts = saved.bases["model.layers.0.self_attn.q_proj"]
    parts["scale"] = parts["scale"][:, :1]
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj.weight: the parts \(codes, scale\) are not those of"):
        store.apply(tiny.fresh(), saved)


def test_a_missing_tensor_of_an_adapter_is_not_drawn_again(tmp_path):
    store.save(tiny.tuned(tiny.plan()), tmp_path / "a")
    saved = store.read(tmp_path / "a")
    del saved.adapter["model.layers.1.mlp.down_proj"]["default"]["A"]
    with pytest.raises(ValueError, match="model.layers.1.mlp.down_proj.default.A"):
        store.apply(tiny.fresh(), saved)


def test_not_a_saved_folder(tmp_path):
    with pytest.raises(ValueError, match="no saved model at"):
        store.read(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a PEFT adapter folder"):
        store.read(tmp_path)
    (tmp_path / "finebits.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        store.read(tmp_path)


# Interruption ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_in_the_middle_leaves_the_old_folder(at, tmp_path, monkeypatch):
    model = tiny.tuned(tiny.plan())
    store.save(model, tmp_path / "a")
    write, calls = store.write, []

    def failing(*args):
        calls.append(args)
        if len(calls) > at:
            raise OSError("no space left on device")
        return write(*args)

    monkeypatch.setattr(store, "write", failing)
    with pytest.raises(OSError, match="no space"):
        store.save(tiny.tuned(tiny.plan(), seed=2), tmp_path / "a")
    same(model, store.apply(tiny.fresh(), store.read(tmp_path / "a")))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def small(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    spec = fb.Spec(format=fb.NF(2, block=32), adapter=fb.LoRA(rank=4), init=fb.LoftQ(steps=1))
    return build(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16)), fb.Plan({"0": spec, "1": spec}))


def save_until(step: str, where: Path) -> None:
    kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if step == "first tensor":
        entry = store.Entry
        store.Entry = type("Entry", (), {"of": staticmethod(lambda t: entry(t.dtype, tuple(t.shape), kill))})
    elif step == "manifest":
        store.record = kill
    elif step == "moving":
        files.os.replace = lambda a, b, move=os.replace: kill() if os.path.basename(b) == "base.safetensors" else move(a, b)
    store.save(small(2), where)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
@pytest.mark.parametrize("step", ["first tensor", "manifest", "moving"])
def test_a_kill_leaves_a_whole_folder(step, tmp_path):
    old, new, where = small(1), small(2), tmp_path / "a"
    store.save(old, where)
    assert forked(lambda: save_until(step, where)) == -signal.SIGKILL
    for model in (new if step == "moving" else old, new):
        back = store.apply(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16)), store.read(where))
        found = back.state_dict()
        assert all(torch.equal(t, found[k]) for k, t in model.state_dict().items() if "bias" not in k)
        store.save(new, where)


def test_build_writes_its_plan_on_the_model():
    plan = tiny.plan()
    assert build(tiny.fresh(), plan).finebits.plan is plan


@pytest.mark.parametrize("kind", ["loftq", "zeros", "dense"])
def test_starting_into_a_folder_writes_what_save_would(kind, tmp_path):
    """Matrix by matrix from the model's file to the saved one: the same bytes."""
    model = tiny.folder(tmp_path / "model")
    format = None if kind == "dense" else fb.NF(2, block=32, scale="bf16")
    plan = replace(tiny.plan(format=format, init=fb.Zeros() if kind == "zeros" else fb.LoftQ(order="svd")), model=str(model))
    fb.start_folder(plan, tmp_path / "one")
    fb.save(build(tiny.fresh(), plan), tmp_path / "other")
    names = sorted(p.name for p in (tmp_path / "other").iterdir())
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == names
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "other" / n).read_bytes() for n in names)


def test_a_spool_refuses_a_second_tensor_of_a_name(tmp_path):
    from finebits.tensorfile import Spool

    with Spool(tmp_path / "x.safetensors") as spool:
        spool.add("a", torch.ones(3))
        with pytest.raises(ValueError, match="a tensor a already"):
            spool.add("a", torch.ones(3))
    assert not list(tmp_path.iterdir()), "what was waiting is gone"


def test_where_a_model_is_wanted_a_saved_one_says_how_it_is_read(tmp_path: Path) -> None:
    from finebits.interop.hf import NoModel, folder_of

    model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}))
    fb.save(model, tmp_path / "model")
    with pytest.raises(NoModel, match="finebits.load reads it, and export target packed writes what AutoModelForCausalLM"):
        folder_of(tmp_path / "model")
