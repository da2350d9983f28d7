"""What it takes to make the same again: commands, versions, the machine, files, hashes."""

from __future__ import annotations

from finebits import registry
from finebits.report import cells, summary
from finebits.report.cells import Column, Json, Table, count, number, size
from finebits.report.folder import Folder
from finebits.report.pace import Pace
from finebits.report.panels.base import Block, Panel
from finebits.runfolder import RECIPE


def panel(run: Folder) -> Panel:
    plan, about = run.plan, run.record.get("about") or {}
    model, data = about.get("model") or {}, about.get("data") or {}
    facts = [
        ("Plan", plan.hash),
        ("Model", plan.model or cells.ABSENT),
        *([("Model revision", cells.text(model["revision"]))] if model.get("revision") else []),
        ("Model hash", plan.model_hash or cells.ABSENT),
        *(
            [("Rows", f"{count(data['rows'])} trained on, {count(data['held_out'])} held out, fingerprint {data['fingerprint']}")]
            if data
            else []
        ),
        ("Seed", str(plan.seed)),
        *machine(about),
        *pace(run),
    ]
    used = {
        (shape, value["paper"])
        for spec in plan.modules.values()
        for slot, shape in (("format", "formats"), ("quantizer", "quantizers"), ("adapter", "adapters"), ("init", "init"))
        if (value := registry.to_json(getattr(spec, slot))) is not None and (slot != "quantizer" or spec.format is not None)
    }
    cited = [registry.head(*u) for u in sorted(used)]
    versions = about.get("versions") or next((e["versions"] for events in run.events.values() for e in events if e.get("versions")), {})
    listed = [Table("versions", (Column("package"), Column("version")), list(versions.items()))] if versions else []
    blocks = [Block(facts=facts, half=bool(cited), tables=listed), Block(head="Methods used", cited=cited, half=True)]
    blocks += [Block(head="Commands", tables=[sessions(run.record)], open=True)] if run.record.get("sessions") else []
    blocks += [Block(head="Files of rows", tables=[files(data)])] if data.get("files") else []
    if run.recipe:
        blocks.append(Block(head=RECIPE, code=run.recipe))
    return Panel("reproduce", "Reproduce", blocks)


def machine(about: Json) -> list[tuple[str, str]]:
    """What it ran on."""
    found = about.get("machine") or {}
    if not found:
        return []
    devices = [f"{d['name']} ({d['capability']}, {size(d['total'])})" for d in found.get("devices") or ()]
    cpu = f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads of torch, {found['capability']}"
    return [
        ("Device", ", ".join(devices) or found["device"]),
        ("Processor", cells.text(cpu)),
        *([("Memory", size(found["memory"]))] if found.get("memory") else []),
        ("System", cells.text(found["system"])),
    ]


def pace(run: Folder) -> list[tuple[str, str]]:
    """How long it took, and how fast the own run trained."""
    ended = [s["seconds"] for s in run.record.get("sessions") or () if s.get("seconds") is not None]
    facts = [("Wall time", summary.took(sum(ended)))] if ended else []
    own = Pace.of(run.events.get(run.main) or ())
    if own.seconds:
        facts.append(("Training", f"{count(own.steps)} steps in {summary.took(own.seconds)}"))
        seen, trained = own.per_second(own.tokens), own.per_second(own.trained)
        rates = [f"{number(v, 1)} {what}" for v, what in ((seen, "tokens/s"), (trained, "trained tokens/s")) if v]
        facts += [("Pace", ", ".join(rates))] if rates else []
    return facts


def sessions(record: Json) -> Table:
    """Who worked at the run, in order."""
    rows = []
    for session in record.get("sessions") or ():
        code = session.get("exit")
        said = session.get("said") or ""
        rows.append((session.get("command"), session.get("seconds"), cells.ABSENT if code is None else str(code), said))
    return Table("commands", (Column("command"), Column("took", summary.took), Column("exit"), Column("said")), rows)


def files(data: Json) -> Table:
    """The files that rows came from."""
    rows = [(f.get("path"), f.get("use"), f.get("bytes"), f.get("sha256")) for f in data.get("files") or ()]
    return Table("files", (Column("file"), Column("for"), Column("size", size), Column("sha256")), rows)
