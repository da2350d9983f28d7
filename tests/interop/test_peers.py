"""The peer's run is real bitsandbytes under real PEFT in a stock trainer, and its bits are those of QLoRA's paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finebits.interop import peers
from finebits.interop.feeding import dataset
from finebits.interop.tokenizer import tokenizer_of
from finebits.tasks.causal_lm import CausalLM
from tiny_llama import names, worded

bnb = pytest.importorskip("bitsandbytes")


def test_nf4_under_lora_in_the_stock_trainer(tmp_path: Path) -> None:
    folder, mine = worded(tmp_path / "llama", tie_word_embeddings=True), names()[:-1]
    model = peers.qlora(folder, mine, torch.float32)
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(issubclass(kinds[n], bnb.nn.Linear4bit) for n in mine) and kinds[names()[-1]] is torch.nn.Linear  # left out of the plan
    assert all(model.get_submodule(n).weight.quant_state.nested for n in mine)
    rows = [{"input_ids": [1, 2, 3, 4 + i], "labels": [-100, 2, 3, 4 + i]} for i in range(4)]
    seen: list[int] = []
    model = peers.adapted(model, mine, rank=4, alpha=8.0)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 1}
    peers.train(model, tokenizer_of(folder), dataset(rows), [[3, 1], [0, 2]], tmp_path / "out", arguments, lambda e: seen.append(e["step"]))
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert seen == [1, 2] and moved and all(".lora_" in k for k in moved)


def test_packs_are_kept_apart_in_the_stock_trainer(tmp_path: Path) -> None:
    folder, mine = worded(tmp_path / "llama"), names()
    rows = [{"input_ids": [1, 2, 3, 4 + i], "labels": [-100, 2, 3, 4 + i]} for i in range(4)]
    packs = [{k: one[k] + two[k] for k in one} | {"segments": [4, 4]} for one, two in ((rows[0], rows[1]), (rows[2], rows[3]))]
    for pack in packs:
        pack["labels"][4] = -100

    def trained(rows: list, batches: list, task: CausalLM | None) -> dict:
        model = peers.adapted(peers.qlora(folder, mine, torch.float32), mine, rank=4, alpha=8.0)
        arguments = {"max_steps": 2, "per_device_train_batch_size": len(batches[0]), "learning_rate": 1e-2, "optim": "sgd", "seed": 1}
        words = tokenizer_of(folder)
        packed = None if task is None else (lambda rows: task.batch(rows, words, 8))
        torch.manual_seed(1)
        peers.train(model, words, dataset(rows), batches, tmp_path / "out", arguments, collate=packed)
        return {k: v.detach() for k, v in model.named_parameters() if v.requires_grad}

    torch.manual_seed(1)
    alone = trained(rows, [[0, 1, 2, 3], [0, 1, 2, 3]], None)
    torch.manual_seed(1)
    packed = trained(packs, [[0, 1], [0, 1]], CausalLM())
    assert all(torch.allclose(alone[k], packed[k], atol=1e-5) for k in alone) and any(float(v.abs().max()) > 0 for v in alone.values())


def test_bits_are_the_papers() -> None:
    """QLoRA, section 3: constants in blocks of 64 cost .5 bits, quantized doubly 8/64 + 32/(64·256) = .127."""
    layer = torch.nn.Module()
    layer.q = bnb.nn.Linear4bit(4096, 1024, bias=False, quant_type="nf4", compress_statistics=True)
    layer.q.weight = bnb.nn.Params4bit(torch.randn(1024, 4096), requires_grad=False, quant_type="nf4", compress_statistics=True)
    assert peers.bits(layer.to("cpu")) == pytest.approx(4.127, abs=1e-3)


def test_without_its_libraries_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    peers.check(CausalLM())
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        peers.check(CausalLM())
