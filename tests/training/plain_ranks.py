"""What each of two gloo ranks finds of whole models under DistributedDataParallel and under our trainer, and of weights in codes under torch's
own `fully_shard`: against one process with the rows of both."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import finebits as fb
from finebits.data.tokens import Example, to_batch
from finebits.plan.base import Plan, Spec
from finebits.qtensor import QTensor
from finebits.tasks.base import labelled
from finebits.tasks.causal_lm import CausalLM

WORLD, ROWS, STEPS = 2, 8, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net() -> Net:
    torch.manual_seed(0)
    spec = Spec(format=fb.NF(3, block=16), adapter=fb.LoRA(rank=4, alpha=8.0), init=fb.LoftQ(steps=1))
    return fb.build(Net(), Plan({"first": spec, "second": spec}))


def shared() -> nn.Module:
    """Adapters of every form over matrices: products, factors that two layers hold together, columns that are whole numbers, a rescaled weight,
    another weight, and none."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48), nn.Linear(48, 16))
    layers.extend([nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)])
    kinds: dict[str, Any] = {"0": fb.LoRA(rank=4, alpha=8.0), "2": fb.S2LoRA(rank=4), "4": fb.S2LoRA(rank=4), "5": fb.PaCA(rank=4)}
    kinds |= {"7": fb.DoRA(rank=4), "9": fb.HiRA(rank=4), "11": fb.Bottleneck(reduction=2)}
    assert {kind.form for kind in kinds.values()} == {"product", "scaled", "weight", "beside"}
    return fb.build(layers, Plan({n: Spec(format=fb.NF(3, block=16), adapter=kind) for n, kind in kinds.items()}))


def rows() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 32, generator=gen), torch.randn(ROWS, 16, generator=gen)


def part(t: Tensor) -> Tensor:
    return t.chunk(WORLD)[dist.get_rank()]


def base(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if ".p." not in k}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def alone(made: Callable[[], nn.Module] = net) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, first gradients and last parameters of one process that sees all rows."""
    model, (x, y) = made(), rows()
    optimizer, losses, first = adam(model), [], {}
    for step in range(STEPS):
        loss = (model(x) - y).square().mean()
        loss.backward()
        if step == 0:
            first = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ddp() -> dict[str, Any]:
    model, (x, y) = shared(), rows()
    before = base(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer, losses, first = adam(model), [], {}
    for step in range(STEPS):
        loss = (wrapped(part(x)) - part(y)).square().mean()
        loss.backward()
        if step == 0:
            first = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.data)
        losses.append(loss.item() / WORLD)
    both = []
    for g in first.values():
        copies = [torch.empty_like(g) for _ in range(WORLD)]
        dist.all_gather(copies, g)
        both.append(torch.equal(*copies))
    after, (expected, gradients, last) = base(model), alone(shared)
    return {
        "equal on ranks": all(both),
        "base untouched": all(torch.equal(before[k], after[k]) for k in before),
        "gradients": far(first, gradients),
        "parameters": far({k: p.detach() for k, p in model.named_parameters() if p.requires_grad}, last),
        "losses": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "falls": expected[-1] < expected[0],
    }


def places() -> dict[str, Any]:
    """Adapters over what is no matrix: a feed-forward sublayer, attention, the model; one step, against one process with both ranks' rows."""
    from finebits.tasks import base as tasks

    kinds = fb.MixLoRA(rank=2, experts=3), fb.PrefixTuning(tokens=3), fb.PromptTuning(tokens=3)
    ids = torch.randint(1, WORDS, (2 * WORLD, 9), generator=torch.Generator().manual_seed(4))
    batch, out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, dict[str, Any]()

    def gradients(wrap: Callable[[Any], Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model = llama(places=kind)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):  # from where all have a gradient
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(6)))
        wrapped = wrap(model)  # which averages for as long as it is there
        (tasks.of(model).loss(wrapped, batch) / batch["labels"][:, 1:].numel()).backward()
        return {k: p.grad for k, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    for kind in kinds:
        both = gradients(nn.parallel.DistributedDataParallel, {k: part(v) for k, v in batch.items()})
        one = gradients(lambda model: model, batch)
        out[kind.over] = max(float((both[k] - one[k]).norm() / one[k].norm()) for k in one) if both.keys() == one.keys() else None
    return out


def fsdp() -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, (x, y) = net(), rows()
    before = base(model)
    whole = {k: (p.nbytes if isinstance(p.data, QTensor) else p.numel() * 4) for k, p in model.named_parameters()}
    fully_shard(model.first)
    fully_shard(model.second)
    fully_shard(model)
    shard = sum(p.to_local().nbytes for p in model.parameters())
    optimizer, losses, first = adam(model), [], {}
    for step in range(STEPS):
        loss = (model(part(x)) - part(y)).square().mean()
        loss.backward()
        if step == 0:
            first = {k: p.grad.full_tensor() for k, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.data)
        losses.append(loss.item() / WORLD)
    expected, gradients, last = alone()
    out = {
        "gradients": far(first, gradients),
        "parameters": far({k: p.full_tensor().detach() for k, p in model.named_parameters() if p.requires_grad}, last),
        "losses": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "share": shard / sum(whole.values()),
    }
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # rank 0 holds it; a sharded weight keeps its one key and is a QTensor
        parts = {f"{k}.{name}": part for k, v in full.items() if isinstance(v, QTensor) for name, part in v.parts.items()}
        out["full"] = same(before, parts | {k: v for k, v in full.items() if not isinstance(v, QTensor) and ".p." not in k})
        out["full parameters"] = far({k: v for k, v in full.items() if ".p." in k}, last)
    return out


WORDS = 96


def llama(adapter: Any = None, places: Any = None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    made = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=WORDS, pad_token_id=0))
    names = [n for n, m in made.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    if places is not None:
        from finebits.anatomy import found

        return fb.build(made, Plan(dict.fromkeys(names, Spec(fb.NF(3, block=16))), over=dict.fromkeys(found(made, places.over), places)))
    return fb.build(
        made, Plan({n: Spec(format=fb.NF(3, block=16), adapter=adapter or fb.LoRA(rank=4), init=fb.LoftQ(steps=1)) for n in names})
    )


def examples() -> list[dict[str, list[int]]]:
    gen = torch.Generator().manual_seed(3)
    found = []
    for i in range(2 * WORLD * STEPS):
        ids = torch.randint(1, WORDS, (12 - i % 3,), generator=gen).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (i % 5) + ids[i % 5 :]})
    return found


def tokenizer(kind: Any) -> Any:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, "w0"))
    return kind(tokenizer_object=words, pad_token="w0", eos_token="w0")


def trainer() -> dict[str, Any]:
    """Our own trainer, two rows a rank, against the plain loop over batches of both ranks' rows."""
    from transformers import PreTrainedTokenizerFast

    from finebits.interop.feeding import FixedOrder
    from finebits.interop.trainer import trainer as made_by

    model, rows, logits, events = llama(), examples(), [0], list[dict[str, Any]]()
    model.lm_head.register_forward_hook(lambda head, x, y: logits.append(y.shape[1] if y.shape[-1] == WORDS else 0))
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "events.jsonl")
        engine = made_by(
            model,
            tokenizer(PreTrainedTokenizerFast),
            rows,
            folder,
            settings | {"max_grad_norm": 0.0},
            events=Path(file),
            watch=events.append,
        )
        engine.data_order = FixedOrder(range(len(rows)))
        engine.train()
        written = Path(file).read_text().count('"event": "step"') if Path(file).exists() else 0
    steps = [e for e in events if e["event"] == "step"]

    alone, losses = llama(), list[float]()
    batches = [[to_batch([Example(**r, line=0) for r in rows[i : i + 2 * WORLD]], 0)] for i in range(0, len(rows), 2 * WORLD)]
    losses = fb.train(alone, batches, adam(alone), total=STEPS)
    ours, theirs = ({k: p.detach() for k, p in m.named_parameters() if p.requires_grad} for m in (model, alone))
    return {
        "wrapped": type(engine.model_wrapped).__name__,
        "logits": max(logits),  # at a time; three are laid in its way when the head is observed
        "losses": max(abs(e["loss"] - v) for e, v in zip(steps, losses, strict=True)),
        "tokens": [e["tokens"] for e in steps] == [sum(labelled(b, CausalLM()) for b in batch) for batch in batches],
        "parameters": far(ours, theirs),
        "falls": losses[-1] < losses[0],
        "written": written,
    }


def rules() -> dict[str, Any]:
    """Rules with state, under our trainer on two ranks and in the plain loop over both ranks' rows."""
    from transformers import PreTrainedTokenizerFast

    from finebits.interop.feeding import FixedOrder
    from finebits.interop.trainer import trainer as made_by

    made = lambda: [fb.IncreLoRA(target_rank=2, warmup=1, every=1, top=4, ramp=1), fb.GGPO(sigma=0.1, beta=0.5), fb.LoRAPlus(4.0)]  # noqa: E731
    model, data, events, one, other = llama(fb.Gated(4, 8.0)), examples(), list[dict[str, Any]](), made(), made()
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    with tempfile.TemporaryDirectory() as folder:
        engine = made_by(
            model, tokenizer(PreTrainedTokenizerFast), data, folder, settings | {"max_grad_norm": 0.0}, one, watch=events.append
        )
        engine.data_order = FixedOrder(range(len(data)))
        engine.train()
    alone = llama(fb.Gated(4, 8.0))
    batches = [[to_batch([Example(**r, line=0) for r in data[i : i + 2 * WORLD]], 0)] for i in range(0, len(data), 2 * WORLD)]
    losses = fb.train(alone, batches, adam(alone), total=STEPS, rules=other)
    states: list[Any] = [None] * WORLD
    dist.all_gather_object(states, str([r.state_dict() for r in one]))
    ours, theirs = ({k: p.detach() for k, p in m.named_parameters() if p.requires_grad} for m in (model, alone))
    return {
        "equal on ranks": len(set(states)) == 1,
        "losses": max(abs(e["loss"] - v) for e, v in zip([e for e in events if e["event"] == "step"], losses, strict=True)),
        "parameters": far(ours, theirs),
        "opened": all(torch.equal(one[0].opened[k], v) for k, v in other[0].opened.items()),
        "some": sum(int((v == t).sum()) for v in one[0].opened.values() for t in range(1, STEPS)),
    }


def found() -> dict[str, dict[str, Any]]:
    return {made.__name__: made() for made in (fsdp, ddp, places, trainer, rules)}
