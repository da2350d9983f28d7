"""Models of transformers and adapters in folders, as the engine of `finebits.serve` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finebits.arithmetic import dtypes
from finebits.build import MOVED, hosts
from finebits.carrier import carriers
from finebits.errors import Invalid
from finebits.evaluate.stepped import AWAY
from finebits.formats.base import Format
from finebits.interop.adapter_set import held_in
from finebits.interop.checkpoint import config_of
from finebits.interop.configs import class_of, raw_config
from finebits.interop.from_peft import belonging
from finebits.interop.hf import folder_of, load, load_planned, ready
from finebits.interop.peft_folder import CONFIG, opened, place
from finebits.interop.selecting import meta, targets
from finebits.interop.tokenizer import stops_of
from finebits.merging.base import Factors
from finebits.peft_forms.base import Held
from finebits.plan.base import Plan, Spec
from finebits.plan.levers import WIDTHS, Levers
from finebits.serve.attention import attend, observing
from finebits.serve.engine import Base, Engine, Limits
from finebits.serve.grouped import check
from finebits.serve.requests import Request, Sampling
from finebits.store import MANIFEST, plan_of

TUNED = "tuned"  # what a model's own adapter is called where it is served beside others
PAGED = "finebits_paged"  # in transformers' registry of attentions
LONGEST = 1 << 16  # tokens, of models that do not say


class Served(NamedTuple):
    """A model to serve: with its tokenizer, the ids that end a text, the folder whose fingerprint adapters are held against, and the adapter
    that it came with, taken off where it is a plain product."""

    base: Base
    tokenizer: Any
    stops: frozenset[int]
    folder: Path
    revision: str | None
    own: Mapping[str, Factors] | None


def served(what: str | Path, format: Format | None = None) -> Served:
    """The model of a folder that `save` wrote, or that a name of a model leads to, with its linear layers in `format` where one is given.

    Raises ValueError where it generates no text, or attends in a way that has no paged form here.
    """
    saved = Path(what)
    if (saved / MANIFEST).is_file() and not (saved / "config.json").is_file():
        if format is not None:
            raise Invalid(f"{what} has its formats already: leave --pack out")
        model, tokenizer = load(saved)
        folder, revision = folder_of(plan_of(model).model, plan_of(model).model_revision), plan_of(model).model_revision
    else:
        folder, revision = folder_of(what), None
        model, tokenizer = _of_folder(folder, str(what), format)
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise Invalid(f"{what} is a {type(model).__name__}, which does not go on with a text: serve a causal language model")
    own = taken_off(model)
    return Served(based(model), tokenizer, frozenset(stops_of(folder, tokenizer)), folder, revision, own)


def _of_folder(folder: Path, name: str, format: Format | None) -> tuple[Any, Any]:
    config = config_of(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = str(config.dtype or torch.float32).removeprefix("torch.")
    dtype = dtypes(said if said in WIDTHS else "float32", device)[
        1
    ]  # what is computed in: nothing is trained, and nothing widened at every step
    if "quantization_config" in raw_config(folder):
        if format is not None:
            raise Invalid(f"{name} is quantized already: leave --pack out")
        model = class_of(config).from_pretrained(folder, dtype=getattr(torch, dtype), device_map=device).eval()
        return ready(model, folder)
    names = targets(meta(folder), "all-linear") if format is not None else {}
    plan = Plan({n: Spec(format) for n in names}, model=name, levers=Levers(dtype=dtype, device=device))
    return load_planned(plan)


def taken_off(model: Any) -> dict[str, Factors] | None:
    """The adapter of a model as factors, silent in the model from now on. None where there is none, and where it is no plain product: it stays
    in the model then, and is served with it."""
    of = {name: [a for a in host.active if a != MOVED] for name, host in hosts(model)}
    adapted = {name: host for name, host in hosts(model) if of[name]}
    plain = all(len(of[n]) == 1 and host.kinds[of[n][0]].form == "product" for n, host in adapted.items())
    if not adapted or not plain or any(c.active for _, c in carriers(model)):
        return None
    found = {}
    for name, host in adapted.items():
        found[name] = factors_of(Held(host.kinds[of[name][0]], {k: t.detach() for k, t in host.tensors(of[name][0]).items()}))
        host.active = [a for a in host.active if a == MOVED]
    return found


def factors_of(held: Held) -> Factors:
    """A product as factors, its scale apart where it has one."""
    kind: Any = held.adapter
    if hasattr(kind, "s") and held.p.keys() == {"A", "B"}:
        return Factors(held.p["B"].float(), held.p["A"].float(), float(kind.s))
    return Factors(*(t.float() for t in kind.lowrank(held.p)))


def based(model: Any) -> Base:
    """A causal language model of transformers, as the engine takes it. Raises ValueError where paged attention does not give what the model's
    own gives, which is tried."""
    from transformers import AttentionInterface

    config, linears = model.config.get_text_config(), {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    device, vocabulary = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, 9), generator=torch.Generator().manual_seed(0)).to(device)
    seen, through = dict[int, tuple[int, int]](), set[str]()
    dtype: list[torch.dtype] = []

    def noting(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].numel() == ids.numel() * args[0].shape[-1]:
                through.add(name)

        return hook

    def watching(module: Any, query: Tensor, key: Tensor, *args: Any, **more: Any) -> Any:
        dtype.append(key.dtype)
        return observing(seen)(module, query, key, *args, **more)

    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        AttentionInterface.register(PAGED, watching)
        model.set_attn_implementation(PAGED)
        handles = [linear.register_forward_pre_hook(noting(name)) for name, linear in linears.items()]
        try:
            model(input_ids=ids, position_ids=torch.arange(9, device=device)[None], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    AttentionInterface.register(PAGED, attend)

    def forward(ids: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last).logits[0]

    if sorted(seen) != list(range(len(seen))) or not seen:
        raise Invalid(
            f"the layers of a {type(model).__name__} do not attend by transformers' attention interface: serve it with vLLM or llama.cpp"
        )
    layers = [seen[i] for i in range(len(seen))]
    longest = getattr(config, "max_position_embeddings", None) or LONGEST
    head = model.get_output_embeddings()  # is given the last tokens alone, and its columns are as long as the vocabulary
    base = Base(
        forward,
        {n: m for n, m in linears.items() if n in through and m is not head},
        layers,
        int(longest),
        vocabulary,
        dtype[0],
        device,
        model,
    )
    _tried(base, ids[0].tolist(), expected)
    return base


def _tried(base: Base, ids: list[int], expected: Tensor) -> None:
    """Raise ValueError where a prompt and tokens after it do not get the logits of the whole text."""
    got = list[Tensor]()

    def forward(*args: Tensor) -> Tensor:
        got.append(base.forward(*args).float())
        logits = torch.zeros_like(got[-1])
        logits[:, ids[len(ids) - 4 + len(got)]] = 1  # the text goes on as it is
        return logits

    longest = max((max(linear.weight.shape) for linear in base.linears.values()), default=1)
    room = 4 * len(base.layers) * 16 * max(longest, *(2 * h * w for h, w in base.layers)) * base.dtype.itemsize
    engine = Engine(replace(base, forward=forward), Limits(room))
    engine.submit(Request(ids[:-3], Sampling(max_tokens=3)))
    while engine.busy:
        engine.step()
    engine.stop()
    logits = torch.cat(got) if got else expected.new_zeros(0)
    wanted = expected[-4:-1]
    if logits.shape != wanted.shape or float((logits - wanted).abs().max()) > AWAY[base.dtype] * float(wanted.std()):
        raise Invalid(
            f"a {type(base.model).__name__} keeps more of a text than keys and values of its tokens, or attends in a way of its own: serve it "
            "with vLLM or llama.cpp"
        )


def factors_in(
    folder: Path, model: Any, linears: Mapping[str, nn.Linear], base: Path, revision: str | None, max_rank: int
) -> dict[str, Factors]:
    """The adapter of a folder of PEFT, or of `finebits.save`, over the `linears` of a model, which lies in the folder `base` and may be without
    values. Raises ValueError, in one sentence, where it is not to be served: trained over another base, of a rank over the limit, with NaN, no
    plain product, or a pickle."""
    if not (folder / MANIFEST).is_file() or (folder / CONFIG).is_file():
        settings, _ = opened(place(folder))
        belonging(folder, settings, base, revision)
    held, _ = held_in(folder, model)
    for module, h in held.items():
        if h.adapter.form != "product" or h.adapter.over != "matrix":
            raise Invalid(
                f"the adapter has a {type(h.adapter).__name__} over {module}, which is no plain product and shares no batch with others: "
                "merge it, or export it as target adapter"
            )
    found = {module: factors_of(h) for module, h in held.items()}
    check(found, linears, max_rank)
    return found


class Reader:
    """Adapters of folders over one base, checked: of PEFT, or of `finebits.save`."""

    def __init__(self, served: Served, max_rank: int) -> None:
        self.served, self.max_rank = served, max_rank

    def __call__(self, folder: Path) -> dict[str, Factors]:
        """Raises ValueError as `factors_in` does."""
        served = self.served
        return factors_in(folder, served.base.model, served.base.linears, served.folder, served.revision, self.max_rank)

    def marked(self, folder: Path) -> Callable[[], dict[str, Factors]]:
        """A reader of this folder as it is now. Raises ValueError where no adapter is there, or a link leads out of it, and when it reads,
        where the folder has changed since."""
        if out := next((f.name for f in folder.iterdir() if not f.resolve().is_relative_to(folder.resolve())), None):
            raise Invalid(f"{out} of the adapter is a link to somewhere else: copy the file")
        if not (folder / MANIFEST).is_file():
            opened(place(folder))
        then = self._mark(folder)

        def read() -> dict[str, Factors]:
            if self._mark(folder) != then:
                raise Invalid(f"the adapter in {folder.name} was changed after it was registered: unload it and load it again")
            return self(folder)

        return read

    def _mark(self, folder: Path) -> Any:
        return sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir() if f.is_file())
