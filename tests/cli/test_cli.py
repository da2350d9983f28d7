"""The command: verbs, exit codes, forms of output. The job itself is replaced by a stand-in."""

import json
import sys
import types
import warnings
from pathlib import Path

import pytest

import finebits
from finebits import registry
from finebits.cli import main
from finebits.data.check import GateFailed
from finebits.errors import Failed
from finebits.files import CannotWrite, Occupied
from finebits.messages import explain
from finebits.plan.base import Infeasible, Plan, Spec
from finebits.recipe import Recipe


class Verification(Failed):
    code = 6


class Check:
    def to_json(self):
        return {
            "rows": 3,
            "preview": [{"line": 1, "pieces": [["user ", False], ["yes\x1b", True]]}, {"line": 2, "pieces": [["no", False]]}],
        }

    def text(self, colour=False):
        return f"rows 3 colour {colour}"


class OutOfMemoryError(RuntimeError):
    pass


def made_plan():
    from finebits.formats.nf import NF

    return Plan({"a": Spec(format=NF(3)), "b": Spec()}, model="m", budget=10)


@pytest.fixture
def job(monkeypatch):
    """A stand-in for finebits.job that notes how it was called."""
    calls = []
    fake = types.ModuleType("finebits.job")

    def note(name, value=None):
        def run(*arguments):
            calls.append((name, *arguments))
            return value() if callable(value) else value

        return run

    fake.plan = note("plan", made_plan)
    fake.check = note("check", Check)
    fake.train = note("train")
    fake.same_rows = lambda recipe: True
    fake.evaluate = note("evaluate", {"rows": 2, "entries": []})
    fake.export = note("export", {"targets": [{"name": "adapter", "path": "x/adapter", "verdict": "same"}], "rows": 2, "tolerance": 1e-3})
    fake.report = note("report", Path("runs/page.html"))
    fake.calls = calls
    monkeypatch.setitem(sys.modules, "finebits.job", fake)
    monkeypatch.setattr(finebits, "job", fake, raising=False)
    return fake


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{model_name_or_path: m}}\noutput_dir: {tmp_path}/run\ndata: {{datasets: [{{path: rows.jsonl}}]}}\n")
    return str(path)


def envelope(capsys):
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


# -- what reaches the job


def test_every_option_reaches_the_job(job, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("finebits.cli.data._painted", lambda *a: "")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "p.json"
    out.touch()
    (tmp_path / "run").mkdir()
    assert main(["--format", "quiet", "plan", recipe, "--out", str(out), "--pareto", "3", "--fast", "seed=7"]) == 0
    assert main(["data", "check", "--recipe", recipe, "max_length=9", "--format", "quiet"]) == 0
    assert (
        main(["train", "-r", recipe, "--plan", "p.json", "--resume", "--overwrite", "--dry-run", "--max-steps", "4", "--format=quiet"]) == 0
    )
    assert main(["eval", recipe, "limit=3", "--format", "quiet"]) == 0
    assert main(["export", recipe, "--to", "merged,adapter", "--no-verify", "--format", "quiet"]) == 0
    assert main(["report", recipe, "--out", "page.html", "--format", "quiet"]) == 0
    assert main(["report", str(tmp_path), "--format", "quiet"]) == 0
    names = [call[0] for call in job.calls]
    assert names == ["plan", "check", "train", "evaluate", "export", "report", "report"]
    plan, check, train, evaluate, export, page, again = [call[1:] for call in job.calls]
    assert isinstance(plan[0], Recipe) and plan[0].training.seed == 7 and plan[1:] == (out, 3, True, False)
    assert check[0].data.max_length == 9
    assert train[1:] == (Path("p.json"), True, True, 4, True, [])
    assert evaluate[0].evaluation.limit == 3
    assert export[1:] == (["merged", "adapter"], False, False)
    assert page == (tmp_path / "run", Path("page.html")) and again == (tmp_path, None)


def test_options_of_plan_that_are_keys_of_the_recipe(job, recipe):
    words = ["--objective", "kl", "--lock", "layers.0.*=nf4-b64", "--lock", "down_proj=dense", "--serve-budget", "100MiB"]
    assert main(["plan", recipe, "--format", "quiet", *words]) == 0
    found = job.calls[0][1]
    assert found.quantization.objective == "kl" and found.quantization.locks == {"layers.0.*": "nf4-b64", "down_proj": None}
    assert found.budget.serve_memory == "100MiB"


def test_the_recipe_decides_where_no_option_does(job, recipe):
    main(["export", recipe, "--format", "quiet"])
    main(["train", recipe, "--format", "quiet"])
    main(["plan", recipe, "--format", "quiet"])
    assert job.calls[0][2:] == (["adapter"], None, False)  # the recipe says whether it is verified
    assert job.calls[1][2:] == (None, False, False, None, False, [])
    assert job.calls[2][2:] == (None, 24, False, False)


def test_what_fits_compares_models(capsys):
    configs = Path(__file__).parent.parent / "data" / "configs"
    models = [str(configs / name) for name in ("llama-3.1-70b", "llama-3.2-3b", "qwen3-4b")]
    words = ["plan", "--what-fits", "5GiB", *models, "budget.device=cuda", "dtype=bfloat16"]
    assert main([*words, "--format", "json"]) == 0
    made = envelope(capsys)
    assert made["schema"] == "finebits.what_fits/1" and [Path(o["model"]).name for o in made["data"]][-1] == "llama-3.1-70b"
    assert made["data"][-1]["effective"] is None and made["data"][-1]["smallest"] > 20 * 2**30
    assert all(o["peak"] <= 5 * 2**30 for o in made["data"][:2]) and not any(o["measured"] for o in made["data"])
    assert main([*words[:3], models[0], *words[6:]]) == 3
    said = capsys.readouterr().out
    assert "none of them fits" in said and "rule of thumb" in said and "no, needs" in said


# -- exit codes


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Infeasible("does not fit", 7, "drop a layer"), 3, "does not fit"),
        (GateFailed("3 rows must not be trained on", Check()), 4, "3 rows must not"),
        (MemoryError(), 5, "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "out of memory: CUDA out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 5, "out of memory"),
        (Verification("merged differs by 0.2"), 6, "merged differs by 0.2"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (in cli/test_cli.py, line"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "a/b: no such file or directory"),
        (OSError(28, "No space left on device"), 1, "no space left on device"),
        (Occupied("runs/x holds a finished run"), 2, "runs/x holds a finished run"),
        (CannotWrite("runs/x cannot be written: the disk is full"), 1, "runs/x cannot be written: the disk is full"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), 1, "this needs the package trl"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else None,
)
def test_exceptions_become_a_sentence_and_a_code(job, recipe, capsys, error, code, said):
    def fail(*arguments):
        raise error

    job.train = fail
    assert main(["train", recipe]) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.removeprefix(" starting\n").startswith(f"x  {said}") and "Traceback" not in shown.err
    assert main(["train", recipe, "--format", "json"]) == code
    found = envelope(capsys)
    assert (found["schema"], found["ok"], found["exit"]) == ("finebits.error/1", False, code)


def test_a_hint_is_said_once(job, recipe, capsys):
    def fail(*arguments):
        raise Infeasible("does not fit", 7, "drop a layer")

    job.plan = fail
    assert main(["plan", recipe]) == 3
    assert capsys.readouterr().err == "x  does not fit\n   drop a layer\n"


def test_ctrl_c_names_the_run_that_can_go_on_and_no_other(job, recipe, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    job.train = job.export = stop
    assert main(["train", recipe]) == main(["export", recipe]) == 130
    assert "resume" not in capsys.readouterr().err
    monkeypatch.setattr("finebits.runfolder.RunFolder.holds", lambda folder: True)
    assert main(["export", recipe]) == 130 and "resume" not in capsys.readouterr().err
    assert main(["train", recipe]) == 130
    assert capsys.readouterr().err.endswith(
        f"x  interrupted\n   finebits train {Recipe.load(recipe).output_dir} --resume goes on with it\n"
    )


def test_what_names_no_run_and_no_rows_is_bad_usage(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    for words, said in {
        ("train", "m"): "data.datasets is empty: name rows to train on behind the model (MODEL rows.jsonl), or in the recipe",
        ("export", str(tmp_path / "m")): f"{tmp_path}/m is no run of finebits: give the output_dir",
        ("runs", "show", str(tmp_path)): f"{tmp_path} is no run of finebits: give the output_dir",
        ("runs", "clean", str(tmp_path / "none")): f"there is no folder {tmp_path}/none",
    }.items():
        assert main(list(words)) == 2
        assert capsys.readouterr().err.startswith(f"x  {said}"), words


def test_a_traceback_is_there_for_the_asking(job, recipe, capsys):
    def fail(*arguments):
        raise ZeroDivisionError("by zero")

    job.train = fail
    assert main(["train", recipe]) == 1
    assert "--traceback" in capsys.readouterr().err
    assert main(["train", recipe, "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_our_own_errors_are_said_as_they_are():
    with pytest.raises(ValueError) as caught:
        registry.load("formats", "nff")
    assert explain(caught.value).text == str(caught.value)
    with pytest.raises(ValueError) as foreign:
        int("x")
    assert explain(foreign.value).text.startswith("ValueError: invalid literal")


def test_a_library_that_is_absent_and_one_that_is_too_old_are_told_apart():
    absent = explain(ModuleNotFoundError("No module named 'trl'", name="trl"))
    assert absent.text == "this needs the package trl, which is not installed" and absent.hint == "pip install 'finebits[train]'"
    module = ModuleNotFoundError("No module named 'transformers.conversion_mapping'", name="transformers.conversion_mapping")
    for old in (module, ImportError("cannot import name 'List' from 'datasets'", name="datasets")):
        told = explain(old)
        assert "not installed" not in told.text and str(old) in told.text and told.hint.startswith("pip install -U 'finebits[")
    assert explain(ModuleNotFoundError("No module named 'of_others'", name="of_others")).text == "the module of_others is not installed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plna"], "no such command 'plna'"),
        (["plan"], "name a recipe first"),
        (["plan", "seed=3"], "name a recipe first"),
        (["plan", "absent.yaml"], "there is no recipe at absent.yaml"),
        (["plan", "{recipe}", "--pareto", "-1"], "invalid value for '--pareto'"),
        (["plan", "{recipe}", "--lock", "down_proj"], "a lock is written LAYER=FORMAT, such as down_proj=nf4-b64"),
        (["plan", "{recipe}", "--lock", "down_proj=nf9"], "quantization.locks.down_proj: NF has 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
        (["plan", "{recipe}", "--objective", "speed"], "quantization.objective wants weight, output, fisher or kl, and 'speed' came"),
        (["plan", "{recipe}", "--serve-budget", "lots"], "budget.serve_memory: "),
        (["plan", "{recipe}", "--probe", "--fast"], "choose one"),
        (["plan", "--what-fits", "8GiB"], "wants the models to compare"),
        (["serve", "{recipe}", "--host", "0.0.0.0"], "give --keys"),
        (["serve", "{recipe}", "--studio", "--keys", "{recipe}"], "leave one of the two out"),
        (["plan", "{recipe}", "seeed=1"], "command line   seeed is not a known key"),
        (
            ["export", "{recipe}", "--to", "ollama"],
            f"command line   export.to.0 wants {', '.join(registry.names('export'))} or gguf:f16 … gguf:q2_k, and 'ollama' came",
        ),
        (["list", "--cite", "{recipe}"], "--cite wants the plan.json that finebits plan writes"),
        (["report"], "name the output_dir of a run, or its recipe"),
        (["--format", "xml", "list"], "invalid value for '--format'"),
    ],
)
def test_bad_usage_is_code_2(job, recipe, capsys, words, said):
    assert main([word.replace("{recipe}", recipe) for word in words]) == 2
    assert said in capsys.readouterr().err.splitlines()[0]
    assert not job.calls


def test_nothing_at_all_shows_the_help(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [{"verdict": "fail"}, {"verdict": "same", "runtimes": [{"name": "merged", "reader": "vLLM", "verdict": "fail"}]}]
)
def test_a_failed_verdict_is_code_6_after_its_table(job, recipe, capsys, more):
    job.export = lambda *a: {"targets": [{"name": "merged", "path": "m"} | more]}
    assert main(["export", recipe, "--format", "json"]) == 6
    found = envelope(capsys)
    assert found["exit"] == 6 and found["ok"] is False and found["data"]["targets"][0]["name"] == "merged"


# -- forms of output


def test_json_is_one_object_whatever_the_job_prints(job, recipe, capsys):
    def chat(*arguments):
        print("loading")
        return made_plan()

    job.plan = chat
    assert main(["plan", recipe, "--format", "json"]) == 0
    found = envelope(capsys)
    assert found["schema"] == "finebits.plan/1" and found["ok"] and found["data"]["modules"].keys() == {"a", "b"}


def test_our_warnings_are_in_the_envelope(job, recipe, capsys):
    def warn(*arguments):
        warnings.warn_explicit("slow kernels", UserWarning, finebits.__file__, 3)
        return made_plan()

    job.plan = warn
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["plan", recipe, "--format", "json"]) == 0
    assert envelope(capsys)["warnings"] == [{"code": "UserWarning", "hint": "slow kernels"}]


def test_quiet_prints_paths_alone(job, recipe, tmp_path, capsys):
    def chat(*arguments):
        print("loading")
        print("1/2", file=sys.stderr)

    job.train = chat
    assert main(["train", recipe, "--format", "quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/run\n" and shown.err == ""


def test_train_shows_what_the_run_has_written(job, recipe, tmp_path, capsys):
    run = tmp_path / "run"

    def work(*arguments):
        (run / "runs/loftq").mkdir(parents=True)
        (run / "evaluation.json").write_text('{"rows": 2}')
        (run / "runs/loftq/memory.json").write_text('{"planned_peak": 3}')

    job.train = work
    assert main(["train", recipe, "--format", "json"]) == 0
    assert envelope(capsys)["data"] == {"output_dir": str(run), "evaluation": {"rows": 2}, "memory": {"planned_peak": 3}}


def test_colour_is_for_those_who_see_it(job, recipe, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["data", "check", recipe])
    assert capsys.readouterr().out == "rows 3 colour False\n"
    main(["data", "check", recipe, "--format", "human"])
    assert capsys.readouterr().out == "rows 3 colour True\n"
    monkeypatch.setenv("NO_COLOR", "1")
    main(["data", "check", recipe, "--format", "human"])
    assert capsys.readouterr().out == "rows 3 colour False\n"


def test_a_preview_marks_what_is_trained_and_disarms_the_rest(job, recipe, capsys):
    assert main(["data", "preview", recipe, "--show", "1"]) == 0
    assert capsys.readouterr().out == "line 1\nuser [[yes\\x1b]]\n"


def test_a_shut_gate_still_shows_what_was_found(job, recipe, capsys):
    def fail(*arguments):
        raise GateFailed("3 rows must not be trained on", Check())

    job.check = fail
    assert main(["data", "check", recipe]) == 4
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]  # a slow machine has said before that it works
    assert shown.out == "rows 3 colour False\n" and last.startswith("x  3 rows")
    assert main(["data", "check", recipe, "--format", "json"]) == 4
    assert envelope(capsys)["data"]["check"]["rows"] == 3


def test_mistakes_of_a_recipe_are_data_in_json(recipe, capsys):
    Path(recipe).write_text("model: {model_name_or_path: m}\ntraining: {max_step: 3}\n")
    assert main(["recipe", "validate", recipe, "--format", "json"]) == 2
    (problem,) = envelope(capsys)["data"]["problems"]
    assert problem == {
        "message": "training.max_step is not a known key", "note": "did you mean max_steps?", "source": recipe, "line": 2, "column": 12,
    }  # fmt: skip
