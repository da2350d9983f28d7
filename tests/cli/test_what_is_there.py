"""A path that is not there is said before anything that takes seconds is imported."""

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "pandas", "scipy"}
COMMANDS = [
    "report nowhere",
    "report nowhere.yaml",
    "report --compare nowhere elsewhere",
    "report nowhere --live",
    "runs show nowhere",
    "runs diff nowhere elsewhere",
    "runs why nowhere",
    "recipe validate missing.yaml",
    "recipe show missing.yaml",
    "recipe show -r missing.yaml",
    "plan missing.yaml",
    "train missing.yaml",
    "train ./nowhere rows.jsonl",
    "train Qwen/Qwen3-0.6B missing.jsonl",
    "train rows/recipe.yaml --plan missing.json",
    "sweep missing.yaml rank=1,2",
    "federate missing.yaml",
    "data check missing.yaml",
    "data stats missing.jsonl -m Qwen/Qwen3-0.6B",
    "data preview rows.jsonl -m ./nowhere",
    "data convert missing.jsonl --out x.jsonl",
    "eval ./nowhere",
    "eval missing.yaml",
    "eval Qwen/Qwen3-0.6B --data missing.jsonl",
    "eval Qwen/Qwen3-0.6B --data rows.jsonl --adapter nowhere",
    "eval Qwen/Qwen3-0.6B --tasks a --tasks-folder nowhere",
    "generate ./nowhere hello",
    "generate missing.gguf hello",
    "generate Qwen/Qwen3-0.6B missing.jsonl --out x.jsonl",
    "generate Qwen/Qwen3-0.6B hello --adapter nowhere",
    "chat ./nowhere",
    "chat Qwen/Qwen3-0.6B --adapter nowhere",
    "export missing.yaml",
    "adapters combine nowhere elsewhere --out x",
    "adapters merge nowhere --out x",
    "adapters diff nowhere elsewhere",
    "adapters compress nowhere --out x",
    "prune ./nowhere --out x",
    "prune Qwen/Qwen3-0.6B --out x --data missing.jsonl",
    "recover nowhere --out x",
    "serve ./nowhere",
    "serve ./nowhere --studio",
    "serve Qwen/Qwen3-0.6B --adapters nowhere",
    "serve Qwen/Qwen3-0.6B --keys missing.yaml",
]
PROGRAM = f"""
import contextlib, io, json, sys
import finebits.cli as cli
found = []
for words in json.loads(sys.argv[1]):
    said, before = io.StringIO(), set(sys.modules)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(words.split())
    found.append([words, code, said.getvalue(), sorted(({HEAVY} & sys.modules.keys()) - before)])
print(json.dumps(found))
"""


def test_a_path_that_is_not_there_is_said_before_anything_long_is_imported(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "once"}\n')
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "recipe.yaml").write_text("model: {model_name_or_path: m/m}\ndata: {datasets: [{path: rows.jsonl}]}\n")
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)], capture_output=True, text=True, check=True, cwd=tmp_path)
    for words, code, said, heavy in json.loads(done.stdout.splitlines()[-1]):
        missing = [w for w in words.split() if w.rpartition("/")[2].partition(".")[0] in ("nowhere", "missing")]
        assert (code, heavy) == (2, []) and missing[0].removeprefix("./") in said, (words, code, said, heavy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows", "rows.jsonl"], "nothing was written"
