"""A model and its adapters over HTTP, and a page of a plan that solves it again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finebits.cli._screen import Screen

ORDER = 70
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="An output_dir, a saved folder, or a model as in recipes; with --studio a plan.json or its folder."
        ),
    ],
    adapters: Annotated[
        Path | None,
        typer.Option(help="A folder whose folders are adapters over this model: each is a model by its name.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; elsewhere than on this machine alone, --keys are needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8765,
    budget: Annotated[str, typer.Option(metavar="SIZE", help="For keys, values and adapters together, beside the model.")] = "1GiB",
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait; one more is answered with 429 at once.")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 32,
    max_rank: Annotated[int, typer.Option(min=1, help="The largest rank of an adapter.")] = 128,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML or JSON: key -> adapters that its owner sees.", show_default=False)
    ] = None,
    pack: Annotated[
        str | None, typer.Option(help="Pack the linear layers of a dense MODEL so: nf4-b64-bf16, int8-b64, ….", show_default=False)
    ] = None,
    studio: Annotated[
        bool, typer.Option("--studio", help="The page of the plan instead, with a slider for the budget that solves it again.")
    ] = False,
) -> None:
    """OpenAI's routes for a model and its adapters; or a local page of a plan."""
    if studio:
        told = {"--adapters": adapters, "--keys": keys, "--pack": pack, "--host": None if host in LOCAL else host}
        if named := next((option for option, value in told.items() if value is not None), None):
            raise typer.BadParameter(f"--studio shows a plan, and {named} is about models that are served: leave one of the two out")
        from finebits.serve import studio as page

        page.plan_at(Path(what))  # what cannot be read fails before anything listens
        print(f"http://127.0.0.1:{port}   Ctrl-C ends it", file=sys.stderr)
        return page.studio(Path(what), port)
    if host not in LOCAL and keys is None:
        raise typer.BadParameter(f"--host {host} is reached from other machines: give --keys, or leave it at 127.0.0.1")
    screen: Screen = context.obj
    with screen.working():
        from finebits import job, sizes
        from finebits.serve.engine import Limits

        limits = Limits(sizes.parse(budget), max_queue, max_batch)
        app = job.served(what, adapters, keys, limits, max_rank, pack, lambda line: print(f"!  {line}", file=sys.stderr))
    import uvicorn

    print(f"http://{host}:{port}/v1   Ctrl-C or SIGTERM: requests that are in are answered, then it ends", file=sys.stderr)
    uvicorn.run(app, host=host, port=port, log_level="warning", server_header=False)
