"""Optimizers that transform gradients against AdamW: time and state over SmolLM2-135M's matrices, a training step, and others' code.

    OMP_NUM_THREADS=1 python benchmarks/optimizers.py [step] [training] [peers] [--rank 64] [--layers 6] [--peers-from FOLDER] [--only galore …]

`step`: one optimizer step over the matrices of some layers, the search for a basis spread over its gap, and the bytes of state; `--only` for
some of them, by name, beside AdamW.
`training`: forward, backward and step of a model of SmolLM2's shapes with random weights, 512 tokens.
`peers`: pytorch-optimizer's GaLore and torchao's AdamW8bit on the same gradients, if FOLDER (pip install --no-deps --target FOLDER) or the
environment has them: how far the weights are apart after one interval and after several, time and state.
Contenders take turns, and each counts with its fastest turn, in processor time: read the ratios.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from finebits.optim.base import named

HIDDEN, KEYS, INNER, LAYERS, VOCABULARY = 576, 192, 1536, 30, 49152
LAYER = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
TURNS, GAP, RATE = 9, 200, 1e-3
Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


def ours(rank: int) -> dict[str, Make]:
    """Contenders by name, AdamW first."""
    from finebits import registry

    def make(paper: str, **settings: Any) -> Make:
        kind = registry.from_json("optim", {"paper": paper} | settings)
        return lambda held: kind.make([{"params": list(held), "weight_decay": 0.0}], lr=RATE)

    return {
        "adamw": make("adamw"),
        "torch's AdamW, fused": lambda held: torch.optim.AdamW(held, lr=RATE, weight_decay=0.0, fused=True),
        f"galore {rank}": make("galore", rank=rank),
        f"galore {rank}, warm": make("galore", rank=rank, search="warm"),
        f"galore {rank}, exact": make("galore", rank=rank, search="exact"),
        f"q_galore {rank}, adamw inside": make("q_galore", rank=rank, inner="adamw"),
        f"natural_galore {rank}": make("natural_galore", rank=rank),
        f"fira {rank}": make("fira", rank=rank),
        f"apollo {rank}": make("apollo", rank=rank),
        "apollo 1 (Mini)": make("apollo", rank=1),
    }


def others(rank: int) -> dict[str, Make]:
    """The code of others, as far as it is installed."""
    found: dict[str, Make] = {}
    try:
        from pytorch_optimizer import GaLore  # type: ignore[import-not-found]

        settings = {"rank": rank, "update_proj_gap": GAP, "scale": 0.25, "projection_type": "std"}
        found[f"pytorch-optimizer GaLore {rank}"] = lambda held: GaLore([{"params": list(held), "weight_decay": 0.0} | settings], lr=RATE)
    except ImportError as e:
        print(f"\npytorch-optimizer: {e}")
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found]

        found["adamw_torch_8bit (torchao, not compiled)"] = lambda held: named("adamw_torch_8bit").make(held, RATE)
        found["torchao AdamW8bit"] = lambda held: AdamW8bit(held, lr=RATE, weight_decay=0.0)
    except ImportError as e:
        print(f"\ntorchao: {e}")
    return found


def seconds(f: Callable[[], Any]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def held_bytes(value: Any) -> int:
    """Of all tensors in an optimizer's state, also in objects and subclasses there."""
    if isinstance(value, Tensor):
        inner = [getattr(value, name) for name in value.__tensor_flatten__()[0]] if hasattr(value, "__tensor_flatten__") else []
        return sum(map(held_bytes, inner)) if inner else value.nbytes
    parts = vars(value) if hasattr(value, "__dict__") else value
    parts = parts.values() if isinstance(parts, dict) else parts if isinstance(parts, list | tuple) else ()
    return sum(map(held_bytes, parts))


def step(rank: int, layers: int, only: list[str]) -> None:
    gen = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=gen)) for shape in LAYER * layers]
    for p in weights:
        p.grad = torch.randn(p.shape, generator=gen)
    makes = {k: make for k, make in (ours(rank) | others(rank)).items() if not only or k == "adamw" or k in only}
    made = {name: make(weights) for name, make in makes.items()}
    first = {name: seconds(optimizer.step) for name, optimizer in made.items()}
    later = {name: min(turn) for name, turn in turns({name: optimizer.step for name, optimizer in made.items()}).items()}
    for name, optimizer in made.items():  # a basis after the first: what a warm search does
        searching = [state for state in optimizer.state.values() if "transform.found" in state]
        for state in searching:
            state["transform.found"] = -GAP
        first[name] = min(first[name], seconds(optimizer.step)) if searching else first[name]
    base = later["adamw"]
    print(f"\n{layers} of {LAYERS} layers, {sum(p.numel() for p in weights):,} weights\n")
    print("| optimizer | ms a step | search, ms | with the search over its gap | time / AdamW | state, MiB | state / AdamW |")
    print("|---|---|---|---|---|---|---|")
    size = {name: sum(map(held_bytes, optimizer.state.values())) for name, optimizer in made.items()}
    for name, t in later.items():
        search = max(first[name] - t, 0.0) if any(word in name.lower() for word in ("galore", "fira")) else 0.0
        whole = t + search / GAP
        times = f"{t * 1e3:.1f} | {search * 1e3:.0f} | {whole * 1e3:.1f} | {whole / base:.2f}"
        print(f"| {name} | {times} | {size[name] / 2**20:.1f} | {size[name] / size['adamw']:.3f} |")


def turns(jobs: dict[str, Callable[[], Any]], count: int = TURNS) -> dict[str, list[float]]:
    """Seconds of each, one after the other, so often."""
    out: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(count):
        for name, job in jobs.items():
            out[name].append(seconds(job))
    return out


def training(rank: int, layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3
    )
    config.vocab_size, config.tie_word_embeddings = VOCABULARY, True
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    tokens = torch.randint(0, VOCABULARY, (1, 512))

    def one(optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.zero_grad()

    made = {name: make(matrices) for name, make in ours(rank).items() if name in ("adamw", f"galore {rank}")}
    first = {name: seconds(lambda o=o: one(o)) for name, o in made.items()}
    later = {name: min(t) for name, t in turns({name: lambda o=o: one(o) for name, o in made.items()}, 4).items()}
    print(f"\nTraining, {layers} of {LAYERS} layers, embeddings frozen, 512 tokens\n")
    print("| optimizer | s a step, search over its gap | / AdamW |\n|---|---|---|")
    whole = {name: t + max(first[name] - t, 0.0) / GAP * (name != "adamw") for name, t in later.items()}
    for name, t in whole.items():
        print(f"| {name} | {t:.3f} | {t / whole['adamw']:.3f} |")


def peers(rank: int, eps: float = 1e-12) -> None:
    """ε as good as nothing: where it is added differs between the two."""
    shape, gen = (INNER, HIDDEN), torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(k, HIDDEN, generator=gen)).Q for k in shape)
    gradients = [U * (1 / torch.arange(1, HIDDEN + 1)) @ V.T + 1e-3 * torch.randn(shape, generator=gen) for _ in range(24)]
    galore = {
        "galore 64, exact": lambda p: named_kind("galore", rank=rank, gap=8, scale=1.0, search="exact").make(p, RATE, (0.9, 0.999), eps)
    }
    eight = {"adamw": lambda p: named("adamw").make(p, RATE), "adamw_8bit (bitsandbytes)": lambda p: named("adamw_8bit").make(p, RATE)}
    try:
        from pytorch_optimizer import GaLore  # type: ignore[import-not-found]

        settings = {"rank": rank, "update_proj_gap": 8, "scale": 1.0, "projection_type": "std"}
        galore["pytorch-optimizer GaLore"] = lambda p: GaLore([p[0] | settings], lr=RATE, eps=eps)
        galore["the same, searches and signs as ours"] = lambda p: aligned(GaLore([p[0] | settings], lr=RATE, eps=eps))
    except ImportError as e:
        print(f"\npytorch-optimizer: {e}")
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found]

        eight["adamw_torch_8bit (torchao, not compiled)"] = lambda p: named("adamw_torch_8bit").make(p, RATE)
        eight["torchao AdamW8bit"] = lambda p: AdamW8bit(p, lr=RATE, weight_decay=0.0)
    except ImportError as e:
        print(f"\ntorchao: {e}")
    for contenders in (galore, eight):
        weights = {name: nn.Parameter(torch.zeros(shape)) for name in contenders}
        made = {name: make([{"params": [weights[name]], "weight_decay": 0.0}]) for name, make in contenders.items()}
        took: dict[str, list[float]] = {name: [] for name in made}
        apart: dict[int, dict[str, float]] = {}
        for t, G in enumerate(gradients):
            for name, optimizer in made.items():
                weights[name].grad = G.clone()
                took[name].append(seconds(optimizer.step))
            moved = {name: p.detach() for name, p in weights.items()}
            base = next(iter(moved.values()))
            apart[t + 1] = {name: float((p - base).norm() / base.norm()) for name, p in moved.items()}
        print("\n| optimizer | apart after 7 steps | after 24 | ms a step, mean of the last 16 | state, KiB |\n|---|---|---|---|---|")
        for name, optimizer in made.items():
            size = sum(map(held_bytes, optimizer.state.values())) / 2**10
            mean = sum(took[name][8:]) / len(took[name][8:])
            print(f"| {name} | {apart[7][name]:.1e} | {apart[24][name]:.1e} | {mean * 1e3:.2f} | {size:.0f} |")


def aligned(optimizer: Any) -> Any:
    """pytorch-optimizer's GaLore with two things as ours: it searches at steps 1, 8, 16 … for a gap of 8, where ours does at 1, 9, 17 …, and
    leaves signs of singular vectors to LAPACK, where ours makes the largest entry of each positive: moments, which stay when P changes, mean
    something else under another sign."""
    import pytorch_optimizer.optimizer.galore as theirs  # type: ignore[import-not-found]

    from finebits.linalg import signs

    class Ours(theirs.GaLoreProjector):
        def project(self, grad: Tensor, num_steps: int, *rest: Any, **more: Any) -> Tensor:
            return super().project(grad, num_steps - 1, *rest, **more)

        def get_orthogonal_matrix(self, weights: Tensor, projection_type: str, *rest: Any, **more: Any) -> Any:
            P = super().get_orthogonal_matrix(weights, projection_type, *rest, **more)
            return P * signs(P.mT).mT if projection_type == "right" else P * signs(P)

    step = optimizer.step

    def stepped() -> None:
        kind, theirs.GaLoreProjector = theirs.GaLoreProjector, Ours
        step()
        theirs.GaLoreProjector = kind

    optimizer.step = stepped
    return optimizer


def named_kind(paper: str, **settings: Any) -> Any:
    from finebits import registry

    return registry.from_json("optim", {"paper": paper} | settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], metavar="step|training|peers")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--peers-from", metavar="FOLDER")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    args = parser.parse_args()
    if args.peers_from:
        sys.path.append(args.peers_from)
    torch.set_num_threads(1)
    for part in args.parts or ("step", "training", "peers"):
        {
            "step": lambda: step(args.rank, args.layers, args.only),
            "training": lambda: training(args.rank, args.layers),
            "peers": lambda: peers(args.rank),
        }[part]()


if __name__ == "__main__":
    main()
