"""List runs, compare two, ask why one went wrong, clean up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finebits.cli._screen import GREEN, PLAIN, RED, YELLOW, Screen

if TYPE_CHECKING:
    from finebits.report.cells import Table

ORDER = 65
HERE = Path("runs")

Folders = Annotated[
    list[Path] | None, typer.Argument(help="Folders in which runs are looked for, also below them; runs if not given.", show_default=False)
]
Run = Annotated[Path, typer.Argument(help="A run's output_dir.")]


def ls(context: typer.Context, folders: Folders = None) -> None:
    """All runs under a folder, one a line."""
    screen: Screen = context.obj
    from finebits.report import summary

    found = [summary.read(path) for path in summary.found(folders or [HERE])]

    def human() -> str:
        from finebits.report.cells import columns

        if not found:
            return f"no run in {', '.join(map(str, folders or [HERE]))}"
        unreadable = [f" {s.path}: {s.problem}" for s in found if s.problem]
        return "\n".join([summary.table(found).text(screen.colour, columns(180)).rstrip("\n"), *unreadable])

    screen.show([s.to_json() for s in found], human, "\n".join(str(s.path) for s in found), "finebits.runs/1")


def show(context: typer.Context, run: Run) -> None:
    """What one run is made of, on what, and what came out."""
    screen: Screen = context.obj
    from finebits.report import summary

    seen = summary.opened(run)

    def human() -> str:
        from finebits.report import text
        from finebits.report.panels.reproduce import files, machine, sessions

        about, colour = seen.about, screen.colour
        data, model = about.get("data") or {}, about.get("model") or {}
        facts = [("Run", str(seen.path)), ("Status", seen.status), ("Model", seen.model)]
        facts += [(f"Model {key}", str(model[key])) for key in ("revision", "fingerprint") if model.get(key)]
        facts += (
            [("Rows", f"{data['rows']:,} trained on, {data['held_out']:,} held out, fingerprint {data['fingerprint']}")] if data else []
        )
        facts += [("Plan", str(seen.record.get("plan") or "")), ("Seed", str(about.get("seed", "")))]
        facts += machine(about)
        versions = about.get("versions") or {}
        facts += [("Versions", "  ".join(f"{k} {v}" for k, v in versions.items()))] if versions else []
        facts += [("Took", summary.took(seen.seconds))] if seen.seconds is not None else []
        rate = (seen.record.get("pace") or {}).get("tokens_per_second")
        facts += [("Pace", f"{rate:,.1f} tokens/s")] if rate else []
        parts = ["\n".join(f" {name:<18} {value}" for name, value in facts if value)]
        parts += [sessions(seen.record).text(colour, text.columns())] if seen.record.get("sessions") else []
        parts += [files(data).text(colour, text.columns())] if data.get("files") else []
        parts += [text.memory_table(seen.memory, colour)] if seen.memory else []
        parts += [text.evaluation_table(seen.evaluation, colour, text.columns())] if seen.evaluation else []
        return "\n\n".join(part.rstrip("\n") for part in parts)

    told = {"record": dict(seen.record), "memory": dict(seen.memory), "evaluation": dict(seen.evaluation)}
    screen.show(seen.to_json() | told, human, str(seen.path), "finebits.run/1")


def diff(
    context: typer.Context,
    one: Annotated[Path, typer.Argument(help="A run's output_dir.")],
    other: Annotated[Path, typer.Argument(help="Another's.")],
) -> None:
    """In what two runs differ: recipe, rows, versions, plan, results."""
    screen: Screen = context.obj
    from finebits.report import summary
    from finebits.report.diff import differences

    tables = differences(summary.opened(one), summary.opened(other))

    def human() -> str:
        from finebits.report.cells import columns

        shown: list[Table] = tables
        return "\n\n".join(t.text(screen.colour, columns()).rstrip("\n") for t in shown) or "no difference"

    screen.show({t.name: {key: [x, y] for key, x, y in t.rows} for t in tables}, human, "", "finebits.diff/1")


def why(context: typer.Context, run: Run) -> None:
    """What is likely wrong with a run, with the evidence.

    It goes by rules, over events.jsonl, the data check, memory and scores; nothing is computed anew.
    """
    screen: Screen = context.obj
    from finebits.report import summary
    from finebits.report.causes import diagnose

    seen = summary.opened(run)
    causes = diagnose(seen)

    def human() -> str:
        ink = {"fail": RED, "warn": YELLOW, "info": GREEN}
        lines = []
        for cause in causes:
            mark = f"{ink[cause.sure]}{cause.sure:<5}{PLAIN}" if screen.colour else f"{cause.sure:<5}"
            lines += [f" {mark} {cause.what}", f"       {cause.evidence}", f"       try: {cause.fix}"]
        looked = ", ".join(seen.told) or "nothing"
        return "\n".join([*lines, f" looked at: {looked}; {len(causes) or 'no'} finding{'' if len(causes) == 1 else 's'}"])

    told = {"path": str(seen.path), "status": seen.status, "looked_at": seen.told, "causes": [c.to_json() for c in causes]}
    screen.show(told, human, "\n".join(c.kind for c in causes), "finebits.why/1")


def clean(
    context: typer.Context,
    folders: Folders = None,
    aside: Annotated[bool, typer.Option("--all", help="Also whole runs that a later one set aside (NAME.1, NAME.2, …).")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it; without this it is only said what would go.")] = False,
) -> None:
    """Take away checkpoints of finished runs. Files of others stay."""
    screen: Screen = context.obj
    from finebits.run import clean as cleaning
    from finebits.sizes import show as size

    found = list(cleaning.leftovers(folders or [HERE], aside))
    rows = [{"path": str(left.path), "kind": left.kind, "files": len(left.files), "bytes": left.bytes} for left in found]
    total = sum(row["bytes"] for row in rows)
    for left in found if yes else ():
        cleaning.remove(left)

    def human() -> str:
        from finebits.report.cells import Column, Table, count
        from finebits.report.cells import size as sized

        if not rows:
            return "nothing to take away"
        columns = Column("path"), Column("what"), Column("files", count), Column("size", sized)
        listed = Table("clean", columns, [tuple(row.values()) for row in rows]).text(screen.colour).rstrip("\n")
        end = f"freed {size(total)}" if yes else f"{size(total)} would be freed: --yes does it"
        return f"{listed}\n {end}"

    screen.show({"done": yes, "bytes": total, "left": rows}, human, "\n".join(row["path"] for row in rows), "finebits.clean/1")
