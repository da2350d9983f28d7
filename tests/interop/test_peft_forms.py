"""Every form of PEFT in both directions: what stock PEFT has trained computes the same here, and what is exported computes the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import finebits as fb
import tiny_llama as tiny
from finebits import registry
from finebits.build import all_hosts, hosts
from finebits.evaluate.exact import float32
from finebits.export.base import check_plan
from finebits.interop.peft import export, stock, verify
from finebits.peft_forms.base import form_of, forms

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
FOUR = ["q_proj", "k_proj", "up_proj", "down_proj"]
TRAINED: dict[str, list[Any]] = {
    "lora": [
        lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"),
        lambda: peft.LoraConfig(
            r=3,
            lora_alpha=8,
            lora_dropout=0.1,
            target_modules=FOUR,
            rank_pattern={"k_proj": 5, "layers.1.mlp.*": 2},
            alpha_pattern={"^model.layers.1.mlp.up_proj": 2.5},
            use_rslora=True,
        ),
    ],
    "adalora": [
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=FOUR, total_step=4, tinit=1, tfinal=1),
    ],
    "dora": [lambda: peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, use_rslora=True, target_modules=FOUR, rank_pattern={"k_proj": 5})],
    "ia3": [lambda: peft.IA3Config(target_modules=FOUR, feedforward_modules=["down_proj"])],
    "hira": [lambda: peft.HiraConfig(r=3, target_modules=FOUR, rank_pattern={"k_proj": 5})],
    "miss": [
        lambda: peft.MissConfig(r=5, target_modules=FOUR),
        lambda: peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=FOUR),
        lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=FOUR),
    ],
    "gralora": [
        lambda: peft.GraloraConfig(r=4, alpha=5, target_modules=FOUR),
        lambda: peft.GraloraConfig(r=4, alpha=6, hybrid_r=3, gralora_k=4, target_modules=FOUR),
    ],
    "oft": [
        lambda: peft.OFTConfig(oft_block_size=8, target_modules=FOUR),
        lambda: peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, block_share=True, target_modules=FOUR),
    ],
    "vera": [lambda: peft.VeraConfig(r=6, target_modules=FOUR, d_initial=0.5)],
    "randlora": [
        lambda: peft.RandLoraConfig(r=7, randlora_alpha=20, target_modules=FOUR),
        lambda: peft.RandLoraConfig(r=8, randlora_alpha=9, sparse=True, target_modules=FOUR),
    ],
    "shira": [lambda: peft.ShiraConfig(r=2, target_modules=FOUR, random_seed=3)],
    "prompt_tuning": [lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)],
    "p_tuning": [
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
        lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
        ),
    ],
    "prefix_tuning": [
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=12),
    ],
}
ALL = [(name, config) for name, configs in TRAINED.items() for config in configs]
every = pytest.mark.parametrize(("name", "config"), ALL, ids=lambda v: v if isinstance(v, str) else "")


def trained(config: Any, folder: Path, model: Any = None, steps: int = 2) -> torch.Tensor:
    """A few steps of stock PEFT, saved; its logits."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model or tiny.fresh(), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step, batch in zip(range(steps), tiny.batches(), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return logits(model.eval())


def logits(model: Any) -> torch.Tensor:
    """Without those of the tokens that PEFT puts before a row."""
    return tiny.logits(model)[:, -9:]


def test_all_forms_are_tested() -> None:
    assert set(TRAINED) | {"trainable_tokens"} == set(registry.names("peft_forms"))  # test_peft_tables.py


@every
def test_what_peft_trained_computes_the_same_here_and_back(name: str, config: Any, tmp_path: Path) -> None:
    wanted = trained(config(), tmp_path / "theirs")
    assert float((wanted - tiny.logits(tiny.fresh())).abs().max()) > 0.05  # something was trained
    model = fb.load_peft(tmp_path / "theirs", tiny.fresh())
    form = form_of(next(all_hosts(model))[1].kinds["default"])
    assert type(form) is registry.load("peft_forms", "prompt_tuning" if name == "p_tuning" else name)  # which is that once it is trained
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-4)
    export(model, tmp_path / "ours", "peft")
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert form is not None and said["peft_type"] == form.peft
    assert said.get("init_lora_weights", True) is True
    torch.testing.assert_close(logits(stock(tmp_path / "ours", "peft")), wanted, rtol=0, atol=1e-4)
    assert verify(tmp_path / "ours", "peft", model, tiny.batches(), tolerance=1e-4)["verdict"] == "same"


ADAPTERS: dict[str, Any] = {type(f).__name__: f.adapter for f in forms() if getattr(f.adapter, "over", None) != "table"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_ours_over_codes_in_their_form_and_back(name: str, tmp_path: Path) -> None:
    """Trained over NF2, exported, loaded by stock PEFT over the dense base, and by us over the codes."""
    adapter: Any = ADAPTERS[name]()
    plan = tiny.plan(adapter, init=fb.Zeros())
    if adapter.over != "matrix":
        plan = fb.Plan({n: fb.Spec(s.format) for n, s in plan.modules.items()}, levers=plan.levers, over={"model": adapter})
    if name == "RandLora":  # whose bases are those of one shape
        few = {n: s if n.rpartition(".")[2] in ("q_proj", "o_proj") else fb.Spec(s.format) for n, s in plan.modules.items()}
        plan = fb.Plan(few, levers=plan.levers)
    model = tiny.tuned(plan)
    with float32(model):
        wanted = tiny.logits(model)
    export(model, tmp_path / "x", "peft")
    torch.testing.assert_close(logits(stock(tmp_path / "x", "peft")), wanted, rtol=0, atol=1e-4)
    bare = fb.build(tiny.fresh(), fb.Plan({n: fb.Spec(fb.NF(2, block=32)) for n in tiny.names()}))
    again = fb.load_peft(tmp_path / "x", bare)
    with float32(again):
        torch.testing.assert_close(tiny.logits(again), wanted, rtol=0, atol=1e-4)


def test_lora_says_rank_and_alpha_of_every_module(tmp_path: Path) -> None:
    """r and lora_alpha are those of most, patterns hold the rest; scalings that differ become one."""
    specs = {
        "q_proj": fb.Spec(adapter=fb.LoRA(rank=4, alpha=2.0, scaling="rslora")),
        "up_proj": fb.Spec(adapter=fb.LoRA(rank=2, alpha=8.0)),
    }
    model = tiny.tuned(tiny.plan(fb.LoRA(rank=3, alpha=8.0), None, fb.Zeros(), **specs))
    export(model, tmp_path / "x", "peft")
    said = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["use_rslora"]) == (3, 8.0, False)
    q, up = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    assert (said["rank_pattern"][q], said["rank_pattern"][up], len(said["rank_pattern"])) == (4, 2, 4)
    assert said["alpha_pattern"] == {n: 4.0 for n in tiny.names() if n.endswith("q_proj")}  # 2/√4 = 4/4
    torch.testing.assert_close(logits(stock(tmp_path / "x", "peft")), tiny.logits(model), rtol=0, atol=1e-4)


def test_gates_may_be_closed_and_fewer(tmp_path: Path) -> None:
    """All modules have as many in PEFT; closed ones come back closed, and those that PEFT has left out are not there."""
    model = tiny.tuned(tiny.plan(fb.Gated(rank=3, alpha=5.0), None, fb.Zeros(), up_proj=fb.Spec(adapter=fb.Gated(rank=2, alpha=1.0))))
    for i, (_, host) in enumerate(hosts(model)):
        host.p["default"]["gate"].data[: i % 4] = 0  # down to none
    export(model, tmp_path / "x", "peft")
    torch.testing.assert_close(logits(stock(tmp_path / "x", "peft")), tiny.logits(model), rtol=0, atol=1e-4)
    again = fb.load_peft(tmp_path / "x", tiny.fresh())
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model), rtol=0, atol=1e-4)
    assert [int((h.p["default"]["gate"] != 0).sum()) for _, h in hosts(again)][:6] == [3, 2, 1, 0, 3, 1]
    trained(TRAINED["adalora"][0](), tmp_path / "theirs", steps=4)
    left = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["rank_pattern"]
    few = fb.load_peft(tmp_path / "theirs", tiny.fresh())
    assert {n: h.kinds["default"].rank for n, h in hosts(few)} == {k.removesuffix(".lora_E"): sum(v) for k, v in left.items() if any(v)}


# Bases ---------------------------------------------------------------------------------------------------------------------------------


def test_the_bases_it_goes_over(tmp_path: Path) -> None:
    """A model, a folder, what save wrote, a plan: one adapter, the same logits over equal weights; and what was loaded is saved and loaded."""
    wanted = trained(TRAINED["lora"][1](), tmp_path / "theirs")
    base = tiny.worded(tmp_path / "base")
    model = fb.load_peft(tmp_path / "theirs", base)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-4)
    assert model.finebits.plan.levers.dropout == 0.1 and next(hosts(model))[1].dropout == 0.1
    fb.save(model, tmp_path / "saved")
    assert torch.equal(tiny.logits(fb.load(tmp_path / "saved")[0]), tiny.logits(model))
    eight = fb.Int(8, block=32)
    plan = fb.Plan({n: fb.Spec(eight, adapter=fb.LoRA(rank=2)) for n in tiny.names()}, model=str(base))
    over_plan = fb.load_peft(tmp_path / "theirs", plan)
    bare = fb.build(tiny.fresh(), fb.Plan({n: fb.Spec(eight) for n in tiny.names()}, model=str(base)))
    fb.save(bare, tmp_path / "bare")
    over_saved = fb.load_peft(tmp_path / "theirs", tmp_path / "bare")
    assert torch.equal(tiny.logits(over_plan), tiny.logits(over_saved))
    assert 0 < float((tiny.logits(over_plan) - wanted).abs().max()) < 0.2 * float(wanted.std())
    assert {n for n, h in hosts(over_saved) if h.active} == {n for n in tiny.names() if n.rpartition(".")[2] in FOUR}
    fb.save(over_saved, tmp_path / "both")
    assert torch.equal(tiny.logits(fb.load(tmp_path / "both")[0]), tiny.logits(over_saved))


@pytest.mark.parametrize("name", ["dora", "vera", "randlora", "prefix_tuning"])
def test_what_was_loaded_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Lengths that are made anew, tensors that hosts share, an adapter over the whole model; in codes."""
    base = tiny.worded(tmp_path / "base")
    trained(TRAINED[name][0](), tmp_path / "theirs")
    plan = fb.Plan({n: fb.Spec(fb.NF(4, block=32)) for n in tiny.names()}, model=str(base))
    model = fb.load_peft(tmp_path / "theirs", plan)
    fb.save(model, tmp_path / "saved")
    assert torch.equal(tiny.logits(fb.load(tmp_path / "saved")[0]), tiny.logits(model))


def test_it_goes_on_training(tmp_path: Path) -> None:
    trained(TRAINED["lora"][0](), tmp_path / "theirs")
    model = fb.load_peft(tmp_path / "theirs", tiny.fresh())
    before = model(**tiny.batches()[0]).loss
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before.backward()
    optimizer.step()
    assert model(**tiny.batches()[0]).loss < before


def test_biases_and_whole_modules_travel(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=FOUR, bias="lora_only", modules_to_save=["lm_head"])
    base = tiny.fresh(attention_bias=True, mlp_bias=True)
    wanted = trained(config, tmp_path / "theirs", tiny.fresh(attention_bias=True, mlp_bias=True))
    model = fb.load_peft(tmp_path / "theirs", base)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-4)
    assert model.lm_head.weight.requires_grad and model.model.layers[0].self_attn.q_proj.bias.requires_grad
    export(model, tmp_path / "ours", "peft")  # they are in the base that it lies over
    torch.testing.assert_close(logits(stock(tmp_path / "ours", "peft")), wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="modules_to_save holds lm_head.weight, which this model shares with model.embed_tokens.weight"):
        fb.load_peft(tmp_path / "theirs", tiny.fresh(attention_bias=True, mlp_bias=True, tie_word_embeddings=True))


# Refusals ------------------------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "layer_replication": [[0, 1], [0, 2]],
    "alora_invocation_tokens": [5, 6],
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "use_qalora": True,
    "init_lora_weights": "pissa",
    "something_new": {"a": 1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_is_not_computed_is_named(setting: str, tmp_path: Path) -> None:
    trained(TRAINED["lora"][0](), tmp_path / "x", steps=0)
    file = tmp_path / "x" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: SETTINGS[setting]}))
    with pytest.raises(ValueError, match=f"^{setting} is ") as e:
        fb.load_peft(tmp_path / "x", tiny.fresh())
    assert "\n" not in str(e.value)


def test_what_is_no_folder_of_peft_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no PEFT adapter at .*nowhere"):
        fb.load_peft(tmp_path / "nowhere", tiny.fresh())
    trained(TRAINED["lora"][0](), tmp_path / "x", steps=0)
    config, file = tmp_path / "x" / "adapter_config.json", tmp_path / "x" / "adapter_model.safetensors"
    other = tiny.fresh()
    other.model.layers = other.model.layers[:1]
    with pytest.raises(ValueError, match="the adapter is for model.layers.1.mlp.down_proj, and the model has no such module"):
        fb.load_peft(tmp_path / "x", other)
    with pytest.raises(ValueError, match="the base has an adapter already"):
        fb.load_peft(tmp_path / "x", tiny.tuned(tiny.plan()))
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "1.mlp.up_proj.lora_B" not in k}, file)
    with pytest.raises(ValueError, match="has no base_model.model.model.layers.1.mlp.up_proj.lora_B.weight, which a LORA"):
        fb.load_peft(tmp_path / "x", tiny.fresh())
    save_file({k: t[:1] if "up_proj.lora_A" in k else t for k, t in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"up_proj.lora_A.weight is \(1, 64\), and settings and model ask for \(3, 64\)"):
        fb.load_peft(tmp_path / "x", tiny.fresh())
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": torch.ones(128, 64)}, file)
    with pytest.raises(ValueError, match="holds model.embed_tokens.weight, and adapter_config.json does not say what for"):
        fb.load_peft(tmp_path / "x", tiny.fresh())
    file.rename(tmp_path / "x" / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        fb.load_peft(tmp_path / "x", tiny.fresh())
    (tmp_path / "x" / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        fb.load_peft(tmp_path / "x", tiny.fresh())
    config.write_text(json.dumps({"peft_type": "XLORA"}))
    save_file(tensors, file)
    with pytest.raises(ValueError, match="peft_type is XLORA"):
        fb.load_peft(tmp_path / "x", tiny.fresh())


def test_what_has_no_form_of_its_own_is_refused_with_the_targets_that_can(tmp_path: Path) -> None:
    model = tiny.tuned(tiny.plan(fb.LoRAXS(rank=3), init=fb.Zeros()))
    with pytest.raises(ValueError, match="q_proj: LoRAXS has no form of its own in PEFT: export target adapter writes it as a plain LoRA"):
        export(model, tmp_path / "x", "peft")
    mixed = tiny.tuned(tiny.plan(init=fb.Zeros(), up_proj=fb.Spec(adapter=fb.Gated(rank=2))))
    with pytest.raises(ValueError, match="up_proj has a Gated adapter and .*q_proj a LoRA, and a PEFT folder holds one method"):
        export(mixed, tmp_path / "x", "peft")
    shapes = tiny.tuned(tiny.plan(fb.RandLoRA(basis=8), init=fb.Zeros()))
    with pytest.raises(ValueError, match="takes the bases of all modules from one set.*: export target merged"):
        export(shapes, tmp_path / "x", "peft")
    with pytest.raises(ValueError, match="no active adapter"):
        export(tiny.tuned(fb.Plan({tiny.names()[0]: fb.Spec(fb.NF(4))})), tmp_path / "x", "peft")
    assert not (tmp_path / "x").exists()


def test_what_a_target_cannot_hold_is_refused_with_the_plan() -> None:
    def plan(adapter: Any) -> fb.Plan:
        return fb.Plan(
            {"up": fb.Spec(adapter=adapter)} if adapter.over == "matrix" else {}, over={} if adapter.over == "matrix" else {"": adapter}
        )

    check_plan(plan(fb.HiRA()), ["peft", "merged"])
    check_plan(plan(fb.PrefixTuning()), ["peft"])
    with pytest.raises(ValueError, match="peft cannot hold LoRAXS over up: PEFT has no such method; targets that can: adapter, .*, merged"):
        check_plan(plan(fb.LoRAXS()), ["adapter", "peft"])
    with pytest.raises(ValueError, match="gptq cannot hold HiRA over up: it is no low-rank .*; targets that can: merged, peft"):
        check_plan(plan(fb.HiRA()), ["merged", "gptq"])
    with pytest.raises(ValueError, match="merged cannot hold PrefixTuning over the model: it depends on its input.*that can: peft"):
        check_plan(plan(fb.PrefixTuning()), ["merged"])
    with pytest.raises(ValueError, match=r"adapter cannot hold Bottleneck over up: it depends .*; export.to=\[\] exports nothing"):
        check_plan(plan(fb.Bottleneck()), ["adapter"])
