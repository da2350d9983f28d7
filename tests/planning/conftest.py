from pathlib import Path

import pytest

from tiny_llama import folder as tiny_folder
from tiny_llama import worded


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost tables of tests stay with the tests."""
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a folder, with a tokenizer of the words w1 … w127."""
    return worded(tmp_path_factory.mktemp("priced") / "llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def small_untied(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    path = tiny_folder(tmp_path_factory.mktemp("untied") / "llama", tie_word_embeddings=False)
    for file in small.glob("token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path
