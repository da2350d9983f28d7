"""What a rule is: something that acts at four moments of an optimizer step. Rules are the only methods with state.

No rule changes a parameter's shape or the module tree: capacity is allocated once, and rank is a mask. `after_backward` fires once an
optimizer step, when the gradients of all micro-batches are there. What a rule wants of the optimizer's settings, such as a learning rate of
its own for some parameters, it says once, by `factors`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from finebits import registry
from finebits.adapters.base import Form
from finebits.errors import Invalid

if TYPE_CHECKING:
    from finebits.optim.base import Optimizer


Across = Literal["one", "copies", "rows"]  # the processes that a rule takes: one, those that hold all tensors whole, or some rows of each


@dataclass
class Run:
    """What a rule may look at: the model, its hosts by name, the optimizer, and where the run stands (steps done, steps in all).

    >>> run = fb.Run(torch.nn.Linear(2, 2), hosts={}, step=5, total=100)
    >>> run.step / run.total
    0.05
    """

    model: nn.Module
    hosts: dict[str, Any]
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    total: int = 0


class Laid(NamedTuple):
    """An adapter over an (m, n) weight, by its settings alone: a planner has no tensors yet."""

    adapter: Any
    m: int
    n: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.adapter.shapes(self.m, self.n)

    def numbers(self, *names: str) -> int:
        """In these of its tensors together."""
        return sum(math.prod(self.shapes[k]) for k in names)


class Scene(NamedTuple):
    """What a rule will meet: the adapters that it acts on, the units of every feed-forward sublayer, the bytes of a number in blocks, and the
    steps of the run, None where nobody knows.

    >>> fb.GGPO().state(Scene((Laid(fb.LoRA(rank=4), m=64, n=32),)))  # two norms of every row of the weight
    512
    """

    adapters: tuple[Laid, ...] = ()
    units: tuple[int, ...] = ()
    width: int = 4
    steps: int | None = None

    def reaches(self, step: int) -> bool:
        """May the run come to a step of this number, from 0?"""
        return self.steps is None or self.steps > step


class Rule:
    """All four moments are optional. `null` is a setting at which the rule vanishes: training is then training without it, bit for bit.

    >>> class Decay(fb.Rule):
    ...     null = {"rate": 0.0}
    ...     rate = 0.5
    ...     def penalty(self, run):
    ...         return self.rate * sum(p.square().sum() for p in run.model.parameters())
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[1.0, 3.0]])
    >>> Decay().penalty(fb.Run(model, {})).detach()  # ½ (1² + 3²)
    tensor(5.)
    """

    null: ClassVar[dict[str, Any]]
    needs: ClassVar[frozenset[str]] = frozenset()  # tensors of a module's own that its adapter must train
    writes: ClassVar[frozenset[str]] = frozenset()  # frozen ones that it must have, for the rule to fill
    forms: ClassVar[frozenset[Form]] = frozenset({"product", "scaled", "codes", "weight", "beside"})  # of adapters that it can follow
    drops: ClassVar[bool] = True  # does it go together with dropout of the adapter's inputs?
    across: ClassVar[Across] = "copies"

    def factors(self, run: Run) -> Mapping[nn.Parameter, Mapping[str, float]]:
        """By what settings of the optimizer are multiplied for some parameters, asked once, when the optimizer is new: {p: {"lr": 16.0}}."""
        return {}

    def suit(self, model: nn.Module) -> None:
        """Raise where it can do nothing with this model, whose tensors may be without values: it is asked when a run is planned."""

    def beside(self, optimizer: Optimizer) -> None:
        """Raise where it can do nothing with what this optimizer keeps: it is asked when a recipe is read."""

    def state(self, scene: Scene) -> int:
        """Bytes of the tensors that it holds from step to step, beside the model and the optimizer."""
        return 0

    def work(self, scene: Scene) -> int:
        """The most bytes that it holds beside those at a moment of a step, whatever the batch."""
        return 0

    def per_token(self, scene: Scene) -> int:
        """Bytes that it keeps of every token for the backward pass, in all blocks together."""
        return 0

    def active(self, layers: int, steps: int | None = None) -> int:
        """Of so many blocks, the most whose weights are trained at a time in a run of so many steps, None where nobody knows."""
        return layers

    def before_forward(self, run: Run) -> None:
        """Before the first micro-batch of a step."""

    def penalty(self, run: Run) -> Tensor | float:
        """Added to the loss of every micro-batch, in proportion to its share of the step."""
        return 0.0

    def after_backward(self, run: Run) -> None:
        """Gradients exist, clipping and the optimizer's step come next."""

    def after_step(self, run: Run) -> None:
        """Parameters have moved, gradients are still there; run.step counts this step."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: everything that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict.

        >>> fb.Rule().load_state_dict({"mean": 1.0})
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: Rule has no state to load, and the checkpoint holds mean
        """
        if state:
            raise Invalid(f"{type(self).__name__} has no state to load, and the checkpoint holds {', '.join(state)}")


def check(rule: Rule, adapter: Any, dropout: float = 0.0) -> None:
    """Raise unless `rule` can act on `adapter`, whose inputs are dropped at the rate `dropout`.

    >>> check(fb.KaSALoss(), fb.Gated())
    >>> check(fb.KaSALoss(), fb.LoRA())
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: KaSALoss acts on tensors A, B and gate that a module trains as its own, and LoRA has none such: take adapter gated
    """
    who, kind = type(rule).__name__, type(adapter).__name__
    if not _fits(rule, adapter):
        raise Invalid(f"{who} acts on {wanted(rule)}, and {kind} has none such: {instead(rule)}")
    if dropout and not rule.drops:
        raise Invalid(f"{who} does not go together with dropout of the inputs, which is {dropout}: set it to 0")


def held(
    rules: Iterable[Rule],
    adapters: Iterable[tuple[Any, tuple[int, int]]],
    units: Iterable[int] = (),
    width: int = 4,
    steps: int | None = None,
) -> tuple[int, int]:
    """What rules take of memory in a step of a run of so many: (bytes, bytes more of every token). They act on adapters over weights of these
    shapes.

    >>> held([fb.AdaLoRA()], [(fb.Gated(rank=2), (8, 16)), (fb.LoRA(rank=2), (8, 16))])  # 8 of each of 50 numbers, 2 gates, P Pᵀ − I
    (434, 0)
    """
    each, fixed, token = list(adapters), 0, 0
    for rule in rules:
        acted = tuple(Laid(adapter, *shape) for adapter, shape in each if _fits(rule, adapter))
        scene = Scene(acted, tuple(units), width, steps)
        fixed, token = fixed + rule.state(scene) + rule.work(scene), token + rule.per_token(scene)
    return fixed, token


def wanted(rule: Rule) -> str:
    """What a rule asks of an adapter, in words.

    >>> wanted(fb.KaSALoss())
    'tensors A, B and gate that a module trains as its own'
    """
    names = sorted(rule.needs)
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
    words = f"{'tensors' if len(names) > 1 else 'a tensor'} {listed} that a module trains as its own"
    words += f", with room in {' and '.join(sorted(rule.writes))}" if rule.writes else ""
    return words if len(rule.forms) == 5 else f"{words}, in an update that is a {' or '.join(sorted(rule.forms))}"


def instead(rule: Rule) -> str:
    """What to do where an adapter does not fit.

    >>> instead(fb.ReLoRA())
    'take adapter restarted'
    """
    fit = [name for name in registry.names("adapters") if _fits(rule, registry.load("adapters", name)())]
    return f"take adapter {' or '.join(fit)}" if fit else "leave the rule out"


def _fits(rule: Rule, adapter: Any) -> bool:
    trained = adapter.shapes(4096, 4096).keys() - adapter.frozen - adapter.shared
    return rule.needs <= trained and rule.writes <= adapter.frozen and adapter.form in rule.forms


def factor(optimizer: torch.optim.Optimizer, rules: Sequence[Rule], run: Run) -> None:
    """Cut the groups of a new optimizer by what the rules multiply its settings with. Groups that were cut before stay as they are; the group
    whose rate is nearest to the run's own comes first, and each remembers the factor of its rate as "rate".

    Training calls it. In a loop of your own, and for fb.train with a scheduler, call it before the scheduler is made, which keeps the rates that
    it finds.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(2, 2)), fb.Plan({"0": fb.Spec(adapter=fb.LoRA(rank=1))}))
    >>> sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    >>> fb.factor(sgd, [fb.LoRAPlus(ratio=4.0)], fb.Run(model, dict(fb.hosts(model))))
    >>> [(group["lr"], len(group["params"])) for group in sgd.param_groups]
    [(0.1, 1), (0.4, 1)]
    """
    by: dict[nn.Parameter, dict[str, float]] = defaultdict(dict)
    for rule in rules:
        for p, settings in rule.factors(run).items():
            for k, f in settings.items():
                by[p][k] = by[p].get(k, 1.0) * f
    if not any(f != 1.0 for settings in by.values() for f in settings.values()):
        return
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = defaultdict(list)
        for p in group["params"]:
            parts[() if "rate" in group else tuple(sorted(by.get(p, {}).items()))].append(p)
        if "initial_lr" in group and "rate" not in group and any(parts.keys() - {()}):
            raise Invalid(
                "a scheduler was made over an optimizer whose rates the rules have yet to set: call fb.factor(optimizer, rules, run) before"
            )
        for settings, params in parts.items():
            scaled = {k: group[k] * f for k, f in settings if k in group}
            groups.append({"rate": dict(settings).get("lr", 1.0)} | group | {"params": params} | scaled)
    optimizer.param_groups[:] = sorted(groups, key=lambda group: abs(math.log(group["rate"])) if group["rate"] > 0 else math.inf)
