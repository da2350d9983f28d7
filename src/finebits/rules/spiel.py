"""SpIEL: Scaling Sparse Fine-Tuning to Large Language Models.  Ansell et al., 2024.  arXiv:2401.16405v2.
Use it with adapter sparse: the entries that are trained move to where the gradient wants them, in as little memory as a LoRA's.

Over W + Δ with Δ = φ at k places, after every `every` steps p·k of the places change, k and all shapes stay (Algorithm 1):

    drop    the p·k entries of the smallest |φ|
    grow    as many candidates of the largest score, φ = 0;   what is dropped and grown at once stays as it is
    p = 1 the first time, then ξ (1 − t/N), or ξ (1 + cos(πt/N))/2

AG: in `accumulate` steps g = ∂L/∂W is looked at, a few rows of a weight at a time. The first finds the k candidates of largest |g|, the others
add up g and g² there; the score is |Σ g|. A new entry begins with Adam's moments and its age as if it had been there in these c steps:

    m = (1 − β₁ᶜ) mean(g),   v = (1 − β₂ᶜ) mean(g²),   a = c,   and every entry's step is   η m/(1 − β₁ᵃ) / (√(v/(1 − β₂ᵃ)) + ε)

MA: the score is ρ_row κ_column, the accumulators of optimizer sm3; no gradient is looked at.
Deviations:
- candidates are found in the first micro-batch of a step of their own, whose gradient does not count in their scores, which it would favour;
- ages are counted in steps of the optimizer; the authors' code counts them on a copy where moments are not float32;
- gradients are looked at before they are clipped: where they are, the moments of new entries are larger than Adam's own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as distributed
from jaxtyping import Float
from torch import Tensor, nn

from finebits.adapters._rows import tiles
from finebits.adapters.base import Form
from finebits.errors import Invalid
from finebits.formats.base import SLAB
from finebits.rules import _family as family
from finebits.rules.base import Rule, Run, Scene

if TYPE_CHECKING:
    from finebits.optim.base import Optimizer

SUMS = "sum", "square", "now"  # of g at the candidates, of g², and of the step that is on its way


class SpIEL(Rule):
    """`every` is 0 for never. `pool` is how many candidates there are for every entry.

    >>> rule = fb.SpIEL(every=20, accumulate=5, rate=0.2)
    >>> [rule.share(step, total=100) for step in (24, 25, 45, 85)]  # nothing, all, ξ (1 − 45/100), ξ (1 − 85/100)
    [0.0, 1.0, 0.11, 0.03]
    """

    null: ClassVar[dict[str, Any]] = {"every": 0}
    needs: ClassVar[frozenset[str]] = frozenset({"delta"})
    writes: ClassVar[frozenset[str]] = frozenset({"index"})
    forms: ClassVar[frozenset[Form]] = frozenset({"weight"})
    drops: ClassVar[bool] = False

    def __init__(
        self,
        variant: Literal["ag", "ma"] = "ag",
        every: int = 20,
        accumulate: int = 5,
        rate: float = 0.2,
        schedule: Literal["linear", "cosine"] = "linear",
        pool: float = 1.0,
    ) -> None:
        if variant not in ("ag", "ma") or schedule not in ("linear", "cosine"):
            raise Invalid(f"SpIEL has variants ag and ma, and schedules linear and cosine; got {variant!r} and {schedule!r}")
        if not (every >= 0 and 0 < rate <= 1 and pool >= 1):
            raise Invalid(f"SpIEL needs every >= 0, a rate above 0 and at most 1, and pool >= 1; got {every}, {rate} and {pool}")
        if variant == "ag" and every and not 2 <= accumulate < every:
            raise Invalid(f"SpIEL needs accumulate of 2 steps or more, and fewer than every; got {accumulate} and {every}")
        self.variant, self.every, self.accumulate, self.rate, self.schedule, self.pool = variant, every, accumulate, rate, schedule, pool
        self.ages: dict[str, Tensor] = {}
        self.candidates: dict[str, Tensor] = {}  # places, in order
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.samples = 0
        self.places: dict[str, Tensor] = {}
        self.loaded = False
        self.before: dict[str, Tensor] = {}  # for the time of one step
        self.span = contextlib.ExitStack()

    def share(self, step: int, total: int) -> float:
        """p after `step` steps; 0 where nothing changes."""
        after = self.accumulate if self.variant == "ag" else 0
        if not self.every or step < self.every + after or (step - after) % self.every:
            return 0.0
        if step == self.every + after:
            return 1.0
        u = min(step / max(total, 1), 1.0)
        return round(self.rate * ((1 - u) if self.schedule == "linear" else (1 + math.cos(math.pi * u)) / 2), 12)

    def state(self, scene: Scene) -> int:
        """At most, which it is while gradients are looked at, if they ever are: ages, candidates, and their sums."""
        looked = 20 if scene.reaches(self.every) else 0
        of = lambda a: 4 * a.numbers("delta") + looked * min(int(self.pool * a.numbers("delta")), a.m * a.n)  # noqa: E731
        return sum(map(of, scene.adapters)) if self.every and self.variant == "ag" else 0

    def work(self, scene: Scene) -> int:
        """The deltas as they were, once some are exchanged, and a few rows of one gradient or score with what their largest are found by."""
        rows = max((min(a.m * a.n, max(SLAB, a.n)) for a in scene.adapters), default=0)
        young = self.variant == "ag" and scene.reaches(self.every + self.accumulate)
        before = 4 * sum(a.numbers("delta") for a in scene.adapters) if young else 0
        return before + 32 * rows if self.every and scene.reaches(self.every - (self.variant == "ma")) else 0

    def beside(self, optimizer: Optimizer) -> None:
        """Its variants read what one optimizer or the other keeps.

        >>> from finebits.optim.base import named
        >>> fb.SpIEL("ma").beside(named("adamw"))
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: SpIEL's variant ma scores by the accumulators of SM3, and the optimizer is AdamW: take training.optim sm3, or
        variant ag
        """
        who = type(optimizer).__name__
        if self.every and self.variant == "ma" and who != "SM3":
            raise Invalid(
                f"SpIEL's variant ma scores by the accumulators of SM3, and the optimizer is {who}: take training.optim sm3, or variant ag"
            )
        if self.every and self.variant == "ag" and who not in ("AdamW", "PagedAdamW"):
            raise Invalid(
                f"SpIEL's variant ag writes the moments of new entries, and {who} keeps none of Adam's as they are: take training.optim adamw"
            )

    def factors(self, run: Run) -> dict[nn.Parameter, dict[str, float]]:
        """None; but SM3 is told where in their weights the entries lie."""
        if self.every and self.variant == "ma":
            for _, host, _, p in family.adapters(run, self):
                if not hasattr(run.optimizer, "cover"):
                    raise Invalid("SpIEL's variant ma scores by the accumulators of SM3: take training.optim sm3, or variant ag")
                run.optimizer.cover(p["delta"], p["index"], tuple(host.weight.shape))  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        return {}

    @torch.no_grad()
    def before_forward(self, run: Run) -> None:
        self.span.close()
        if not self.every:
            return
        looks = self.variant == "ag" and run.step >= self.every and run.step % self.every < self.accumulate
        for name, host, _, p in family.adapters(run, self):
            if self.loaded:
                p["index"].copy_(self.places[name])
            self.places[name] = p["index"].detach()
            if self.variant == "ag" and name not in self.ages:
                self.ages[name] = torch.zeros_like(p["index"]).detach()
            if looks:
                self._listen(name, host, len(p["index"]), run.step % self.every == 0)
        self.loaded = False

    def _listen(self, name: str, host: Any, k: int, first: bool) -> None:
        m, n = host.weight.shape

        def find(x: Tensor, g: Tensor) -> None:
            if name not in self.candidates:
                many = min(int(self.pool * k), m * n)
                self.candidates[name] = largest(lambda rows: _gradient(x, g, rows).abs(), m, n, many)

        def add(x: Tensor, g: Tensor) -> None:
            gathered(x, g, self.candidates[name], self.seen[name]["now"])

        if first:
            self.candidates.pop(name, None)
            self.samples = 0
        see = find if first else add
        self.span.callback(host.register_forward_hook(lambda host, inputs, y: _Tap.apply(y, inputs[0], see)).remove)

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        self.span.close()
        if not self.every or self.variant != "ag":
            return
        if run.step >= self.every and run.step % self.every == 0:
            for name, places in self.candidates.items():
                if _several():  # what one process has seen goes for all
                    distributed.broadcast(places, 0)
                self.seen[name] = {k: torch.zeros(len(places), device=places.device) for k in SUMS}
        elif run.step >= self.every and run.step % self.every < self.accumulate:
            self.samples += 1
            for seen in self.seen.values():
                if _several():
                    distributed.all_reduce(seen["now"])
                    seen["now"] /= distributed.get_world_size()
                seen["sum"] += seen["now"]
                seen["square"] += seen["now"].square()
                seen["now"].zero_()
        young = {name: p for name, p in family.tensors(run, self).items() if bool((self.ages[name] != run.step).any())}
        self.before = {name: p["delta"].clone() for name, p in young.items()}

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if not self.every:
            return
        share = self.share(run.step, run.total)
        for name, host, _, p in family.adapters(run, self):
            if self.variant == "ag":
                self.ages[name] += 1
                if name in self.before:
                    self._aged(run, name, p["delta"])
            if many := int(share * len(p["index"])):
                (self._by_gradients if self.variant == "ag" else self._by_accumulators)(run, name, host, p, many)
        self.before = {}
        if share:
            self.candidates, self.seen = {}, {}

    def _aged(self, run: Run, name: str, phi: nn.Parameter) -> None:
        """Adam's step once more, with the age of every entry, where that is not the optimizer's."""
        (m, v, _), group, a = _adam(run, phi), _group(run, phi), self.ages[name].to(phi.dtype)
        beta1, beta2 = group["betas"]
        step = m / (1 - beta1**a) / ((v / (1 - beta2**a)).sqrt() + group["eps"])
        own = self.before[name] * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * step
        phi.copy_(torch.where(self.ages[name] == run.step, phi, own))

    def _by_gradients(self, run: Run, name: str, host: Any, p: family.Tensors, many: int) -> None:
        if name not in self.candidates:
            raise Invalid(f"SpIEL saw no gradient of {name}: every module of the adapter must be part of the loss")
        seen, c, (m, v, _) = self.seen[name], self.samples, _adam(run, p["delta"])
        gone, new = exchanged(p["index"].long(), p["delta"], self.candidates[name], seen["sum"].abs(), many)
        beta1, beta2 = _group(run, p["delta"])["betas"]
        p["index"][gone] = self.candidates[name][new].int()
        p["delta"][gone] = 0.0
        m[gone] = (1 - beta1**c) * seen["sum"][new] / c
        v[gone] = (1 - beta2**c) * seen["square"][new] / c
        self.ages[name][gone] = c
        _sort(p["index"], p["delta"], m, v, self.ages[name])

    def _by_accumulators(self, run: Run, name: str, host: Any, p: family.Tensors, many: int) -> None:
        state, (m, n) = {} if run.optimizer is None else run.optimizer.state[p["delta"]], host.weight.shape
        rho, kappa, at = state["0"], state["1"], p["index"].long()
        stay = at[p["delta"].abs().argsort(stable=True)[many:]]

        def score(rows: slice) -> Tensor:
            s = (rho[rows, None] * kappa).flatten()
            inside = (stay >= rows.start * n) & (stay < rows.stop * n)
            s[stay[inside] - rows.start * n] = -1.0
            return s.view(-1, n)

        found = largest(score, m, n, min(many, m * n - len(stay)))
        gone, new = exchanged(at, p["delta"], found, rho[found // n] * kappa[found % n], many)
        p["index"][gone], p["delta"][gone] = found[new].int(), 0.0
        _sort(p["index"], p["delta"])

    def state_dict(self) -> dict[str, Any]:
        return {"places": self.places, "ages": self.ages, "candidates": self.candidates, "seen": self.seen, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.places, self.ages, self.candidates = (
            {k: t.clone() for k, t in state[part].items()} for part in ("places", "ages", "candidates")
        )
        self.seen = {name: {k: t.clone() for k, t in sums.items()} for name, sums in state["seen"].items()}
        self.samples, self.loaded = state["samples"], True


def exchanged(active: Tensor, phi: Tensor, candidates: Tensor, score: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """(which of the active entries go, which of the candidates come in their place), at most `many`. Ties go to the lower place.

    >>> active, phi = torch.tensor([2, 5, 7]), torch.tensor([0.1, 3.0, 0.2])
    >>> gone, new = exchanged(active, phi, torch.tensor([2, 4, 5]), torch.tensor([1.0, 2.0, 9.0]), 2)
    >>> gone, new  # 2 and 7 are dropped, 4 and 2 grown: 2 stays as it is
    (tensor([2]), tensor([1]))
    """
    order = phi.abs().argsort(stable=True)
    dropped, stay = order[:many], order[many:]
    free = (~torch.isin(candidates, active[stay])).nonzero()[:, 0]
    best = free[score[free].argsort(descending=True, stable=True)][:many]
    new = best[~torch.isin(candidates[best], active[dropped])]
    return dropped[~torch.isin(active[dropped], candidates[best])][: len(new)], new


def largest(make: Callable[[slice], Tensor], m: int, n: int, many: int) -> Tensor:
    """The places, in order, of the largest of the m·n numbers whose rows `make` gives; ties go to the lower place.

    >>> largest(lambda rows: torch.tensor([[1.0, 4.0], [4.0, 3.0]])[rows], 2, 2, 2)
    tensor([1, 2])
    """
    values = places = None
    for rows in tiles(m, n):
        s = make(rows).reshape(-1)
        own = torch.arange(len(s), device=s.device) + rows.start * n
        values, places = (s, own) if values is None or places is None else (torch.cat([values, s]), torch.cat([places, own]))
        if len(values) > many:
            least = values.topk(many).values[-1]
            above, equal = (values > least).nonzero()[:, 0], (values == least).nonzero()[:, 0]
            keep = torch.cat([above, equal[: many - len(above)]]).sort().values
            values, places = values[keep], places[keep]
    assert places is not None
    return places


def gathered(x: Float[Tensor, "*t n"], g: Float[Tensor, "*t m"], places: Tensor, into: Tensor) -> None:
    """Add gᵀ x at these places, which are in order.

    >>> out = torch.zeros(2)
    >>> gathered(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]), torch.tensor([1, 2]), out)
    >>> out  # of [[3, 6], [5, 10]]
    tensor([6., 5.])
    """
    m, n = g.shape[-1], x.shape[-1]
    for rows in tiles(m, n):
        a, b = torch.searchsorted(places, torch.tensor([rows.start * n, rows.stop * n], device=places.device)).tolist()
        if b > a:
            into[a:b] += _gradient(x, g, rows).flatten()[places[a:b] - rows.start * n]


def _gradient(x: Tensor, g: Tensor, rows: slice) -> Tensor:
    return g.reshape(-1, g.shape[-1])[:, rows].float().mT @ x.reshape(-1, x.shape[-1]).float()


class _Tap(torch.autograd.Function):
    """y, and on the way back `see(x, ∂L/∂y)`. x is kept as all inputs are: where a block is computed again, it is not."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, see: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        ctx.see = see
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        ctx.see(*ctx.saved_tensors, grads[0])
        return grads[0], None, None


def _group(run: Run, p: nn.Parameter) -> dict[str, Any]:
    groups = [] if run.optimizer is None else run.optimizer.param_groups
    return next(group for group in groups if any(q is p for q in group["params"]))


def _adam(run: Run, p: nn.Parameter) -> tuple[Tensor, Tensor, Any]:
    state = {} if run.optimizer is None else run.optimizer.state.get(p, {})
    m, v = state.get("exp_avg"), state.get("exp_avg_sq")
    if not all(type(t) is Tensor and t.is_floating_point() and t.shape == p.shape for t in (m, v)):
        raise Invalid(
            "SpIEL's variant ag writes the moments of new entries, and this optimizer keeps none of Adam's: take training.optim adamw"
        )
    return m, v, state.get("step")  # pyright: ignore[reportReturnType]


def _sort(index: Tensor, *others: Tensor) -> None:
    order = index.argsort()
    for t in (index, *others):
        t.copy_(t[order])


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
