"""Laws of a training rule, in the plain loop."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.rules.base import Laid, Rule, Run, Scene, check
from variants import methods

# Of experts: tests/laws/test_module_adapters.py; of steps that are trained, over a dense base: tests/papers/test_l4q.py
RULES = [c for c in methods("rules") if not {"router", "log_scale"} & set(getattr(c, "needs", ()))]
every = pytest.mark.parametrize("cls", RULES)
STEPS = 16
SOON: dict[str, dict[str, Any]] = {  # settings under which a run of so few steps sees all that the rule does
    "IncreLoRA": {"target_rank": 2, "warmup": 4, "every": 3, "top": 2, "ramp": 2},
    "SoRA": {"schedule": "linear", "stages": 4},
    "S2Sparsity": {"weight": 0.1},
    "LayerDrop": {"p": 0.5},
    "ReLoRA": {"warmup": 2},
    "LISA": {"blocks": 1, "every": 3},
    "OwLore": {"blocks": 1, "every": 3},
    "SpIEL": {"every": 4, "accumulate": 3, "rate": 0.5, "pool": 3.0},  # all entries: micro-batches show others of fewer
}
KINDS = (
    fb.Gated(rank=4, alpha=8.0),
    fb.LoRA(rank=4, alpha=8.0),
    fb.SLoRA(rank=4, alpha=8.0, train="left"),
    fb.Restarted(4, 8.0, slots=3),
    fb.Sparse(rank=2),
)


def made(cls: type[Rule], **settings: Any) -> Rule:
    return cls(**SOON.get(cls.__name__, {}) | settings)


def adapter(rule: Rule) -> Any:
    """The first of the kinds that a rule can act on."""
    for kind in KINDS:
        try:
            check(rule, kind)
        except ValueError:
            continue
        return kind
    raise LookupError(f"no kind of adapter for {rule}")


class Student(nn.Module):
    """Two blocks and a head, as transformers are built."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def student(kind: Any = KINDS[0]) -> nn.Module:
    """Quantized layers under adapters of a kind."""
    torch.manual_seed(5)
    spec = Spec(format=fb.NF(4, block=16), adapter=kind)
    return fb.build(Student(), Plan(dict.fromkeys(("blocks.0.0", "blocks.1.0", "head"), spec)))


def batches(count: int, parts: int = 1) -> list[list[dict[str, Tensor]]]:
    gen = torch.Generator().manual_seed(11)
    rows = [(torch.randn(8, 12, generator=gen), torch.randn(8, 6, generator=gen)) for _ in range(count)]
    return [[{"x": a, "y": b} for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)] for x, y in rows]


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum()


def run(
    rules: list[Rule], on_step: Callable[[Run, float], None] = lambda run, loss: None, parts: int = 1, kind: Any = None
) -> tuple[list[float], nn.Module]:
    kind = kind or adapter(rules[0])
    model = student(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    count = lambda batch: batch["x"].shape[0]  # noqa: E731
    losses = fb.train(model, batches(STEPS, parts), optimizer, total=STEPS, loss=square, tokens=count, rules=rules, on_step=on_step)
    return losses, model


def test_folder_is_not_empty() -> None:
    assert methods("rules")


@every
def test_null_setting_vanishes(cls: type[Rule]) -> None:
    losses, model = run([cls(**cls.null)])
    plain, same = run([], kind=adapter(cls(**cls.null)))
    assert losses == plain
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True) if a.requires_grad)


@every
def test_state_goes_through_a_file_and_training_goes_on_the_same(cls: type[Rule]) -> None:
    expected, _ = run([made(cls)])
    rules = [made(cls)]

    def swap(run: Run, loss: float) -> None:
        if run.step == STEPS - 10:
            file = io.BytesIO()
            torch.save(rules[0].state_dict(), file)
            file.seek(0)
            rules[0] = made(cls)
            rules[0].load_state_dict(torch.load(file, weights_only=True))

    losses, _ = run(rules, swap)
    assert losses == expected


@every
def test_loading_copies(cls: type[Rule]) -> None:
    """Training on does not write into the checkpoint that was loaded."""
    kept: list[dict] = []
    rules = [made(cls)]

    def look(run: Run, loss: float) -> None:
        if run.step == 5:
            kept.append(copy.deepcopy(rules[0].state_dict()))

    run(rules, look)
    state, before = kept[0], copy.deepcopy(kept[0])
    other = made(cls)
    other.load_state_dict(state)
    run([other])
    assert str(state) == str(before)


@every
def test_micro_batches_do_not_matter(cls: type[Rule]) -> None:
    whole, model = run([made(cls)])
    for parts in (2, 4):
        cut, same = run([made(cls)], parts=parts)
        assert cut == pytest.approx(whole, rel=1e-4)
        for a, b in zip(model.parameters(), same.parameters(), strict=True):
            if a.requires_grad:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@every
def test_shapes_and_modules_never_change(cls: type[Rule]) -> None:
    expected = {k: v.shape for k, v in student(adapter(made(cls))).state_dict().items()}
    _, model = run([made(cls)])
    assert {k: v.shape for k, v in model.state_dict().items()} == expected


@every
def test_the_quantized_base_is_never_touched(cls: type[Rule]) -> None:
    before = {k: v.clone() for k, v in student(adapter(made(cls))).state_dict().items() if ".p." not in k}
    _, model = run([made(cls)])
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@every
def test_it_does_something(cls: type[Rule]) -> None:
    """A law that a rule without an effect would pass says nothing of it."""
    losses, _ = run([made(cls)])
    plain, _ = run([], kind=adapter(made(cls)))
    assert losses != plain


@every
def test_evaluation_is_without_it(cls: type[Rule]) -> None:
    """Between two steps nothing of the rule is left on the model: no hook, no other forward, no other rate."""
    rates: list[Any] = []

    def look(run: Run, loss: float) -> None:
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in run.model.modules())
        assert run.optimizer is not None
        rates.append([group["lr"] for group in run.optimizer.param_groups])

    run([made(cls)], look)
    assert rates == rates[:1] * STEPS


def bytes_of(things: list[Any], known: set[int]) -> int:
    """Of the tensors that are reached from some things, by attributes, containers and functions, but for known storages."""
    found, seen, left = dict[int, int](), set[int](), list(things)
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, list | tuple):
            left += thing
        elif isinstance(thing, Rule):
            left.append(vars(thing))
        elif callable(thing):
            left += [getattr(thing, "__defaults__", None), *(c.cell_contents for c in getattr(thing, "__closure__", None) or ())]
    return sum(size for at, size in found.items() if at not in known)


@every
def test_it_holds_what_a_plan_counts(cls: type[Rule]) -> None:
    """From step to step to the byte, and inside of a step no more than that; what its graphs keep is told in its `work` as well."""
    rule = made(cls)
    kind, between, inside = adapter(rule), list[int](), list[int]()
    scene = Scene(tuple(Laid(kind, *shape) for shape in ((12, 12), (12, 12), (6, 12))))

    class Watch(Rule):
        """Behind the rule at every moment."""

        def look(self, run: Run) -> None:
            of_model = {t.untyped_storage()._cdata for t in run.model.parameters()}
            hooks = [hook for m in run.model.modules() for hook in m._forward_hooks.values()]
            inside.append(bytes_of([rule, *hooks], of_model))

        before_forward = after_backward = look

    def look(run: Run, loss: float) -> None:
        between.append(bytes_of([rule], {t.untyped_storage()._cdata for t in run.model.parameters()}))

    run([rule, Watch()], look)
    assert max(between) == rule.state(scene) if cls is fb.SpIEL else set(between) == {rule.state(scene)}  # which holds more at times
    assert max(inside) <= rule.state(scene) + rule.work(scene)
    if cls.__name__ in ("MGPO", "ALLoRA", "LaMDAFreeze"):
        assert max(inside) == rule.state(scene) + rule.work(scene) - (4 * 30 if cls is fb.ALLoRA else 0)  # κ − 1 is the graph's
    assert cls(**cls.null).per_token(scene._replace(units=(5,))) == 0


@every
def test_what_it_cannot_act_on_is_refused_with_the_recipe_and_in_a_run(cls: type[Rule]) -> None:
    rule = made(cls)
    if not rule.needs:
        return
    with pytest.raises(ValueError, match=f"{cls.__name__} acts on .*take adapter"):
        check(rule, fb.LoRAXS(rank=2))
    with pytest.raises(ValueError, match=f"{cls.__name__} acts on .*take adapter"):
        run([rule], kind=fb.LoRAXS(rank=2))
