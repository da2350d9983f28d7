"""The page says whether every export holds the chat template that was trained with, and shows where one parts from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from run_folder import write_run

from finebits.plan.base import Plan
from finebits.report.page import run_page
from finebits.report.templates import Template, held, of_model

LEARNED = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
OTHER = LEARNED.replace("<|end|>", "</s>")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run", layers=2, steps=4)
    told = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(told | {"template_sha": Template.of(LEARNED).sha}))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({"chat_template": LEARNED}))
    replace(Plan.load(folder / "plan.json"), model=str(tmp_path / "m")).save(folder / "plan.json")
    for target in ("adapter", "merged"):
        (folder / "export" / target).mkdir(parents=True)
        (folder / "export" / target / "chat_template.jinja").write_text(LEARNED)
    return folder


def test_the_same_everywhere_is_one_line(run: Path) -> None:
    page = run_page(run)
    assert "the one that was trained with in every export" in page and "another chat template" not in page


def test_where_they_part_is_shown(run: Path) -> None:
    (run / "export" / "merged" / "chat_template.jinja").write_text(OTHER)
    page = run_page(run)
    assert "merged holds another chat template" in page and "adapter holds another" not in page
    assert "+{{ m.content }}&lt;/s&gt;" in page and "-{{ m.content }}&lt;|end|&gt;" in page and "trained with in every" not in page


def test_a_base_that_has_changed_since_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "m" / "chat_template.jinja").write_text(OTHER)  # which transformers prefers
    page = run_page(run)
    assert "the base model&#39;s chat template" in page and "holds another chat template" not in page


def test_a_record_without_a_text_is_compared_by_its_hash(run: Path) -> None:
    (run / "export" / "merged" / "chat_template.jinja").unlink()
    (run / "export" / "merged" / "finebits.json").write_text(
        json.dumps({"schema": "finebits.gguf/1", "sha256": {}, "template_sha": "0" * 64})
    )
    found = held(run / "export" / "merged")
    assert found is not None and (found.sha, found.text) == ("0" * 64, None)
    assert "merged holds another chat template (sha 000000)" in run_page(run)


def test_rows_without_a_template_have_no_line(run: Path) -> None:
    told = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(told | {"template_sha": None}))
    assert "trained with in every export" not in run_page(run)


def test_what_is_no_model_here_has_none(tmp_path: Path) -> None:
    assert of_model("") is None and of_model("package:x") is None and of_model(str(tmp_path / "gone")) is None
    for content in ("{}", "{", "[1]", '{"chat_template": [{"name": "default"}]}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert of_model(str(tmp_path)) is None
