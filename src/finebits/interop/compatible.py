"""What cannot be asked of a plan together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finebits import rewrite
from finebits.adapters._family import Pair
from finebits.init.base import check_start, rounds_the_weight
from finebits.interop.menus import Coverage
from finebits.interop.selecting import Mistake
from finebits.optim._projected import Transformed
from finebits.optim.base import named
from finebits.plan import cost
from finebits.plan.base import Spec, served
from finebits.plan.budget import Bits, Share
from finebits.plan.planner import Planner
from finebits.refine._movable import unmovable

if TYPE_CHECKING:
    from finebits.recipe.settings import Settings


def too_wide(adapters: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """A notice where LoRAs are of a higher rank than an update of their matrix can have. Raises Mistake where no side of any matrix is so long.

    >>> too_wide({"a": fb.LoRA(rank=32)}, {"a": (64, 16)})
    ['rank 32 is more than the 16 that an update of a can have (1 of 1 matrices): more memory, and no more is learned']
    """
    ranks = {name: a.rank for name, a in adapters.items() if isinstance(a, Pair) and name in shapes}
    wide = [name for name, rank in ranks.items() if rank > min(shapes[name][-2:])]
    if not wide:
        return []
    longest = max(max(shapes[name][-2:]) for name in ranks)
    if min(ranks.values()) > longest:
        raise Mistake(f"adapter.rank is {min(ranks.values())}, and the longest side of a matrix is {longest}: lower it, 8 to 64 are usual")
    most = f"rank {ranks[wide[0]]} is more than the {min(shapes[wide[0]][-2:])} that an update of {wide[0]} can have"
    return [f"{most} ({len(wide)} of {len(ranks)} matrices): more memory, and no more is learned"]


def _paper(value: Any) -> str:
    """The name by which a recipe has it."""
    return type(value).__module__.rpartition(".")[2]


def refuse_conflicts(s: Settings, covered: Coverage, fast: bool, stated: int | Bits | Share | None) -> None:
    """Raise Mistake where two things that were asked for cannot be had together."""
    if isinstance(stated, Bits) and s.serve_budget is not None:
        raise Mistake(
            f"budget.memory is {stated.average:g} bits, which bound what is saved as well: leave budget.serve_memory out, or state "
            "budget.memory in bytes"
        )
    _served(s)
    _planner(s, covered, fast)
    for init in s.inits or (s.init,):
        try:
            check_start(s.adapter, init)
        except ValueError as e:
            raise Mistake(str(e)) from None
    if s.dropout and not s.adapter.drops:
        raise Mistake(f"dropout of the inputs has no meaning for {type(s.adapter).__name__}: leave adapter.dropout out")
    if s.adapter.over != "matrix" and (s.ranks or s.ranking is not None):
        raise Mistake(f"ranks are chosen matrix by matrix, and {type(s.adapter).__name__} lies over none: leave adapter.ranks out")
    if s.adapter.over != "matrix" and (s.rank_pattern or s.alpha_pattern):
        key = "rank_pattern" if s.rank_pattern else "alpha_pattern"
        raise Mistake(f"adapter.{key} is of matrices, and {type(s.adapter).__name__} lies over none: leave it out")
    for f in dict.fromkeys(f for f in (*s.formats, *covered.fixed.values()) if f is not None and s.adapter.itself):
        try:
            rewrite.check(f)
        except ValueError as e:
            raise Mistake(str(e)) from None
    for f in dict.fromkeys((*s.formats, *covered.fixed.values())) if s.adapter.form == "codes" else ():
        try:
            served(Spec(f, adapter=s.adapter))
        except ValueError as e:
            raise Mistake(str(e)) from None
    optimizer = named(s.optim)
    if isinstance(optimizer, Transformed) and not s.adapter.itself:
        raise Mistake(
            f"{_paper(optimizer)} transforms gradients of weights that are trained themselves, and {type(s.adapter).__name__} trains others "
            "beside them: take adapter full, or another optimizer"
        )
    if optimizer.only not in (None, _paper(s.adapter)):
        raise Mistake(
            f"{_paper(optimizer)} steps the tensors of adapter {optimizer.only} alone, and {type(s.adapter).__name__} has others: take "
            "that adapter, or another training.optim"
        )
    _clips(s)
    if why := unmovable(s.refine, (*s.formats, *covered.fixed.values())):
        raise Mistake(why)
    joint = "ranks" if s.ranks else "starts" if s.inits else ""
    if s.objective not in cost.OBJECTIVES:
        raise Mistake(f"the objective is {s.objective!r}; it can be {', '.join(cost.OBJECTIVES)}")
    if fast and joint:
        raise Mistake("ranks and starts are chosen by what they do to the weights, and --fast does not read them: plan without it")
    nats = s.objective in ("fisher", "kl")
    if fast and nats:
        raise Mistake(f"the objective {s.objective} needs the model's weights and rows, and --fast reads neither: plan without it")
    if covered.fused and not fast:
        raise Mistake(
            f"{covered.fused[0]} holds all experts in one tensor and says not how it is computed with, so that they cannot be taken apart: "
            "leave it out of target_modules, or name it in exclude_modules"
        )
    if nats and covered.head:
        raise Mistake(
            f"an 8-bit head is priced by its weight error, and the objective {s.objective} counts nats: leave head out of budget.levers"
        )
    if s.objective == "kl" and joint:
        raise Mistake(f"the objective kl measures variants without their starts, so {joint} cannot be chosen under it: use fisher")
    if s.pricing is not None and (joint or s.objective == "kl"):
        why = f"{joint} are" if joint else "the objective kl measures variants"
        raise Mistake(f"quantization.pricing rounds otherwise than the quantizer, and {why} chosen as they will be: leave pricing out")
    if s.objective == "kl" and s.quantizer.needs:
        raise Mistake(
            f"the objective kl measures variants as they are rounded, and {type(s.quantizer).__name__} needs statistics: use fisher"
        )
    if s.ranking is not None and s.ranks:
        raise Mistake("ranks are given out before the bits are chosen, or chosen with them: leave ranking out, or ranks")
    if s.ranking is not None and fast:
        raise Mistake(f"{type(s.ranking).__name__} gives out ranks by weights and rows, and --fast reads neither: plan without it")
    if s.planner.trials and (s.quantizer.needs or s.pricing is not None or s.inits):
        what = (
            "adapter.inits"
            if s.inits
            else "quantization.pricing"
            if s.pricing is not None
            else f"the quantizer {type(s.quantizer).__name__}"
        )
        raise Mistake(
            f"block_size's trials measure weights as they are rounded, without statistics and starts: leave {what} out, or trials"
        )


def _planner(s: Settings, covered: Coverage, fast: bool) -> None:
    """Raise Mistake where the planner does not keep to what is asked for beside it."""
    planner, name = s.planner, type(s.planner).__module__.rpartition(".")[2]
    if not isinstance(planner, Planner):
        raise Mistake(f"{name} gives out ranks and no bits: write adapter.ranks={name}, and take the planner lagrange for the bits")
    asked = {"fixed": covered.fixed, "head": covered.head, "tables": covered.tables, "ranks": s.ranks}
    keys = {
        "fixed": "quantization.locks or overrides",
        "head": "head in budget.levers",
        "tables": "quantization.embeddings",
        "ranks": "adapter.ranks",
    }
    what = next(
        (keys[feature] for feature, there in asked.items() if there and {"tables": "head"}.get(feature, feature) not in planner.honours),
        None,
    )
    if what is not None:
        raise Mistake(f"the planner {name} {planner.because}: leave {what} out, or take another planner")
    if planner.tunes_blocks and any(not isinstance(getattr(f, "block", None), int) for f in s.formats):
        raise Mistake(f"the planner {name} chooses among blocks of a width, and a candidate has none: write them as nf4-b32, nf4-b64, …")
    if fast and (planner.trials or "kurtosis" in planner.asks):
        raise Mistake(f"{name}'s trials and heuristic look at the weights, and --fast does not read them: plan without it")
    if s.serve_budget is not None and s.ranks and "serve" not in planner.honours and not planner.deputy:
        raise Mistake(f"with ranks to choose, a serve budget is a second limit that {name} does not keep: take the planner milp")
    if "latency" in planner.asks:
        raise Mistake("a limit on latency needs a menu that says how long a candidate takes, and plans of models do not: leave latency out")


def _served(s: Settings) -> None:
    """Raise Mistake where what a server holds has no budget, or is no plain product."""
    key = "serve_adapters" if s.serve_adapters else "serve_tokens" if s.serve_tokens else None
    if key is not None and s.serve_budget is None:
        raise Mistake(f"budget.{key} counts in the budget for serving, and there is none: give budget.serve_memory, or leave it out")
    if s.serve_rank is not None and not s.serve_adapters:
        raise Mistake("budget.serve_rank is of the adapters that budget.serve_adapters counts: say how many, or leave it out")
    if s.serve_adapters and (s.adapter.form != "product" or s.adapter.over != "matrix"):
        raise Mistake(f"a server holds plain products, and {type(s.adapter).__name__} is none: leave budget.serve_adapters out")


def _clips(s: Settings) -> None:
    """Raise Mistake where clipping is to be learned and a weight is not rounded to nearest."""
    who = next((type(r).__name__ for r in s.refine if "clips" in r.moves), None)
    if who is None:
        return
    instead = "use its scales instead of clip, which serve any codes"
    if not s.quantizer.nearest:
        name = type(s.quantizer).__name__
        raise Mistake(
            f"{who}'s clip rounds weights to nearest at every step, which would undo what {name} has found: take rtn, or {instead}"
        )
    for init in s.inits or (s.init,):
        if not rounds_the_weight(s.adapter, init):
            name = type(init).__name__
            raise Mistake(
                f"{who}'s clip rounds the weight itself, and {name} rounds what it leaves beside the adapter: take qera, or {instead}"
            )
