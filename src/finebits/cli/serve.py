"""A model and its adapters over HTTP, here or with another engine, and a page of a plan that solves it again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from finebits.cli._recipe import a_model
from finebits.cli._screen import Screen, remark
from finebits.errors import Failed

ORDER = 70
LOCAL = ("127.0.0.1", "localhost", "::1")
OURS = {"keys": "--keys", "pack": "--pack", "max_queue": "--max-queue", "studio": "--studio"}  # of the engine here, or of the page
THEIRS = {"out": "--out", "start": "--start", "verify": "--verify", "overwrite": "--overwrite", "arguments": "what stands behind --"}


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
        typer.Option(
            exists=True, help="A folder whose folders are adapters over this model: each is a model by its name.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; elsewhere than on this machine alone, --keys are needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8765,
    budget: Annotated[str, typer.Option(metavar="SIZE", help="For keys, values and adapters together, beside the model.")] = "1GiB",
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait; one more is answered with 429 at once.")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 32,
    max_rank: Annotated[int, typer.Option(min=1, help="The largest rank of an adapter.")] = 128,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, help="YAML or JSON: key -> adapters that its owner sees.", show_default=False),
    ] = None,
    pack: Annotated[
        str | None, typer.Option(help="Pack the linear layers of a dense MODEL so: nf4-b64-bf16, int8-b64, ….", show_default=False)
    ] = None,
    studio: Annotated[
        bool, typer.Option("--studio", help="The page of the plan instead, with a slider for the budget that solves it again.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="vllm|llama.cpp",
            help="Another engine: write the files that it reads and print the command that serves them (--start runs it).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --backend: where its files go; else NAME-BACKEND here.", show_default=False)
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="With --backend: become the engine, once its files are written.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="With --backend: start it, compare its logprobs with ours for three adapters, and end it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --backend: replace what else --out holds.")] = False,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- ENGINE'S OPTIONS]", help="With --backend: more for its command, such as -- --dtype float32.", show_default=False
        ),
    ] = None,
) -> None:
    """OpenAI's routes for a model and its adapters, or a plan's page."""
    sources = {name: context.get_parameter_source(name) for name in (*OURS, *THEIRS)}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    a_model(what)
    if backend is not None:
        if named := next((OURS[name] for name in OURS if name in given), None):
            raise typer.BadParameter(f"{named} is of the engine here, and --backend takes another: leave one of the two out")
        if host not in LOCAL:
            raise typer.BadParameter(
                f"--host {host} is reached from other machines, and with --backend anybody there may use, and in vLLM load, any adapter: leave "
                "it at 127.0.0.1, with a proxy before it that asks for keys"
            )
        if start and verify:
            raise typer.BadParameter("--start goes on serving and --verify ends it again: choose one")
        return _handed(
            context.obj, what, backend, adapters, out, (host, port, budget, max_batch), max_rank, start, verify, overwrite, arguments
        )
    if named := next((THEIRS[name] for name in THEIRS if name in given), None):
        raise typer.BadParameter(f"{named} is about another engine: add --backend vllm or --backend llama.cpp")
    if studio:
        told = {"--adapters": adapters, "--keys": keys, "--pack": pack, "--host": None if host in LOCAL else host}
        if named := next((option for option, value in told.items() if value is not None), None):
            raise typer.BadParameter(f"--studio shows a plan, and {named} is about models that are served: leave one of the two out")
        from finebits.serve import listen
        from finebits.serve import studio as page

        page.plan_at(Path(what))  # what cannot be read fails before anything listens
        listen.free(LOCAL[0], port)
        remark(f"http://127.0.0.1:{port}   Ctrl-C ends it")
        return page.studio(Path(what), port)
    if host not in LOCAL and keys is None:
        raise typer.BadParameter(f"--host {host} is reached from other machines: give --keys, or leave it at 127.0.0.1")
    screen: Screen = context.obj
    with screen.working():
        from finebits import sizes
        from finebits.serve import listen

        listen.free(host, port)
        from finebits.run import serving
        from finebits.serve.engine import Limits

        try:
            room = sizes.parse(budget)
        except ValueError as e:
            raise typer.BadParameter(f"--budget: {e}") from None
        limits = Limits(room, max_queue, max_batch)
        app = serving.served(what, adapters, keys, limits, max_rank, pack, lambda line: remark(f"!  {line}"))
    remark(f"http://{host}:{port}/v1   Ctrl-C or SIGTERM: requests that are in are answered, then it ends")
    listen.until_stopped(app, host, port)


def _handed(
    screen: Screen,
    what: str,
    backend: str,
    adapters: Path | None,
    out: Path | None,
    where: tuple[str, int, str, int],
    max_rank: int,
    start: bool,
    verify: bool,
    overwrite: bool,
    arguments: list[str] | None,
) -> None:
    from finebits.serve.backends import BACKENDS, Asked

    if backend not in BACKENDS:
        raise typer.BadParameter(f"--backend wants {' or '.join(BACKENDS)}, and {backend!r} came")
    engine, (host, port, budget, batch) = BACKENDS[backend], where
    rows: list[Any] = []
    with screen.working():
        from finebits import sizes
        from finebits.interop import handed as handing
        from finebits.run import serving
        from finebits.serve import comparing

        if start or verify:
            comparing.program(engine)  # before anything is written
        place, name = serving.to_serve(what)
        folder, asked = out or Path(f"{Path(name).name}-{engine.name}"), Asked(host, port, sizes.parse(budget), batch)
        made = handing.handed(
            place, name, adapters, folder, engine, asked, max_rank, tuple(arguments or ()), overwrite, lambda line: remark(f"!  {line}")
        )
        if verify:
            rows = handing.verified(place, made, adapters, engine, asked, max_rank, folder / handing.LOG)
            screen.code = 6 if any(row.verdict == "fail" for row in rows) else 0
    if not (start or verify):
        try:
            comparing.program(engine)
        except Failed as e:
            remark(f"!  {e}")
    if not start:
        data = {"backend": engine.name, "folder": str(folder), "command": made.command.line, "adapters": list(made.written.adapters)}
        data |= {"left_out": dict(made.left_out), "verified": [row._asdict() for row in rows]}
        screen.show(data, lambda: "\n".join([made.command.line, *([comparing.table(rows)] if rows else [])]), str(folder / handing.SCRIPT))
        if screen.code:
            raise typer.Exit(screen.code)
        return
    remark(made.command.line)
    os.execvpe(comparing.program(engine), list(made.command.words), os.environ | made.command.environment)
