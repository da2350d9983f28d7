"""A stock SFTTrainer on a built model: it trains, saves, resumes, and its losses are those of the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.qtensor import QTensor

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

STEPS, VOCABULARY = 6, 64


def model(init: Any = None) -> nn.Module:
    """A tiny Llama with 3-bit linears under LoRA."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = transformers.LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0)
    llama = transformers.LlamaForCausalLM(config)
    names = [n for n, m in llama.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    spec = Spec(format=fb.NF(3, block=16), adapter=fb.LoRA(rank=4, alpha=8.0), init=init or fb.LoftQ(steps=1))
    return fb.build(llama, Plan({n: spec for n in names}))


def rows() -> list[dict[str, list[int]]]:
    gen = torch.Generator().manual_seed(3)
    found = []
    for _ in range(2 * STEPS):
        ids = (torch.arange(10) * 3 + torch.randint(1, 50, (1,), generator=gen)).remainder(VOCABULARY - 1).add(1).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<pad>": VOCABULARY - 1}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="<pad>", eos_token="<pad>"
    )


def trainer(folder: Path, tokenizer: Any, init: Any = None, **kw: Any) -> Any:
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.02, logging_steps=1, save_steps=2,
        report_to="none", use_cpu=True, bf16=False, seed=7, lr_scheduler_type="constant", disable_tqdm=True, packing=False,
        gradient_checkpointing=False, max_grad_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    args = trl.SFTConfig(**settings | kw)
    return trl.SFTTrainer(model(init), args, train_dataset=datasets.Dataset.from_list(rows()), processing_class=tokenizer)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, Any, dict[str, torch.Tensor]]:
    """One run without interruption; its checkpoints stay."""
    folder = tmp_path_factory.mktemp("run")
    run = trainer(folder, tokenizer)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train()
    return folder, run, before


def test_it_trains_the_adapters_alone(whole: tuple[Path, Any, dict[str, torch.Tensor]]) -> None:
    _, run, before = whole
    seen = losses(run)
    assert len(seen) == STEPS and seen[-1] < seen[0]
    after = run.model.state_dict()
    assert after.keys() == before.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if ".p.default." in k}
    assert sum(isinstance(p.data, QTensor) for p in run.model.parameters()) == 14


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_goes_on_with_equal_losses(whole: tuple[Path, Any, dict], tokenizer: Any, tmp_path: Path, at: int) -> None:
    folder, run, _ = whole
    again = trainer(tmp_path, tokenizer, init=fb.Zeros())  # the checkpoint must bring everything, base and start included
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
    assert losses(again)[-(STEPS - at) :] == losses(run)[at:]
    left, right = run.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_the_plain_loop_has_the_same_losses(whole: tuple[Path, Any, dict], tokenizer: Any, tmp_path: Path) -> None:
    _, run, _ = whole
    order = [batch for batch in trainer(tmp_path, tokenizer).get_train_dataloader()]
    own = model()
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    got = fb.train(own, [[batch] for batch in order[:STEPS]], optimizer, total=STEPS)
    assert got == pytest.approx(losses(run), rel=2e-4)
