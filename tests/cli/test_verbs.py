"""What the command shows of itself: help, verbs and their files, methods, the machine, recipes. Nothing of it needs a job."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import finebits
from finebits import cli, registry
from finebits.cli import main
from finebits.plan.base import Plan, Spec
from finebits.recipe import Recipe

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "yaml", "numpy")


def envelope(capsys):
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "init",
        "plan",
        "data",
        "data check",
        "data preview",
        "train",
        "sweep",
        "federate",
        "eval",
        "export",
        "adapters",
        "adapters combine",
        "adapters merge",
        "adapters diff",
        "adapters compress",
        "prune",
        "recover",
        "report",
        "runs",
        "runs ls",
        "runs clean",
        "serve",
        "list",
        "recipe",
        "recipe show",
        "doctor",
    ],
)
def test_help_is_there(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert f"finebits {verb}".strip() in capsys.readouterr().out


def test_help_and_list_import_nothing_heavy():
    program = (
        "import sys, finebits.cli as cli\n"
        "for words in (['--help'], ['train', '--help'], ['--version'], ['list']): assert cli.main(words) == 0\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_verbs_stand_in_the_order_of_the_work(capsys):
    main(["--help"])
    listed = capsys.readouterr().out.split("Commands:")[1].split("Exit codes")[0]
    assert [
        line.split()[0] for line in listed.strip().splitlines()
    ] == "init plan data train federate sweep eval generate chat export adapters prune recover report runs serve list recipe doctor".split()


def test_a_verb_is_a_file(capsys, monkeypatch, tmp_path):
    (tmp_path / "greet.py").write_text('ORDER = 35\ndef greet(name: str):\n    """Say hello."""\n    print(f"hello {name}")\n')
    (tmp_path / "pair.py").write_text('"""Two parts."""\nORDER = 36\ndef one():\n    print(1)\ndef two():\n    print(2)\n')
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert main(["greet", "Ann"]) == main(["pair", "two"]) == 0
    assert capsys.readouterr().out == "hello Ann\n2\n"
    main(["--help"])
    shown = capsys.readouterr().out
    assert "Say hello." in shown and "Two parts." in shown and shown.index("train ") < shown.index("greet ") < shown.index("eval ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"finebits {finebits.__version__}\n"


def test_list_names_every_method(capsys):
    assert main(["list", "--format", "json"]) == 0
    assert envelope(capsys)["data"] == {
        s: {n: registry.head(s, n) for n in registry.names(s)} for s in (*registry.SHAPES, *registry.OPEN) if registry.names(s)
    }
    assert main(["list", "--shape", "formats"]) == 0
    shown = capsys.readouterr().out
    assert "nf " in shown and "loftq" not in shown


def test_cite_names_the_methods_of_a_plan(tmp_path, capsys):
    from finebits.adapters.lora import LoRA
    from finebits.formats.nf import NF
    from finebits.init.loftq import LoftQ

    tuned = Spec(format=NF(3), adapter=LoRA(), init=LoftQ())
    Plan({"a": tuned, "b": tuned, "c": Spec()}).save(tmp_path / "plan.json")
    assert main(["list", "--cite", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    assert "init/loftq  2 matrices\nLoftQ: LoRA-Fine-Tuning-Aware Quantization" in shown and "arXiv:2305.14314v1" in shown
    assert "zeros" not in shown and "gated" not in shown
    assert main(["list", "--cite", str(tmp_path / "plan.json"), "--format", "quiet"]) == 0
    assert capsys.readouterr().out.split() == ["formats/nf", "quantizers/rtn", "init/loftq", "adapters/lora"]


def test_doctor_names_versions_devices_and_kernels(capsys, monkeypatch):
    monkeypatch.setenv("FINEBITS_KERNELS", "reference")
    assert main(["doctor", "--format", "json"]) == 0
    rows = envelope(capsys)["data"]
    assert {"finebits", "torch", "transformers", "cpu", "cuda", "kernels", "linear", "FINEBITS_KERNELS"} <= {row["what"] for row in rows}
    assert any(row["what"] == "linear" and row["found"] == "on cpu: reference for 2/3/4/8 bits" for row in rows)


def test_doctor_tells_a_patch_release_that_is_too_old(capsys, monkeypatch):
    import importlib.metadata

    wanted = ["numpy>=1.26.0", 'peft>=0.18.1; extra == "train"', 'trl>=1.5.1; extra == "train"', "rich>=13.9"]
    held = {"numpy": "1.26", "peft": "0.18.0", "trl": "1.5.1+local", "rich": "13.9.4"}
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: wanted)
    monkeypatch.setattr(importlib.metadata, "version", held.__getitem__)
    assert main(["doctor", "--format", "json"]) == 1
    rows = {row["what"]: row for row in envelope(capsys)["data"]}
    assert {name: rows[name]["mark"] for name in held} == {"numpy": "warn", "peft": "fail", "trl": "ok", "rich": "ok"}
    assert rows["peft"]["fix"] == 'pip install -U "peft>=0.18.1"' and "fix" not in rows["trl"]
    assert rows["trl"]["found"].startswith("1.5.1+local (tested 1.5.1 - ") and rows["rich"]["found"] == "13.9.4"
    assert "older than any that was tested" in rows["numpy"]["found"]


def test_recipe_show_and_schema(tmp_path, capsys):
    recipe = str(tmp_path / "r.yaml")
    Path(recipe).write_text("model: {model_name_or_path: m}\ndata: {datasets: [{path: rows.jsonl}]}\n")
    assert main(["recipe", "show", recipe, "seed=9"]) == 0
    assert Recipe.parse(capsys.readouterr().out).training.seed == 9
    assert main(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["training"]
    assert main(["recipe", "validate", recipe]) == 0
    assert capsys.readouterr().out == "ok\n"
