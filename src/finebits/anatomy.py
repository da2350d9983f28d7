"""What of a model is no matrix and can be adapted: its table of words, its feed-forward sublayers, and the network between words and head.

No architecture is known by name. A feed-forward sublayer is known by what its matrices are called, and, where it has values, by giving what its
parts give; a network by its embeddings, its config, and the inputs that its forward takes, which are those of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits.adapters.base import FeedForward, Place, identity
from finebits.errors import Invalid

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
FUSED = (("gate_up_proj", "down_proj"),)  # gate and up are the halves of one matrix
PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc_in", "fc_out"), ("up_proj", "down_proj"))
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")


def found(model: nn.Module, place: Place) -> dict[str, tuple[int, int]]:
    """The modules of a model that an adapter over such a place lies over, and what it is sized by (`Place`). Raises ValueError where there is
    none.

    >>> mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 8), "down_proj": torch.nn.Linear(8, 4), "act_fn": torch.nn.ReLU()})
    >>> found(torch.nn.Sequential(mlp), "feed_forward")
    {'0': (8, 4)}
    """
    if place == "feed_forward":
        parts = {name: parts_of(module) for name, module in model.named_modules()}
        some = {name: found.shape for name, found in parts.items() if found is not None}
        if not some:
            names = ", ".join(" and ".join(names) for names in (*GATED, *FUSED, *PLAIN))
            raise Invalid(
                f"{type(model).__name__} has no feed-forward sublayer that is known (a module with {names}, and an activation): "
                "take an adapter over matrices"
            )
        return some
    network = getattr(model, "base_model", model)
    if place == "table":
        network = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else network  # pyright: ignore[reportCallIssue]
    name = next(k for k, m in model.named_modules() if m is network)
    return {name: size_of(network, place)}


def size_of(module: nn.Module, place: Place) -> tuple[int, int]:
    """What an adapter over this module is sized by. Raises ValueError where the module is no such place.

    >>> size_of(torch.nn.Linear(2, 2), "feed_forward")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: a Linear is no feed-forward sublayer that is known
    """
    if place == "feed_forward":
        parts = parts_of(module)
        if parts is None:
            raise Invalid(f"a {type(module).__name__} is no feed-forward sublayer that is known")
        return parts.shape
    if place == "table":
        return _words(module)
    who, config = type(module).__name__, getattr(module, "config", None)
    takes = set(inspect.signature(type(module).forward).parameters)
    table: Any = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None  # pyright: ignore[reportCallIssue]
    if config is None or not {"inputs_embeds", "attention_mask"} <= takes or not hasattr(table, "num_embeddings"):
        raise Invalid(f"a {who} is no network of words (it takes no inputs_embeds, or has no embeddings): take an adapter over matrices")
    words, width = int(table.num_embeddings), int(table.embedding_dim)
    if place == "model":
        return words, width
    heads, size, layers = keys_of(module)
    return layers * heads * size, width


def _words(table: nn.Module) -> tuple[int, int]:
    """(words, width) of a table. Raises ValueError where it does more than to look rows up."""
    if not isinstance(table, nn.Embedding):
        raise Invalid(f"a {type(table).__name__} is no table of embeddings")
    if table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
        raise Invalid(
            "this table of embeddings changes its rows, or their gradients, by what is looked up (max_norm, sparse, …): leave it out"
        )
    return table.num_embeddings, table.embedding_dim


def keys_of(network: nn.Module) -> tuple[int, int, int]:
    """(heads of keys and values, numbers of each, layers). Raises ValueError where a layer does not attend to all that came before."""
    who, config = type(network).__name__, network.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    odd = next(
        (
            what
            for what, there in (
                (f"layers of {', '.join(sorted(map(str, kinds)))}", kinds != {"full_attention"}),
                (f"a window of {window} tokens, behind which a prefix would be forgotten", window),
                ("keys of another kind (kv_lora_rank)", getattr(config, "kv_lora_rank", None)),
                ("layers that share keys", getattr(config, "num_kv_shared_layers", 0)),
                ("an encoder beside its decoder", getattr(config, "is_encoder_decoder", False)),
                ("no cache of keys", cache_of(network) is None),
            )
            if there
        ),
        None,
    )
    if odd is not None:
        raise Invalid(f"a prefix is keys and values of every layer before all others, and {who} has {odd}: take prompt_tuning")
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return heads, size, int(config.num_hidden_layers)


@dataclass(frozen=True)
class Parts:
    """The matrices of a feed-forward sublayer by name: one that gates and one beside it, or both in one, or one alone; what leads back."""

    module: Any
    up: str
    down: str
    gate: str | None
    halves: bool
    act: Callable[[Tensor], Tensor]
    shape: tuple[int, int]

    def both(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.halves:
            g, u = getattr(self.module, self.up)(x).chunk(2, -1)
            return g, u
        return None if self.gate is None else getattr(self.module, self.gate)(x), getattr(self.module, self.up)(x)

    def back(self, h: Tensor) -> Tensor:
        return getattr(self.module, "dropout", identity)(getattr(self.module, self.down)(h))


def parts_of(module: nn.Module) -> Parts | None:
    """The parts of a feed-forward sublayer; None where it is none that is known."""
    own = dict(module.named_children())
    act = next((getattr(module, k) for k in ACTIVATIONS if callable(getattr(module, k, None))), None)
    matrices = {k: _matrix(m) for k, m in own.items()}
    if act is None or {k for k, m in matrices.items() if m is None} - {*ACTIVATIONS, "dropout", "p"}:  # p: a host's own
        return None
    for gate, up, down in (*GATED, *((None, *names) for names in (*FUSED, *PLAIN))):
        there = [matrices.get(k) for k in (gate, up, down) if k is not None]
        if None in there or sum(m is not None for m in matrices.values()) != len(there):
            continue
        (m, n), halves = matrices[up] or (0, 0), (up, down) in FUSED
        inner = m // 2 if halves else m
        if matrices[down] == (n, inner):
            return Parts(module, up, down, gate, halves, act, (inner, n))
    return None


def _matrix(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a matrix, however it is stored."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if hasattr(module, "nf") and getattr(getattr(module, "weight", None), "ndim", 0) == 2:  # stored the other way round
        n, m = cast(Tensor, module.weight).shape
        return int(m), int(n)
    return None


def feed_forward(
    module: nn.Module, whole: Callable[..., Any], drop: Callable[[Tensor], Tensor], note: Callable[[Any], None]
) -> FeedForward:
    """A sublayer as an adapter sees it."""
    parts = parts_of(module)
    if parts is None:
        raise Invalid(f"a {type(module).__name__} is no feed-forward sublayer that is known")
    return FeedForward(whole, parts.both, parts.act, parts.back, parts.shape, drop, note)


def agrees(module: nn.Module) -> None:
    """Raise ValueError where a sublayer does otherwise than its parts; one without values cannot be asked."""
    if any(p.device.type == "meta" for p in module.parameters()):
        return
    was = module.training
    module.eval()
    try:
        first = next(module.parameters())
        see = feed_forward(module, module.forward, identity, lambda noted: None)
        x = torch.linspace(-2, 2, see.shape[1]).cos().to(first.device, first.dtype if first.is_floating_point() else torch.float32)
        with torch.no_grad():
            got, wanted = see.down(see.inner(*see.both(x))).float(), see(x).float()
    finally:
        module.train(was)
    if not torch.allclose(got, wanted, rtol=0.02, atol=1e-3 * float(wanted.abs().max()) + 1e-6):
        raise Invalid(f"a {type(module).__name__} gives something else than its matrices and its activation do: its experts are not known")


class Words:
    """A network as an adapter sees it (`finebits.adapters.base.Network`)."""

    def __init__(self, module: nn.Module, whole: Callable[..., Any], shape: tuple[int, int]) -> None:
        self.module: Any = module
        self.whole, self.shape = whole, shape

    def rows(self, ids: Tensor) -> Tensor:
        table = self.module.get_input_embeddings()
        with torch.no_grad():
            return table(ids.to(next(self.module.parameters()).device)).float()

    def remembered(self, ids: Tensor) -> Tensor:
        heads, size, layers = keys_of(self.module)
        kept = Before(None, (heads, size), keeps=True)
        was = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                given = {"input_ids": ids[None].to(next(self.module.parameters()).device), str(cache_of(self.module)): kept}
                self.whole(**given, use_cache=True)
        finally:
            self.module.train(was)
        parts = [t[0].transpose(0, 1).reshape(len(ids), heads * size) for i in range(layers) for t in kept.seen[i]]
        return torch.cat(parts, 1).float()

    def prompted(self, inputs: dict[str, Any], prompt: Float[Tensor, "v n"]) -> Any:
        inputs, count = dict(inputs), len(prompt)
        begins = _length(next((inputs[k] for k in CACHES if inputs.get(k) is not None), None)) == 0
        rows = inputs.get("inputs_embeds")
        if rows is None:
            rows = self.module.get_input_embeddings()(inputs.pop("input_ids"))
        inputs.pop("input_ids", None)
        _longer(inputs, rows, count, begins)
        if not begins:  # they lie in the cache
            return self.whole(**inputs | {"inputs_embeds": rows})
        ahead = prompt.to(rows.dtype).expand(len(rows), *prompt.shape)
        return _without(self.whole(**inputs | {"inputs_embeds": torch.cat([ahead, rows], 1)}), count)

    def prefixed(self, inputs: dict[str, Any], prefix: Float[Tensor, "v w"]) -> Any:
        heads, size, _ = keys_of(self.module)
        cache, inputs = str(cache_of(self.module)), dict(inputs)
        given = next((found for k in CACHES for found in [inputs.pop(k, None)] if found is not None), None)
        rows = inputs.get("inputs_embeds")
        _longer(inputs, inputs["input_ids"] if rows is None else rows, len(prefix), False)
        wants, config = inputs.get("use_cache"), self.module.config
        if wants is None:  # an encoder keeps nothing, and says use_cache all the same
            wants = config.use_cache and getattr(config, "is_decoder", True)
        before = given if isinstance(given, Before) else Before(prefix, (heads, size), given, keeps=bool(wants))
        out = self.whole(**inputs | {cache: before})
        if not before.asked and not _checkpointed(self.module):
            raise Invalid(f"attention of {type(self.module).__name__} asks for no keys of before: take prompt_tuning")
        own = given if given is not None else before if wants else None
        return type(out)(**{k: own if k == cache else v for k, v in out.items() if k != cache or own is not None})


CACHES = "cache", "past_key_values"  # what transformers calls a cache of keys, its newer name first


def cache_of(module: nn.Module) -> str | None:
    """What a module's forward calls a cache of keys; None where it takes none."""
    takes = inspect.signature(getattr(type(module), "finebits_kind", type(module)).forward).parameters
    return next((name for name in CACHES if name in takes), None)


def _checkpointed(module: nn.Module) -> bool:
    return module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _longer(inputs: dict[str, Any], rows: Tensor, count: int, begins: bool) -> None:
    """Masks for `count` places before every row, positions after them; where a row begins, its inputs have them too."""
    mask, positions, b = inputs.get("attention_mask"), inputs.get("position_ids"), len(rows)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise Invalid(
                "virtual tokens need a mask of (rows, tokens), and one for every pair came (of a static cache?): take a dynamic one"
            )
        inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], 1)
    if positions is not None:
        inputs["position_ids"] = positions = positions + count
        if begins:
            first = torch.arange(count, device=positions.device, dtype=positions.dtype)
            inputs["position_ids"] = torch.cat([first.expand(*positions.shape[:-1], count), positions], -1)
    kinds = inputs.get("token_type_ids")
    if kinds is not None and begins:
        inputs["token_type_ids"] = torch.cat([kinds.new_zeros(b, count), kinds], 1)


def _without(out: Mapping[str, Any], count: int) -> Any:
    """What a network gives, without its first places."""
    if out.get("pooler_output") is not None:
        raise Invalid(
            f"a {type(out).__name__} holds one pooled state a row, which would be a virtual token's: take an adapter over matrices"
        )
    cut = {"last_hidden_state": lambda h: h[:, count:], "hidden_states": lambda all: tuple(h[:, count:] for h in all)}
    return type(out)(**{k: cut[k](v) if k in cut and v is not None else v for k, v in out.items()})  # pyright: ignore[reportCallIssue]


class Before:
    """A cache of keys and values that begins with a prefix, and goes on with another cache, or, where it `keeps`, with what it is given itself.

    It is what transformers' models ask of a cache. `prefix` is (v, layers · 2 · heads · size): k of the first layer, its v, and so on.
    """

    is_compileable = False

    def __init__(self, prefix: Tensor | None, heads: tuple[int, int], cache: Any = None, keeps: bool = False) -> None:
        self.prefix, self.heads, self.cache, self.keeps = prefix, heads, cache, keeps and cache is None
        self.count = 0 if prefix is None else len(prefix)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.asked = False

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.asked = True
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer, *args, **kwargs)
        elif self.keeps:
            old = self.seen.get(layer)
            new = (key, value) if old is None else (torch.cat([old[0], key], 2), torch.cat([old[1], value], 2))
            key, value = self.seen[layer] = new
        if self.prefix is None:
            return key, value
        heads, size = self.heads
        if key.shape[1] != heads or key.shape[3] != size or value.shape[3] != size:
            raise Invalid(f"layer {layer} has {key.shape[1]} heads of {key.shape[3]} in its keys, and its config says {heads} of {size}")
        own = self.prefix.view(self.count, -1, heads, size)[:, 2 * layer : 2 * layer + 2].to(key.dtype)  # (v, 2, heads, size)
        k, v = (t.transpose(0, 1).expand(len(key), -1, -1, -1) for t in own.unbind(1))
        return torch.cat([k, key], 2), torch.cat([v, value], 2)

    def get_seq_length(self, layer: int = 0) -> int:
        if self.cache is not None:
            return self.count + int(self.cache.get_seq_length(layer))
        return self.count + (self.seen[layer][0].shape[2] if layer in self.seen else 0)

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        if self.cache is not None:
            length, offset = self.cache.get_mask_sizes(query_length, layer)
            return self.count + length, offset
        return self.get_seq_length(layer) + query_length, 0

    def reorder_cache(self, rows: Tensor) -> None:
        self.seen = {i: (k.index_select(0, rows), v.index_select(0, rows)) for i, (k, v) in self.seen.items()}


def attending(network: nn.Module) -> Iterator[nn.Module]:
    """The modules of a network that ask a cache for keys."""
    for module in network.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and cache_of(module) and "Attention" in type(module).__name__:
            yield module
