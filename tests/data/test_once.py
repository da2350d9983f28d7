"""A job parses its files once and tokenizes each row once; its processes read arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import chatty
from finebits import job
from finebits.data import check, rows, tokens
from finebits.recipe import Recipe
from finebits.run.material import stored, tokenized
from finebits.run.part import Part
from finebits.run.source import Source
from finebits.run.stage import Stage
from finebits.runfolder import TOKENS, RunFolder

RECIPE = """
model: {{model_name_or_path: {root}/m, dtype: float32}}
data: {{datasets: [{{path: {root}/d.jsonl}}], held_out: {{path: {root}/h.jsonl}}, max_length: 64}}
quantization: {{candidates: [nf4-b32], calibration_rows: 2}}
adapter: {{rank: 2, init: zeros}}
evaluation: {{samples: 1}}
training: {{max_steps: 2}}
output_dir: {root}/run
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path / "home"))
    chatty.model(tmp_path / "m")
    chatty.written(tmp_path / "d.jsonl", chatty.rows())
    chatty.written(tmp_path / "h.jsonl", chatty.rows(3))
    return Recipe.parse(RECIPE.format(root=tmp_path))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a file is parsed, and a row tokenized."""
    seen = {"parsed": 0, "tokenized": 0}

    def counting(key: str, real: Any) -> Any:
        def called(*given: Any, **named: Any) -> Any:
            seen[key] += 1
            return real(*given, **named)

        return called

    monkeypatch.setattr(rows, "shaped", counting("parsed", rows.shaped))
    encode = counting("tokenized", tokens.encode)
    for module in (tokens, check):
        monkeypatch.setattr(module, "encode", encode)
    return seen


def test_files_are_parsed_and_rows_tokenized_once(recipe: Recipe, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the gate through the plan and every process to the table; what a process makes is left out here."""
    parts: list[Part] = []

    def work(folder: RunFolder, stage: Stage) -> None:
        parts.append(Part(folder, stage))
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "work", work)
    with pytest.raises(KeyboardInterrupt):
        job.train(recipe)
    (part,) = parts
    many = len(part.material.train) + len(part.material.held)
    assert counted == {"parsed": 2, "tokenized": many} and many == len(chatty.rows()) + 3
    assert (part.folder / TOKENS).exists() and sum(len(b["labels"]) for b in part.batches) == 3
    made = tokenized(Source.of(recipe))
    assert list(made.train) == list(part.material.train) and made.prompts == part.material.prompts
    assert Part(part.folder, Stage("tune", "zeros")).examples["input_ids"][0] == made.train[0].input_ids


def test_arrays_are_made_again_when_what_they_are_made_of_is_another(recipe: Recipe, tmp_path: Path, counted: dict[str, int]) -> None:
    folder = RunFolder(tmp_path / "run")

    def makes(recipe: Recipe) -> bool:
        before = counted["tokenized"]
        stored(Source.of(recipe), folder)
        return counted["tokenized"] > before

    assert makes(recipe) and not makes(recipe)
    shorter = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 32})})
    assert makes(shorter) and makes(recipe)
    template = tmp_path / "m" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    assert makes(recipe)
    chatty.written(tmp_path / "d.jsonl", chatty.rows(5))
    assert makes(recipe) and not makes(recipe)


def test_a_turn_that_is_not_learned_is_another_row(tmp_path: Path, recipe: Recipe) -> None:
    before = Source.of(recipe).hash
    said = chatty.rows()
    said[0]["messages"][-1]["train"] = False
    chatty.written(tmp_path / "d.jsonl", said)
    assert Source.of(recipe).hash != before
