"""The names that people know from other tools: each is a key, an option of its name, or is told what does it here. And forms of rows without
questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finebits.data.rows import read
from finebits.recipe import Recipe, RecipeError
from finebits.recipe.flags import keys, words

KEYS = """model_name_or_path model_revision dtype attn_implementation dataset_name datasets max_length per_device_train_batch_size
gradient_accumulation_steps num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps r lora_alpha lora_dropout target_modules
use_rslora use_dora rank_pattern alpha_pattern init_lora_weights modules_to_save load_in_4bit bnb_4bit_quant_type bnb_4bit_use_double_quant
assistant_only_loss completion_only_loss gradient_checkpointing packing output_dir seed report_to logging_steps save_steps eval_strategy
eval_steps base_model model checkpoint_dir dataset data hf_dataset sequence_len cutoff_len max_seq_length block_size micro_batch_size batch_size
grad_accumulation_steps num_epochs epochs iters warmup_ratio lora_r lora_rank lora_target lora_target_linear quantization_bit quantize
train_on_inputs train_on_completions mask_prompt sample_packing neat_packing enable_activation_checkpointing out_dir save_interval torch_dtype
push_to_hub hub_model_id"""
VALUES = {"bnb_4bit_quant_type": "nf4", "warmup_ratio": "0.1", "quantization_bit": "4", "quantize": "bnb.nf4", "use_dora": "true"}
TOLD = {"activation_offloading", "padding_free", "resume_from_checkpoint", "auto_find_batch_size"}
LENGTHS = "rows of like length share a batch in every run"


@pytest.mark.parametrize("name", KEYS.split())
def test_a_name_is_an_option(name: str) -> None:
    overrides, _ = words([f"--{name}", VALUES.get(name, "1")])
    assert overrides and all(o.partition("=")[0] in keys() or o.startswith("data.datasets") for o in overrides)


@pytest.mark.parametrize("name", sorted(TOLD))
def test_a_name_that_is_none_is_told_what_does_it_here(name: str) -> None:
    with pytest.raises(RecipeError, match=f"--{name} is no key of a recipe: [a-z]"):
        words([f"--{name}", "1"])
    with pytest.raises(RecipeError, match=f"training.{name} is not a known key(.|\n)*(finebits train|data.packing|training.)"):
        Recipe.parse(f"{{model: {{model_name_or_path: m}}, training: {{{name}: true}}}}")


def test_code_that_comes_with_a_model_is_not_run() -> None:
    for said in (lambda: words(["--trust-remote-code", "true"]), lambda: Recipe.parse("{model: {trust_remote_code: true}}")):
        with pytest.raises(RecipeError, match="finebits runs no code that comes with a model"):
            said()


@pytest.mark.parametrize("said", ["--group-by-length", "--group_by_length=true", "--train-sampling-strategy group_by_length"])
def test_batches_of_rows_of_like_length_may_be_asked_for(said: str) -> None:
    assert words(said.split()) == ([], len(said.split()))


@pytest.mark.parametrize("said", ["--group-by-length=false", "--no-group-by-length", "--train_sampling_strategy sequential"])
def test_other_batches_are_refused(said: str) -> None:
    with pytest.raises(RecipeError, match=LENGTHS):
        words(said.split())


@pytest.mark.parametrize("key", ["group_by_length: true", "train_sampling_strategy: group_by_length"])
def test_in_a_recipe_the_order_of_rows_is_no_key(key: str) -> None:
    with pytest.raises(RecipeError, match=f"is not a known key(.|\n)*{LENGTHS}"):
        Recipe.parse(f"{{model: {{model_name_or_path: m}}, training: {{{key}}}}}")


def test_qlora_is_lora_over_four_bits() -> None:
    found = Recipe.parse("model: {model_name_or_path: m}", overrides=words(["--adapter", "qlora"])[0])
    assert found.adapter.paper == "lora" and found.quantization.candidates == ["nf4"]
    assert words(["--adapter=dora"]) == (['adapter.paper="dora"'], 1)
    for adapter in ("{paper: qlora}", "{choose: [lora, qlora]}"):
        with pytest.raises(RecipeError, match=r"qlora is LoRA over weights of 4 bits: write paper: lora, and candidates: \[nf4\]"):
            Recipe.parse(f"{{model: {{model_name_or_path: m}}, adapter: {adapter}}}")


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
FORMS = {
    "messages": {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "input": "", "output": "b", "system": "s", "history": [["x", "y"]]},
    "completion": {"prompt": "a", "completion": "b"},
    "completion of turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "text": {"text": "a b"},
    "pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "pair of turns": {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "c"}]},
    "ids": {"input_ids": [1, 2], "labels": [-100, 2]},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_without_questions(form: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(FORMS[form]) + "\n")
    rows = read(tmp_path / "rows.jsonl")
    assert len(rows) == 1 and rows.why.startswith("detected: key")
