"""Every causal architecture of transformers that can be made tiny: planned, loaded with every matrix left dense, its loss and its adapters'
gradients are those of the stock model, and a step stays within the plan; or one sentence refuses it while planning.

    pytest -m 'every or not every' tests/laws/test_architectures.py -s     prints the list
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from architectures import ALIKE, MORE, PASSING, batch, folder, held, settings, step
from finebits.build import hosts
from finebits.interop.hf import load_planned
from finebits.interop.planning import plan_model
from finebits.interop.selecting import Mistake
from finebits.linears import expert, inputs_first
from finebits.plan.solve import again

REFUSED = {
    "trocr": ({}, "not the next-token loss"),
    "xlm": ({}, "not the next-token loss"),
    "cpmant": ({}, "not the next-token loss"),
    "mixtral": (dict(output_router_logits=True), "loss of its routers"),
}


BEYOND = {"roberta": 1.06}  # with dropout, computed again
LOOSE = {"recurrent_gemma": 0.7}  # its blocks keep their last state for themselves, with all that it was computed from


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.every] if k in ALIKE else []) for k in MORE])
def test_loss_gradients_and_memory(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder(tmp_path, kind, MORE[kind])
    stock, b = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), batch()
    wanted = stock(**b, use_cache=False).loss
    wanted.backward()
    theirs = {k: p.grad for k, p in stock.named_parameters()}
    plan = plan_model(tmp_path, None, None, settings())
    assert plan.levers.attn_implementation == (stock.config.get_text_config()._attn_implementation or "eager")
    model, _ = load_planned(plan)
    loss = step(model, b)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    for name, host in hosts(model):
        A, B, of = host.p["default"]["A"], host.p["default"]["B"], expert(host)
        G = theirs[f"{name}.weight"] if of is None else theirs[name.rpartition(".")[0]][of[0]]
        G = G.T if inputs_first(host) else G
        got = torch.zeros_like(B) if B.grad is None else B.grad
        torch.testing.assert_close(got, 2.0 * G @ A.T, rtol=1e-3, atol=1e-4 * float(G.norm()), msg=lambda m, name=name: f"{name}: {m}")
        A.grad = B.grad = None
    model.train()
    said = f"{kind:20} {type(model).__name__:28} loss {float(wanted):.4f}"
    for checkpointing in (False, True)[: 1 + model.supports_gradient_checkpointing]:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        plan = again(plan, gradient_checkpointing=checkpointing)
        measured, planned = held(lambda: step(model, b)), sum(v for k, v in plan.memory.items() if k in PASSING)
        model.zero_grad()
        said += f"  {'checkpoints' if checkpointing else 'step'} {measured:>10,} of {planned:>10,} bytes"
        assert LOOSE.get(kind, 0.8) * planned < measured < BEYOND.get(kind, 1.05) * planned, said
    print(said)


@pytest.mark.filterwarnings("ignore")
def test_what_the_model_never_calls_stays_as_it_is(tmp_path: Path) -> None:
    """Mamba multiplies by the weight of dt_proj and never calls it: an adapter there would train nothing."""
    folder(tmp_path, "mamba", {})
    plan = plan_model(tmp_path, None, None, settings(target_modules=["dt_proj", "x_proj", "in_proj"]))
    assert {name.rpartition(".")[2] for name in plan.modules} == {"x_proj", "in_proj"}
    (notice,) = plan.notices
    assert "layers.0.mixer.dt_proj and 1 more" in notice and notice in " ".join(plan.summary().split())
    with pytest.raises(Mistake, match="calls none of the modules that target_modules names"):
        plan_model(tmp_path, None, None, settings(target_modules=["dt_proj"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_one_sentence_of_refusal(kind: str, tmp_path: Path) -> None:
    more, said = REFUSED[kind]
    folder(tmp_path, kind, more)
    with pytest.raises(Mistake, match=said) as caught:
        plan_model(tmp_path, None, None, settings())
    print(f"{kind:20} refused: {caught.value}")
    assert "\n" not in str(caught.value)
