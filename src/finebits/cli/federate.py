"""Rounds of clients who keep their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from finebits import registry
from finebits.cli._recipe import File, Words, read, with_rows
from finebits.cli._screen import Screen

ORDER = 32


class Engine(StrEnum):
    """What runs the rounds."""

    process = "process"
    flower = "flower"


def _own(help: str, default: str) -> Any:
    """An option that is a key of the recipe's federation."""
    return typer.Option(help=help, show_default=f"the recipe's, else {default}")


def federate(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    aggregator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME|all",
            help=f"{', '.join(registry.names('federate'))}; several are compared. Those that the recipe names keep their settings.",
            show_default="the recipe's, else fedavg",
        ),
    ] = None,
    clients: Annotated[int | None, _own("The training rows are dealt to so many.", "20")] = None,
    rounds: Annotated[int | None, _own("In each of them clients train as the recipe's training says.", "10")] = None,
    alpha: Annotated[float | None, _own("Skews the labels that clients have (Dirichlet): small, few of them.", "dealt evenly")] = None,
    fraction: Annotated[float | None, _own("The chance of a client to take part in a round.", "1")] = None,
    dropout: Annotated[float | None, _own("The chance of one that takes part to fall out before it has sent anything.", "0")] = None,
    ranks: Annotated[
        str | None,
        typer.Option(metavar="R,R", help="Of clients in turn, for flora and hetlora.", show_default="the recipe's, else the adapter's"),
    ] = None,
    clip: Annotated[float | None, _own("Differential privacy of clients: the longest update that is averaged.", "none")] = None,
    noise: Annotated[float | None, _own("Noise on the sum, in multiples of --clip.", "none")] = None,
    epsilon: Annotated[float | None, _own("In its place: what all rounds come to.", "none")] = None,
    delta: Annotated[float | None, _own("With epsilon: well below 1 over the number of clients.", "1e-05")] = None,
    engine: Annotated[
        Engine, typer.Option(help="process: one client after another, here; flower: Flower's simulation, the same numbers.")
    ] = Engine.process,
    central: Annotated[
        bool | None,
        typer.Option(
            "--central/--no-central", help="Train on all rows in one place too, to compare with.", show_default="the recipe's, else central"
        ),
    ] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Write an app of Flower for nodes of their own, and train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rounds in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace them.")] = False,
) -> None:
    """Fine-tune on rows of many clients, which stay with them.

    A base is held once; of each client only the adapter is put in and taken out. Results lie in output_dir.
    """
    screen: Screen = context.obj
    said = {
        "clients": clients,
        "rounds": rounds,
        "dirichlet_alpha": alpha,
        "fraction_train": fraction,
        "client_dropout": dropout,
        "client_ranks": _ranks(ranks),
        "clipping_norm": clip,
        "noise_multiplier": noise,
        "epsilon": epsilon,
        "delta": delta,
        "compare_central": central,
    }
    more = [f"federation.{key}={json.dumps(value)}" for key, value in said.items() if value is not None]
    r = read(words, recipe, more)
    if aggregator is not None:
        r = read(words, recipe, [*more, f"federation.aggregators={json.dumps(_chosen(aggregator, r.federation.aggregators))}"])
    r = with_rows(r)
    with screen.working(long=True):
        from finebits.run import federated

        told = federated.federate(r, federated.How.of(r, engine.value), resume, overwrite, prepare)
    if prepare:
        apps = list(told["apps"].values())
        return screen.show(told, lambda: "\n".join(f"{app}: flwr run {app}" for app in apps), "\n".join(apps))
    where = Path(r.output_dir) / federated.RESULTS
    screen.show(told, lambda: f"{federated.summary(told)}\nwrote {where} and {federated.PICTURE}", str(where))


def _ranks(ranks: str | None) -> list[int] | None:
    try:
        return None if ranks is None else [int(r) for r in ranks.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--ranks takes numbers with commas, such as 16,8,4, and {ranks!r} came") from None


def _chosen(aggregator: str, said: Sequence[Any]) -> list[Any]:
    """The aggregators of an option, with the settings that a recipe has of them."""
    known = registry.names("federate")
    names = list(known) if aggregator == "all" else aggregator.split(",")
    if unknown := next((n for n in names if n not in known), None):
        from finebits.recipe.mistakes import nearest

        meant = nearest(unknown, known)
        raise typer.BadParameter(
            f"there is no aggregator {unknown!r}{f', did you mean {meant}?' if meant else ''} ({', '.join(known)}, or all)"
        )
    settings = {e["paper"]: e for e in said if isinstance(e, dict)}
    return [settings.get(n, n) for n in dict.fromkeys(names)]
