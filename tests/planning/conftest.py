from pathlib import Path

import pytest

from tiny_llama import folder as tiny_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost tables of tests stay with the tests."""
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a folder, with a tokenizer of the words w1 … w127."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tiny_folder(tmp_path_factory.mktemp("priced") / "llama", tie_word_embeddings=True)
    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{i}": i for i in range(1, 128)}, "w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_untied(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    path = tiny_folder(tmp_path_factory.mktemp("untied") / "llama", tie_word_embeddings=False)
    for file in small.glob("token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path
