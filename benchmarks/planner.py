"""How fast and how near to optimal the solvers are, on a menu as large as that of a 70B-class model.

    python benchmarks/planner.py [--modules 560] [--bits 2.5 3 3.5 4] [--milp-seconds 60]

The menu: `modules` matrices with the shapes of an 80-layer decoder of hidden size 8192 (Llama-2-70B's linears), each in the 432 formats of
LQ-LoRA's grid, priced to the byte. Losses are synthetic, c·u·4^(−b)·g(block), with a sensitivity u drawn log-normally a matrix (σ = 1.2) and a
jitter of 5 % an option: what matters here is the size and the shape of the problem, not a model.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import numpy as np

from finebits.plan.base import Option, Spec
from finebits.plan.knapsack import dual_bound, total
from finebits.planners import _highs
from finebits.planners.lagrange import Lagrange
from finebits.planners.lq_lora_ilp import configs, grid

SHAPES = {
    "q_proj": (8192, 8192),
    "k_proj": (1024, 8192),
    "v_proj": (1024, 8192),
    "o_proj": (8192, 8192),
    "gate_proj": (28672, 8192),
    "up_proj": (28672, 8192),
    "down_proj": (8192, 28672),
}


def menu(modules: int, seed: int = 0) -> tuple[dict[str, list[Option]], int]:
    """The menu, and how many weights it is about."""
    rng = np.random.default_rng(seed)
    formats = grid()
    specs = [Spec(format=f) for f in formats]
    sizes = {shape: [f.storage_bits(*shape) // 8 for f in formats] for shape in set(SHAPES.values())}
    curve = np.array([4.0**-b * (1 + 0.06 * math.log2(B0 / 16)) * (1 + 0.3 * 4.0**-b0) for b, b0, _, B0, _ in configs()])
    found, weights = {}, 0
    for i in range(modules):
        kind, shape = list(SHAPES.items())[i % len(SHAPES)]
        loss = curve * float(rng.lognormal(0, 1.2)) * shape[0] * shape[1] / 2**26 * (1 + 0.05 * rng.standard_normal(len(formats)))
        found[f"layers.{i // len(SHAPES)}.{kind}"] = [Option(*row) for row in zip(specs, sizes[shape], loss.tolist(), strict=True)]
        weights += shape[0] * shape[1]
    return found, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=560)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0])
    parser.add_argument("--milp-seconds", type=float, default=60.0)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    made, weights = menu(given.modules)
    print(f"{len(made)} matrices x {len(next(iter(made.values())))} options, {weights / 1e9:.2f} G weights")
    print(" bits   lagrange s (median, worst)   loss        gap to bound   milp s   milp loss   lagrange / milp   bytes used of the budget")
    for bits in given.bits:
        budget, times = int(bits * weights / 8), []
        for _ in range(given.repeats):
            begun = time.perf_counter()
            choice = Lagrange()(made, budget)
            times.append(time.perf_counter() - begun)
        size, loss = total(choice)
        gap = loss / dual_bound(made, budget) - 1
        line = f" {bits:4.2f}   {statistics.median(times):8.3f} {max(times):8.3f}            {loss:10.6f}   {100 * gap:8.4f} %  "
        if _highs.available() and given.milp_seconds > 0:
            begun = time.perf_counter()
            exact = _highs.solve(made, budget, gap=1e-6, seconds=given.milp_seconds)
            best = total(exact.choice)[1]
            line += f"   {time.perf_counter() - begun:6.2f}  {best:10.6f}   {loss / best:.6f}{'' if exact.complete else ' (time was up)'}"
        print(line + f"   {size / budget:.6f}", flush=True)


if __name__ == "__main__":
    main()
