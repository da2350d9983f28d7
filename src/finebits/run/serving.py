"""What `finebits serve` is given, as an application that answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finebits.errors import Invalid, WrongUse
from finebits.recipe import Recipe
from finebits.run.stage import main_run
from finebits.runfolder import MODEL, RECIPE, RunFolder


def to_serve(what: str) -> tuple[str | Path, str]:
    """(the model of a run, a folder or a name of one, what it is called where it is served)."""
    place = Path(what)
    if not place.exists():
        return what, what.removeprefix("package:")
    name = place.resolve().name
    if (place / RECIPE).is_file():
        place = RunFolder(place).run(main_run(Recipe.load(place / RECIPE))) / MODEL
        if not place.is_dir():
            raise Invalid(f"{what} holds no trained model yet: run finebits train first")
    return place, name


def served(
    what: str,
    adapters: Path | None = None,
    keys: Path | None = None,
    limits: Any = None,
    max_rank: int = 128,
    format: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """The application that answers for a run, a folder that `save` wrote or a model, and for every adapter in a folder of them. Raises
    ValueError for all that is wrong before anything listens; adapters that cannot be served are said and left out."""
    from finebits.interop.quantizer import format_for
    from finebits.interop.serving import TUNED, Reader
    from finebits.interop.serving import served as loaded
    from finebits.serve.engine import Engine, Limits
    from finebits.serve.http import Served, app
    from finebits.serve.tenants import Tenants

    tenants = Tenants.read(keys)
    if adapters is not None and not adapters.is_dir():
        raise WrongUse(f"there is no folder of adapters at {adapters}: give the folder whose folders are adapters")
    place, name = to_serve(what)
    it = loaded(place, format_for(format))
    read, engine = Reader(it, max_rank), Engine(it.base, limits or Limits())
    own = it.own
    if own is not None:
        tenants.give(TUNED, engine.register(lambda: own, pinned=True))
    for folder in sorted(p for p in adapters.iterdir() if p.is_dir() and not p.name.startswith(".")) if adapters is not None else ():
        if folder.name in (TUNED, name):
            raise Invalid(f"{folder} has the name of what is served itself: rename it")
        try:
            tenants.give(folder.name, engine.register(read.marked(folder)))
        except (Invalid, OSError) as e:
            say(f"{folder.name} is not served: {e}")
    return app(Served(name, engine, it.tokenizer, it.stops, tenants, adapters, read.marked))
