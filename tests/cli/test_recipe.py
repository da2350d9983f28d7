"""Recipes: what is read, what is refused and where, and what the parts become."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from finebits import registry
from finebits.formats.int import Int
from finebits.formats.nf import NF
from finebits.init.loftq import LoftQ
from finebits.init.zeros import Zeros
from finebits.optim.base import known
from finebits.plan.budget import FORMS
from finebits.planners.dp import DP
from finebits.planners.lagrange import Lagrange
from finebits.planners.milp import MILP
from finebits.quantizers.gptq import GPTQ
from finebits.quantizers.hqq import HQQ
from finebits.quantizers.rtn import RTN
from finebits.recipe import SYNONYMS, Recipe, RecipeError, format_value, leaves
from finebits.recipe.flags import words
from finebits.refine.apiq import ApiQ
from finebits.refine.rilq import RILQ


def listed(names: Iterable[str]) -> str:
    """As a message lists what it wants."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}"


ROOT = Path(__file__).parents[2]
HEAD = "model:\n  model_name_or_path: somewhere\n"


def read(body: str = "", *overrides: str) -> Recipe:
    return Recipe.parse(HEAD + body, "recipe.yaml", overrides)


def refused(body: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(body, *overrides)
    assert caught.value.code == 2
    return [str(problem) for problem in caught.value.problems]


def only(body: str, *overrides: str) -> str:
    (problem,) = refused(body, *overrides)
    return problem


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_come_back_as_they_were(path):
    recipe = Recipe.load(path)
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert recipe.formats() and recipe.adapter_value() and recipe.init_value()


def test_the_8b_recipe_names_a_folder_with_a_config():
    recipe = Recipe.load(ROOT / "recipes/llama_8b_8gib.yaml")
    config = yaml.safe_load((ROOT / recipe.model.model_name_or_path / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (4096, 32, 128256)
    assert recipe.budget.total == 8 << 30


def test_everything_but_the_model_has_a_default():
    assert Recipe.parse("model: {model_name_or_path: x}").training.learning_rate == 2e-4
    with pytest.raises(RecipeError, match=r"^recipe has no model: add model"):
        Recipe.parse("output_dir: x")


def test_how_weights_are_rounded_and_the_start_refined():
    recipe = read(
        "quantization: {quantizer: {paper: gptq, scales: search}, calibration: sweep}\nadapter: {refine: [apiq, {paper: rilq, epochs: 1}]}\n"
    )
    assert recipe.quantizer_value() == GPTQ(scales="search") and recipe.refine_values() == [ApiQ(), RILQ(epochs=1)]
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert read().quantizer_value() == RTN() and read().refine_values() == []
    assert read("", "quantizer.paper=hqq").quantizer_value() == HQQ()
    assert "recipe.yaml:3" in only("adapter: {refine: [apik]}") and "apiq" in only("adapter: {refine: [apik]}")
    assert "quantization.quantizer" in only("quantization: {quantizer: {paper: gptq, scale: search}}")
    assert "collect or sweep" in only("quantization: {calibration: swept}")


def test_a_changed_recipe_comes_back_as_it_was():
    recipe = read(
        "adapter: {paper: lora, r: 8, lora_alpha: 32, lora_dropout: 0.1, target_modules: [q_proj],\n"
        "  init: {paper: loftq, steps: 2}, scaling: rslora}\n"
        "quantization: {candidates: [{paper: int, bits: 4, symmetric: false}], overrides: {'.*\\.down_proj': int8, x: null}}\n"
        "rules: [lora_plus, {paper: lora_plus, ratio: 3.0}]\ntraining: {learning_rate: 1e-5}\n"
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe


def test_an_empty_section_is_its_defaults():
    assert read("training:\n  # max_steps: 3\n") == read()


def test_every_leaf_of_the_schema_is_described():
    schema = Recipe.model_json_schema()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        for key, leaf in section["properties"].items():
            described = schema["$defs"][leaf["$ref"].split("/")[-1]] if "$ref" in leaf else leaf
            assert described.get("description"), f"{name}.{key}"


def test_leaf_names_are_unique_across_sections():
    assert all(len(sections) == 1 for sections in leaves().values())


def test_synonyms_lead_to_keys_that_exist():
    for wanted in SYNONYMS.values():
        section, _, key = wanted.partition(".")
        assert section in Recipe.model_fields and (not key or section in leaves()[key]), wanted


# -- mistakes, each at its line


def test_an_unknown_key_is_shown_with_what_was_meant():
    assert only("training:\n  per_device_batch_size: 4\n") == (
        "recipe.yaml:4:3   training.per_device_batch_size is not a known key\n"
        "     3 | training:\n"
        "     4 |   per_device_batch_size: 4\n"
        "       |   ^^^^^^^^^^^^^^^^^^^^^ did you mean per_device_train_batch_size?"
    )


@pytest.mark.parametrize(
    ("body", "where", "meant"),
    [
        ("training: {micro_batch_size: 2}", "3:12", "did you mean per_device_train_batch_size?"),
        ("data: {sequence_len: 2}", "3:8", "did you mean max_length?"),
        ("training: {sequence_len: 2}", "3:12", "finebits calls this data.max_length"),
        ("base_model: x", "3:1", "finebits calls this model.model_name_or_path"),
        ("lora: {r: 3}", "3:1", "finebits calls this adapter"),
        ("learning_rate: 3", "3:1", "it belongs into the section training"),
        ("training: {warmup_ratio: 0.1}", "3:12", "did you mean warmup_steps? (a number below 1 there is a share of all steps)"),
        ("trainig: {}", "3:1", "did you mean training?"),
        (
            "budget: {xyzzy: 1}",
            "3:10",
            "known here: memory, device, reserve, serve_memory, serve_adapters, serve_rank, serve_tokens, levers",
        ),
        ("data: {datasets: [{path: a, fomat: text}]}", "3:29", "did you mean format?"),
        ("data: {held_out: {pth: a, path: b}}", "3:19", "did you mean path?"),
        ("adapter: {lora_r: 3}", "3:11", "did you mean rank?"),
        ("adapter: {scalling: rslora}", "3:11", "did you mean scaling?"),
        ("adapter: {target_module: x}", "3:11", "did you mean target_modules?"),
    ],
)
def test_unknown_keys_name_what_other_tools_call_so(body, where, meant):
    problem = only(body)
    assert problem.startswith(f"recipe.yaml:{where}   ") and "is not a known key" in problem and problem.endswith(f" {meant}")


@pytest.mark.parametrize(
    ("body", "where", "said"),
    [
        ("training: {max_steps: many}", "3:23", "training.max_steps wants a whole number, and 'many' came"),
        ("training: {max_steps: 3.5}", "3:23", "training.max_steps wants a whole number, and 3.5 came"),
        ("training: {max_steps: true}", "3:23", "training.max_steps wants a whole number, and true came"),
        ("training: {learning_rate: -1}", "3:27", "training.learning_rate wants a number above 0, and -1 came"),
        ("training: {learning_rate: .nan}", "3:27", "training.learning_rate wants a finite number, and nan came"),
        (
            "training: {optim: adamw8bit}",
            "3:19",
            f"training.optim wants {listed(known())} or a mapping, and 'adamw8bit' came",
        ),
        ("training: {report_to: 3}", "3:23", "training.report_to wants text or a list, and 3 came"),
        ("training: 3", "3:11", "training wants a section of keys, and 3 came"),
        ("model: 3", "3:1", "model is there twice, first in line 1"),
        ("export: {verify: 1}", "3:18", "export.verify wants true or false, and 1 came"),
        (
            "export: {to: [adapter, ggfu]}",
            "3:24",
            f"export.to.1 wants {listed([*registry.names('export'), 'gguf:f16 … gguf:q2_k'])}, and 'ggfu' came",
        ),
        ("evaluation: {limit: 0}", "3:21", "evaluation.limit wants a number of at least 1, and 0 came"),
        ("budget: {memory: 8G}", "3:18", "budget.memory: '8G' does not say which unit: write 8GiB (1024) or 8GB (1000)"),
        ("budget: {memory: lots}", "3:18", f"budget.memory: a budget is {FORMS}, and 'lots' came"),
        (
            "budget: {memory: 3.1}",
            "3:18",
            "budget.memory: 3.1 does not say what is meant: write 3.1GiB, 3.1MiB or, of a linear weight on average, '3.1 bits'",
        ),
        ("budget: {memory: 0}", "3:18", f"budget.memory: a budget of 0 holds no model: write {FORMS}; leave it out for no limit"),
        ("budget: {memory: [8]}", "3:18", f"budget.memory: a budget is {FORMS}, and [8] came"),
        ("budget: {reserve: 120%}", "3:19", "budget.reserve: a share from 0% up to (not including) 100% is wanted, and '120%' came"),
        ("budget: {memory: 1GiB, reserve: 2GiB}", "3:9", "budget: 2 GiB cannot be kept back from 1 GiB: nothing would be left"),
        ("data: {datasets: [{format: text}]}", "3:19", "data.datasets.0.path is missing"),
        ("data: {held_out: x}", "3:18", "data.held_out wants a section of keys, and 'x' came"),
        ("quantization: {candidates: []}", "3:28", "quantization.candidates wants at least one entry, and a list came"),
        ("adapter: {r: many}", "3:14", "adapter.r wants a whole number, and 'many' came"),
        ("adapter: {target_modules: [q_proj, 3]}", "3:36", "adapter.target_modules.1 wants text, and 3 came"),
        ("rules: {paper: adalora}", "3:8", "rules wants a list, and a mapping came"),
        ("output_dir: null", "3:13", "output_dir wants text, and null came"),
        ("recipe: 2", "3:9", "recipe wants 1, and 2 came"),
    ],
)
def test_a_wrong_value_names_the_wanted_type(body, where, said):
    assert only(body).splitlines()[0] == f"recipe.yaml:{where}   {said}"


@pytest.mark.parametrize(
    ("body", "where", "said"),
    [
        ("quantization: {candidates: [nf4, nf9]}", "3:34", "NF has 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
        ("quantization: {candidates: [nf]}", "3:29", "a format is written like nf4, nf3-b64, int4a-b32"),
        ("quantization: {candidates: [nf4-b8]}", "3:29", "block is 8; it can be 16 to 4096 columns"),
        ("quantization: {candidates: [{paper: nf, bit: 3}]}", "3:41", "nf has no setting 'bit': did you mean bits?"),
        ("quantization: {candidates: [{paper: nf, bits: x}]}", "3:41", "nf.bits wants a whole number, and 'x' came"),
        ("quantization: {candidates: [nf4a]}", "3:29", "nf has no setting 'symmetric'"),
        ("quantization: {candidates: [{bits: 3}]}", "3:29", "a method of formats is a name, or a mapping with the key paper"),
        ("quantization: {overrides: {'(': nf4}}", "3:28", "'(' is not a regular expression"),
        ("quantization: {overrides: {a: nf9}}", "3:28", "NF has 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
        ("quantization: {locks: {down_proj: nf9}}", "3:24", "NF has 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
        ("quantization: {planner: lagrnge}", "3:25", "finebits has no planners method 'lagrnge'. Did you mean 'lagrange'?"),
        (
            "quantization: {planner: uniform, constraints: {max_formats: 2}}",
            "3:25",
            "quantization.constraints are kept by the planner milp",
        ),
        ("adapter: {inits: [zeros, loftQ]}", "3:26", "finebits has no init method 'loftQ'. Did you mean 'loftq'?"),
        ("adapter: {paper: lorra}", "3:18", "finebits has no adapters method 'lorra'. Did you mean 'lora'?"),
        ("adapter: {init: loftQ}", "3:17", "finebits has no init method 'loftQ'. Did you mean 'loftq'?"),
        ("adapter: {init: false}", "3:17", "write zeros for a start that changes nothing"),
        ("adapter: {init: {paper: loftq, steps: 0}}", "3:17", "LoftQ needs steps >= 1, not 0"),
        ("adapter: {init: {paper: loftq, order: x}}", "3:32", "loftq.order wants quantize or svd, and 'x' came"),
        ("adapter: {paper: gated, use_rslora: true}", "3:25", "gated has no setting 'scaling'"),
        ("adapter: {use_rslora: true, scaling: lora}", "3:29", "use_rslora and scaling say the same thing twice"),
        ("adapter: {r: 3, rank: 4}", "3:11", "r says what another key says already"),
        ("adapter: {target_modules: '['}", "3:27", "'[' is not a regular expression"),
        (
            "rules: [kasa_loss, {paper: adalora, target_rnk: 4}]\nadapter: {paper: gated}",
            "3:37",
            "adalora has no setting 'target_rnk': did you mean target_rank?",
        ),
        (
            "rules: [kasa_loss, {paper: adalora, target_rank: x}]\nadapter: {paper: gated}",
            "3:37",
            "adalora.target_rank wants a whole number, and 'x' came",
        ),
        (
            "rules: [lora_plus, adalora]",
            "3:20",
            "rules.1: AdaLoRA acts on tensors A, B and gate that a module trains as its own, and LoRA has none such",
        ),
        (
            "rules: [allora]\nadapter: {dropout: 0.1}",
            "3:9",
            "ALLoRA does not go together with dropout of the inputs, which is 0.1: set it to 0",
        ),
    ],
)
def test_a_method_that_does_not_exist_is_found_at_its_line(body, where, said):
    problem = only(body)
    assert problem.startswith(f"recipe.yaml:{where}   ") and said in problem.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1,\nb: 2", "recipe:2:5   this is not YAML"),
        ("\ta: 3", "recipe:1:1   this is not YAML"),
        ("", "recipe wants sections of keys, and it is empty"),
        ("- a", "recipe wants sections of keys, and a list came"),
        ("model: &a {model_name_or_path: x}\ndata: *a", "recipe:2:1   a recipe holds no YAML aliases"),
        ("model: !!python/object:os.system {x: y}", "recipe:1:8   a recipe holds no YAML tags"),
        ("model: !!python/name:os.system ''", "recipe:1:8   this is not YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "recipe:2:1   this is not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(text, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert str(caught.value).startswith(said)


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in (("absent.yaml", "there is no recipe at"), ("", "is a folder"), ("binary.yaml", "is not text in UTF-8")):
        with pytest.raises(RecipeError, match=said):
            Recipe.load(tmp_path / name)


def test_all_mistakes_are_reported_together_in_order():
    said = refused("data: {max_lenght: 3}\ntraining:\n  max_steps: x\n  lr: 3\n", "seed=x")
    assert [line.split("   ")[0] for line in said] == ["recipe.yaml:3:8", "recipe.yaml:5:14", "recipe.yaml:6:3", "command line"]


# -- overrides


def test_overrides_reach_every_kind_of_key():
    recipe = read(
        "adapter: {r: 3}\n",
        "training.learning-rate=1e-4",
        "max_steps=7",
        "rank=5",
        "lora_alpha=9",
        "adapter.init.steps=3",
        "rules.0=layer_drop",
        "rules.1.paper=layerwise_lr",
        "rules.1.decay=0.5",
        "data.datasets.0.path=a-b.jsonl",
        r"quantization.overrides.model\.layers\.0\..*down-x=null",
        "candidates=[nf2, nf4]",
        "candidates.1=nf3",
        "budget.memory=1GiB",
        "output-dir=elsewhere",
        "data.held_out.path=h.jsonl",
    )
    assert recipe.training.learning_rate == 1e-4 and recipe.training.max_steps == 7
    assert recipe.adapter.rank == 5 and recipe.adapter.alpha == 9
    assert recipe.init_value().steps == 3
    assert [vars(rule).get("decay") for rule in recipe.rule_values()] == [None, 0.5]
    assert recipe.data.datasets[0].path == "a-b.jsonl" and recipe.data.held_out.path == "h.jsonl"
    assert recipe.quantization.overrides == {r"model\.layers\.0\..*down-x": None}
    assert recipe.quantization.candidates == ["nf2", "nf3"]
    assert recipe.budget.total == 1 << 30 and recipe.output_dir == "elsewhere"


def test_an_override_without_a_value_is_no_null():
    """A variable of the shell that is not set must not lift a limit."""
    said = only("budget: {memory: 1GiB}", "budget.memory=")
    assert "budget.memory is given no value: write one, or null for none" in said
    assert "adapter.rank is given no value" in only("", "rank= ")
    assert "budget.memory is given no value" in only("", *words(["--budget", ""])[0])
    assert read("budget: {memory: 1GiB}\n", "budget.memory=null").budget.memory is None


def test_overrides_make_the_sections_that_a_file_lacks():
    recipe = read(
        "",
        "quantization.constraints.overhead=0.2",
        "quantization.constraints.tie=[[q_proj, k_proj]]",
        "data.held_out.path=rows.jsonl",
        "export.rows=3",
    )
    assert recipe.quantization.constraints.overhead == 0.2 and recipe.quantization.constraints.tie == [["q_proj", "k_proj"]]
    assert recipe.data.held_out is not None and recipe.data.held_out.path == "rows.jsonl" and recipe.export.rows == 3
    assert (
        read("quantization: {constraints: {max_formats: 2}}", "quantization.constraints.overhead=0.2").quantization.constraints.max_formats
        == 2
    )
    settled = read(
        "", "quantization.planner=block_size", "quantization.planner.overhead=0.05", "adapter.refine=[apiq]", "adapter.refine.0.epochs=3"
    )
    assert settled.planner_value().overhead == 0.05 and settled.refine_values()[0].epochs == 3


def test_the_last_override_of_a_key_counts():
    assert read("", "seed=1", "training.seed=2").training.seed == 2


@pytest.mark.parametrize(
    ("override", "said", "caret"),
    [
        ("foo", "an override is written section.key=value, and 'foo' came", "^^^"),
        ("learnin_rate=1", "learnin_rate is not a known key", "^^^^^^^^^^^^ did you mean training.learning_rate?"),
        ("training.max_stps=1", "training.max_stps is not a known key", "^^^^^^^^^^^^^^^^^ did you mean max_steps?"),
        ("max_steps=x", "training.max_steps wants a whole number, and 'x' came", "          ^"),
        (
            "export.to=[foo]",
            f"export.to.0 wants {listed([*registry.names('export'), 'gguf:f16 … gguf:q2_k'])}, and 'foo' came",
            "           ^^^",
        ),
        ("training={bar: 3}", "training.bar is not a known key", "          ^^^ known here"),
        ("data.datasets.2.path=x", "data.datasets has no entry 2: the next one is 0", "^^^^"),
        ("candidates.0.bits=3", "quantization.candidates.0 has no entry 'bits': it is 'nf2-b64-bf16'", "^^^^"),
        ("seed=[", "this is not YAML", "      ^"),
    ],
)
def test_a_wrong_override_is_shown_like_a_line(override, said, caret):
    first, text, marks = only("", override).splitlines()
    assert first.startswith(f"command line   {said}") and text == f"       | {override}" and marks.startswith(f"       | {caret}")


# -- what the parts become


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("nf4", NF(4)),
        ("nf3-b128", NF(3, block=128)),
        ("nf2-b64-bf16", NF(2, block=64, scale="bf16")),
        ("int8", Int(8)),
        ("int4-b128", Int(4, block=128)),
        ("int4a-b32", Int(4, block=32, symmetric=False)),
        ("nf4-fp16", NF(4, scale="fp16")),
        ({"paper": "nf", "bits": 3, "scale": "bf16"}, NF(3, scale="bf16")),
    ],
)
def test_short_names_of_formats(entry, value):
    assert format_value(entry) == value


def test_peft_spellings_mean_the_same():
    ours = read("adapter: {rank: 4, alpha: 8, dropout: 0.1, init: zeros, use_rslora: true}")
    peft = read("adapter: {r: 4, lora_alpha: 8, lora_dropout: 0.1, init_lora_weights: true, use_rslora: true}")
    assert ours == peft
    assert ours.adapter_value().scaling == "rslora" and ours.adapter_value().rank == 4


def test_further_keys_belong_to_the_adapter():
    assert read("adapter: {paper: gated, rank: 5}").adapter_value().alpha == 12.0
    assert read("adapter: {scaling: rslora}").adapter_value().scaling == "rslora"


def test_rules_are_new_at_every_call():
    recipe = read("rules: [layer_drop]")
    assert recipe.rule_values()[0] is not recipe.rule_values()[0]


def test_the_reserve_is_kept_back():
    budget = read("budget: {memory: 1000MiB, reserve: 5%}").budget
    assert budget.usable == 950 << 20 and budget.reserve_share == pytest.approx(0.05)
    assert read().budget.usable is None and read().budget.reserve_share == 0.0
    stated = read("budget: {memory: 3.1 bits}").budget
    assert (
        stated.total is None
        and stated.reserve_share == pytest.approx(0.05)
        and read("", "budget.memory=80% of nf4").budget.memory == "80% of nf4"
    )
    assert "write reserve as a share" in refused("budget: {memory: 80% of nf4, reserve: 300MiB}")[0]
    assert Recipe.parse(read("budget: {memory: 3.1 bits}").to_yaml(), "again").budget == stated


def test_what_a_plan_must_keep_to():
    assert read().planner_value() == Lagrange() and read("quantization: {planner: {paper: dp, states: 9}}").planner_value() == DP(9)
    recipe = read("quantization: {constraints: {tie: [[q_proj, k_proj], [gate_proj, up_proj]], max_formats: 3, overhead: 0.05}}")
    assert recipe.planner_value() == MILP((("q_proj", "k_proj"), ("gate_proj", "up_proj")), 3, overhead=0.05)
    recipe = read(
        "adapter: {ranks: [4, 8], inits: [zeros, {paper: loftq, steps: 1}]}", "quantization.locks.layers.0.*=null", "locks.o_proj=nf2"
    )
    assert recipe.lock_values() == {"layers.0.*": None, "o_proj": NF(2)} and recipe.init_values() == [Zeros(), LoftQ(steps=1)]
    assert recipe.adapter.ranks == [4, 8] and recipe.adapter_value().rank == 16


def test_overrides_become_formats():
    entries = {r".*\.down_proj": "nf2", r".*\.1\..*": None}
    recipe = read(r"quantization: {overrides: {'.*\.down_proj': nf2, '.*\.1\..*': null}}")
    assert recipe.quantization.overrides == entries
    assert recipe.override_values() == {r".*\.down_proj": NF(2), r".*\.1\..*": None}
