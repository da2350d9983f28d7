"""Configs of other tools: each loads as a recipe, each of its keys is taken or listed, and what contradicts itself is refused."""

import functools
import json
import re
from pathlib import Path

import pytest
import yaml

from finebits.cli import main
from finebits.errors import Invalid
from finebits.importers.base import imported, read, tools
from finebits.recipe import Recipe

DATA = Path(__file__).parent / "data"
FILES = sorted(p for p in DATA.iterdir() if p.is_file())


def tool(path):
    return path.name.split("_")[0]


@functools.cache
def read_once(path):
    return imported(tool(path), path)


def names(config):
    """Every name of a key that has a value."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict) and value:
            yield from names(value)
        elif value is not None:
            yield key


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_config_becomes_a_recipe_and_none_of_its_keys_is_dropped(path, tmp_path):
    text, left = read_once(path)
    written = tmp_path / "recipe.yaml"
    written.write_text(text)
    recipe = Recipe.load(written)
    assert recipe.model.model_name_or_path and len(recipe.data.datasets) > 0
    lost = [name for name in names(read(path)) if not re.search(rf"\b{re.escape(str(name))}\b", text)]
    assert not lost
    for key, why in left.items():
        assert why and re.search(rf"^#   {re.escape(key)}: ", text, re.M), key
    assert "notARealToken" not in text


def test_every_tool_has_three():
    assert all(sum(tool(p) == name for p in FILES) >= 3 for name in tools())


def of(name):
    path = next(p for p in FILES if p.stem == name)
    return Recipe.parse(read_once(path)[0])


def test_what_they_say():
    a = of("axolotl_qlora_llama")
    assert (a.adapter.paper, a.adapter.rank, a.adapter.alpha, a.adapter.dropout) == ("lora", 32, 16, 0.05)
    assert a.quantization.candidates == ["nf4"] and a.data.assistant_only_loss and a.data.max_length == 2048
    assert a.training.optim == "adamw_bnb_8bit" and a.budget.device == "cuda"
    a = of("axolotl_lora_chat")
    assert a.quantization.candidates == ["int8-b128-bf16"] and a.adapter.use_rslora and a.training.warmup_steps == 0.05
    assert a.data.held_out is not None and a.data.held_out.path == "data/support_test.jsonl" and a.training.report_to == "wandb"
    a = of("axolotl_full_completion")
    assert a.adapter.paper == "full" and not a.data.assistant_only_loss and a.model.model_revision == "main"
    b = of("llamafactory_qlora_pretrain")
    assert b.adapter.paper == "dora" and not b.data.assistant_only_loss and b.data.datasets[0].path.endswith("corpora/c4_demo.jsonl")
    assert b.adapter.modules_to_save == ["embed_tokens"] and b.training.max_steps == 2000
    assert of("llamafactory_lora_sft").adapter.target_modules == "all-linear"
    c = of("trl_sft_qlora")
    assert c.model.dtype == "bfloat16" and c.adapter.target_modules == ["q_proj", "v_proj"] and c.training.warmup_steps == 0.03
    assert of("trl_sft_full").adapter.paper == "full" and len(of("trl_sft_mixture").data.datasets) == 2
    d = of("unsloth_sections")
    assert d.training.seed == 3407 and d.training.gradient_checkpointing and len(d.adapter.target_modules or ()) == 7
    assert not of("unsloth_full").training.gradient_checkpointing
    e = of("torchtune_qlora_single_device")
    assert e.adapter.target_modules == "all-linear" and e.model.model_name_or_path == "/tmp/Llama-3.2-3B-Instruct/"
    assert e.training.learning_rate == 3e-4 and e.training.warmup_steps == 100 and e.budget.device == "cuda"
    e = of("torchtune_full")
    assert e.training.max_steps == 200 and e.model.dtype == "float32" and e.budget.device == "cpu" and len(e.data.datasets) == 2
    f = of("mlx_lora_config")
    assert f.adapter.alpha == 160 and f.training.max_steps == 1000 and f.data.datasets[0].path == "data/train.jsonl"
    assert f.training.lr_scheduler_type == "cosine" and f.adapter.target_modules == ["q_proj", "v_proj"]
    assert of("mlx_dora_hub").adapter.paper == "dora" and of("mlx_full").training.seed == 9


def test_how_often_and_on_what_they_evaluate():
    """Axolotl divides an epoch, and evaluates before the first step; LLaMA-Factory and Axolotl count rows from 1 on; mlx-lm always does."""
    a = of("axolotl_qlora_evals")
    t = a.training
    assert a.data.test_split_size == 200 and t.neftune_noise_alpha == 5 and t.num_train_epochs == 3
    assert (t.eval_strategy, t.eval_steps, t.eval_on_start, t.save_strategy) == ("steps", 1 / 12, True, "epoch")
    assert (t.lr_scheduler_type, t.lr_scheduler_kwargs, t.early_stopping_patience) == ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 3)
    assert t.effective_batch_size == 16 and t.metric_for_best_model == "loss"
    first = of("axolotl_qlora_llama")
    assert first.data.test_split_size == 0.1 and first.training.eval_steps == 0.25 and first.training.save_strategy == "epoch"
    b = of("llamafactory_dpo_val")
    assert b.data.test_split_size == 0.1 and b.training.loss == {"paper": "dpo", "beta": 0.1} and b.training.neftune_noise_alpha == 5
    assert (b.training.eval_strategy, b.training.eval_steps) == ("steps", 500)
    c = of("trl_sft_evals").training
    assert (c.eval_steps, c.save_steps, c.load_best_model_at_end, c.metric_for_best_model) == (0.25, 0.25, True, "loss")
    f = of("mlx_lora_config").training
    assert (f.eval_strategy, f.eval_steps, f.eval_on_start) == ("steps", 200, True)


def test_settings_of_a_loss_go_with_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"base_model": "m", "rl": "kto", "rl_beta": 0.2, "kto_desirable_weight": 0.5}))
    assert Recipe.parse(imported("axolotl", path)[0]).training.loss == {"paper": "kto", "beta": 0.2, "desirable": 0.5}


@pytest.mark.parametrize(
    ("tool", "config", "key", "why"),
    [
        ("axolotl", {"base_model": "m", "val_set_size": 0, "evals_per_epoch": 4}, "evals_per_epoch", "nothing is held out there"),
        ("axolotl", {"base_model": "m", "val_set_size": 0.0}, "val_set_size", "holds out anyway"),
        ("axolotl", {"base_model": "m", "rl": "ipo", "rl_beta": 0.2}, "rl", "finebits has no loss ipo"),
        ("axolotl", {"base_model": "m", "rl": "dpo", "orpo_alpha": 0.2}, "orpo_alpha", "finebits has no key for it"),
        ("axolotl", {"base_model": "m", "neftune_noise_alpha": 0}, "neftune_noise_alpha", "it is so anyway"),
        ("axolotl", {"base_model": "m", "val_set_size": 1.5}, "val_set_size", "wants a whole number or a number below 1"),
        ("llamafactory", {"model_name_or_path": "m", "stage": "dpo", "pref_loss": "simpo"}, "stage", "finebits has no loss simpo"),
        (
            "llamafactory",
            {"model_name_or_path": "m", "stage": "kto", "dpo_label_smoothing": 0.1},
            "dpo_label_smoothing",
            "does not read it",
        ),
        ("llamafactory", {"model_name_or_path": "m", "stage": "sft", "val_size": "some"}, "val_size", "neither a share nor a number"),
    ],
)
def test_what_is_not_taken_over_says_why(tool, config, key, why, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    text, left = imported(tool, path)
    assert why in left[key] and f"#   {key}:" in text


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("axolotl", {"base_model": "m", "val_set_size": 0.1, "evals_per_epoch": 4, "eval_steps": 50}, "says that training.eval_steps is"),
        ("axolotl", {"base_model": "m", "adapter": "qlora", "load_in_4bit": False}, "qlora, and the base is not loaded in 4 bits"),
        ("axolotl", {"base_model": "m", "load_in_4bit": True, "load_in_8bit": True}, "are both true"),
        ("axolotl", {"base_model": "m", "adapter": "lora", "sequence_len": 64, "max_length": 32}, "says that data.max_length is"),
        ("axolotl", {"model": "m"}, "no config of Axolotl"),
        ("llamafactory", {"model_name_or_path": "m", "finetuning_type": "full", "lora_rank": 8}, "finetuning_type is full"),
        ("llamafactory", {"model_name_or_path": "m", "stage": "ppo"}, "stage: ppo"),
        ("trl", {"model_name_or_path": "m", "load_in_4bit": True}, "without use_peft"),
        ("trl", {"model_name_or_path": "m", "use_peft": True, "lora_r": 8, "r": 16}, "lora_r says that adapter.rank is 8"),
        ("unsloth", {"model": "m", "training": {"seed": 1}, "seed": 2}, "in one place and"),
        ("unsloth", {"model": "m", "training_type": "full", "load_in_4bit": True}, "it quantizes them"),
        ("torchtune", {"model": {"_component_": "a.llama3_8b", "lora_rank": 8}}, "has settings of LoRA"),
        ("torchtune", {"model": {"_component_": "a.lora_llama3_8b"}, "output_dir": "${nowhere}"}, "refers to ${nowhere}"),
        ("torchtune", {"model": {"_component_": "a.lora_llama3_8b"}}, "names no model"),
        ("mlx", {"model": "m", "fine_tune_type": "full", "lora_parameters": {"rank": 8}}, "fine_tune_type is full"),
        ("mlx", {"model": "m", "iters": 3, "learning_rate": 1e-5, "lr_schedule": {"arguments": [1e-4, 3]}}, "lr_schedule begins at"),
        ("mlx", {"model": "m"}, "no config of mlx-lm"),
    ],
)
def test_what_contradicts_itself_or_is_of_another_tool_is_refused(kind, config, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(Invalid, match=re.escape(said)):
        imported(kind, path)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "a: [", "\0", "!!python/object/apply:os.system ['false']", "{a: &x [*x]}", "a: 1\na: 2"], ids=range(7)
)
def test_files_that_are_no_config(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(Invalid, match=r"c\.yaml"):
        imported("axolotl", path)


def test_init_imports_and_lists_what_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = str(DATA / "trl_sft_qlora.yaml")
    assert main(["init", "--from", "trl", file, "--budget", "8GiB", "--seed", "5", "--format", "json"]) == 0
    shown = capsys.readouterr()
    assert "push_to_hub is not in the recipe" in shown.err and "push_to_hub" in json.loads(shown.out)["data"]["left"]
    recipe = Recipe.load("recipe.yaml")
    assert recipe.budget.memory == "8GiB" and recipe.training.seed == 5 and recipe.adapter.rank == 32
    before = Path("recipe.yaml").read_bytes()
    assert main(["init", "--from", "trl", file]) == 2
    assert "is not overwritten" in capsys.readouterr().err and Path("recipe.yaml").read_bytes() == before
    assert main(["init", "--from", "axolotl", file, "--out", "b.yaml"]) == 2 and not Path("b.yaml").exists()
    assert main(["init", "--from", "soup", file, "--out", "b.yaml"]) == 2 and "finebits reads configs of axolotl" in capsys.readouterr().err
