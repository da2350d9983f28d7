"""Labelled rows: texts and pictures, their classes, and what the gate says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finebits.data.check import require
from finebits.data.labelled import classes, within
from finebits.data.pictures import Pictures
from finebits.data.rows import Row, gathered, read
from finebits.tasks.classification import Classification
from finebits.tasks.image_classification import ImageClassification

TASK = Classification(("ham", "spam"))


class Words:
    """A tokenizer of letters: 1, the letters, 2."""

    pad_token_id, model_max_length = 0, 16

    def __call__(self, text: str, truncation: bool = False, max_length: int = 0, verbose: bool = True) -> dict[str, list[int]]:
        ids = [3 + ord(c) % 20 for c in text]
        return {"input_ids": [1, *(ids[: max_length - 2] if truncation else ids), 2]}


def test_a_class_follows_the_numbers_of_its_row() -> None:
    rows = [{"text": "abc", "label": "spam"}, {"text": "abcdefgh", "label": 0}]
    made = TASK.examples(rows, Words(), 6, True)
    assert [e.input_ids[-1] for e in made] == [1, 0] and made.labelled == [1, 1]
    assert made[1].input_ids[-2] == 2 and made[1].truncated == 4  # cut inside, so that the end stays
    assert [TASK.tokens(n) for n in made.lengths] == [5, 6]
    batch = TASK.batch([vars(e) for e in made], Words(), 4)
    assert batch["input_ids"].shape == (2, 8) and batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [5, 6] and not batch["input_ids"][0, 5:].any()
    shorter = within(made, 3)
    assert [len(e.input_ids) for e in shorter] == [4, 4] and [e.input_ids[-1] for e in shorter] == [1, 0] and shorter.labelled == [1, 1]


def test_the_gate_names_rows_without_a_label_of_the_model() -> None:
    rows = gathered([{"text": "a", "label": "ham"}, {"text": "b"}, {"text": "c", "label": "eggs"}])
    found = TASK.check(rows, Words(), 16, True, lambda: _limits())
    assert [(p.kind, p.lines) for p in found.problems if p.level == "fail"] == [("label", (2, 3))]
    assert "'ham', 'spam'" in found.text() and "a label a row" in found.text() and "end-of-turn" not in found.text()
    with pytest.raises(ValueError, match="line"):
        require(found)
    with pytest.raises(ValueError, match=r":2: the row has no \"label\"; wanted one of 'ham', 'spam'"):
        classes(rows, TASK.labels)
    with pytest.raises(ValueError, match=r'needs "text"'):
        TASK.examples([{"image": [[0]], "label": 1}], Words(), 16, True)


def _limits() -> Any:
    from finebits.data.limits import Limits

    return Limits(ids=30, positions=8, fixed=True)


def pictures(folder: Path, **more: Any) -> Pictures:
    asked = {"do_normalize": True, "image_mean": [0.5], "image_std": [0.25], "do_rescale": True, "rescale_factor": 1 / 255} | more
    (folder / "preprocessor_config.json").write_text(json.dumps(asked))
    return Pictures.of(folder, (1, 4, 4))


def test_pictures_are_brought_to_size_and_range(tmp_path: Path) -> None:
    task = ImageClassification(("left", "right"), (1, 4, 4), 5)
    np.save(tmp_path / "a.npy", np.full((8, 8), 255, np.uint8))
    (tmp_path / "d.jsonl").write_text('{"image": "a.npy", "label": "right"}\n' + json.dumps({"image": [[0] * 4] * 4, "label": 0}))
    rows, reader = read(tmp_path / "d.jsonl"), pictures(tmp_path)
    assert rows.format == "image"
    made = task.examples(rows, reader, 5, True)
    batch = task.batch([vars(e) for e in made], reader)
    assert batch["pixel_values"].shape == (2, 1, 4, 4) and batch["labels"].tolist() == [1, 0]
    torch.testing.assert_close(batch["pixel_values"][:, 0, 0, 0], torch.tensor([2.0, -2.0]))
    assert task.prompts(rows, reader, 1)[0].text.splitlines()[0] == "@" * 28
    before = rows[0].said
    np.save(tmp_path / "a.npy", np.zeros((8, 8), np.uint8))
    assert rows[0].said != before  # what a run depends on is the picture


def test_what_is_no_picture_is_refused_in_a_sentence(tmp_path: Path) -> None:
    reader = pictures(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        gathered([{"image": "nowhere.png"}])
    for image, said in (([[0, 300]], "whole numbers from 0 to 255"), ([[0, 1], [0]], "equally long"), ([[[1, 2]]], "channels")):
        with pytest.raises(ValueError, match=said):
            reader.read(Row(1, image=image), "d:1")
    with pytest.raises(ValueError, match="do_center_crop"):
        pictures(tmp_path, do_center_crop=True)
    with pytest.raises(ValueError, match="wanted 1 each"):
        pictures(tmp_path, image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        Pictures.of(tmp_path / "other", (1, 4, 4))
