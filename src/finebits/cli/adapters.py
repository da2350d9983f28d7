"""Merge, compare and shrink adapters in folders of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finebits import registry
from finebits.cli._recipe import a_model
from finebits.cli._screen import Screen

ORDER = 51
Folder = Annotated[Path, typer.Argument(exists=True, help="A folder of PEFT that holds a LoRA.")]
Out = Annotated[Path, typer.Option(help="The folder of PEFT that is written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the adapter that the folder holds.")]


By = Annotated[str, typer.Option(help=f"{', '.join(registry.names('merging'))}: cat is exact, and its ranks add up.")]
Weights = Annotated[str | None, typer.Option(metavar="W,W", help="What stands before each; else 1.", show_default=False)]
Rank = Annotated[int | None, typer.Option(help="For svd: the rank of the result; else the largest.", show_default=False)]
Density = Annotated[float | None, typer.Option(help="For ties, dare and dare_ties: the share of entries that stay.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Of what dare draws.")]


def combine(
    context: typer.Context,
    folders: Annotated[list[Path], typer.Argument(exists=True, help="Folders of PEFT with LoRAs of one base.")],
    out: Out,
    by: By = "cat",
    weights: Weights = None,
    rank: Rank = None,
    density: Density = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """One LoRA of several."""
    screen: Screen = context.obj
    each, method = _way(by, weights, rank, density)
    with screen.working():
        from finebits.interop.adapter_folders import combine, lora_folder, write_folder

        made = combine([lora_folder(f) for f in folders], method, each, seed)
        write_folder(made, out, overwrite)
    ranks = sorted({f.rank for f in made.updates.values()})
    said = {"path": str(out), "by": by, "modules": len(made.updates), "ranks": ranks}
    screen.show(said, lambda: f"{out}: {len(made.updates)} modules, rank {' and '.join(map(str, ranks))}", str(out))


def merge(
    context: typer.Context,
    folders: Annotated[
        list[Path],
        typer.Argument(exists=True, help="A folder of PEFT (or a LoRA in GGUF), or several with LoRAs of one base, which are one first."),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the model that is written.")],
    base: Annotated[
        str | None, typer.Option(help="The base, a folder or a name; else the one that the adapters name.", show_default=False)
    ] = None,
    by: By = "cat",
    weights: Weights = None,
    rank: Rank = None,
    density: Density = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")] = False,
) -> None:
    """Adapters in the weights of their base, a matrix at a time: a model without adapters."""
    screen: Screen = context.obj
    each, method = _way(by, weights, rank, density)
    a_model(base)
    with screen.working(long=True):
        from finebits.interop.merging import merge_several

        plain = len(folders) == 1 and each is None and by == "cat"
        made = merge_several(folders, base, out, None if plain else method, each, seed, overwrite)
    screen.show(made, lambda: f"{out}: {made['bytes'] / 2**20:,.1f} MiB", str(out))


def _way(by: str, weights: str | None, rank: int | None, density: float | None) -> tuple[list[float] | None, Any]:
    """(what stands before each, the way of merging) of a command line."""
    try:
        each = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--weights takes numbers with commas, such as 0.7,0.3, and {weights!r} came") from None
    given = {"rank": rank, "density": density}
    try:
        return each, registry.from_json("merging", {"paper": by} | {k: v for k, v in given.items() if v is not None})
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def diff(context: typer.Context, first: Folder, second: Folder) -> None:
    """How far apart two LoRAs are."""
    screen: Screen = context.obj
    with screen.working():
        from finebits.interop.adapter_folders import diff, lora_folder

        told = diff(lora_folder(first), lora_folder(second))

    def human() -> str:
        row = lambda name, d: (  # noqa: E731
            f"{name}: difference {d['difference']:.4g}, of {d['first']:.4g} and {d['second']:.4g}, cosine {d['cosine']:.3f}"
        )
        lines = [row(name, d) for name, d in (*told["modules"].items(), ("all", told["all"]))]
        lines += [f"{key}: {a!r} and {b!r}" for key, (a, b) in told["settings"].items()]
        return "\n".join([*lines, *(f"{name}: in one alone" for name in (*told["only_first"], *told["only_second"]))])

    screen.show(told, human)


def compress(
    context: typer.Context,
    folder: Folder,
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The largest rank.", show_default=False)] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of the squared norm that stays in every module, such as 0.99.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """The best LoRA of lower rank, and what it leaves out."""
    screen: Screen = context.obj
    with screen.working():
        from finebits.interop.adapter_folders import compress, lora_folder, write_folder

        made = compress(lora_folder(folder), rank, energy)
        write_folder(made.adapter, out, overwrite)
    ranks = sorted(made.ranks.values())
    said = {"path": str(out), "error": made.error, "ranks": made.ranks, "errors": made.errors}
    screen.show(said, lambda: f"{out}: rank {ranks[0]} to {ranks[-1]}, relative error {made.error:.4g}", str(out))
