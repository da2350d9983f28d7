"""Rounds of clients who keep their rows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finebits import registry
from finebits.cli._recipe import File, Words, read, with_rows
from finebits.cli._screen import Screen

ORDER = 32


class Engine(StrEnum):
    """What runs the rounds."""

    process = "process"
    flower = "flower"


def federate(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    aggregator: Annotated[
        str, typer.Option(metavar="NAME,NAME|all", help=f"{', '.join(registry.names('federate'))}; several are compared.")
    ] = "fedavg",
    clients: Annotated[int, typer.Option(min=1, help="The training rows are dealt to so many.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="In each of them clients train as the recipe's training says.")] = 10,
    alpha: Annotated[
        float | None,
        typer.Option(help="Skews the labels that clients have (Dirichlet): small, few of them; else dealt evenly.", show_default=False),
    ] = None,
    fraction: Annotated[float, typer.Option(help="The chance of a client to take part in a round.")] = 1.0,
    dropout: Annotated[float, typer.Option(help="The chance of one that takes part to fall out before it has sent anything.")] = 0.0,
    ranks: Annotated[
        str | None, typer.Option(metavar="R,R", help="Of clients in turn, for flora and hetlora; else the recipe's.", show_default=False)
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Differential privacy of clients: the longest update that is averaged.", show_default=False)
    ] = None,
    noise: Annotated[float | None, typer.Option(help="Noise on the sum, in multiples of --clip.", show_default=False)] = None,
    epsilon: Annotated[float | None, typer.Option(help="In its place: what all rounds come to.", show_default=False)] = None,
    delta: Annotated[float, typer.Option(help="With epsilon: well below 1 over the number of clients.")] = 1e-5,
    engine: Annotated[
        Engine, typer.Option(help="process: one client after another, here; flower: Flower's simulation, the same numbers.")
    ] = Engine.process,
    central: Annotated[bool, typer.Option("--central/--no-central", help="Train on all rows in one place too, to compare with.")] = True,
    prepare: Annotated[bool, typer.Option("--prepare", help="Write an app of Flower for nodes of their own, and train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rounds in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace them.")] = False,
) -> None:
    """Fine-tune on rows of many clients, which stay with them.

    A base is held once; of each client only the adapter is put in and taken out. Results lie in output_dir.
    """
    screen: Screen = context.obj
    names = registry.names("federate") if aggregator == "all" else tuple(aggregator.split(","))
    unknown = [n for n in names if n not in registry.names("federate")]
    if unknown:
        raise typer.BadParameter(f"there is no aggregator {unknown[0]!r}: {', '.join(registry.names('federate'))}, or all")
    try:
        each = tuple(int(r) for r in ranks.split(",")) if ranks else ()
    except ValueError:
        raise typer.BadParameter(f"--ranks takes numbers with commas, such as 16,8,4, and {ranks!r} came") from None
    if any(r < 1 for r in each):
        raise typer.BadParameter(f"--ranks takes numbers from 1 on, and {ranks!r} came")
    r = with_rows(read(words, recipe))
    with screen.working(long=True):
        from finebits.run import federated

        how = federated.How(names, clients, rounds, alpha, fraction, dropout, each, clip, noise, epsilon, delta, central, engine.value)
        told = federated.federate(r, how, resume, overwrite, prepare)
    if prepare:
        apps = list(told["apps"].values())
        return screen.show(told, lambda: "\n".join(f"{app}: flwr run {app}" for app in apps), "\n".join(apps))
    where = Path(r.output_dir) / federated.RESULTS
    screen.show(told, lambda: f"{federated.summary(told)}\nwrote {where} and {federated.PICTURE}", str(where))
