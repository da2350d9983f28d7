"""LoRAM (arXiv:2502.13533): pruned models are stock models, what is recovered is what was learned at the kept places and nothing elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import finebits as fb
import tiny_llama as tiny
from finebits.cli import main
from finebits.interop.pruning import Manifest

SIZES = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6, "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_key_value_heads": 3, "tie_word_embeddings": True},  # as SmolLM2
    "MistralConfig": {"num_key_value_heads": 6},
    "Qwen2Config": {"num_key_value_heads": 2},  # biases of q, k and v; no head_dim of its own
    "Qwen3Config": {"num_key_value_heads": 3, "head_dim": 12},  # norms of every head
    "Gemma2Config": {"num_key_value_heads": 3, "head_dim": 10, "query_pre_attn_scalar": 10},
    "Phi3Config": {"num_key_value_heads": 3},  # q, k and v in one matrix, gate and up in another
}
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
every = pytest.mark.parametrize("kind", KINDS)


def whole(kind: str, place: Path, gone: tuple[list[int], list[int]] | None = None) -> Any:
    """A model in a folder; channels and heads of keys that are `gone` lead nowhere, and are small."""
    import transformers

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | KINDS[kind], initializer_range=0.2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        for layer in model.model.layers if gone else ():
            for groups, module in ((gone[0], layer.mlp), (gone[1], layer.self_attn)):
                for name, m in module.named_children():
                    if name in ("gate_proj", "up_proj", "gate_up_proj", *ROLES[:3], "qkv_proj"):
                        for rows in places(model.config, name, groups):
                            m.weight[rows] *= 1e-3
                    elif name in ("down_proj", "o_proj"):
                        for columns in places(model.config, name, groups):
                            m.weight[:, columns] = 0
    model.save_pretrained(place)
    return model


def places(config: Any, role: str, units: list[int]) -> list[list[int]]:
    """Where units are, said once more: in rows of q, k, v, gate, up, in columns of o and down."""
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv, inner = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    g = q // kv
    queries = [[(g * h + j) * d + i for j in range(g) for i in range(d)] for h in units]
    keys = [[h * d + i for i in range(d)] for h in units]
    shifted = lambda rows, by: [[i + by for i in r] for r in rows]  # noqa: E731
    if role == "qkv_proj":
        return [*queries, *shifted(keys, q * d), *shifted(keys, (q + kv) * d)]
    if role == "gate_up_proj":
        return [[u for u in units], [inner + u for u in units]]
    return queries if role in ("q_proj", "o_proj") else keys if role in ("k_proj", "v_proj") else [list(units)]


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(small: Path, out: Path, modules: Any = "all-linear", r: int = 3, moved: float = 0.1) -> Any:
    """A LoRA of stock PEFT over the pruned model, its numbers drawn."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(stock(small), LoraConfig(r=r, lora_alpha=7, target_modules=modules, task_type="CAUSAL_LM"))
    gen = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = moved * torch.randn(p.shape, generator=gen)
    model.save_pretrained(out)
    return model.eval()


def over(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()


@every
def test_what_leads_nowhere_is_found_and_is_not_missed(kind: str, tmp_path: Path) -> None:
    kv = KINDS[kind]["num_key_value_heads"]
    gone = ([1, 5, 6, 39, *range(10, 22)], [0, 4] if kv == 6 else [1])
    large = whole(kind, tmp_path / "large", gone)
    made = fb.prune(tmp_path / "large", tmp_path / "small", channels=24, heads=(kv - len(gone[1])) / kv)
    for kept, out in zip((made.kept.units["channels"], made.kept.units["heads"]), gone, strict=True):
        of = 40 if out is gone[0] else kv
        assert all(set(units) == set(range(of)) - set(out) for units in kept.values()) and len(kept) == 3
    small = stock(tmp_path / "small")
    assert sum(p.numel() for p in small.parameters()) == made.parameters[1] < made.parameters[0]
    torch.testing.assert_close(logits(small), logits(large), rtol=1e-5, atol=1e-5)
    tuned = trained(tmp_path / "small", tmp_path / "tuned")
    fb.recover(tmp_path / "tuned", tmp_path / "adapter")
    again = over(stock(tmp_path / "large"), tmp_path / "adapter")
    assert (logits(again) - logits(small)).abs().max() > 0.01
    torch.testing.assert_close(logits(again), logits(tuned), rtol=1e-5, atol=2e-5)


@every
def test_an_update_is_what_was_learned_at_kept_places_and_nothing_elsewhere(kind: str, tmp_path: Path) -> None:
    large = whole(kind, tmp_path / "large")
    made = fb.prune(tmp_path / "large", tmp_path / "small", 0.5, drop=[1], by=fb.Random())
    tuned = trained(tmp_path / "small", tmp_path / "tuned")
    fb.recover(tmp_path / "tuned", tmp_path / "adapter")
    again = over(stock(tmp_path / "large"), tmp_path / "adapter")
    names = [n for n, m in large.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    assert made.kept.blocks == (0, 2) and not hasattr(again.get_submodule(f"base_model.model.{names[len(names) // 2]}"), "lora_A")
    for i, at in ((0, 0), (2, 1)):
        for full in (n for n in names if f".{i}." in n):
            role = full.rpartition(".")[2]
            here = again.get_submodule(f"base_model.model.{full}").get_delta_weight("default")
            there = tuned.get_submodule(f"base_model.model.{full.replace(f'.{i}.', f'.{at}.')}").get_delta_weight("default")
            units = made.kept.units["channels" if ".mlp." in full else "heads"][i]
            index = torch.tensor([p for group in places(large.config, role, list(units)) for p in group])
            kept = here.index_select(1 if role in ("down_proj", "o_proj") else 0, index)
            assert torch.equal(kept, there) and here.shape == large.get_submodule(full).weight.shape
            assert here.count_nonzero() == kept.count_nonzero()


def test_stock_peft_merges_it_and_nothing_learned_changes_nothing(tmp_path: Path) -> None:
    large = whole("LlamaConfig", tmp_path / "large")
    fb.prune(tmp_path / "large", tmp_path / "small", 0.5)
    for moved in (0.1, 0.0):
        trained(tmp_path / "small", tmp_path / "tuned", moved=moved)
        fb.recover(tmp_path / "tuned", tmp_path / "adapter")
        again = over(stock(tmp_path / "large"), tmp_path / "adapter")
        before = logits(again)
        assert torch.equal(before, logits(large)) == (moved == 0)
        torch.testing.assert_close(logits(again.merge_and_unload()), before, rtol=1e-5, atol=1e-5)


def test_recovering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    whole("LlamaConfig", tmp_path / "large")
    fb.prune(tmp_path / "large", tmp_path / "small", 0.5)
    trained(tmp_path / "small", tmp_path / "tuned", ["q_proj", "down_proj", "up_proj"])
    for name in ("a", "b"):
        fb.recover(tmp_path / "tuned", tmp_path / name)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1] and len(contents[0]) >= 3
    assert json.loads(contents[0]["adapter_config.json"])["target_modules"] == ["down_proj", "q_proj", "up_proj"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    whole("LlamaConfig", tmp_path / "large")
    fb.prune(tmp_path / "large", tmp_path / "small", 0.5)
    trained(tmp_path / "small", tmp_path / "tuned")
    other = whole("LlamaConfig", tmp_path / "other")
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is for the whole model with fingerprint .*other has"):
        fb.recover(tmp_path / "tuned", tmp_path / "adapter", model=tmp_path / "other")
    small = stock(tmp_path / "small")
    small.model.norm.weight.data += 1
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="is for the pruned model with fingerprint"):
        fb.recover(tmp_path / "tuned", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"other is no pruned model \(it has no prune.json\)"):
        fb.recover(tmp_path / "tuned", tmp_path / "adapter", pruned=tmp_path / "other")
    assert not (tmp_path / "adapter").exists()


def steps(folder: Path, plan: Any, start: Path, out: Path) -> list[float]:
    """Losses of two steps from a plan; what they begin with and what they end in is saved."""
    model, _ = fb.load_planned(plan)
    fb.save(model, start)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for batch in tiny.batches(rows=4, size=2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    fb.save(model.eval(), out)
    return losses


def test_with_nothing_pruned_it_is_lora(tmp_path: Path) -> None:
    from finebits.interop.peft import export

    tiny.worded(tmp_path / "large")
    made = fb.prune(tmp_path / "large", tmp_path / "small", 1.0)
    assert made.parameters[0] == made.parameters[1] and load_file(tmp_path / "small" / "model.safetensors").keys()
    found = []
    for name in ("large", "small"):
        spec = fb.Spec(fb.NF(4, block=32), adapter=fb.LoRA(rank=4, alpha=8.0))
        plan = fb.Plan(dict.fromkeys(tiny.names(), spec), model=str(tmp_path / name), levers=fb.Levers(dtype="float32"))
        found.append(steps(tmp_path / name, plan, tmp_path / f"{name}-start", tmp_path / f"{name}-tuned"))
    assert found[0] == found[1]
    export(fb.load(tmp_path / "large-tuned")[0], tmp_path / "lora", "peft")
    fb.recover(tmp_path / "small-tuned", tmp_path / "adapter", start=tmp_path / "small-start")
    lora, loram = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "adapter"))
    assert lora.keys() == loram.keys() and all(torch.equal(lora[k], loram[k]) for k in lora)


@pytest.mark.parametrize("init", [fb.LoftQ(steps=1), fb.PiSSA()], ids=str)
def test_a_start_is_no_part_of_what_was_learned(init: Any, tmp_path: Path) -> None:
    tiny.worded(tmp_path / "large")
    fb.prune(tmp_path / "large", tmp_path / "small", 0.5)
    spec = fb.Spec(fb.NF(4, block=32), adapter=fb.LoRA(rank=4, alpha=8.0), init=init)
    plan = fb.Plan(dict.fromkeys(tiny.names(), spec), model=str(tmp_path / "small"), levers=fb.Levers(dtype="float32"))
    steps(tmp_path / "small", plan, tmp_path / "start", tmp_path / "tuned")
    with pytest.raises(ValueError, match="began with another update than none.*output_dir"):
        fb.recover(tmp_path / "tuned", tmp_path / "adapter")
    other = replace(plan, modules=dict.fromkeys(tiny.names(), replace(spec, format=fb.NF(2, block=32))))
    fb.save(fb.load_planned(other)[0], tmp_path / "other")
    with pytest.raises(ValueError, match="is not the one in .*other: it was trained too"):
        fb.recover(tmp_path / "tuned", tmp_path / "adapter", start=tmp_path / "other")
    fb.recover(tmp_path / "start", tmp_path / "nothing", start=tmp_path / "start")
    fb.recover(tmp_path / "tuned", tmp_path / "adapter", start=tmp_path / "start")
    again = {name: over(stock(tmp_path / "large"), tmp_path / name) for name in ("adapter", "nothing")}
    at = "model.layers.1.mlp.down_proj"
    before, after = (fb.load(tmp_path / name)[0].get_submodule(at) for name in ("start", "tuned"))
    learned = (after.stack(torch.float32).weight - before.stack(torch.float32).weight).detach()
    delta = again["adapter"].get_submodule(f"base_model.model.{at}").get_delta_weight("default").detach()
    kept = torch.tensor(Manifest.read(tmp_path / "small").kept.units["channels"][1])
    torch.testing.assert_close(delta[:, kept], learned, rtol=1e-4, atol=1e-5)
    nothing = again["nothing"].get_submodule(f"base_model.model.{at}").get_delta_weight("default").detach()
    assert float(nothing.abs().max()) < 1e-6 < float(learned.abs().max())


def test_more_than_updates_is_refused(tmp_path: Path) -> None:
    tiny.worded(tmp_path / "large")
    fb.prune(tmp_path / "large", tmp_path / "small", 0.5)
    for adapter, said in ((fb.DoRA(rank=2), "has a DoRA adapter"), (fb.Bottleneck(), "has a Bottleneck adapter")):
        spec = fb.Spec(None, adapter=adapter)
        plan = fb.Plan({tiny.names()[0]: spec}, model=str(tmp_path / "small"), levers=fb.Levers(dtype="float32"))
        fb.save(fb.load_planned(plan)[0], tmp_path / type(adapter).__name__)
        with pytest.raises(ValueError, match=said):
            fb.recover(tmp_path / type(adapter).__name__, tmp_path / "adapter")


def test_a_mask_keeps_the_best_of_every_few_and_the_factors_as_they_are(tmp_path: Path) -> None:
    large = whole("LlamaConfig", tmp_path / "large")
    fb.prune(tmp_path / "large", tmp_path / "small", mask="2:4")
    W, left = (m.model.layers[1].mlp.up_proj.weight.detach() for m in (large, stock(tmp_path / "small")))
    order = W.view(-1, 4).abs().argsort(1)
    assert torch.equal(left.view(-1, 4).gather(1, order[:, 2:]), W.view(-1, 4).gather(1, order[:, 2:]))
    assert left.count_nonzero() * 2 == W.numel()
    trained(tmp_path / "small", tmp_path / "tuned")
    fb.recover(tmp_path / "tuned", tmp_path / "adapter")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("tuned", "adapter"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_wanda_keeps_what_carries_most(tmp_path: Path) -> None:
    """E ‖down_:j x_j‖² of every channel j, from the states themselves."""
    tiny.worded(tmp_path / "large")
    rows = [{"text": " ".join(f"w{(i * k) % 126 + 1}" for k in range(1, 13))} for i in range(6)]
    with pytest.raises(ValueError, match="Wanda looks at what layers are given, and no rows came"):
        fb.prune(tmp_path / "large", tmp_path / "small", 0.5, by=fb.Wanda())
    made = fb.prune(tmp_path / "large", tmp_path / "small", channels=30, by=fb.Wanda(), data=rows)
    model, seen = stock(tmp_path / "large"), []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    for row in rows:
        ids = [int(w[1:]) for w in row["text"].split()]
        with torch.no_grad():
            model(input_ids=torch.tensor([[*ids, 0]]))
    energy = torch.cat(seen).square().sum(0) * down.weight.square().sum(0)
    best, rest = set(made.kept.units["channels"][1]), energy.sort(descending=True)
    assert len(best & set(rest.indices[:30].tolist())) >= 29  # rows may or may not be learned from to their last token


def test_blocks_that_are_worth_least_go(tmp_path: Path) -> None:
    large = whole("Gemma2Config", tmp_path / "large")  # whose layers are of two kinds in turn
    large.model.layers[0].mlp.up_proj.weight.data *= 1e-2
    large.model.layers[0].self_attn.o_proj.weight.data *= 1e-2
    large.model.layers[0].mlp.down_proj.weight.data *= 1e-2
    large.save_pretrained(tmp_path / "large")
    made = fb.prune(tmp_path / "large", tmp_path / "small", blocks=2)
    small = stock(tmp_path / "small")
    assert made.kept.blocks == (1, 2) and small.config.layer_types == large.config.layer_types[1:]
    with torch.no_grad():
        large.model.layers = large.model.layers[1:]
        for i, layer in enumerate(large.model.layers):
            layer.self_attn.layer_idx = i
    large.config = small.config
    torch.testing.assert_close(logits(small), logits(large), rtol=1e-5, atol=1e-5)


def test_layers_stored_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    large = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()
    with torch.no_grad():
        for block in large.transformer.h:
            block.mlp.c_proj.weight[1::2] = 0
            block.mlp.c_fc.weight[:, 1::2] *= 1e-3
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"attention whose matrices are known: leave its heads \(heads=1\)"):
        fb.prune(tmp_path / "large", tmp_path / "small", 0.5)
    fb.prune(tmp_path / "large", tmp_path / "small", channels=64)
    small = stock(tmp_path / "small")
    assert small.config.n_inner == 64
    torch.testing.assert_close(logits(small), logits(large), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"keep": 0.0}, "0.0 of 40 cannot be kept"),
        ({"channels": 41}, "41 of 40 cannot be kept"),
        ({"drop": [3]}, "no block 3 to leave out: the model has 3"),
        ({"drop": [0, 1, 2]}, "all blocks are left out"),
        ({"mask": "5:4"}, "a mask is written N:M"),
    ],
)
def test_what_cannot_be_kept_is_refused(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole("LlamaConfig", tmp_path / "large")
    with pytest.raises(ValueError, match=said):
        fb.prune(tmp_path / "large", tmp_path / "small", **asked)
    assert not (tmp_path / "small").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole("LlamaConfig", tmp_path / "large")
    large, small, adapter = (str(tmp_path / name) for name in ("large", "small", "adapter"))
    assert main(["prune", large, "--out", small, "--channels", "24", "--heads", "0.67", "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)["data"]
    assert (shown["channels"], shown["heads"], shown["blocks"]) == (24, 2, 3)
    trained(Path(small), tmp_path / "tuned")
    assert main(["recover", str(tmp_path / "tuned"), "--out", adapter]) == 0 and "a LoRA of " in capsys.readouterr().out
    assert main(["prune", large, "--out", str(tmp_path / "like"), "--like", small]) == 0
    held = [Manifest.read(tmp_path / name) for name in ("small", "like")]
    assert held[0] == held[1]
    assert main(["recover", str(tmp_path / "tuned"), "--out", adapter, "--quantize", "nf4"]) == 1
    assert main(["prune", large, "--out", small, "--drop", "one"]) == 2
    tiny.worded(tmp_path / "worded")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "w3 w4 w5"}))
    words = ["prune", str(tmp_path / "worded"), "--out", str(tmp_path / "seen"), "--data", str(tmp_path / "rows.jsonl")]
    assert main(words) == 0 and [Manifest.read(tmp_path / name).by["paper"] for name in ("small", "seen")] == ["magnitude", "wanda"]


def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned, aligned, trained in 4 bits, recovered, and scored on the whole model as it is and in 4 bits; stages in this process."""
    from finebits import job
    from finebits.recipe import Recipe
    from finebits.run.__main__ import make

    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(job, "work", make)
    tiny.worded(tmp_path / "large")
    fb.prune(tmp_path / "large", tmp_path / "small", 0.5)
    for name in ("train", "held"):
        rows = [" ".join(f"w{(i + k) % 9 + 20}" for k in range(12)) for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))

    def run(model: Path, out: Path, adapter: str, to: str) -> None:
        job.train(
            Recipe.parse(f"""
model: {{model_name_or_path: {model}, dtype: float32}}
data: {{datasets: [{{path: {tmp_path / "train.jsonl"}}}], held_out: {{path: {tmp_path / "held.jsonl"}}}, max_length: 16}}
budget: {{memory: 5 bits}}
quantization: {{candidates: [nf4-b32-bf16]}}
adapter: {adapter}
training: {{max_steps: 4, learning_rate: 1.0e-2, per_device_train_batch_size: 4, logging_steps: 1}}
evaluation: {{samples: 0, per_device_eval_batch_size: 4, compare: []}}
export: {{to: {to}, verify: false}}
output_dir: {out}
""")
        )

    run(tmp_path / "small", tmp_path / "align", "{rank: 4, init: zeros}", "[merged]")
    aligned = tmp_path / "align" / "export" / "merged"
    run(aligned, tmp_path / "tune", "{rank: 4, init: loftq}", "[]")
    made = job.recover(tmp_path / "tune", tmp_path / "adapter", formats=["nf4-b32"])
    held = Manifest.read(aligned)
    assert held.aligned == made["aligned"] != held.pruned == Manifest.read(tmp_path / "small").pruned
    found = {(row["model"], row["adapter"]): row["loss"] for row in made["losses"]}
    assert list(found) == [("pruned", False), ("pruned, as it was trained", True), ("whole", False), ("whole", True)] + [
        ("whole, in nf4-b32", with_it) for with_it in (False, True)
    ]
    assert found["pruned, as it was trained", True] < found["pruned", False]
    with pytest.raises(ValueError, match="no output_dir of a run"):
        job.recover(tmp_path / "adapter", tmp_path / "again", formats=["nf4"])
    evaluated = json.loads((tmp_path / "tune" / "evaluation.json").read_text())
    entries = {e["key"]: e["loss"] for e in evaluated["entries"]}
    assert entries["full"] == found["pruned", False] and entries["loftq"] == found["pruned, as it was trained", True]
    whole_rows = [
        dict(input_ids=torch.tensor([[int(w[1:]) for w in json.loads(line)["text"].split()] + [0]]))
        for line in (tmp_path / "held.jsonl").read_text().splitlines()
    ]
    with torch.no_grad():
        large, again = stock(tmp_path / "large"), over(stock(tmp_path / "large"), tmp_path / "adapter")
        direct = [sum(float(m(**b, labels=b["input_ids"]).loss) for b in whole_rows) / len(whole_rows) for m in (large, again)]
    assert direct == pytest.approx([found["whole", False], found["whole", True]], abs=1e-4)
