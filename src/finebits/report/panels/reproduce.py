"""What it takes to make the same again."""

from __future__ import annotations

from finebits import registry
from finebits.report import cells
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel
from finebits.runfolder import RECIPE


def panel(run: Folder) -> Panel:
    plan = run.plan
    facts = [
        ("Plan", plan.hash),
        ("Model", plan.model or cells.ABSENT),
        ("Model hash", plan.model_hash or cells.ABSENT),
        ("Seed", str(plan.seed)),
    ]
    versions = next((e["versions"] for events in run.events.values() for e in events if e.get("versions")), None)
    facts += [(k, str(v)) for k, v in (versions or {}).items()]
    used = {
        (shape, value["paper"])
        for spec in plan.modules.values()
        for slot, shape in (("format", "formats"), ("quantizer", "quantizers"), ("adapter", "adapters"), ("init", "init"))
        if (value := registry.to_json(getattr(spec, slot))) is not None and (slot != "quantizer" or spec.format is not None)
    }
    cited = [registry.head(*u) for u in sorted(used)]
    blocks = [Block(facts=facts, half=bool(cited)), Block(head="Methods used", cited=cited, half=True)]
    if run.recipe:
        blocks.append(Block(head=RECIPE, code=run.recipe))
    return Panel("reproduce", "Reproduce", blocks)
