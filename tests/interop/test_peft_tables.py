"""Tables of embeddings in PEFT, both ways: LoRA over nn.Embedding, trained tokens alone and beside a LoRA; heads of their own and tied ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.carrier import Following, tables
from finebits.errors import Invalid
from finebits.evaluate.exact import float32
from finebits.export._peft import to_peft
from finebits.export.base import CannotHold, check_plan
from finebits.interop.peft import export, stock, verify
from variants import crossed

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")]
NAME, WORDS = "model.embed_tokens", [65, 32, 51]
Q = ["q_proj", "embed_tokens"]
TRAINED: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=Q, use_rslora=True, rank_pattern={"embed_tokens": 5}),
    "lora that the head follows": lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=Q, ensure_weight_tying=True),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=WORDS),
    "tokens beside a lora": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=WORDS),
    "tokens beside a dora": lambda: peft.LoraConfig(
        r=3, target_modules=["q_proj"], use_dora=True, trainable_token_indices={"embed_tokens": WORDS}
    ),
}


def trained(config: Any, folder: Path, tied: bool) -> torch.Tensor:
    """A few steps of stock PEFT, saved; its logits."""
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny.fresh(tie_word_embeddings=tied), config).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for batch in tiny.batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return tiny.logits(model.eval())


@pytest.mark.parametrize("who", TRAINED)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_peft_trained_computes_the_same_here_and_back(who: str, tied: bool, tmp_path: Path) -> None:
    wanted = trained(TRAINED[who](), tmp_path / "theirs", tied)
    assert float((wanted - tiny.logits(tiny.fresh(tie_word_embeddings=tied))).abs().max()) > 0.05
    model = fb.load_peft(tmp_path / "theirs", tiny.fresh(tie_word_embeddings=tied))
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-4)
    assert isinstance(model.lm_head, Following) == (tied and who != "lora")
    export(model, tmp_path / "ours", "peft")
    said, theirs = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs"))
    assert said["peft_type"] == theirs["peft_type"] and said.get("ensure_weight_tying", False) == (tied and "follows" in who)
    torch.testing.assert_close(tiny.logits(stock(tmp_path / "ours", "peft")), wanted, rtol=0, atol=1e-4)
    assert verify(tmp_path / "ours", "peft", model, tiny.batches(), tolerance=1e-4)["verdict"] == "same"


TARGETS, KINDS = ("adapter", "merged", "compressed_tensors"), (fb.LoRA(rank=3), fb.VeRA(rank=3), fb.TrainableTokens((9, 3)))


@pytest.mark.parametrize(("to", "adapter", "follows"), crossed(TARGETS, KINDS, (False, True)), ids=str)
def test_ours_over_codes_in_every_kind_of_target(to: str, adapter: Any, follows: bool, tmp_path: Path) -> None:
    spec = fb.Spec(fb.Int(4, 32), adapter=fb.LoRA(rank=2))
    plan = fb.Plan({NAME: fb.Spec(fb.Int(8, 32))} | dict.fromkeys(tiny.names(), spec), over={NAME: adapter}, tied=follows)
    model = tiny.tuned(plan, tiny.fresh(tie_word_embeddings=True))
    with float32(model):
        wanted = tiny.logits(model)
    export(model, tmp_path / "x", to)
    result = verify(tmp_path / "x", to, model, tiny.batches(), tolerance=1e-3)
    assert result["verdict"] == ("ok" if to == "merged" else "same")
    if to == "adapter":
        torch.testing.assert_close(tiny.logits(stock(tmp_path / "x", to)), wanted, rtol=0, atol=1e-4)
        again = (
            fb.load_peft(tmp_path / "x", fb.build(tiny.fresh(tie_word_embeddings=True), _bare(plan))) if adapter.over == "matrix" else model
        )
        with float32(again):
            torch.testing.assert_close(tiny.logits(again), wanted, rtol=0, atol=1e-4)


def _bare(plan: fb.Plan) -> fb.Plan:
    return fb.Plan({name: fb.Spec(s.format) for name, s in plan.modules.items()})


def test_in_16_bits_a_base_that_rows_lie_in_is_float32_and_peft_has_the_rows_themselves(tmp_path: Path) -> None:
    plan = fb.Plan(dict.fromkeys(tiny.names(), fb.Spec(adapter=fb.LoRA(rank=2))), over={NAME: fb.TrainableTokens((9, 3))})
    plan = fb.Plan(plan.modules, over=plan.over, levers=fb.Levers("bfloat16"))
    model = tiny.tuned(plan, tiny.fresh(tie_word_embeddings=True, dtype=torch.bfloat16))
    for to, dtype in (("adapter", "float32"), ("peft", "bfloat16")):
        export(model, tmp_path / to, to)
        assert json.loads((tmp_path / to / "base" / "config.json").read_text())["dtype"] == dtype
        assert verify(tmp_path / to, to, model, tiny.batches())["verdict"] == "same"
    _, tensors = to_peft(model, "", own=True)
    rows = tensors[f"base_model.model.{NAME}.token_adapter.trainable_tokens_delta"]
    assert torch.equal(rows, tables(model)[NAME].tensors("default")["tokens"].detach())


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    spec = fb.Spec(adapter=fb.LoRA(rank=2))
    with pytest.raises(CannotHold, match="export target gguf cannot hold LoRA over model.embed_tokens: .*table of embeddings; targets"):
        check_plan(fb.Plan({"q": spec}, over={NAME: fb.LoRA(rank=2)}), ["gguf"])
    with pytest.raises(CannotHold, match="export target peft cannot hold VeRA over model.embed_tokens"):
        check_plan(fb.Plan({}, over={NAME: fb.VeRA(rank=2)}), ["peft"])
    with pytest.raises(CannotHold, match="cannot hold trained tokens beside VeRA: PEFT's method has no place for them"):
        check_plan(fb.Plan({"q": fb.Spec(adapter=fb.VeRA(rank=2))}, over={NAME: fb.TrainableTokens((1,))}), ["peft"])
    check_plan(fb.Plan({"q": spec}, over={NAME: fb.TrainableTokens((1,))}), ["gptq", "peft", "adapter", "merged"])
    trained(TRAINED["lora"](), tmp_path / "x", tied=False)
    with pytest.raises(Invalid, match="over which its adapter was trained, and the model has another"):
        fb.load_peft(tmp_path / "x", tiny.fresh(seed=3))
    beside = tiny.tuned(fb.Plan({n: fb.Spec(adapter=fb.VeRA(rank=2)) for n in tiny.names()}, over={NAME: fb.TrainableTokens((1,))}))
    with pytest.raises(Invalid, match="PEFT's VERA has no place for them"):
        export(beside, tmp_path / "y", "peft")
