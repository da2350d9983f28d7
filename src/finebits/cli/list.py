"""The methods, by their folders, or those that a plan uses with their references."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from finebits import registry
from finebits.cli._screen import BOLD, PLAIN, Screen

ORDER = 80
SHAPES = (*registry.SHAPES, *registry.OPEN)
Shape = StrEnum("Shape", SHAPES)


def methods(
    context: typer.Context,
    shape: Annotated[Shape | None, typer.Option(help="One kind of method alone.", show_default=False)] = None,
    cite: Annotated[Path | None, typer.Option(help="The references of the methods that this plan uses.", show_default=False)] = None,
) -> None:
    """Every method, with its paper."""
    screen: Screen = context.obj
    wanted = [shape.value] if shape else list(SHAPES)
    used = None if cite is None else _used(cite)
    by_shape = {s: {name: registry.head(s, name) for name in registry.names(s) if used is None or (s, name) in used} for s in wanted}
    by_shape = {s: heads for s, heads in by_shape.items() if heads}

    def human() -> str:
        wide = max((len(name) for heads in by_shape.values() for name in heads), default=0)
        bold, plain = (BOLD, PLAIN) if screen.colour else ("", "")
        if used is not None:
            return "\n\n".join(
                f"{bold}{s}/{name}{plain}  {used[s, name]}\n{head}" for s, heads in by_shape.items() for name, head in heads.items()
            )
        blocks = [[f"{bold}{s}{plain}", *(f"  {name:{wide}}  {head}" for name, head in heads.items())] for s, heads in by_shape.items()]
        return "\n\n".join("\n".join(block) for block in blocks)

    screen.show(by_shape, human, "\n".join(f"{s}/{name}" for s, heads in by_shape.items() for name in heads))


def _used(path: Path) -> dict[tuple[str, str], str]:
    """{(shape, method): how many matrices use it} of a plan, read as the data that it is."""
    from finebits.recipe import Problem, RecipeError

    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        modules = plan["modules"] if str(plan["schema"]).startswith("finebits.plan/") else None
    except (OSError, ValueError, KeyError, TypeError):
        modules = None
    if not isinstance(modules, dict):
        raise RecipeError([Problem(f"--cite wants the plan.json that finebits plan writes, and {path} is none")])
    slots = {"format": "formats", "quantizer": "quantizers", "adapter": "adapters", "init": "init"}
    counts: dict[tuple[str, str], int] = {}

    def walk(shape: str, entry: Any) -> None:
        if isinstance(entry, dict):
            if "paper" in entry:
                counts[shape, str(entry["paper"])] = counts.get((shape, str(entry["paper"])), 0) + 1
            for value in entry.values():
                walk(shape, value)

    for spec in modules.values():
        for slot, shape in slots.items():
            if slot == "quantizer" and not spec.get("format"):
                continue  # a dense weight is not quantized, whatever the slot's default
            if slot == "init" and not spec.get("adapter"):
                continue
            walk(shape, spec.get(slot))
    for entry in plan.get("levers", {}).get("refine", ()):
        walk("refine", entry)
    walk("ranks", plan.get("solver", {}).get("ranks"))
    return {key: f"{n} {'matrix' if n == 1 else 'matrices'}" for key, n in counts.items()}
