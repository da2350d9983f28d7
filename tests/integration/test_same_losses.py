"""The plain loop and the trainer: the same rows, the same four moments, identical losses; and the trainer's own checkpoints."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.rules.adalora import AdaLoRA
from finebits.rules.base import Rule, Run
from finebits.train import order, train

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.filterwarnings("default")]
STEPS, VOCABULARY, RATE = 5, 64, 0.02


def model(adapter: Any) -> Any:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=VOCABULARY, pad_token_id=0))
    names = [n for n, m in llama.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    init = fb.LoftQ(steps=1) if adapter.admits is None else fb.Zeros()
    return fb.build(llama, Plan({n: Spec(format=fb.NF(3, block=16), adapter=adapter, init=init) for n in names}))


def rows(count: int = 17) -> list[dict[str, list[int]]]:
    gen = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        length = int(torch.randint(5, 14, (1,), generator=gen))
        ids = (torch.arange(length) * 3 + torch.randint(1, 50, (1,), generator=gen)).remainder(VOCABULARY - 1).add(1).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<pad>": VOCABULARY - 1}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="<pad>", eos_token="<pad>"
    )


class Diary(Rule):
    """Writes down when it was called, and what it saw."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def before_forward(self, run: Run) -> None:
        self.lines.append(("before_forward", run.step, run.total))

    def penalty(self, run: Run) -> float:
        self.lines.append(("penalty", run.step))
        return 0.0

    def after_backward(self, run: Run) -> None:
        self.lines.append(("after_backward", run.step, all(p.grad is not None for p in run.model.parameters() if p.requires_grad)))

    def after_step(self, run: Run) -> None:
        self.lines.append(("after_step", run.step, all(p.grad is not None for p in run.model.parameters() if p.requires_grad)))


def by_trainer(folder: Path, tokenizer: Any, adapter: Any, rules: list[Rule], **more: Any) -> tuple[list[float], Any]:
    from finebits.interop.trainer import trainer

    seen: list[float] = []
    settings = dict(max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=RATE, max_grad_norm=0.5)
    settings |= dict(lr_scheduler_type="linear", weight_decay=0.0, seed=7, gradient_checkpointing=False) | more
    watch = lambda e: seen.append(e["loss"]) if e["event"] == "step" else None  # noqa: E731
    engine = trainer(model(adapter), tokenizer, rows(), folder, settings, rules, loss_chunk=8, watch=watch)
    engine.train(resume_from_checkpoint=more.get("resume_from_checkpoint"))
    return seen, engine


def by_loop(adapter: Any, rules: list[Rule]) -> list[float]:
    built, data = model(adapter), rows()
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    fb.factor(optimizer, rules, Run(built, dict(fb.hosts(built)), optimizer))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))
    batches = []
    for epoch in range(3):
        cut = order([len(r["input_ids"]) for r in data], 2, 7 + epoch)
        pairs = [cut[i : i + 2] for i in range(0, len(cut), 2)]
        batches += [[padded([data[i] for i in batch]) for batch in pair] for pair in pairs]
    return train(built, batches[:STEPS], optimizer, total=STEPS, scheduler=scheduler, rules=rules, clip=0.5)


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(r["input_ids"]) for r in batch)
    pad = lambda key, fill: torch.tensor([r[key] + [fill] * (longest - len(r[key])) for r in batch])  # noqa: E731
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch])
    return {"input_ids": pad("input_ids", VOCABULARY - 1), "attention_mask": mask, "labels": pad("labels", -100)}


RULES: list[Rule] = [
    AdaLoRA(target_rank=1, final=1),
    fb.KaSALoss(beta=0.1, gamma=0.1),
    fb.LaMDAFreeze(eta=0.7),
    fb.IncreLoRA(target_rank=2, warmup=1, every=1, top=20, ramp=2),
    fb.SoRA(threshold=0.5),
    fb.LoRAPlus(),
    fb.GGPO(sigma=0.1, beta=0.5),
    fb.MGPO(rho=0.1),
    fb.DensityLoss(weight=0.1, eps=0.1),
    fb.ReLoRA(every=2, warmup=1),
]


def under(rule: Rule | None) -> Any:
    """An adapter that the rule can act on."""
    kinds = {fb.LaMDAFreeze: fb.SLoRA(4, 8.0, "left"), fb.ReLoRA: fb.Restarted(4, 8.0, slots=2), type(None): fb.LoRA(4, 8.0)}
    return kinds.get(type(rule), fb.Gated(4, 8.0))


@pytest.mark.parametrize("rule", [None, *RULES], ids=lambda r: type(r).__name__)
def test_trainer_and_plain_loop_have_identical_losses(tmp_path: Path, tokenizer: Any, rule: Rule | None) -> None:
    adapter = under(rule)
    one, other = ([Diary(), *([copy.deepcopy(rule)] if rule else [])] for _ in range(2))
    theirs, engine = by_trainer(tmp_path, tokenizer, adapter, one)
    ours = by_loop(adapter, other)
    assert ours == pytest.approx(theirs, rel=1e-6) and len(ours) == STEPS
    assert one[0].lines == other[0].lines, "the four moments come at other times"
    assert {line[0] for line in one[0].lines} == {"before_forward", "penalty", "after_backward", "after_step"}
    if isinstance(rule, AdaLoRA):
        gates = [p for n, p in engine.model.named_parameters() if n.endswith("gate")]
        assert sum(int((g != 0).sum()) for g in gates) == len(gates), "AdaLoRA ends with target_rank gates a host on average"


def test_penalties_are_trained_on_where_the_trainer_computes_the_loss_itself(tmp_path: Path, tokenizer: Any) -> None:
    """Heads that scale or cap their logits go through the trainer's own loss."""
    from finebits.interop.trainer import trainer

    def gates(rules: list[Rule]) -> float:
        built = model(fb.Gated(rank=4, alpha=8.0))
        built.config.logit_scale = 2.0
        settings = dict(max_steps=2, per_device_train_batch_size=2, learning_rate=RATE, gradient_checkpointing=False)
        trainer(built, tokenizer, rows(4), tmp_path, settings, rules).train()
        return sum(float(p.detach().square().sum()) for n, p in built.named_parameters() if n.endswith("gate"))

    assert gates([fb.KaSALoss(beta=100.0, gamma=0.0)]) < 0.97 * gates([])


@pytest.mark.parametrize(
    "rule",
    [r for r in RULES if type(r).load_state_dict is not Rule.load_state_dict or isinstance(r, (fb.LaMDAFreeze, fb.LoRAPlus))],
    ids=lambda r: type(r).__name__,
)
def test_a_resumed_run_repeats_the_losses_and_the_rules(tmp_path: Path, tokenizer: Any, rule: Rule) -> None:
    adapter, at = under(rule), 4 if isinstance(rule, fb.LaMDAFreeze) else 2  # after all columns are frozen, too
    whole, _ = by_trainer(tmp_path / "a", tokenizer, adapter, [copy.deepcopy(rule)], save_strategy="steps", save_steps=2)
    again, _ = by_trainer(
        tmp_path / "b",
        tokenizer,
        adapter,
        [copy.deepcopy(rule)],
        resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{at}"),
        save_strategy="no",
    )
    assert again == pytest.approx(whole[at:], rel=1e-6)


@pytest.mark.parametrize("adapter", [fb.S2LoRA(rank=4), fb.VeRA(rank=8), fb.RandLoRA(basis=8, alpha=8.0)], ids=lambda a: type(a).__name__)
def test_what_layers_share_trains_and_resumes(tmp_path: Path, tokenizer: Any, adapter: Any) -> None:
    from safetensors.torch import load_file

    whole, engine = by_trainer(tmp_path / "a", tokenizer, adapter, [], save_strategy="steps", save_steps=2)
    assert by_loop(adapter, []) == pytest.approx(whole, rel=1e-6) and whole[-1] < whole[0]
    saved = load_file(tmp_path / "a" / "checkpoint-2" / "adapter.safetensors")
    assert saved.keys() == {n for n, p in engine.model.named_parameters() if p.requires_grad}
    from_there = dict(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"), save_strategy="no", gradient_checkpointing=True)
    again, _ = by_trainer(tmp_path / "b", tokenizer, adapter, [], **from_there)
    assert again == pytest.approx(whole[2:], rel=1e-6)


def test_the_first_interrupt_saves_and_stops(tmp_path: Path, tokenizer: Any) -> None:
    class Impatient(Rule):
        def after_backward(self, run: Run) -> None:
            if run.step == 1:
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has put the tests in the background
    seen, engine = by_trainer(tmp_path, tokenizer, fb.LoRA(rank=4), [Impatient()])
    assert len(seen) == 2 and engine.moments.stop
    assert (tmp_path / "checkpoint-2" / "adapter.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_newest_whole_checkpoint_counts(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint comes whole or not at all, and the one before it goes only then."""
    from finebits.interop.trainer import BudgetTrainer, checkpoints

    state, saved = BudgetTrainer._save_rng_state, []

    def failing(self: Any, folder: str) -> None:
        saved.append(folder)
        if len(saved) == 3:
            raise KeyboardInterrupt  # in the middle of the third
        state(self, folder)

    monkeypatch.setattr(BudgetTrainer, "_save_rng_state", failing)
    with pytest.raises(KeyboardInterrupt):
        by_trainer(tmp_path, tokenizer, fb.LoRA(rank=4), [], save_strategy="steps", save_steps=1, save_total_limit=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    by_trainer(tmp_path, tokenizer, fb.LoRA(rank=4), [], save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"], "and nothing else is left"
    whole = tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt"
    whole.write_bytes(whole.read_bytes()[:100])
    assert [p.name for p in checkpoints(tmp_path)] == [f"checkpoint-{STEPS - 1}"]


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """The mean is over all tokens of a step, however they are cut: unequal rows in two micro-batches, and in one."""
    losses = []
    for pieces in (1, 2, 4):
        built, data = model(fb.LoRA(rank=4, alpha=8.0)), rows(4)
        optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=RATE)
        step = [padded(data[i : i + 4 // pieces]) for i in range(0, 4, 4 // pieces)]
        losses.append(train(built, [step, step], optimizer, total=2))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def test_worst_batch_first_and_every_row_once() -> None:
    lengths = [3, 9, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 7]
    cut = order(lengths, 3, seed=1)
    assert sorted(i for b in cut for i in b) == list(range(13))
    assert 9 in [lengths[i] for i in cut[0]] and len(cut[-1]) == 1
    assert cut == order(lengths, 3, seed=1) != order(lengths, 3, seed=2)
