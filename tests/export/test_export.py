import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import finebits as fb
import tiny_llama as tiny
from finebits.adapters._family import Usual
from finebits.build import hosts, vectors
from finebits.evaluate.exact import float32
from finebits.evaluate.heldout import teacher
from finebits.export import _safetensors as plain
from finebits.export._card import FINETUNE, card
from finebits.export._peft import to_peft
from finebits.export.base import VerificationFailed
from finebits.interop.peft import export, stock, verify
from finebits.qtensor import dense

UNEQUAL = {"q_proj": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=7, alpha=3.0)), "down_proj": fb.Spec(fb.Int(3), adapter=fb.Gated(rank=2))}
PRODUCTS = {  # adapters that are a plain product, whatever they train
    "q_proj": fb.Spec(fb.NF(4), adapter=fb.VeRA(rank=24)),
    "k_proj": fb.Spec(fb.NF(4), adapter=fb.S2LoRA(rank=4)),
    "v_proj": fb.Spec(fb.Int(3), adapter=fb.S2LoRA(rank=4)),
    "o_proj": fb.Spec(fb.NF(3), adapter=fb.PaCA(rank=6)),
    "gate_proj": fb.Spec(fb.NF(4), adapter=fb.LoRAFA(rank=3)),
    "up_proj": fb.Spec(None, adapter=fb.BlockLoRA(rank=2, blocks=3)),
}
CASES = {
    "nf2 from loftq, bf16": lambda: tiny.tuned(tiny.plan(dtype="bfloat16")),
    "nf2 from loftq, fp32": lambda: tiny.tuned(tiny.plan()),
    "unequal ranks and kinds": lambda: tiny.tuned(tiny.plan(dtype="bfloat16", **UNEQUAL)),
    "alpha is not r": lambda: tiny.tuned(tiny.plan(fb.LoRA(rank=3, alpha=17.0), dtype="bfloat16")),
    "rslora": lambda: tiny.tuned(tiny.plan(fb.LoRA(rank=3, alpha=5.0, scaling="rslora"), dtype="bfloat16")),
    "gated, some gates closed": lambda: closed(tiny.tuned(tiny.plan(fb.Gated(rank=5, alpha=10.0), dtype="bfloat16"))),
    "tied": lambda: tiny.tuned(tiny.plan(dtype="bfloat16"), tiny.fresh(dtype=torch.bfloat16, tie_word_embeddings=True)),
    "tied, head quantized": lambda: head_quantized(),
    "some linears left alone": lambda: tiny.tuned(tiny.plan(dtype="bfloat16", k_proj=fb.Spec(), o_proj=fb.Spec(fb.NF(3)))),
    "biases": lambda: tiny.tuned(tiny.plan(dtype="bfloat16"), biased()),
    "dense base": lambda: tiny.tuned(tiny.plan(format=None, init=fb.Zeros(), dtype="bfloat16")),
    "tuned vectors": lambda: vectors_moved(tiny.tuned(tiny.plan(dtype="bfloat16"), biased())),
    "other products": lambda: tiny.tuned(tiny.plan(dtype="bfloat16", **PRODUCTS)),
    "two adapters": lambda: two(tiny.tuned(tiny.plan(dtype="bfloat16"))),
}


def vectors_moved(model):
    for p in vectors(model).values():
        p.data.mul_(1.5).add_(0.125)
    return model


def closed(model):
    for i, (_, host) in enumerate(hosts(model)):
        host.p["default"]["gate"].data[: i % 6] = 0  # down to no open gate at all
    return model


def two(model):
    for _, host in hosts(model):
        host.add("second", fb.LoRA(rank=2), torch.Generator().manual_seed(1), {"B": 0.1 * torch.ones(host.out_features, 2)})
    return model


def head_quantized():
    plan = tiny.plan(dtype="bfloat16")
    plan = fb.Plan({**plan.modules, "lm_head": fb.Spec(fb.Int(8), adapter=fb.LoRA(rank=2))}, levers=plan.levers)
    return tiny.tuned(plan, tiny.fresh(dtype=torch.bfloat16, tie_word_embeddings=True))


def biased():
    model = tiny.fresh(dtype=torch.bfloat16, attention_bias=True, mlp_bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    return model


@pytest.mark.parametrize("case", CASES)
def test_stock_libraries_compute_what_was_trained(case, tmp_path):
    """One fp32 forward of transformers + peft against ours, without any of our scoring between; then the verdict."""
    model = CASES[case]()
    with float32(model):
        wanted = tiny.logits(model)
    spread = float(wanted.std())
    assert spread > 0.3  # a tolerance of 1e-3 means something here
    row = export(model, tmp_path / "adapter", "adapter")
    got = tiny.logits(stock(tmp_path / "adapter", "adapter"))
    assert float((got - wanted).abs().max()) < 1e-3
    result = verify(tmp_path / "adapter", "adapter", model, tiny.batches())
    assert result["verdict"] == "same" and result["bytes"] == row["bytes"] and result["max_logit_difference"] < 1e-3
    assert result["kl"] < 1e-2 and 0 <= result["top1"] <= 1
    export(model, tmp_path / "merged", "merged")
    got = tiny.logits(stock(tmp_path / "merged", "merged"))
    assert float((got - wanted).abs().max()) < 0.2 * spread
    assert verify(tmp_path / "merged", "merged", model, tiny.batches())["verdict"] in ("same", "ok")


def test_float32_training_in_bf16_files_is_exact_for_the_adapter(tmp_path):
    """The base is written in the dtype that training multiplied with: a float32 run gets a float32 base."""
    model = tiny.tuned(tiny.plan())
    export(model, tmp_path / "a", "adapter")
    assert json.loads((tmp_path / "a" / "base" / "config.json").read_text())["dtype"] == "float32"
    for k, t in load_file(tmp_path / "a" / "base" / "model.safetensors").items():
        assert t.dtype == torch.float32, k


@pytest.mark.parametrize("case", ["unequal ranks and kinds", "tied", "tied, head quantized"])
def test_the_base_is_the_dequantization_bit_for_bit(case, tmp_path):
    model = CASES[case]()
    export(model, tmp_path / "a", "adapter")
    base = load_file(tmp_path / "a" / "base" / "model.safetensors")
    of = dict(hosts(model))
    for name, t in base.items():
        host = of.get(name.removesuffix(".weight"))
        wanted = host.weight.dequantize(torch.bfloat16) if host else model.state_dict()[name]
        assert torch.equal(t, wanted), name
    assert ("lm_head.weight" in base) == (case != "tied")


def test_merged_is_rounded_once(tmp_path):
    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    export(model, tmp_path / "m", "merged")
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for name, host in hosts(model):
        p = host.p["default"]
        W = host.weight.dequantize(torch.bfloat16).double() + host.kinds["default"].s * p["B"].double() @ p["A"].double()
        error = (merged[f"{name}.weight"].double() - W).abs()
        assert bool((error <= 1.001 * 2**-8 * W.abs() + 1e-6).all())  # half a unit in the last of bf16's 8 bits


def test_the_config_folds_everything_into_b(tmp_path):
    model = CASES["unequal ranks and kinds"]()
    export(model, tmp_path / "a", "adapter")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7
    assert config["use_rslora"] is False and config["init_lora_weights"] is True and not config["rank_pattern"]
    assert config["base_model_name_or_path"] == str((tmp_path / "a" / "base").resolve())
    assert config["target_modules"] and set(config["target_modules"]) == {n.rpartition(".")[2] for n in tiny.names()}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(tiny.names()) and {t.dtype for t in tensors.values()} == {torch.float32}
    for name, host in hosts(model):
        L, R = tensors[f"base_model.model.{name}.lora_B.weight"], tensors[f"base_model.model.{name}.lora_A.weight"]
        assert R.shape[0] == L.shape[1] == 7
        p, kind = host.tensors("default"), host.kinds["default"]
        torch.testing.assert_close(L @ R, kind.merged(p, torch.zeros(L.shape[0], R.shape[1])).detach())


def test_modules_of_one_layer_alone_are_named_in_full():
    plan = tiny.plan()
    keep = {n: s for n, s in plan.modules.items() if ".0.self_attn" in n}
    config, tensors = to_peft(tiny.tuned(fb.Plan(keep, levers=plan.levers)), "somewhere/base")
    assert set(config.target_modules) == set(keep) and len(tensors) == 2 * len(keep)
    assert config.base_model_name_or_path == "somewhere/base"


@pytest.mark.parametrize("target", ["adapter", "merged"])
def test_a_model_in_many_files_is_the_same_model(target, tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "SHARD", 20_000)
    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    row = export(model, tmp_path / "a", target)
    found = {str(f.relative_to(tmp_path / "a")): f.stat().st_size for f in (tmp_path / "a").rglob("*.safetensors")}
    assert row["bytes"] == sum(found.values())
    assert len(found) > 4  # many shards, an index, and the stock libraries still read them
    assert verify(tmp_path / "a", target, model, tiny.batches())["verdict"] in ("same", "ok")


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Values are made when they are written, and none is kept."""
    import weakref

    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    alive, most = weakref.WeakSet(), 0
    entries = plain.merged_entries(model, torch.bfloat16)

    def watched(entry):
        def value():
            nonlocal most
            t = entry.value().clone()
            alive.add(t)
            most = max(most, len(alive))
            return t

        return entry._replace(value=value)

    for name, file in plain.model_files({k: watched(e) for k, e in entries.items()}).items():
        file.write(tmp_path / name)
    assert most <= 2


def test_a_real_tokenizer_and_generation_config_travel(tmp_path):
    class Words:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, False  # which transformers refuses to save
    export(model, tmp_path / "m", "merged", Words())
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["temperature"] == 0.7


# The proof must fail where it should ----------------------------------------------------------------------------------------------------


def edit(file: Path, change) -> None:
    from safetensors.torch import save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


Q = "base_model.model.model.layers.1.mlp.down_proj"
WRONG = {
    "adapter dropped": ("adapter_model.safetensors", lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]),
    "one module's adapter dropped": ("adapter_model.safetensors", lambda t: t[f"{Q}.lora_B.weight"].zero_()),
    "scaling forgotten": ("adapter_model.safetensors", lambda t: [v.div_(2) for k, v in t.items() if "lora_B" in k]),
    "two modules exchanged": ("adapter_model.safetensors", lambda t: swap(t, "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj")),
    "one weight of the base": ("base/model.safetensors", lambda t: t["model.layers.0.mlp.up_proj.weight"][3].mul_(1.5)),
    "two layers of the base exchanged": ("base/model.safetensors", lambda t: swap(t, "layers.0.mlp.up_proj", "layers.1.mlp.up_proj")),
}


def swap(t, a, b):
    for k in [k for k in t if a in k]:
        t[k], t[k.replace(a, b)] = t[k.replace(a, b)], t[k]


@pytest.mark.parametrize("wrong", WRONG)
def test_verification_fails_on_a_wrong_file(wrong, tmp_path):
    model, batches = tiny.tuned(tiny.plan(dtype="bfloat16")), tiny.batches()
    export(model, tmp_path / "a", "adapter")
    file, change = WRONG[wrong]
    edit(tmp_path / "a" / file, change)
    with pytest.raises(VerificationFailed, match=r"largest logit difference [\d.]+ \(tolerance 0.001") as e:
        verify(tmp_path / "a", "adapter", model, batches)
    assert e.value.code == 6 and e.value.hint and e.value.result["verdict"] == "fail"


def test_verification_fails_on_the_original_base(tmp_path):
    """The adapter of a LoftQ start over the weights it did not start from: the mistake that users make."""
    model, batches = tiny.tuned(tiny.plan(dtype="bfloat16")), tiny.batches()
    export(model, tmp_path / "a", "adapter")
    tiny.fresh(dtype=torch.bfloat16).save_pretrained(tmp_path / "a" / "base")
    with pytest.raises(VerificationFailed):
        verify(tmp_path / "a", "adapter", model, batches)


def test_verification_fails_on_wrong_merged_weights(tmp_path):
    model, batches = tiny.tuned(tiny.plan(dtype="bfloat16")), tiny.batches()
    export(model, tmp_path / "m", "merged")
    for name, file in plain.model_files(plain.base_entries(model, torch.bfloat16)).items():  # the update was forgotten
        file.write(tmp_path / "m" / name)
    with pytest.raises(VerificationFailed, match="KL"):
        verify(tmp_path / "m", "merged", model, batches)


def test_verification_is_against_the_model_as_it_ran(tmp_path, monkeypatch):
    """A packed product that computes something else than the weights say is found out, although both sides agree on the weights."""
    from finebits import kernels

    model, batches = tiny.tuned(tiny.plan(dtype="bfloat16")), tiny.batches()
    export(model, tmp_path / "a", "adapter")
    product = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda x, t, transposed=False: 1.2 * product(x, t, transposed))
    with pytest.raises(VerificationFailed) as e:
        verify(tmp_path / "a", "adapter", model, batches)
    assert e.value.result["max_logit_difference"] < 1e-3 and e.value.result["kl"] > 1e-2


def test_a_given_teacher_is_used(tmp_path):
    model, batches = tiny.tuned(tiny.plan(dtype="bfloat16")), tiny.batches()
    export(model, tmp_path / "a", "adapter")
    assert verify(tmp_path / "a", "adapter", model, batches, teacher(model, batches)) == verify(tmp_path / "a", "adapter", model, batches)
    with pytest.raises(VerificationFailed):
        verify(tmp_path / "a", "adapter", model, batches, teacher(tiny.fresh(), batches))


# Refusals -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagonal(Usual):
    """y = base(x)·d: mergeable, of full rank."""

    rank: ClassVar[int] = 0

    def params(self, base, gen, start):
        return {"d": torch.full((base.weight.shape[0],), 1.1)}

    def forward(self, p, x, base):
        return base(x) * p["d"]

    def merged(self, p, W):
        return dense(W) * p["d"][:, None]

    def bias(self, p, b):
        return None if b is None else b * p["d"]

    def shapes(self, m, n):
        return {"d": (m,)}


def test_an_adapter_that_is_not_low_rank_is_sent_to_merged(tmp_path):
    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    name, host = list(hosts(model))[2]
    host.remove("default")
    host.add("default", Diagonal(), torch.Generator())
    with pytest.raises(ValueError, match=f"{name}: Diagonal is no low-rank update and rescales no weight: export target merged holds it"):
        export(model, tmp_path / "a", "adapter")
    assert not (tmp_path / "a").exists()
    export(model, tmp_path / "m", "merged")
    assert verify(tmp_path / "m", "merged", model, tiny.batches())["verdict"] in ("same", "ok")


def test_nothing_to_export(tmp_path):
    with pytest.raises(ValueError, match="no active adapter"):
        export(tiny.tuned(fb.Plan({tiny.names()[0]: fb.Spec(fb.NF(4))})), tmp_path / "a", "adapter")
    with pytest.raises(ValueError, match="carries no plan"):
        export(tiny.fresh(), tmp_path / "a", "merged")
    (tmp_path / "e").mkdir()
    with pytest.raises(VerificationFailed, match="is not an exported adapter"):
        verify(tmp_path / "e", "adapter", tiny.tuned(tiny.plan()), tiny.batches())


def test_an_interrupted_export_leaves_the_old_one(tmp_path, monkeypatch):
    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    export(model, tmp_path / "a", "adapter")
    before = {f: f.read_bytes() for f in (tmp_path / "a").rglob("*") if f.is_file()}
    monkeypatch.setattr("finebits.export._peft.write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(tiny.tuned(tiny.plan(dtype="bfloat16"), seed=2), tmp_path / "a", "adapter")
    assert {f: f.read_bytes() for f in (tmp_path / "a").rglob("*") if f.is_file()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_cards_say_what_they_belong_to(tmp_path):
    import yaml

    model = tiny.tuned(tiny.plan(dtype="bfloat16"))
    told = {
        "data": {"path": "/home/someone/rows.jsonl", "rows": 12, "tokens": 345},
        "recipe": "training:\n  seed: 42\n",
        "memory": {"planned_peak": 3 * 2**20, "measured_peak": 2**21, "rows": [{"phase": "load", "planned": None, "measured": 2**20}]},
    }
    export(model, tmp_path / "a", "adapter", **told)
    export(model, tmp_path / "m", "merged", **told)
    for folder, relation in (("a", "adapter"), ("a/base", "quantized"), ("m", "finetune")):
        text = (tmp_path / folder / "README.md").read_text()
        head = yaml.safe_load(text.split("---")[1])
        assert head["base_model"] == "tiny/llama" and head["base_model_relation"] == relation and head["tags"] == ["finebits"]
        assert "| training peak | 3 MiB | 2 MiB |" in text and "| load | - | 1 MiB |" in text
        assert "rows.jsonl: 12 rows, 345 tokens" in text and "/home/someone" not in text and "seed: 42" in text
        assert model.finebits.plan.hash in text
    assert "not valid over the original weights" in (tmp_path / "a" / "README.md").read_text()
    local = fb.Plan(model.finebits.plan.modules, model=str(tmp_path / "a"), levers=fb.Levers(dtype="bfloat16"))
    text = card(local, FINETUNE, "", "x")
    assert "base_model:" not in text and str(tmp_path) not in text
