"""Which modules are adapted, how, and which are trained themselves: as PEFT reads the same words."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import finebits as fb
from architectures import MORE, PASSING, batch, folder, held, settings, step
from finebits.build import hosts, tuned
from finebits.interop.hf import load, load_planned
from finebits.interop.peft import export, stock, verify
from finebits.interop.planning import plan_model
from finebits.interop.selecting import Mistake
from finebits.plan import memory
from finebits.plan.footprint import Footprint
from finebits.plan.solve import again

pytestmark = pytest.mark.filterwarnings("ignore")
ATTENTION = ["q_proj", "v_proj", "o_proj"]
CONFIGS = {
    "ranks and alphas": dict(
        target_modules=ATTENTION, rank_pattern={"layers.0.self_attn.q_proj": 5, "v_proj": 3}, alpha_pattern={r".*\.1\..*": 9}
    ),
    "the first pattern counts": dict(target_modules=ATTENTION, rank_pattern={r"layers\.1\..*q_proj": 2, "q_proj": 7}),
    "rslora": dict(target_modules=ATTENTION, use_rslora=True, rank_pattern={"q_proj": 9}),
    "one block": dict(target_modules=ATTENTION, layers_to_transform=1),
    "blocks by a pattern": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0], layers_pattern="layers"),
    "endings excluded": dict(target_modules=r".*_proj", exclude_modules=["o_proj", "layers.0.mlp.up_proj"]),
    "an expression excluded": dict(target_modules=ATTENTION, exclude_modules=r".*\.0\..*"),
    "modules to save": dict(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head", "input_layernorm", "1.mlp"]),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("llama"), "llama", {})


@pytest.mark.parametrize("case", CONFIGS)
def test_a_lora_config_means_what_it_means_to_peft(case, llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **CONFIGS[case])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), deepcopy(config)).base_model.model
    wanted = {n: (m.r["default"], m.scaling["default"]) for n, m in theirs.named_modules() if hasattr(m, "lora_A") and n.count("lora") == 0}
    trained = {n.replace(".modules_to_save.default", "") for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n}
    plan = plan_model(llama, None, peft_config=config, candidates=["nf4-b32"], objective="weight", dtype="float32", max_length=64)
    model, _ = load_planned(plan)
    assert {n: (host.kinds["default"].rank, host.kinds["default"].s) for n, host in hosts(model)} == wanted
    assert set(tuned(model)) == trained
    assert plan.sizes["trained"]["trained"] == sum(p.numel() for _, host in hosts(model) for p in host.p.parameters())


def test_modules_are_trained_saved_and_exported(llama, tmp_path):
    """Beside adapters over four bits; the adapter's base holds them, so that stock PEFT has them too."""
    given = settings(
        formats=(fb.NF(4, 32),), init=fb.LoftQ(), modules_to_save=["lm_head", "embed_tokens", "norm"], target_modules=["q_proj", "mlp.*"]
    )
    plan = plan_model(llama, None, None, given.__class__(**vars(given) | dict(target_modules=["q_proj", "up_proj"])))
    assert plan == fb.Plan.from_json(plan.to_json())
    model, _ = load_planned(plan)
    before = {n: p.detach().clone() for n, p in tuned(model).items()}
    assert before.keys() == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(3):
        losses.append(float(step(model, batch())))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0] and all(not torch.equal(p, before[n]) for n, p in tuned(model).items())
    ids = batch()["input_ids"][1:]
    wanted = model(input_ids=ids).logits.detach()
    fb.save(model, tmp_path / "saved")
    restored, _ = load(tmp_path / "saved")
    assert torch.equal(restored(input_ids=ids).logits, wanted) and tuned(restored).keys() == before.keys()
    export(model, tmp_path / "out", "adapter")
    assert verify(tmp_path / "out", "adapter", model, [batch()], tolerance=1e-4)["verdict"] == "same"
    torch.testing.assert_close(stock(tmp_path / "out", "adapter").eval()(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["post_attention_layernorm"], ["0.mlp"]], ids=str)
def test_their_memory_is_planned(saved, llama):
    plan = plan_model(llama, None, None, settings(modules_to_save=saved, target_modules="all-linear"))
    model, _ = load_planned(plan)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        plan = again(plan, gradient_checkpointing=checkpointing)
        measured, planned = held(lambda: step(model, batch())), sum(v for k, v in plan.memory.items() if k in PASSING)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        state = held(optimizer.step)
        model.zero_grad()
        assert 0.75 * planned < measured < 1.05 * planned
        moment = memory.moments(Footprint.of(plan).geometry, 0, memory.Trained(**plan.sizes["trained"]), plan.workload)["step"]
        assert moment["optimizer"] <= state < 1.02 * (moment["optimizer"] + moment["optimizer's work"]) + 4096  # a small tensor's own work


def test_a_tied_head_stays_tied(tmp_path):
    folder(tmp_path, "llama", dict(tie_word_embeddings=True))
    model, _ = load_planned(plan_model(tmp_path, None, None, settings(modules_to_save=["lm_head"], target_modules=["q_proj"])))
    assert list(tuned(model)) == ["model.embed_tokens.weight"] and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_of_experts_is_adapted_beside_them(tmp_path):
    folder(tmp_path, "llama4_text", MORE["llama4_text"])
    with pytest.raises(Mistake, match="feed_forward.experts.*cannot be taken apart: leave it out of target_modules, or name it in exclude"):
        plan_model(tmp_path, None, None, settings(target_modules="all-linear"))
    plan = plan_model(tmp_path, None, None, settings(target_modules="all-linear", exclude_modules=r".*\.experts\..*"))
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {n.rpartition(".")[2] for n in plan.modules}


def test_in_sixteen_bits_a_notice_says_what_is_lost(llama):
    plan = plan_model(llama, None, None, settings(dtype="bfloat16", modules_to_save=["norm"], target_modules=["q_proj"]))
    assert any("norm: trained in bfloat16" in n for n in plan.notices)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(rank_pattern={"k_prj": 2}), "rank_pattern has 'k_prj', which matches no end"),
        (dict(exclude_modules=["k_prj"]), "exclude_modules is .'k_prj'., and target_modules names no such module"),
        (dict(exclude_modules=".*"), "exclude_modules leaves none"),
        (dict(layers_to_transform=[7]), "layers_to_transform leaves none"),
        (dict(layers_to_transform=[0, 7]), "layers_to_transform names the block 7, and the model has none of that number"),
        (
            dict(target_modules=["lm_head", "q_proj"]),
            "names lm_head, and that is the output head, over which no adapter lies: modules_to_save",
        ),
        (dict(modules_to_save=["score"]), "modules_to_save names score"),
        (dict(target_modules=["embed_tokens"]), "names model.embed_tokens and no linear of the model, whose bits are planned"),
        (dict(rank_pattern={"q_proj": 2}, ranks=(2, 4)), "ranks lets the planner choose"),
    ],
)
def test_what_does_not_fit_is_told(given, said, llama):
    with pytest.raises(Mistake, match=said):
        plan_model(llama, None, None, settings(**dict(target_modules="all-linear") | given))
