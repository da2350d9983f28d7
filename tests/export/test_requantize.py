"""Base and adapter as one quantized model: what rounding keeps of the adapter, what others read, and what is refused before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finebits as fb
import tiny_llama as tiny
from finebits import job, store
from finebits.build import hosts
from finebits.carrier import tables
from finebits.export._peft import TENSORS
from finebits.export.base import REQUANTIZED, CannotHold, check_all
from finebits.interop.peft import export, stock, verify
from finebits.qtensor import QTensor, dense
from finebits.recipe import Recipe
from finebits.recipe.source import RecipeError
from finebits.requantize import kept, plan_after
from finebits.run.__main__ import make
from finebits.tasks import base as tasks

FOUR = fb.Int(4, 32, scale="bf16")
NEAREST = fb.Requantize(FOUR, fb.RTN(), ())
FEEDBACK = fb.Requantize(FOUR, fb.GPTQ(scales="search"), ())
REFINED = fb.Requantize(FOUR)
ROWS = tiny.batches(rows=24, size=6, seed=7)


def tuned(adapter: Any = None, format: Any = FOUR, model: Any = None, **specs: Any) -> Any:
    return tiny.tuned(tiny.plan(adapter or fb.LoRA(rank=4, alpha=8.0), format, fb.Zeros(), **specs), model)


def anew(model: Any, how: fb.Requantize, rows: Any = ROWS, progress: Any = lambda done, total, name: None) -> Any:
    task = tasks.of(model)
    return fb.requantize(model, how, rows, task.states, head=task.head(model), keep=task.inside, keep_final=task.outside, progress=progress)


def states(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([tasks.of(model).states(model, b)[b["attention_mask"] == 1] for b in ROWS])


def test_against_the_tuned_outputs_feedback_loses_less_than_rounding_and_learned_scales_less_again() -> None:
    goal, lost = states(tuned()), {}
    for name, how in {"nearest": NEAREST, "feedback": FEEDBACK, "refined": REFINED}.items():
        model = tuned()
        report = anew(model, how)
        lost[name] = float((states(model) - goal).square().sum() / goal.square().sum())
        assert set(report) == set(tiny.names()) and all(isinstance(h.weight, QTensor) and not h.kinds for _, h in hosts(model))
    assert lost["refined"] < lost["feedback"] < lost["nearest"]


def test_what_is_smaller_than_a_step_is_taken_back_by_rounding_and_kept_by_feedback() -> None:
    """Over codes of the very format that is asked for, an update below half a step changes no code."""
    gen = torch.Generator().manual_seed(0)
    q = fb.quantize(torch.randn(32, 64, generator=gen), fb.Int(4, 32))
    W, D = q.dequantize(), 0.03 * torch.randn(32, 2, generator=gen) @ torch.randn(2, 64, generator=gen)
    step = q.parts["scale"].repeat_interleave(32, -1)
    peaks = W.view(32, 2, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(32, 64)
    D = torch.where(W.abs() == peaks, 0.0, D.clamp(-0.45 * step, 0.45 * step))  # the scales stay
    x = torch.randn(400, 8, generator=gen) @ torch.randn(8, 64, generator=gen) + 0.1 * torch.randn(400, 64, generator=gen)
    gram = fb.Gram()
    gram.add(x)
    R = gram.value()
    nearest = fb.quantize(W + D, fb.Int(4, 32)).dequantize()
    assert torch.equal(nearest, W) and kept(W, W + D, nearest, R) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
    feedback = fb.quantize(W + D, fb.Int(4, 32), fb.GPTQ(), {fb.Gram: gram}).dequantize()
    left = kept(W, W + D, feedback, R)
    outputs = lambda A: x @ A.mT  # noqa: E731
    moved, wanted = outputs(feedback - W), outputs(D)
    assert left.kept == pytest.approx(float((moved * wanted).sum() / wanted.square().sum()), rel=1e-3)
    assert left.noise == pytest.approx(float((moved - wanted).square().sum() / wanted.square().sum()), rel=1e-3)
    assert left.kept is not None and left.noise is not None
    assert left.kept > 0.9 and left.noise < 0.3 and kept(W, W, feedback, R) == (None, None)


@pytest.mark.parametrize("adapter", [fb.LoRA(rank=4), fb.DoRA(rank=4), fb.HiRA(rank=4), fb.IA3(), fb.OFT()], ids=lambda a: type(a).__name__)
def test_every_form_that_is_in_a_weight(adapter: Any) -> None:
    """At 8 bits every weight is the tuned one, which its base is not."""
    model, gen = tuned(adapter, fb.NF(4, 32)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in (p for _, host in hosts(model) for p in host.p.parameters() if p.requires_grad):
            p.add_(0.2 * torch.randn(p.shape, generator=gen))
    base = {n: dense(h.weight).detach() for n, h in hosts(model)}
    wanted = {n: dense(h.stack(torch.float32).weight).detach() for n, h in hosts(model)}
    outputs = tiny.logits(model)
    anew(model, fb.Requantize(fb.Int(8, 16), fb.RTN(), ()))
    far = lambda W, n: float((W - wanted[n]).abs().max() / wanted[n].abs().max())  # noqa: E731
    assert all(far(h.weight.dequantize(), n) < 0.005 < 0.02 < far(base[n], n) for n, h in hosts(model))
    assert float((tiny.logits(model) - outputs).norm() / outputs.norm()) < 0.1


@pytest.mark.parametrize("follows", [True, False])
def test_a_table_takes_its_adapter_in_as_merged_does(follows: bool, tmp_path: Path) -> None:
    plan = fb.Plan({n: fb.Spec(FOUR) for n in tiny.names()}, over={"model.embed_tokens": fb.LoRA(rank=2)}, tied=follows)
    model = tiny.tuned(plan, tiny.fresh(tie_word_embeddings=True))
    export(model, tmp_path / "merged", "merged")
    want = stock(tmp_path / "merged", "merged")
    anew(model, fb.Requantize(fb.Int(8, 32, scale="bf16"), fb.RTN(), ()))
    assert not tables(model) and (model.lm_head.weight is model.model.embed_tokens.weight) == follows
    assert torch.allclose(model.model.embed_tokens.weight, want.model.embed_tokens.weight, atol=1e-2)
    assert torch.allclose(model.lm_head.weight, want.lm_head.weight, atol=1e-2)
    pytest.importorskip("compressed_tensors")
    export(model, tmp_path / "x", "compressed_tensors")
    assert verify(tmp_path / "x", "compressed_tensors", model, tiny.batches())["verdict"] == "same"


def test_dense_matrices_stay_and_adapted_ones_outside_of_blocks_are_dense(tmp_path: Path) -> None:
    specs = {"k_proj": fb.Spec(), "v_proj": fb.Spec(None, adapter=fb.LoRA(rank=2))}
    plan = tiny.plan(fb.LoRA(rank=2), FOUR, fb.Zeros(), **specs)
    plan.modules["lm_head"] = fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))
    model = tiny.tuned(plan)
    head = dense(dict(hosts(model))["lm_head"].stack(torch.float32).weight).detach()
    report = anew(model, NEAREST)
    held = {n: h.weight for n, h in hosts(model)}
    assert torch.equal(held["lm_head"], head) and "lm_head" not in report
    assert not isinstance(held["model.layers.0.self_attn.k_proj"], QTensor) and isinstance(held["model.layers.0.self_attn.v_proj"], QTensor)
    fb.save(model, tmp_path / "x")
    again = store.apply(tiny.fresh(), store.read(tmp_path / "x"))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    after = model.finebits.plan.modules
    assert after["lm_head"].format is None and after["model.layers.0.self_attn.v_proj"].format == FOUR


@pytest.mark.parametrize("to", ["compressed_tensors", "gptq", "gguf"])
def test_its_readers_find_the_rounded_model_and_no_adapter(to: str, tmp_path: Path) -> None:
    """In the place of an adapter over the same codes, whose files go."""
    if to != "gptq":
        pytest.importorskip(to)
    how = fb.Requantize(fb.Int(4, 32, scale="bf16" if to == "compressed_tensors" else "fp16"), refine=REFINED.refine)
    model = tuned(format=how.format)
    export(model, tmp_path / "x", to)
    assert (tmp_path / "x" / TENSORS).exists()
    report = {"name": "int4", **how.to_json(), "rows": 24, "loss": 1.0, "tuned": 1.0, "kl": 0.0}
    report["layers"] = {n: k._asdict() for n, k in anew(model, how).items()}
    export(model, tmp_path / "x", to, requantized=report)
    assert not (tmp_path / "x" / TENSORS).exists() and json.loads((tmp_path / "x" / REQUANTIZED).read_text()) == report
    assert "## Rounded once more" in (tmp_path / "x" / "base" / "README.md").read_text()
    assert verify(tmp_path / "x", to, model, tiny.batches())["verdict"] == "same"
    if to != "gptq":  # loaded by GPTQModel, which is not installed for tests
        theirs = stock(tmp_path / "x", to)
        for name, host in hosts(model):
            assert torch.equal(theirs.get_submodule(name).weight, host.weight.dequantize())


def test_a_rounded_model_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    model = tuned()
    anew(model, FEEDBACK)
    fb.save(model, tmp_path / "x")
    again = store.apply(tiny.fresh(), store.read(tmp_path / "x"))
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_weights_that_learn_in_their_codes_begin_at_the_tuned_ones() -> None:
    """Block-AP; what it leaves are codes of the format, nearer to the tuned model than without."""
    far = []
    for refine in ((), (fb.EfficientQAT(epochs=6),)):
        model = tuned()
        want = tiny.logits(model)
        report = anew(model, fb.Requantize(fb.Int(3, 32), fb.GPTQ(scales="search"), refine))
        far.append(float((tiny.logits(model) - want).norm() / want.norm()))
        assert all(host.weight.format == fb.Int(3, 32) for n, host in hosts(model) if n in report)
    assert far[1] < far[0]


def divergence(model: Any, goal: Tensor) -> float:
    return float((goal.softmax(-1) * (goal.log_softmax(-1) - outputs(model).log_softmax(-1))).sum(-1).mean())


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[b["attention_mask"] == 1] for b in ROWS]
        )


def test_scales_of_all_blocks_then_follow_what_the_tuned_model_gives_out() -> None:
    """E2E-QP, after blocks or alone: nearer in what comes out, in the codes that the blocks left; every step is told."""
    goal, far, codes, told = outputs(tuned()), {}, {}, list[tuple[int, int, str]]()
    whole = fb.EfficientQAT(epochs=4, scales=1e-2, scope="model")
    for name, refine in {"none": (), "whole": (whole,), "blocks": REFINED.refine, "both": (whole, *REFINED.refine)}.items():
        model = tuned()
        told.clear()
        anew(model, fb.Requantize(fb.Int(3, 32, scale="bf16"), refine=refine), progress=lambda *at: told.append(at))
        far[name], codes[name] = divergence(model, goal), [h.weight.parts["codes"] for _, h in hosts(model)]
    assert far["whole"] < 0.8 * far["none"] and far["both"] < 0.8 * far["blocks"]
    assert all(
        torch.equal(a, b) for one, other in (("none", "whole"), ("blocks", "both")) for a, b in zip(codes[one], codes[other], strict=True)
    )
    steps = 4 * len(ROWS)
    assert (
        {total for _, total, _ in told} == {14 + steps}
        and told[-1][0] == 14 + steps
        and [d for d, _, _ in told] == sorted(d for d, _, _ in told)
    )
    assert told[14][2] == f"EfficientQAT over the whole model, step 1 of {steps}"


def test_what_cannot_be_is_said_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="made by finebits.build .* carries no plan"):
        anew(tiny.fresh(), NEAREST)
    with pytest.raises(ValueError, match="needs calibration rows, and none came"):
        anew(tuned(), NEAREST, [])
    beside = tiny.plan(None, FOUR, fb.Zeros(), down_proj=fb.Spec(FOUR, adapter=fb.Bottleneck(reduction=8)))
    with pytest.raises(ValueError, match="model.layers.0.mlp.down_proj: Bottleneck depends on its input"):
        anew(tiny.tuned(beside), NEAREST)
    with pytest.raises(CannotHold, match="cannot round Bottleneck over model.layers.0.mlp.down_proj"):
        check_all(beside, ["gptq"], NEAREST)
    with pytest.raises(CannotHold, match="gptq cannot hold this as it is: model.layers.0.self_attn.q_proj"):
        check_all(tiny.plan(), ["merged", "gptq"], fb.Requantize(fb.NF(4)))
    with pytest.raises(CannotHold, match=r"hold codes \(bitsandbytes, .*\) get .*, and export.to is adapter, merged: name one"):
        check_all(tiny.plan(), ["adapter", "merged"], NEAREST)
    with pytest.raises(ValueError, match="RILQ moves no scales of blocks"):
        fb.Requantize(FOUR, refine=(fb.RILQ(),))
    assert plan_after(tiny.plan(), NEAREST).modules["model.layers.1.mlp.up_proj"] == fb.Spec(FOUR, fb.RTN())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("int4-g32", "scale is 'g32'"),
        ("{format: int4-b32, quantizer: gtpq}", "gtpq"),
        ("{format: int4-b32, refine: [lrec]}", "LREC moves no scales"),
        ("{fromat: int4-b32}", "did you mean format"),
        ("{quantizer: rtn}", "format is missing"),
    ],
)
def test_a_recipe_says_where_it_is_wrong(value: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"export.requantize(.|\n)*{said}"):
        Recipe.parse("model: {model_name_or_path: m}", overrides=["export.to=[gptq]", f"export.requantize={value}"])


def test_a_run_is_exported_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe and the verb, over a run that is refused while it is untrained; beside targets of what was trained."""
    pytest.importorskip("compressed_tensors")
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "work", make)
    tiny.worded(tmp_path / "m")
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(f"w{(i * j) % 50 + 1}" for j in range(9))}) + "\n" for i in range(1, 13))
    )
    text = f"""
model: {{model_name_or_path: {tmp_path / "m"}, dtype: float32}}
data: {{datasets: [{{path: {tmp_path / "d.jsonl"}}}], held_out: {{path: {tmp_path / "d.jsonl"}}}, max_length: 16}}
quantization: {{candidates: [nf3-b32], objective: weight, calibration_rows: 8}}
adapter: {{rank: 4, init: zeros}}
training: {{max_steps: 6, learning_rate: 1.0e-2, per_device_train_batch_size: 4}}
evaluation: {{samples: 0, full_precision: false}}
export: {{to: [], requantize: null}}
output_dir: {tmp_path / "out"}
"""
    job.train(Recipe.parse(text))
    recipe = Recipe.parse(text, overrides=["export.to=[merged, compressed_tensors]", "export.requantize=int4-b32-bf16"])
    found = job.export(recipe)
    merged, packed = found["targets"]
    assert (merged["verdict"], packed["verdict"]) == ("ok", "same") and "requantized" not in merged
    report = json.loads((Path(packed["path"]) / REQUANTIZED).read_text())
    assert report == packed["requantized"] and report["rows"] == 8 and set(report["layers"]) == set(tiny.names())
    assert 0 <= report["kl"] < 0.2 and abs(report["loss"] - report["tuned"]) < 0.2
    assert "int4-b32-bf16 by gptq, apiq" in (Path(packed["path"]) / "base" / "README.md").read_text()
    from finebits.report.text import export_table

    assert "in the median layer; least: model.layers." in export_table(found)
    served = Recipe.parse(text, overrides=["export.to=[merged]", f"export.runtimes.vllm={_vllm(tmp_path / 'runtime')}"])
    asked_for = job.export(served)
    row = next(t for t in asked_for["targets"] if t["name"] == "merged")
    (asked,) = row["runtimes"]
    assert asked["verdict"] == "ok" and asked["reader"] == "vLLM 0" and abs(asked["kl"] - row["kl"]) < 1e-3
    assert asked["loss"] == pytest.approx(row["loss"], abs=1e-3) and "vLLM 0" in export_table(asked_for)


def _vllm(place: Path) -> Path:
    """The python of an environment whose vLLM is transformers."""
    (place / "vllm" / "lora").mkdir(parents=True)
    (place / "vllm" / "__init__.py").write_text(VLLM)
    (place / "vllm" / "lora" / "__init__.py").write_text("")
    (place / "vllm" / "lora" / "request.py").write_text("LoRARequest = tuple\n")
    python = place / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={place} exec {sys.executable} -W ignore "$@"\n')
    python.chmod(0o755)
    return python


VLLM = """
import torch
from types import SimpleNamespace as S
from transformers import AutoModelForCausalLM, AutoTokenizer
__version__ = "0"
SamplingParams = S
class LLM:
    def __init__(self, path, **named):
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.get_tokenizer = lambda: AutoTokenizer.from_pretrained(path)
    def generate(self, prompts, every, lora_request, use_tqdm):
        for p in prompts:
            with torch.no_grad():
                row = self.model(torch.tensor([p["prompt_token_ids"]])).logits[0, -1].log_softmax(-1)
            yield S(outputs=[S(logprobs=[{i: S(logprob=float(v)) for i, v in enumerate(row)}])])
"""
