"""Every rule of block-size tuning from a recipe: the lines that switch it, and what they change in the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import finebits as fb
from finebits.plan.base import Plan
from finebits.plan.problem import menu_of
from finebits.recipe import Recipe
from finebits.recipe.rows import rows_of
from finebits.run.plans import priced
from tiny_llama import fresh

HEAVY, TWIN, LARGE, SMALL = (f"model.layers.{n}" for n in ("0.mlp.gate_proj", "1.mlp.gate_proj", "1.mlp.up_proj", "1.self_attn.k_proj"))
PLAIN = "quantization.planner={paper: block_size}"
SHARE = "quantization.planner={paper: block_size, overhead: 0.3}"
FOUR = "nf4-b16, nf4-b32, nf4-b64"


@pytest.fixture(scope="module")
def recipe(small: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Llama of wide MLPs, one of whose layers has heavy tails, and rows."""
    root = tmp_path_factory.mktemp("rules")
    model = fresh(tie_word_embeddings=True)
    for layer in model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj = _wide(layer.mlp)
    model.config.intermediate_size = 288
    W = model.get_submodule(HEAVY).weight.data
    W.copy_(W.pow(3) * 40)
    model.save_pretrained(root / "model")
    for file in small.glob("token*"):
        (root / "model" / file.name).write_bytes(file.read_bytes())
    for name in ("train", "held"):
        rows = (" ".join(f"w{(i * j * j) % 120 + 1}" for j in range(14)) for i in range(1, 9))
        (root / f"{name}.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    return f"""
recipe: 1
model: {{model_name_or_path: {root / "model"}, dtype: float32}}
data: {{datasets: [{{path: {root / "train.jsonl"}}}], held_out: {{path: {root / "held.jsonl"}}}, max_length: 64}}
quantization: {{candidates: [{FOUR}], objective: weight, calibration_rows: 4, planner: {{paper: block_size}}}}
adapter: {{rank: 2, init: zeros}}
output_dir: {root / "out"}
"""


def _wide(mlp: object) -> tuple:
    from torch import nn

    sizes = ((64, 288), (64, 288), (288, 64))
    made = tuple(nn.Linear(n, m, bias=False) for n, m in sizes)
    for linear in made:
        nn.init.normal_(linear.weight, std=0.15)
    return made


def planned(recipe: str, *lines: str) -> Plan:
    read = Recipe.parse(recipe, overrides=lines)
    return priced(read, rows_of(read))


def blocks(plan: Plan) -> dict[str, int]:
    return {name: s.format.block for name, s in plan.modules.items()}  # type: ignore[union-attr]


def share(plan: Plan) -> float:
    """Bytes of scales over bytes of codes, from the formats alone."""
    scales = codes = 0
    for name, s in plan.modules.items():
        m, n = plan.costs[name]["shape"]
        scales += s.format.storage_bits(m, n) / 8 - m * n / 2  # type: ignore[union-attr]
        codes += m * n / 2
    return scales / codes


def largest(plan: Plan) -> int:
    return max(c["bytes"] for c in plan.costs.values())


def less_by_fisher(base: Plan, other: Plan) -> bool:
    """Of two choices, the second loses less as the second's prices have it."""
    priced = {n: {o.spec.format: o.loss for o in options} for n, options in menu_of(other).items()}
    lost = [sum(priced[n][s.format] for n, s in plan.modules.items()) for plan in (base, other)]
    return blocks(base) != blocks(other) and lost[1] < 0.99 * lost[0]


def tried(base: Plan, other: Plan) -> bool:
    found = other.solver["trials"]
    names = {t["choice"] for t in found}
    assert {"optimum", "uniform 64"} <= names and any(" at " in n for n in names) and "trials" not in base.solver
    assert [t["kl"] for t in found] == sorted(t["kl"] for t in found) and all(t["kl"] > 0 for t in found)
    best = found[0]["choice"]
    if " at " in best:
        name, _, block = best.partition(" at ")
        return blocks(other) == blocks(base) | {name: int(block)}
    return blocks(other) == (blocks(base) if best == "optimum" else dict.fromkeys(base.modules, int(best.split()[1])))


SCALES = "quantization.candidates=[nf4-b64, {paper: nf, bits: 4, block: 32, scale: %s}]"
RULES: dict[
    str, tuple[list[str], list[str], Callable[[Plan, Plan], bool]]
] = {  # the recipe's lines before, the rule's line, what it changes
    "R1": ([PLAIN], [SHARE], lambda a, b: blocks(a)[LARGE] == blocks(a)[SMALL] and blocks(b)[LARGE] > blocks(b)[SMALL]),
    "R2 and R6": ([PLAIN], [SHARE], lambda a, b: share(a) > 0.4 and 0.2 < share(b) <= 0.3 and b.solver["blocks"]["active"] == "overhead"),
    "R3": ([PLAIN], [SHARE], lambda a, b: blocks(a)[HEAVY] == blocks(a)[TWIN] and blocks(b)[HEAVY] < blocks(b)[TWIN]),
    "R4": (
        [PLAIN],
        ["quantization.candidates=[nf4-b32, nf4-b64]"],
        lambda a, b: {*blocks(a).values()} == {16} and min(blocks(b).values()) == 32,
    ),
    "R5": (
        ["quantization.planner=uniform", "budget.memory=5 bits"],
        ["quantization.planner=block_size", "budget.memory=5 bits"],
        lambda a, b: len({*blocks(a).values()}) == 1 < len({*blocks(b).values()}) and b.solver["loss"] < a.solver["loss"],
    ),
    "R7": (
        [PLAIN],
        ["quantization.planner={paper: block_size, layer: 12000}"],
        lambda a, b: largest(a) > 12000 >= largest(b) and blocks(a)[SMALL] == blocks(b)[SMALL],
    ),
    "R8": ([SHARE], [SHARE, "quantization.objective=fisher"], less_by_fisher),
    "R9": (
        ["quantization.planner=lagrange"],
        [PLAIN],
        lambda a, b: (
            {n for n, s in b.modules.items() if s.format.unit == 16} == {n for n in b.modules if n.endswith("o_proj")}  # type: ignore[union-attr]
            and all(s.format.unit is None for s in a.modules.values())  # type: ignore[union-attr]
        ),
    ),
    "R10": (
        ["quantization.planner={paper: block_size, overhead: 0.16}", "quantization.candidates=[nf4-b64]"],
        ["quantization.planner={paper: block_size, overhead: 0.16}", SCALES % "{paper: clustered, K: 16}"],
        lambda a, b: b.solver["loss"] < 0.97 * a.solver["loss"] and share(b) <= 0.16,
    ),
    "R11": (
        ["quantization.planner={paper: block_size, overhead: 0.16}", "quantization.candidates=[nf4-b64]"],
        ["quantization.planner={paper: block_size, overhead: 0.16}", SCALES % "{paper: double, inner: fp16, offset: zero}"],
        lambda a, b: b.solver["loss"] < 0.97 * a.solver["loss"] and share(b) <= 0.16,
    ),
    "R12, trials": ([SHARE], ["quantization.planner={paper: block_size, overhead: 0.3, trials: 6}"], tried),
    "R12, heuristic": (
        [PLAIN],
        ["quantization.planner={paper: block_size, by: heuristic}"],
        lambda a, b: blocks(b)[LARGE] == 64 > blocks(b)[SMALL] and blocks(b)[HEAVY] < 64 and {*blocks(a).values()} == {16},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_acts_from_a_recipe(recipe: str, rule: str) -> None:
    before, after, changed = RULES[rule]
    assert changed(planned(recipe, *before), planned(recipe, *after))


def test_a_plan_of_blocks_is_solved_again_as_it_was(recipe: str) -> None:
    from finebits.plan.solve import again

    made = planned(recipe, "quantization.planner={paper: block_size, by: heuristic, overhead: 0.3}")
    assert again(Plan.from_json(made.to_json())).to_json() == made.to_json() and share(made) <= 0.3


def test_what_the_rules_cannot_do_is_refused(recipe: str) -> None:
    for lines, said in (
        (
            ["quantization.planner={paper: block_size, trials: 1}", "quantization.quantizer=gptq"],
            "without statistics and starts: leave the quantizer",
        ),
        (
            ["quantization.planner=block_size", "quantization.candidates=[{paper: nf, block: row}]"],
            "a candidate has none: write them as nf4-b32",
        ),
    ):
        with pytest.raises(fb.interop.selecting.Mistake, match=said):
            planned(recipe, *lines)
    locked = planned(recipe, SHARE, "quantization.locks.up_proj=null")
    assert {r["module"]: r["block"] for r in locked.solver["blocks"]["rows"]}[LARGE] is None
