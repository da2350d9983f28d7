"""A GGUF file as a base: what transformers makes of it, tensor by tensor, and codes where a format holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chatty
import finebits as fb
import tiny_llama as tiny
from finebits.build import hosts
from finebits.export import _gguf as words
from finebits.interop.checkpoint import Tensors
from finebits.interop.hf import folder_of, load_planned
from finebits.layouts.gguf import FORMATS
from finebits.qtensor import QTensor

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # of the linears, one after another
SCALES = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}  # where a K-quant's block has its own


def blocks(W: np.ndarray, kind: str) -> np.ndarray:
    """W in blocks; of the kinds that the gguf package only reads, any codes under small scales."""
    code = gguf.GGMLQuantizationType[kind]
    if kind not in SCALES:
        return gguf.quants.quantize(W, code)
    size = gguf.constants.GGML_QUANT_SIZES[code][1]
    data = np.random.default_rng(0).integers(0, 256, (W.shape[0], W.shape[1] // 256, size), dtype=np.uint8)
    a, b = SCALES[kind]
    data[..., a:b] = np.full((b - a) // 2, 0.001, np.float16).view(np.uint8)
    return data.reshape(W.shape[0], -1)


def file(path: Path, kinds: tuple[str, ...] = KINDS) -> Path:
    """A Llama of two layers with rows of 256 whose linears are of these kinds."""
    model = tiny.fresh(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model.resize_token_embeddings(264, mean_resizing=False)
    config, name_of = model.config, words.named("llama", 2)
    writer = gguf.GGUFWriter(path, "llama")
    words.sizes(writer, config)
    vocabulary = sorted(chatty.tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(word for word, _ in vocabulary), *("ab", "bc", "cd")][: config.vocab_size])
    writer.add_token_types([3] * 5 + [1] * (config.vocab_size - 5))
    writer.add_token_merges(["a b", "b c", "c d"])
    writer.add_eos_token_id(4)
    at = 0
    for name, t in model.state_dict().items():
        W, new = t.numpy(), name_of(name)
        rows = words.order(new, "llama", config, W.shape[0])
        W = W if rows is None else np.ascontiguousarray(W[rows.numpy()])
        if "_proj" in name:
            kind, at = kinds[at % len(kinds)], at + 1
            writer.add_tensor(new, blocks(W, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(new, W)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("gguf")
    (place / "given").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINEBITS_HOME", str(place / "cache"))
        yield file(place / "given" / "model.gguf")


def test_it_is_what_transformers_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    dense = GgufConfig(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file=folder.name, dtype=torch.bfloat16, quantization_config=dense)
    made = folder_of(folder)
    assert folder_of(folder.parent) == made  # a folder with one GGUF file is that file
    tensors = Tensors(made)
    for name, p in stock.named_parameters():
        assert torch.equal(tensors[name].bfloat16(), p), name
    again = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)  # and it reads what was made of it
    assert torch.equal(tiny.logits(again), tiny.logits(stock))


def test_one_notice_says_what_it_was(folder: Path) -> None:
    (notice,) = Tensors(folder_of(folder)).notices
    assert notice.startswith("the weights are quantized already (GGUF Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, ")
    assert "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 keeps its codes" in notice


def test_codes_that_a_format_holds_are_kept(folder: Path) -> None:
    names, reader = tiny.names(), {t.name: t for t in gguf.GGUFReader(folder).tensors}
    held = {name: FORMATS[kind] for name, kind in zip(names, KINDS * 2, strict=False) if kind in FORMATS}
    plan = fb.Plan({name: fb.Spec(format) for name, format in held.items()}, model=str(folder), levers=fb.Levers(dtype="float32"))
    model, _ = load_planned(plan)
    of = dict(hosts(model))
    assert len(held) == 9 and all(isinstance(of[name].weight, QTensor) and of[name].weight.format == f for name, f in held.items())
    config, name_of = model.config, words.named("llama", 2)
    for name in held:
        tensor = reader[name_of(f"{name}.weight")]
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        rows = words.order(tensor.name, "llama", config, wanted.shape[0])
        found = of[name].weight.dequantize().numpy()  # in float32: nothing went through bfloat16
        assert np.array_equal(found if rows is None else found[rows.numpy()], wanted), name


def test_what_is_no_model_and_several_files_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(folder.read_bytes())
    with pytest.raises(ValueError, match="has 2 GGUF files"):
        folder_of(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds an adapter and no model"):
        folder_of(tmp_path / "c.gguf")
