"""Exports inside the runtimes that serve them: what is asked, how it is judged, and what is told where one is not here. The runtimes are small
modules that stand for llama.cpp and vLLM, in an environment of their own; the scripts that ask them are the real ones."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finebits.errors import Invalid
from finebits.evaluate.heldout import Teacher
from finebits.interop.runtimes import base as runtimes
from finebits.tasks.classification import Classification

WORDS = 7
LLAMA = """
import json, os, pathlib, numpy as np
__version__ = "0"
class Llama:
    metadata = {"tokenizer.chat_template": "T"}
    def __init__(self, path, lora_path=None, **named):
        self.table = np.load(os.path.join(os.path.dirname(path), "table.npy"))
        said = os.path.join(os.path.dirname(path), "says.txt")
        if os.path.exists(said):
            raise SystemExit(open(said).read())
        pathlib.Path(path).with_name("seen.json").write_text(json.dumps({"lora": lora_path, "path": os.environ.get("PYTHONPATH", "")}))
    def n_vocab(self): return self.table.shape[1]
    def reset(self): self.scores = None
    def eval(self, ids): self.scores = self.table[ids]
    def tokenize(self, text, add_bos, special): return [len(w) for w in text.decode().split()]
"""
VLLM = """
import os, pathlib, numpy as np
from types import SimpleNamespace as S
__version__ = "0"
SamplingParams = S
class Tokenizer:
    chat_template = "T"
    def __call__(self, text, add_special_tokens): return {"input_ids": [len(w) for w in text.split()]}
class LLM:
    def __init__(self, path, **named):
        self.table = np.load(os.path.join(path, "table.npy"))
        assert named.get("max_lora_rank") in (None, 8)
        pathlib.Path(path, "dtype.txt").write_text(named["dtype"])
    def get_tokenizer(self): return Tokenizer()
    def generate(self, prompts, every, lora_request, use_tqdm):
        for p in prompts:
            row = self.table[p["prompt_token_ids"][-1]]
            row = row - np.log(np.exp(row).sum())
            yield S(outputs=[S(logprobs=[{i: S(logprob=float(v)) for i, v in enumerate(row)}])])
"""
ROWS = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 1, 0, 0]])
BATCH = {"input_ids": ROWS, "attention_mask": (ROWS > 0).long(), "labels": ROWS.masked_fill(ROWS < 3, -100)}


class Words:
    """A tokenizer: tokens are the lengths of words."""

    chat_template = "T"

    def __call__(self, text: str, **named: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(w) for w in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join("x" * i for i in ids)


@pytest.fixture
def house(tmp_path: Path) -> Any:
    """A table of logits by the token before, as the trained model; folders of targets; an environment with both runtimes."""
    table = torch.randn(WORDS, WORDS)
    places = [(r, i) for r in range(2) for i in range(4) if BATCH["labels"][r, i + 1] >= 0]
    trained = Teacher(lambda h: table[h[:, 0]], [torch.tensor([[int(ROWS[at])] for at in places])])
    for name, text in (("llama_cpp.py", LLAMA), ("vllm/__init__.py", VLLM), ("vllm/lora/__init__.py", "")):
        (tmp_path / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "packages" / name).write_text(text)
    (tmp_path / "packages/vllm/lora/request.py").write_text("LoRARequest = lambda *a: a\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$PYTHONPATH" in "") ;; *) exit 3;; esac\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    words = Words()
    target = tmp_path / "out" / "gguf-q8_0"
    target.mkdir(parents=True)

    def served(logits: Any, to: str = "gguf:q8_0") -> list[dict[str, Any]]:
        for place in (target, target / "base"):
            place.mkdir(exist_ok=True)
            if not (place / "config.json").exists():
                (place / "config.json").write_text("{}")
            np.save(place / "table.npy", np.asarray(logits, np.float32))
        key = "llama_cpp" if to.startswith("gguf") else "vllm"
        return runtimes.verify(target, to, {key: str(python)}, trained, [BATCH], words, chunk=2)

    return SimpleNamespace(table=table, trained=trained, python=python, words=words, target=target, served=served, tmp=tmp_path)


@pytest.mark.parametrize("to", ["gguf:q8_0", "merged"])
def test_what_computes_the_same_is_the_same_and_what_does_not_is_no_model_of_ours(
    house: Any, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")  # which is ours, and not the runtime's
    (row,) = house.served(house.table, to)
    assert row["verdict"] == "same" and row["kl"] == pytest.approx(0, abs=1e-6) and row["top1"] == 1.0 and row["name"] == to
    assert row["max_logit_difference"] < 1e-5 and row["lost"] == pytest.approx(0, abs=1e-6)
    logs = torch.log_softmax(house.table, -1)
    places = [(2, 3), (3, 4), (5, 6)]
    assert row["loss"] == pytest.approx(-sum(float(logs[a, b]) for a, b in places) / len(places), abs=1e-5)
    (row,) = house.served(house.table + 3 * torch.randn(WORDS, WORDS), to)
    assert row["verdict"] == "fail" and row["kl"] > 0.1 and "KL is " in row["note"] and "at most" in row["note"]
    assert not list(house.target.parent.glob(".replay-*"))


def test_figures_are_those_of_the_rows_without_padding(house: Any) -> None:
    other = house.table + 0.01 * torch.randn(WORDS, WORDS)
    (row,) = house.served(other)
    p, q = (torch.log_softmax(t, -1)[[2, 3, 5]].double() for t in (house.table, other))
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert row["bounds"]["kl"] == pytest.approx(2e-2 + 1e-2)
    logs = [torch.log_softmax(t, -1)[[2, 3, 5]] for t in (house.table, other)]
    assert row["max_logit_difference"] == pytest.approx(float((logs[0] - logs[1]).abs().max()), rel=1e-4)
    nll = [-sum(float(t[i, y]) for i, y in enumerate((3, 4, 6))) / 3 for t in logs]
    assert row["lost"] == pytest.approx(nll[1] - nll[0], abs=1e-5)
    assert (
        row["verdict"] == "rounded" and house.served(other, "merged")[0]["verdict"] == "ok"
    )  # to 8 bits, which is another model by design


def test_other_tokens_another_template_and_other_words_fail(house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    house.words.chat_template = "another"
    why = lambda logits: next(r["note"] for r in house.served(logits) if r["verdict"] == "fail")  # noqa: E731
    assert "the chat template is another" in why(house.table)
    house.words.chat_template = "T"
    assert "it knows 6 words, the trained model 7" in why(house.table[:, :6])
    monkeypatch.setattr(Words, "__call__", lambda self, text, **named: {"input_ids": [1]})
    assert "cut into other tokens" in why(house.table)


def test_an_adapter_goes_with_its_base(house: Any) -> None:
    (house.target / "base").mkdir()
    (house.target / "adapter.gguf").write_text("")
    house.served(house.table, "gguf")
    assert json.loads((house.target / "base/seen.json").read_text()) == {
        "lora": str(house.target / "adapter.gguf"),
        "path": f"{house.tmp}/packages",
    }
    (house.target / "adapter_config.json").write_text(json.dumps({"r": 3}))
    assert house.served(house.table, "adapter")[0]["verdict"] == "same"  # in a place of rank 8
    (house.target / "adapter_config.json").write_text(json.dumps({"r": 3, "rank_pattern": {"q": 1000}}))
    (row,) = house.served(house.table, "adapter")
    assert row["verdict"] == "not run" and "rank 1000" in row["note"]
    (house.target / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "oft_block_size": 8}))
    (row,) = house.served(house.table, "peft")
    assert row["verdict"] == "not run" and "OFT" in row["note"]


@pytest.mark.parametrize(("method", "dtype"), [(None, "float32"), ("compressed-tensors", "bfloat16"), ("gptq", "float16")])
def test_codes_are_multiplied_in_what_their_scales_are_held_in(house: Any, method: str | None, dtype: str) -> None:
    """What vLLM multiplies codes with on a CPU takes 16 bits alone."""
    base = house.target / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({} if method is None else {"quantization_config": {"quant_method": method}}))
    assert house.served(house.table, "gptq")[0]["verdict"] == "same" and (base / "dtype.txt").read_text() == dtype


@pytest.mark.parametrize(
    ("says", "why"),
    [("ValueError: Model architectures ['X'] are not supported for now", "X"), ("RuntimeError: it requires CUDA", "CUDA")],
)
def test_what_a_runtime_does_not_support_is_told_and_decides_nothing(house: Any, says: str, why: str) -> None:
    (house.target / "says.txt").write_text(says)
    (house.target / "base").mkdir()
    (house.target / "base/says.txt").write_text(says)
    (row,) = house.served(house.table)
    assert row["verdict"] == "not run" and why in row["note"]


def test_what_fails_otherwise_is_a_failure_in_its_own_words(house: Any) -> None:
    (house.target / "base").mkdir()
    (house.target / "base/says.txt").write_text("OSError: the file ends early")
    (row,) = house.served(house.table)
    assert row["verdict"] == "fail" and "the file ends early" in row["note"] and "kl" not in row


def test_where_there_is_none_the_reason_is_told(house: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = lambda pythons, to="gguf": runtimes.verify(house.target, to, pythons, house.trained, [BATCH], None)  # noqa: E731
    assert ask({}) == [] and ask({"vllm": ""}) == []  # vLLM is not asked of GGUF
    assert "make verify-llama" in ask({"llama_cpp": ""})[0]["note"]
    assert "has no llama_cpp" in ask({"llama_cpp": sys.executable})[0]["note"]
    assert "cannot be started" in ask({"llama_cpp": str(tmp_path)})[0]["note"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    assert runtimes.found({}, beside=False) == {} and runtimes.found({}, beside=True) == {"llama_cpp": "", "vllm": ""}
    (tmp_path / ".venv-llama/bin").mkdir(parents=True)
    (tmp_path / ".venv-llama/bin/python").write_text("")
    assert runtimes.found({"vllm": str(house.python)}, beside=True) == {"llama_cpp": ".venv-llama/bin/python", "vllm": str(house.python)}
    with pytest.raises(Invalid, match="export.runtimes.vllm names gone"):
        runtimes.found({"vllm": "gone"}, beside=True)


def test_another_task_is_not_asked(house: Any) -> None:
    trained = Teacher(house.trained.head, house.trained.states, task=Classification(("ham", "spam")))
    (row,) = runtimes.verify(house.target, "gguf", {"llama_cpp": "python"}, trained, [BATCH], None)
    assert row["verdict"] == "not run" and math.isnan(row.get("kl", math.nan))
