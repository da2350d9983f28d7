"""Small classifiers of random weights, each in a folder with rows that it can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from finebits.files import write_text

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def encoder(folder: Path) -> Path:
    """A text encoder of random weights with a head for two labels, and texts that two words tell apart."""
    from transformers import BertConfig, BertForSequenceClassification

    return _of_texts(folder, BertForSequenceClassification, BertConfig, max_position_embeddings=32)


def decoder(folder: Path) -> Path:
    """The same of a model whose tokens see none that come later, and whose last one is asked."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return _of_texts(folder, LlamaForSequenceClassification, LlamaConfig, pad_token_id=0)


def _of_texts(folder: Path, model: Any, config: Any, **more: Any) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "win", "meet", "money", "monday", "now", "at", "noon", "free"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}
    model(config(vocab_size=len(words), initializer_range=0.2, **SMALL, **names, **more)).save_pretrained(folder)
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **special).save_pretrained(folder)
    gen = torch.Generator().manual_seed(0)
    said = lambda: " ".join(words[i] for i in torch.randint(6, 12, (int(torch.randint(3, 9, (1,), generator=gen)),), generator=gen))  # noqa: E731
    rows = [{"text": f"{('meet', 'win')[i % 2]} {said()}", "label": ("ham", "spam")[i % 2]} for i in range(72)]
    return written(folder, rows)


def pictures(folder: Path) -> Path:
    """A ViT of random weights, and pictures that are light on one side or the other."""
    from transformers import ViTConfig, ViTForImageClassification

    names = {"id2label": {0: "left", 1: "right"}, "label2id": {"left": 0, "right": 1}}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, initializer_range=0.2, **SMALL, **names)
    ViTForImageClassification(config).save_pretrained(folder)
    asked = {"do_resize": True, "size": {"height": 8, "width": 8}, "do_normalize": True, "image_mean": [0.5], "image_std": [0.5]}
    write_text(folder / "preprocessor_config.json", json.dumps(asked))
    gen = torch.Generator().manual_seed(0)
    rows = []
    for i in range(72):
        picture = torch.randint(0, 100, (8, 8), generator=gen)
        picture[:, 4 * (i % 2) : 4 * (i % 2) + 4] += 100
        rows.append({"image": picture.tolist(), "label": i % 2})
    return written(folder, rows)


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for name, part in (("train", rows[:48]), ("held", rows[48:])):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(r) + "\n" for r in part))
    return folder
