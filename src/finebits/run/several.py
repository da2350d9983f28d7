"""What a recipe asks for that several processes cannot do together, said before anything is planned."""

from __future__ import annotations

from collections.abc import Sequence

from finebits.errors import Invalid
from finebits.optim._shell import refuse_layerwise
from finebits.optim.base import named
from finebits.plan.base import Plan
from finebits.plan.shared_out import part
from finebits.recipe import Recipe
from finebits.run.stage import QLORA
from finebits.sizes import show

WHOLE = "or train without --use_fsdp, where every process holds the whole model"


def check(recipe: Recipe, launch: Sequence[str], plan: Plan | None = None) -> None:
    """Raises Invalid where the processes that these words of accelerate start cannot train as the recipe says, or as its plan does."""
    from finebits.interop.launching import check_installed, parsed, shards

    found = parsed(launch, recipe.budget.device)
    check_installed(found)
    if QLORA in recipe.evaluation.compare:
        raise Invalid("the run qlora of evaluation.compare is trained in one process: leave it out, or train without arguments behind --")
    optimizer, rules = named(recipe.optimizer_value() if plan is None else plan.levers.optim), recipe.rule_values()
    if optimizer.layerwise:
        refuse_layerwise(1, 0.0, 2, rules=False)
    for rule in rules:
        if rule.across == "one":
            raise Invalid(
                f"{type(rule).__name__} changes which weights have gradients, which several processes do not agree about: train without "
                "arguments behind --, or leave the rule out"
            )
    if shards(found) is None:
        return
    for rule in rules:
        if rule.across != "rows":
            raise Invalid(
                f"{type(rule).__name__} looks at whole tensors, and FSDP leaves every process some rows of each: leave it out, {WHOLE}"
            )
    if not optimizer.rowwise:
        name = type(optimizer).__module__.rpartition(".")[2]
        raise Invalid(
            f"the optimizer {name} looks at whole tensors, or keeps its state in a way of its own, and FSDP leaves every process some rows of "
            f"each: take adamw, lion or sgd, {WHOLE}"
        )
    kinds = [adapter for adapter, _ in recipe.choices()] or [recipe.adapter_value()]
    themselves = any(kind.itself for kind in kinds)
    if plan is None:
        dtype, codes = recipe.model.dtype, themselves and None not in recipe.formats()
    else:
        dtype = plan.levers.dtype
        codes = any(s.adapter is not None and s.adapter.itself and s.format is not None for s in plan.modules.values())
    if codes:
        raise Invalid(
            "adapter full moves weights in codes one whole matrix at a time, and FSDP leaves every process some rows of each: leave "
            f"quantization.candidates out with a budget that holds dense weights, {WHOLE}"
        )
    if (themselves or recipe.adapter.modules_to_save) and dtype == "bfloat16":
        raise Invalid(
            f"weights of 16 bits are rounded by chance as they are trained, which FSDP does not: set model.dtype to float32, {WHOLE}"
        )
    if plan is not None and plan.levers.embeddings == "cpu":
        raise Invalid(
            f"the plan leaves the embeddings in host memory, from where FSDP takes them: leave embeddings out of budget.levers, {WHOLE}"
        )


def held(plan: Plan, launch: Sequence[str]) -> str:
    """What each of the processes is predicted to hold while it trains; nothing where no model is cut, or nobody says among how many."""
    from finebits.interop.launching import count, parsed, shards

    found = parsed(launch, plan.levers.device)
    processes, geometry = count(found), plan.sizes.get("geometry")
    if shards(found) is None or not processes or geometry is None or not plan.memory:
        return ""
    terms = part(plan.memory, geometry["observed"]["layers"], processes)
    return (
        f"each of {processes} processes is predicted to hold {show(sum(terms.values()))} while it trains, {show(terms['linear weights'])} of it "
        f"linear weights; the plan above, and its other phases, are of one process that holds all, as each does until the model is cut"
    )
