"""Continuations of prompts, the likeliest or drawn, one or a batch of them; and samples from dense copies of the weights where these have room:
without compiled kernels, unpacking a quantized weight for every token costs more than multiplying with it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finebits.build import Adapted, all_hosts, generator, hosts
from finebits.data.limits import positions_of
from finebits.errors import Invalid
from finebits.evaluate.heldout import evaluating
from finebits.evaluate.stepped import Steps, steps_of
from finebits.qtensor import dense


@contextlib.contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype | None = None, room: int | None = None) -> Iterator[nn.Module]:
    """Inside, every host multiplies with one dense merged weight, in `dtype` or its own; outside, nothing has changed. `room` is how many bytes
    these weights may take together: hosts that have none left stay as they are.

    Only the hosts' `forward` is swapped, so that packed parts, adapters and state dicts stay as they are. Peak memory above the model: the
    dense weights (m·n·itemsize each) and, while one is made, three float32 matrices of its size. For evaluation: adapters get no gradient.
    A host whose adapter depends on its input, and so has no dense form, stays as it is.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA())}))
    >>> before = model(torch.ones(1, 64))
    >>> with dense_weights(model):
    ...     print(torch.allclose(model(torch.ones(1, 64)), before, atol=1e-4))
    True
    """
    swapped: list[Adapted] = []
    try:
        for _, host in hosts(model):
            if any(host.kinds[a].form == "beside" for a in host.active):
                continue
            *_, m, n = host.weight.shape
            size = m * n * (dtype or host.weight.dtype).itemsize
            if room is not None and (room := room - size) < 0:
                break
            with torch.no_grad():
                W = dense(host.stack(torch.float32).weight).to(dtype or host.weight.dtype)
            host.forward = _dense(W, host.stack(torch.float32).bias)
            swapped.append(host)
        yield model
    finally:
        for host in swapped:
            del host.__dict__["forward"]


def _dense(W: Tensor, bias: Tensor | None):
    def forward(input: Tensor) -> Tensor:
        return F.linear(input, W.to(input.dtype), None if bias is None else bias.to(input.dtype))

    return forward


@contextlib.contextmanager
def fixed(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, a host puts its base and its active adapters together once for every dtype of inputs, and not for every token: for short products
    that costs as much as multiplying. Nothing is merged, and packed weights stay packed. Adapters get no gradient.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA())}))
    >>> with fixed(model):
    ...     print("forward" in vars(model[0]))
    True
    """
    swapped = [host for _, host in hosts(model) if "forward" not in vars(host)]
    try:
        for host in swapped:
            host.forward = _fixed(host)  # pyright: ignore[reportAttributeAccessIssue]
        yield model
    finally:
        for host in swapped:
            del host.__dict__["forward"]


def _fixed(host: Adapted) -> Callable[[Tensor], Tensor]:
    layers: dict[torch.dtype, Any] = {}

    def forward(input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return type(host).forward(host, input)
        layer = layers.get(input.dtype)
        if layer is None:
            layer = layers[input.dtype] = host.stack(input.dtype)
        return layer(input)

    return forward


@contextlib.contextmanager
def settings(model: Any, **wanted: Any) -> Iterator[None]:
    """Inside, the model generates with these settings alone: what its folder says of sampling is no matter, and nothing to warn of."""
    before = model.generation_config
    stop = wanted.get("eos_token_id") or [0]
    try:
        model.generation_config = type(before)(**{"pad_token_id": stop[0]} | {k: v for k, v in wanted.items() if v != []})
        yield
    finally:
        model.generation_config = before


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest (temperature 0), or drawn from softmax(z / temperature) over the fewest tokens that hold
    `top_p`. Draws depend on `seed` and on what the row is called alone, not on the rows beside it.

    >>> Sampling(temperature=0.7, top_p=0.9).greedy, Sampling().greedy
    (False, True)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise Invalid(
                f"the temperature is 0 or above and top_p is above 0 and at most 1; temperature={self.temperature}, top_p={self.top_p} came"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Drawn:
    """A processor of transformers' logits under which the argmax is a draw: argmax(z + g) with g = −log(−log u) is one from softmax(z).

    >>> draw = Drawn(Sampling(temperature=1.0), ["a", "a"])
    >>> z = draw(torch.zeros(2, 1), torch.tensor([[0.0, 1.0, 2.0]] * 2))
    >>> torch.equal(z[0], z[1])  # rows that are called alike draw alike
    True
    """

    def __init__(self, how: Sampling, called: Sequence[Any]) -> None:
        self.how, self.generators = how, [generator(how.seed, str(name)) for name in called]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        z = scores.float() / self.how.temperature
        if self.how.top_p < 1:
            ordered, order = z.softmax(-1).sort(-1, descending=True)
            left = ordered.cumsum(-1) - ordered >= self.how.top_p  # the first that reaches it stays
            z = z.masked_fill(torch.zeros_like(left).scatter(-1, order, left), -math.inf)
        u = torch.stack([torch.rand(z.shape[-1], generator=g, dtype=torch.float64) for g in self.generators])
        return z - (-u.clamp_min(1e-300).log()).log().float().to(z.device)


@dataclass(frozen=True)
class Continuation:
    """Token ids that follow a prompt, up to the stop (left out), and whether there was one."""

    ids: list[int]
    stopped: bool


class Streamer:
    """What transformers hands new tokens to, for one prompt: `said` gets each as it comes, and the times tell the speed."""

    def __init__(self, said: Callable[[int], None] = lambda id: None) -> None:
        self.said, self.times = said, list[float]()
        self._begun = False

    def put(self, value: Tensor) -> None:
        if not self._begun:  # the prompt
            self._begun = True
            return
        self.times.append(time.perf_counter())
        for id in value.flatten().tolist():
            self.said(id)

    def end(self) -> None:
        """Nothing more comes."""

    @property
    def speed(self) -> float | None:
        """Tokens a second, after the first; None where there was one at most."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None


def continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop: Sequence[int],
    how: Sampling = Sampling(),
    called: Sequence[Any] | None = None,
    streamer: Streamer | None = None,
) -> list[Continuation]:
    """What follows each prompt (token ids), at most `new_tokens`, all of them in one batch with a cache of keys and values; shorter prompts are
    padded in front. `called` are names of the rows, which draws depend on. `streamer` is for one prompt alone. `model` is a transformers model,
    whose hosts multiply as they are: packed weights by the kernels, and tokens after the prompts by a call of them each, where the model is made
    for that (evaluate/stepped.py). Where it has a table of positions, answers end with the table; raises Invalid where a prompt leaves none."""
    device = next(p.device for p in model.parameters())
    longest, pad = max(map(len, prompts)), stop[0] if stop else 0
    if not all(prompts):
        raise Invalid("a prompt has no tokens, so there is nothing to go on from: write one")
    positions, learned = positions_of(model.config.get_text_config(), model)
    if learned and positions is not None:
        positions -= _virtual(model)
        new_tokens = min(new_tokens, positions - longest)
        if new_tokens < 1:
            raise Invalid(f"a prompt has {longest:,} tokens, and the model has {positions:,} positions for it and its answer: shorten it")
    draws = [] if how.greedy else [Drawn(how, called if called is not None else range(len(prompts)))]
    if (steps := steps_of(model, len(prompts), longest + new_tokens)) is not None:
        with evaluating(model), fixed(model):
            if (logits := steps.begin(prompts)) is not None:
                return [_cut(ids, stop) for ids in _stepped(steps, logits, new_tokens, stop, draws, streamer)]
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    wanted = settings(model, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[*stop])
    with evaluating(model), fixed(model), wanted:
        made = model.generate(input_ids=ids, attention_mask=mask, logits_processor=draws, streamer=streamer)
    return [_cut(tokens, stop) for tokens in made[:, longest:].tolist()]


def _stepped(
    steps: Steps, logits: Tensor, new_tokens: int, stop: Sequence[int], draws: Sequence[Drawn], streamer: Streamer | None
) -> list[list[int]]:
    """At most `new_tokens` of every row after these logits, until each has met a stop."""
    made, open_ = [list[int]() for _ in logits], set(range(len(logits)))
    if streamer is not None:
        streamer.put(steps.lengths)  # for the prompt
    for i in range(new_tokens):
        if i:
            logits = steps([ids[-1] for ids in made])
        for draw in draws:
            logits = draw(steps.lengths, logits)
        newest = logits.argmax(-1)
        for ids, token in zip(made, newest.tolist(), strict=True):
            ids.append(token)
        if streamer is not None:
            streamer.put(newest)
        open_ = {row for row in open_ if made[row][-1] not in stop}
        if not open_:
            break
    return made


def _cut(tokens: list[int], stop: Sequence[int]) -> Continuation:
    end = next((i for i, t in enumerate(tokens) if t in stop), None)
    return Continuation(tokens[:end], end is not None)


def _virtual(model: Any) -> int:
    """Tokens that active adapters put before every prompt, ours or PEFT's."""
    ours = sum(getattr(host.kinds[a], "tokens", 0) for _, host in all_hosts(model) for a in host.active)
    return ours or getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0) or 0


def together(model: Any, wanted: int) -> int:
    """How many prompts may be continued in one batch: one where padding in front would enter a recurrent state."""
    return 1 if getattr(model, "_is_stateful", False) else wanted


def greedy(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stop: Sequence[int], room: int | None = None) -> list[list[int]]:
    """Token ids that follow each prompt (token ids), at most `new_tokens`, up to the first of `stop` (left out). One prompt at a time, so
    that no padding enters; `model` is a transformers model, and its hosts are dense while it generates, as far
    as `room` bytes go."""
    with dense_weights(model, room=room):
        return [continued(model, [prompt], new_tokens, stop)[0].ids for prompt in prompts]
