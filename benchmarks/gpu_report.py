"""What `benchmarks/gpu.py` found, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MIB = 2**20


def rendered(found: dict[str, Any]) -> str:
    """The results as a section of RESULTS.md; what failed is said, not left out."""
    lines = ["## On a GPU", "", "`python benchmarks/gpu.py` (`make gpu`)", "", *_machine(found["machine"]), ""]
    parts = found["parts"]
    for name, part in parts.items():
        if not name.startswith("train: "):
            lines += [f"### {name}", "", *_said(part), *SECTIONS[name](part), ""]
    if any(name.startswith("train: ") for name in parts):
        lines += ["### train", "", *_train({k.removeprefix("train: "): v for k, v in parts.items() if k.startswith("train: ")}), ""]
    return "\n".join(lines)


def _machine(m: Any) -> list[str]:
    if isinstance(m, str):
        return ["```", m, "```"]
    card = f"{m['gpu']}, {m['memory'] / 2**30:.0f} GiB, compute capability {m['capability']}, " if "gpu" in m else ""
    return [f"- {card}Python {m['python']}, " + ", ".join(f"{k} {v}" for k, v in sorted(m["versions"].items()))]


def _said(part: dict[str, Any]) -> list[str]:
    run = part.get("run", {})
    lines = [f"{run.get('seconds', 0)} s, exit code {run.get('exit')}" + (", stopped at its time limit" if run.get("out of time") else "")]
    if "note" in part:
        lines.append(f"- {part['note']}")
    if "crashed" in part:
        lines.append(f"- failed: {part['crashed'].strip().splitlines()[-1]}")
    return [*lines, *(f"- failed in {e['in']}: {e['error'].splitlines()[0]}" for e in part.get("errors", [])), ""]


def _tests(part: dict[str, Any]) -> list[str]:
    return [part.get("summary", "no summary"), *(f"- {f['test']}: {f['why'].splitlines()[0]}" for f in part.get("failed", []) if f["why"])]


def _command(part: dict[str, Any]) -> list[str]:
    lines = [f"- `finebits {v['verb']}`: exit code {v['exit']}, {v['seconds']} s" for v in part.get("verbs", [])]
    for f in part.get("files", []):
        held = f["holds"]
        if held.get("schema", "").startswith("finebits.memory"):
            peaks = [
                ("train", held["planned_peak"], held["measured_peak"]),
                *((r["phase"], r["planned"], r["measured"]) for r in held["rows"]),
            ]
            lines.append(f"- {f['file']}: " + "; ".join(f"{n} planned {_mib(p)}, measured {_mib(m)}" for n, p, m in peaks))
    return lines


def _mib(n: int | None) -> str:
    return "not known" if n is None else f"{n / MIB:.1f} MiB"


# Columns of the table of products: a heading, and the contender that stands under it.
COLUMNS = {"4 bits": "ours", "3 bits": "ours, 3 bits", "2 bits": "ours, 2 bits", "bf16": "bf16", "bitsandbytes": "bitsandbytes, train"}


def _linear(part: dict[str, Any]) -> Iterator[str]:
    """One line a product: the device's own µs with the weight not in its cache, and what a call from Python takes."""
    speed = part.get("bandwidth")
    rows = part.get("rows", [])
    jobs: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in rows:
        jobs.setdefault((r["shape"], r.get("job"), r.get("tokens"), r.get("backward")), {})[r["contender"]] = r
    if speed:
        yield f"µs from a graph, weights not in the cache (copy bandwidth {speed / 1e9:.0f} GB/s); `call`: a layer called from Python."
        yield ""
    yield f"| in x out | job | {' | '.join(COLUMNS)} | 4 bits / bf16 | of the bandwidth at 4, 3, 2 bits | call: 4 bits, bf16, bitsandbytes |"
    yield "|" + "---|" * (5 + len(COLUMNS))
    for (shape, job, tokens, backward), found in sorted(jobs.items(), key=lambda j: (j[0][1] or "", j[0][0], bool(j[0][3]), j[0][2] or 0)):
        what = job or f"{tokens} token{'s' if tokens > 1 else ''}{', forward + backward' if backward else ''}"
        if job:
            found = {"bitsandbytes, train" if name == "bitsandbytes" else name: r for name, r in found.items()}
        times = [f"{found[c]['cold'] * 1e6:.1f}" if c in found else "" for c in COLUMNS.values()]
        ratio = f"{found['ours']['cold'] / found['bf16']['cold']:.2f}" if {"ours", "bf16"} <= set(found) else ""
        held = [found[c] for c in list(COLUMNS.values())[:3] if c in found]
        shares = ", ".join(f"{r['bytes'] / r['cold'] / speed:.0%}" for r in held) if speed and tokens == 1 and not backward else ""
        called = [found[c] for c in ("ours", "bf16", "bitsandbytes, train") if c in found]
        calls = ", ".join(f"{r['call'] * 1e6:.0f}" for r in called) if not job else ""
        yield f"| {shape} | {what} | {' | '.join(times)} | {ratio} | {shares} | {calls} |"


def _adapters(part: dict[str, Any]) -> Iterator[str]:
    """What the products of adapters add to a layer of side×side, ranks 4 to 64 in turn; `gathered`: a pair of products for each adapter."""
    yield "| side | rows | adapters | grouped µs | gathered / it | call: grouped, gathered | far from the reference |"
    yield "|" + "---|" * 7
    for r in part.get("rows", []):
        ours, torch = r["times"]["grouped"], r["times"]["gathered"]
        calls = f"{ours['call'] * 1e6:.0f}, {torch['call'] * 1e6:.0f}"
        ratio = f"{ours['hot'] * 1e6:.1f} | {torch['hot'] / ours['hot']:.1f}"
        yield f"| {r['side']} | {r['batch']} | {r['adapters']} | {ratio} | {calls} | {r['far']:.1e} |"


def _tune(part: dict[str, Any]) -> Iterator[str]:
    yield "| bits | body | launch | cold µs | of the bandwidth |"
    yield "|" + "---|" * 5
    for r in sorted(part.get("rows", []), key=lambda r: (r["body"], -r["bits"], r["cold"])):
        launch = ", ".join(f"{k} {r[k]}" for k in ("rows", "slices", "ahead", "split") if k in r)
        yield f"| {r['bits']} | {r['body']} | {launch} | {r['cold'] * 1e6:.1f} | {r['share']:.0%} |"


def _train(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """An 8B-shaped Llama with random weights, rank-16 LoRA on all linears, one row, checkpointing."""
    for name, part in parts.items():
        if "crashed" in part or part.get("errors") or "note" in part or part.get("run", {}).get("out of time"):
            yield from (f"- {name}: {line.removeprefix('- ')}" for line in _said(part) if line)
    yield ""
    yield "| tokens | contender | step ms | tokens/s | time / PEFT + bitsandbytes | peak MiB | planned MiB | planned / peak | made in s |"
    yield "|" + "---|" * 9
    rows = [(name, part, r) for name, part in parts.items() for r in part.get("rows", [])]
    peer = {r["tokens"]: r["step seconds"] for name, _, r in rows if name == "PEFT + bitsandbytes"}
    for name, part, r in sorted(rows, key=lambda row: row[2]["tokens"]):
        ratio = f"{r['step seconds'] / peer[r['tokens']]:.2f}" if r["tokens"] in peer else ""
        plan = f"{r['planned'] / MIB:.0f} | {r.get('planned over peak', '')}" if "planned" in r else "|"
        speed = f"{r['step seconds'] * 1e3:.0f} | {r['tokens a second']:.0f} | {ratio} | {r['peak'] / MIB:.0f}"
        yield f"| {r['tokens']} | {name} | {speed} | {plan} | {part['built']['seconds']} |"


SECTIONS = {"tests": _tests, "command": _command, "linear": _linear, "adapters": _adapters, "tune": _tune}
