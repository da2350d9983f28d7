"""The pool of pages that a tuned model is to be served with, for its plan: counted from shapes, as the server itself will count it."""

from __future__ import annotations

from typing import Any

from torch import nn

from finebits.interop.menus import Coverage
from finebits.interop.selecting import Mistake, known_head
from finebits.plan.footprint import Pool
from finebits.plan.levers import Levers
from finebits.recipe.settings import Settings
from finebits.serve.room import room


def kv_layers(config: Any) -> list[tuple[int, int]]:
    """(heads, width) of the keys of every layer, from a text model's config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(heads, width)] * config.num_hidden_layers


def pool_of(settings: Settings, shell: Any, covered: Coverage, levers: Levers) -> Pool | None:
    """The adapters that are asked for, and the model's own, which is always there; None where nothing is.

    Raises Mistake where the model keeps no keys and values to count.
    """
    if not settings.serve_adapters and not settings.serve_tokens:
        return None
    if not shell.can_generate() or getattr(shell.config, "is_encoder_decoder", False):
        raise Mistake(f"a {type(shell).__name__} does not go on with a text: leave budget.serve_adapters and budget.serve_tokens out")
    head = known_head(shell).module
    longest = max(max(m.weight.shape) for m in shell.modules() if isinstance(m, nn.Linear) and m is not head)
    adapted = {name: (m, n) for name, (*experts, m, n) in covered.adapted.items() if not experts}
    most, layers = max(settings.ranks, default=0), kv_layers(shell.config.get_text_config())
    own = {name: covered.adapters.get(name, settings.adapter) or settings.adapter for name in adapted}
    tuned = {name: most or a.rank for name, a in own.items()} if settings.adapter.form == "product" else {}
    ranks = {name: settings.serve_rank or rank for name, rank in tuned.items()}
    sizes = layers, longest, adapted
    found = room(*sizes, ranks, settings.serve_adapters, settings.serve_tokens, levers.inner)
    itself = room(*sizes, tuned, 1, 0, levers.inner).adapters
    rank = max(ranks.values(), default=0)
    return Pool(found.page, settings.serve_adapters, rank, found.adapters + itself, settings.serve_tokens, found.cache)
