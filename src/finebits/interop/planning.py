"""From a model and a budget to a plan."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finebits import registry
from finebits.adapters.base import of_rank
from finebits.anatomy import parts_of, size_of
from finebits.arithmetic import dtypes
from finebits.build import Progress
from finebits.calibrate.blockwise import blocks_of
from finebits.carrier import tied
from finebits.data.limits import positions_of
from finebits.data.packing import Packs
from finebits.host_embeddings import looked_up
from finebits.interop import choosing, compatible, menus
from finebits.interop.checkpoint import Tensors, config_of, fingerprint, persistent, weight_files
from finebits.interop.from_peft import belonging
from finebits.interop.given import name_of, unchanged
from finebits.interop.hf import folder_of, processor_of
from finebits.interop.menus import Coverage
from finebits.interop.observed import observed, over
from finebits.interop.packed import packable
from finebits.interop.peft_folder import mark
from finebits.interop.peft_folder import read as read_peft
from finebits.interop.pool import pool_of
from finebits.interop.pricing import Calibration, CostTable, evaluate, unquantized
from finebits.interop.ranking import given_out
from finebits.interop.roles import lying
from finebits.interop.selecting import (
    Mistake,
    Shape,
    attention,
    chosen,
    ends,
    fitted,
    head_units,
    known_head,
    laid,
    locked,
    meta,
    overridden,
    own_head,
    own_table,
    patterned,
    saved,
)
from finebits.interop.tokenizer import embedded, limits_of
from finebits.linears import expert, files_shape, own_class, unlike_factors
from finebits.plan import budget as budgets
from finebits.plan import cost, measured, memory, problem, solve
from finebits.plan.base import Infeasible, Plan, Spec
from finebits.plan.budget import Bits
from finebits.plan.compare import ModelChoice, model_choice, ranked
from finebits.plan.footprint import Footprint
from finebits.plan.levers import PULLS, Counted, Levers, Start, Workload, in_words, parts
from finebits.plan.planner import Menu
from finebits.plan.seen import Observed
from finebits.recipe import call
from finebits.recipe.rows import rows_of
from finebits.recipe.settings import Settings
from finebits.rules.base import Rule, held
from finebits.tasks import base as tasks
from finebits.train import met

FOLLOWING = 3  # float32 numbers an output that are there at a time in the loss of a head that follows a table; one more under a cap


def plan_model(
    model: str | Path | nn.Module,
    budget: str | int | float | None,
    data: Any = None,
    settings: Settings | None = None,
    progress: Progress = lambda done, total, name: None,
    fast: bool = False,
    pareto: int = 0,
    held_out: Any = None,
    *,
    training_args: Any = None,
    peft_config: Any = None,
    **keywords: Any,
) -> Plan:
    """The plan with the least expected loss with which no phase of the job exceeds the budget: bits and the levers that may be pulled, together.

    `model` is a folder, hub id, .gguf, package:NAME, or a transformers model loaded from one of these; `budget` a size ("400MiB"), an average of
    bits ("3.1 bits"), a share ("80% of nf4"; finebits.plan.budget), or None for the best options whatever they take; `data` chat or text rows,
    used for calibration (without data `output` falls back to `weight`) and to count what the batches of training hold (without data every row
    is full, and every token trained); `held_out` the rows that models are scored on (without, as in training). `keywords` are keys of a recipe,
    methods as values or by name (`max_length=256, rank=8, candidates=["nf4", fb.Int(4)]`), and what is not said is as in a recipe that does
    not say, so that `finebits plan` of a recipe of these keys makes this plan; with `datasets` rows are read from files as there.
    `training_args` (a TrainingArguments or SFTConfig) and `peft_config` (a LoraConfig) say what they say; what finebits cannot honour in them is
    refused. `settings` are keywords that were read before, in place of these.
    Every matrix is priced under every candidate, one matrix at a time, and prices are kept in the cache. `fast` reads config.json alone:
    every matrix is taken to lose what its format loses on normal data. `pareto` also solves that many budgets between the smallest and the
    largest choice, into `plan.solver["pareto"]`. Raises Infeasible (exit code 3), which names the smallest budget that fits and what else
    could be given up, and Mistake (exit code 2) where two settings cannot be had together.

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> sizes = dict(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    ...     plan = fb.plan_model(folder, "3.5 bits", rank=2, max_length=16, fast=True)
    >>> bits = 8 * plan.memory["linear weights"] / (7 * 32 * 32)
    >>> len(plan.modules), bits <= 3.5, plan.modules["model.layers.0.mlp.up_proj"].adapter.rank
    (7, True, 2)
    """
    live = model if isinstance(model, nn.Module) else None
    model = str(model) if isinstance(model, str | Path) else name_of(model)
    if settings is None:
        if isinstance(held_out, Mapping):  # {"path": …}, as a recipe has it
            keywords, held_out = keywords | {"held_out": held_out}, None
        recipe = call.recipe(model, budget, keywords, training_args, peft_config)
        model, settings = recipe.model.model_name_or_path, Settings.of(recipe)
        if recipe.data.datasets and not fast:
            if data is not None:
                raise Mistake("rows are given and data.datasets names files of rows: leave one of the two out")
            data, held_out = rows_of(recipe)
    elif keywords or training_args is not None or peft_config is not None:
        raise Mistake(f"settings are given, and {', '.join(keywords) or 'an object'} beside them: leave one of the two out")
    stated = _read(budget)
    if settings.choose:
        return choosing.best(settings, budget, lambda own: plan_model(model, budget, data, own, progress, fast, pareto, held_out))
    folder = folder_of(model, settings.model_revision, config_only=fast)
    embedded(folder)
    if live is not None and not fast:
        unchanged(live, folder)
    shell = meta(folder, settings.attn_implementation)
    known_head(shell)
    if settings.packing:
        packable(shell, settings.adapter)
    for rule in settings.rules:
        try:
            rule.suit(shell)
        except ValueError as e:
            raise Mistake(str(e)) from None
    held, continues, notices = _continued(settings, shell, folder, fast)
    if held:
        settings = replace(settings, adapter=next(iter(held.values())), init=Spec().init)
    whole = saved(shell, settings)
    for name in whole:
        shell.get_submodule(name).requires_grad_(True)
    words = laid(shell, settings)
    tabled = bool(words) or settings.adapter.over == "table"
    if tabled or (whole and any(p.requires_grad for p in shell.get_input_embeddings().parameters())):  # they are where they are trained
        settings = replace(settings, levers=tuple(pull for pull in settings.levers if pull != "embeddings"))
    settings = replace(settings, max_length=tasks.of(shell).longest(settings.max_length))
    workload = _workload(settings)
    levers = _seated(shell, settings.adapter, replace(workload.levers, attn_implementation=attention(shell)))
    settings = replace(settings, adapter=fitted(shell, settings.adapter, chosen(shell, settings)))
    watched, shapes, own, more = _watched(settings, shell, levers, held, words)
    notices += more
    if settings.dropout and tabled:
        notices.append("dropout acts on inputs, and those of a table of embeddings are numbers of words: its adapter has none")
    fixed = overridden(settings.overrides, list(shapes)) | locked(settings.locks, list(shapes))
    of_bits = isinstance(stated, Bits)  # nothing else is bounded, so no head need give way
    of = {name: expert(shell.get_submodule(name)) for name, shape in shapes.items() if len(shape) == 2}
    experts = {name: its[1] for name, its in of.items() if its is not None}
    covered = Coverage(shapes, own_head(shell) if "head" in settings.levers and not of_bits else {}, fixed, experts=experts)
    if settings.adapter.over == "matrix":
        own |= patterned(settings, [*(name for name, adapter in own.items() if adapter is not None), *words])
    covered = replace(covered, adapters=own)
    notices += compatible.too_wide(own, shapes)
    if settings.embeddings:
        covered = replace(covered, tables=own_table(shell))
        if trained := next((name for name in covered.tables if shell.get_submodule(name).weight.requires_grad), None):
            both = f"{trained} is to be trained (adapter.modules_to_save) and held in codes (quantization.embeddings)"
            raise Mistake(f"{both}: leave one of the two out")
    compatible.refuse_conflicts(settings, covered, fast, stated)
    if settings.planner.tunes_blocks:
        covered = replace(covered, units=head_units(shell, shapes))
    ranking = {} if settings.ranking is None else {"ranks": registry.to_json(settings.ranking)}
    if whole and levers.width < 4:
        notices.append(
            f"{', '.join(settings.modules_to_save or ())}: trained in {levers.dtype}, and rounded by chance, so that small steps are "
            "kept on average; model.dtype=float32 keeps them all"
        )
    notices += Tensors(folder).notices if weight_files(folder) else []
    counted = workload.counted
    if data is not None and not fast:
        data = tasks.of(shell).examples(data, processor_of(folder), settings.max_length, settings.assistant_only_loss)
        counted = replace(counted, **batches(folder, data, settings, levers))
    if held_out is not None and not fast:
        counted = replace(counted, scored=scored(folder, held_out, settings, levers))
    workload = replace(workload, levers=levers, counted=replace(counted, routed=bool(experts) or None))
    if settings.ranking is not None:
        covered = replace(covered, adapters=given_out(settings.ranking, settings, folder, covered.adapted, data, workload, progress))
    priced = workload
    if of_bits:  # so that machines of other dtypes find the same prices
        priced = replace(workload, levers=replace(levers, dtype="float32", compute=None))
    offered = menus.priced_menu(settings, folder, covered, data, levers, fast, progress, priced)
    menu, tails = offered.menu, dict[str, float]()
    if "kurtosis" in settings.planner.asks:
        tensors = Tensors(folder)
        tails = {name: cost.kurtosis(tensors[f"{name}.weight"].float()) for name in menu}
        menu = {name: problem.tailed(options, tails[name]) for name, options in menu.items()}
    layers = {name: shell.get_submodule(name) for name in covered.adapted}
    others = {name: list(shape) for name, m in layers.items() if (shape := files_shape(m)) is not None}
    unsolved = Plan(
        modules={name: options[0].spec for name, options in menu.items()},
        model=str(model),
        model_hash="" if fast else fingerprint(folder),
        seed=settings.seed,
        over={name: settings.adapter for name in over(shell, settings.adapter)} | words,
        trained=tuple(whole),
        continues=continues,
        tied=settings.ensure_weight_tying and any(tied(shell, shell.get_submodule(name)) for name in words),
        model_revision=settings.model_revision,
        notices=tuple(notices),
        **vars(workload),
        costs={
            name: {
                "shape": list(shape),
                "menu": [menus.line(s, c, settings) for s, c in zip(offered.specs[name], offered.cells[name], strict=True)],
            }
            | ({"head": True} if name in covered.head else {"embeddings": True} if name in covered.tables else {})
            | ({"stored": others[name]} if name in others else {})
            | ({"experts": experts[name]} if name in experts else {})
            | ({"windows": has} if name in layers and (has := unlike_factors(layers[name])) else {})
            | ({"class": own_class(layers[name])} if name in layers and own_class(layers[name]) != "Linear" else {})
            | ({"kurtosis": tails[name]} if name in tails else {})
            for name, shape in covered.all.items()
        },
        solver={"objective": offered.objective, "measured": not fast} | ranking,
        sizes=_footprint(settings, shell, covered, levers, watched, words).to_json() | _adapters(settings, menu),
    )
    plan = solve.solve(solve.with_budget(unsolved, budget), menu, settings.planner, pareto)
    if offered.objective != "kl" and not settings.planner.trials:
        return plan
    calibration = offered.calibration or Calibration(folder, data, priced)
    table = CostTable(folder, offered.objective, calibration.hash, levers.width, False)
    if offered.objective == "kl":
        plan = measured.predicted(plan, evaluate(calibration, menus.spread(menu), table, progress))
    if settings.planner.trials:
        near = measured.neighbours(plan, menu, settings.planner)
        return measured.settled(plan, menu, [*near.values()], evaluate(calibration, [*near.values()], table, progress), [*near])
    choices = measured.contenders(plan, menu, settings.planner)
    return measured.settled(plan, menu, choices, evaluate(calibration, choices, table, progress))


def _continued(settings: Settings, shell: Any, base: Path, fast: bool) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The adapters of the PEFT folder that training goes on from by module, what the plan keeps of it, and notices. Raises Mistake where it was
    trained over another model, or holds more than adapters."""
    if settings.folder is None:
        return {}, {}, []
    folder = Path(settings.folder).resolve()
    try:
        given = read_peft(folder, shell)
    except ValueError as e:
        raise Mistake(f"adapter.folder: {e}") from e
    if given.others:
        raise Mistake(
            f"adapter.folder holds {next(iter(given.others))} beside its adapters, which a plan has no place for: use fb.load_peft"
        )
    notices = [f"{type(next(iter(given.held.values())).adapter).__name__} over {len(given.held)} modules goes on from {settings.folder}"]
    if fast:
        return {name: h.adapter for name, h in given.held.items()}, {"folder": str(folder), "mark": mark(folder)}, notices
    try:
        notices += belonging(folder, given.settings, base, settings.model_revision)
    except ValueError as e:
        raise Mistake(f"adapter.folder: {e}") from e
    return {name: h.adapter for name, h in given.held.items()}, {"folder": str(folder), "mark": mark(folder)}, notices


def _read(budget: str | int | float | None) -> Any:
    try:
        return budgets.read(budget)
    except ValueError as e:
        raise Mistake(str(e)) from None


def _seated(shell: Any, adapter: Any, levers: Levers) -> Levers:
    """Levers that pad no row past the positions that a model has learned, of which virtual tokens take theirs. A row that is longer by itself is
    the data gate's."""
    positions, learned = positions_of(shell.config.get_text_config(), shell)
    if not learned or positions is None:
        return levers
    before = getattr(adapter, "tokens", 0)
    room = positions - before
    if before and levers.max_length > room:
        raise Mistake(
            f"{type(adapter).__name__} puts {before} tokens before every row of up to {levers.max_length:,}, and {type(shell).__name__} has "
            f"{positions:,} positions: {f'set data.max_length to {room} at most' if room > 1 else 'take fewer (adapter.tokens)'}"
        )
    return replace(levers, positions=room)


def _watched(
    settings: Settings, shell: Any, levers: Levers, held: Mapping[str, Any], words: Mapping[str, Any]
) -> tuple[Observed, dict[str, Shape], dict[str, Any], list[str]]:
    """What was seen of the blocks, the matrices that a plan covers, the adapter of each, and notices. A matrix whose module the model never
    calls is none of them: it would train nothing, and whatever reads its weight might not know how."""
    shapes, adapter = chosen(shell, settings), settings.adapter
    ranks = [r for r in settings.ranks if any(r <= min(s) for s in shapes.values())]
    if ranks and adapter.rank:
        adapter = of_rank(adapter, max(ranks))
    dtype, longest = levers.compute or levers.dtype, levers.padded(levers.max_length)
    longest = longest if levers.positions is None else min(longest, levers.positions)
    for name in shapes if adapter.itself else ():
        shell.get_submodule(name).weight.requires_grad_(True)
    try:
        names = [n for n, s in shapes.items() if len(s) == 2]
        own, notices = lying(shell, names, settings.adapter, settings.target_modules is not None or bool(held))
        if held and adapter.over == "matrix":
            if odd := next((name for name in held if name not in own), None):
                raise Mistake(f"{settings.folder} is for {odd}, which is no linear layer that is planned: leave adapter.folder out")
            own = {name: held.get(name) for name in own}
        largest = own if adapter is settings.adapter else {name: a and of_rank(a, adapter.rank) for name, a in own.items()}
        watched, called = observed(shell, shapes, adapter, getattr(torch, dtype), longest, settings.dropout, largest, words)
    except ValueError as e:
        raise Mistake(str(e)) from e
    left = [name for name, s in shapes.items() if len(s) == 2 and name not in called]
    if not left:
        return watched, shapes, own, notices
    if len(left) == len(shapes):
        raise Mistake(f"{type(shell).__name__} calls none of the modules that target_modules names ({left[0]}, …): name others")
    names = f"{left[0]}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
    notice = f"{names}: the model reads their weights and never calls them as modules, so they stay as they are"
    kept = {name: s for name, s in shapes.items() if name not in left}
    return watched, kept, {name: a for name, a in own.items() if name in kept}, [*notices, notice]


def _footprint(settings: Settings, shell: Any, covered: Coverage, levers: Levers, watched: Observed, words: Mapping[str, Any]) -> Footprint:
    """What is in memory beside the planned weights. Where ranks vary, adapters' numbers are the options' own."""
    apart = {k: p.numel() for k, p in shell.named_parameters() if k.removesuffix(".weight") not in covered.all}
    apart |= {k: b.numel() for k, b in persistent(shell).items()}
    varied, adapter = bool(settings.ranks), settings.adapter
    given = {name: covered.adapters.get(name, adapter) for name in covered.adapted}
    own = {name: a and a.at(name) for name, a in given.items()}
    adapted = [(own[name], shape) for name, shape in covered.adapted.items()]
    others = {name: adapter for name in over(shell, adapter)} | dict(words)
    sizes = {n: size_of(shell.get_submodule(n), "table" if n in words else a.over) for n, a in others.items()}
    beside = [sum(some) for some in zip((0, 0), *(cost.numbers(a, *sizes[n]) for n, a in others.items()), strict=True)]
    if varied:
        rank = max(r for r in settings.ranks if any(r <= min(s) for s in covered.adapted.values()))
        trained = memory.Trained(beside[0], beside[1], rank)
    else:
        rank = max((0 if a is None else a.rank for a in own.values()), default=0)
        mine = cost.together(adapted)
        trained = memory.Trained(mine[0] + beside[0], mine[1] + beside[1], rank, cost.again(adapted))
    tables = {n: a for n, a in others.items() if n in words or a.over == "table"}
    numbers = {n: cost.numbers(a, *sizes[n])[0] for n, a in tables.items()}
    follow = [n for n, a in tables.items() if (settings.ensure_weight_tying or a.over == "table") and tied(shell, shell.get_submodule(n))]
    trained = replace(trained, words=sum(numbers.values()), followed=sum(numbers[n] for n in follow))
    dense = sum(math.prod(s) for s in covered.shapes.values()) * levers.width
    entrance = looked_up(shell)
    still = entrance is None or entrance.weight.requires_grad or covered.tables or tables  # none that is looked up alone, and left as it is
    lookup = 0 if still or entrance is None else entrance.weight.numel()
    embeddings, head = ends(shell)
    packed = sum(math.prod(s) for s in covered.tables.values())
    embeddings -= packed
    head = 0 if covered.head else head
    task, way = tasks.of(shell), known_head(shell)
    steps = settings.max_steps if settings.max_steps > 0 else None
    full = _at_a_time({n: s for n, s in covered.adapted.items() if (a := own[n]) is not None and a.itself}, shell, settings.rules, steps)
    trains = [p.numel() for k, p in shell.named_parameters() if p.requires_grad and k.removesuffix(".weight") not in covered.all]
    whole = sum(trains), max(trains, default=0)
    taught = packed if any(shell.get_submodule(name).weight is way.module.weight for name in covered.tables) else 0
    units = [made.shape[0] for module in shell.modules() if (made := parts_of(module)) is not None] if settings.rules else []
    largest = max((r for r in settings.ranks if any(r <= min(s) for s in covered.adapted.values())), default=0)
    acted = [(of_rank(a, largest) if a is not None and varied else a, (s[-2], s[-1])) for a, s in adapted]
    ruled = held(settings.rules, [(a, s) for a, s in acted if a is not None], units, levers.inner, steps)
    copies = FOLLOWING + (way.cap is not None) if follow else way.copies
    counts = task.outputs(), apart, covered.shapes, embeddings, head, lookup, copies, task.input_bytes(), whole, packed, taught, ruled
    geometry = memory.geometry(watched, *counts)
    geometry = replace(geometry, full=tuple(sorted((*shape, count) for shape, count in full.items())))
    required = geometry, trained, dense, settings.reserve, tuple(settings.levers), varied, settings.serve_budget, settings.compared
    return Footprint(*required, settings.left_out, sum(beside), pool=pool_of(settings, shell, covered, levers))


def _at_a_time(full: Mapping[str, Shape], shell: Any, rules: Sequence[Rule], steps: int | None) -> Counter[Shape]:
    """The shapes of the matrices that are trained themselves at a time: all outside of blocks, and those of the largest blocks, of which the
    rules say how many in a run of so many steps."""
    if not full or not rules:
        return Counter(full.values())
    of = {block: [s for name, s in full.items() if name.startswith(f"{block}.")] for block in blocks_of(shell)}
    active = min(rule.active(len(of), steps) for rule in rules)
    heavy = sorted(of.values(), key=lambda shapes: -sum(math.prod(s) for s in shapes))[:active]
    outside = [s for name, s in full.items() if not name.startswith(tuple(f"{block}." for block in of))]
    return Counter([*outside, *(s for shapes in heavy for s in shapes)])


def _adapters(settings: Settings, menu: Menu) -> dict[str, Any]:
    """The adapters of every rank on offer, so that a plan's menu can be read again."""
    adapters = (o.spec.adapter for options in menu.values() for o in options if o.spec.adapter)
    by_rank = {a.rank: a for a in adapters} if settings.ranks else {}
    return {"adapters": {str(rank): registry.to_json(adapter) for rank, adapter in by_rank.items()}} if by_rank else {}


def compare(
    budget: str | int, models: Sequence[str], settings: Settings, progress: Progress, fast: bool = False, data: Any = None
) -> list[ModelChoice]:
    """What each model could be within the budget, the best buy first (finebits.plan.compare says on what that rests). Every lever may be
    pulled. The objective is that of the settings; a folder that holds a config.json alone is planned for from that, by typical errors, and so
    is every model where there are no rows for an objective that needs them."""
    if not isinstance(_read(budget), int):
        raise Mistake(f"models are compared within one amount of memory, which {budget} is not: give a size such as 8GiB")
    for key, asked in (
        ("adapter.ranks", settings.ranks or settings.ranking),
        ("adapter.inits", settings.inits),
        ("budget.serve_memory", settings.serve_budget),
    ):
        if asked:
            raise Mistake(f"models are compared by the plain errors of formats within one budget: leave {key} out")
    nats = settings.objective in ("fisher", "kl")
    if nats and data is None and not fast:
        raise Mistake(f"the objective {settings.objective} counts nats on rows, and there are none: name data.datasets, or take weight")
    offers = []
    for model in models:
        folder = folder_of(model, settings.model_revision, config_only=fast)
        parameters = sum(p.numel() for p in meta(folder, settings.attn_implementation).parameters())
        bare = fast or not weight_files(folder)
        own = replace(settings, objective="weight" if bare else settings.objective, levers=PULLS)
        own = replace(own, levers=tuple(p for p in PULLS if p != "head")) if nats and not bare else own
        try:
            plan = plan_model(model, budget, data, own, progress, fast=bare)
        except Infeasible as e:
            offers.append(model_choice(model, parameters, e))
            continue
        if bare or not nats:
            offers.append(model_choice(model, parameters, plan, in_words(plan.levers)))
            continue
        task = tasks.of(config_of(folder))
        tokens = task.examples(data, processor_of(folder), task.longest(settings.max_length), settings.assistant_only_loss)
        calibration, width = Calibration(folder, tokens, plan.workload), plan.levers.width
        text = unquantized(calibration, CostTable(folder, own.objective, calibration.hash, width, False))
        typical = {name: menus.typical(s, plan.costs[name]["shape"], width).loss for name, s in plan.modules.items()}
        offers.append(model_choice(model, parameters, plan, in_words(plan.levers), text, typical))
    return ranked(offers)


def batches(folder: Path, data: Any, settings: Settings, levers: Levers) -> dict[str, Any]:
    """What the rows ask of memory, as `Counted` has it: `batches`, by rows a batch the batches of the run (in the trainer's own order) that no
    other exceeds, as [tokens of the longest padded row, trained tokens, padded widths met by then] and a 1 where it is met in the first step
    alone, how many widths there are, and the calibration's longest row and tokens with padding; and `lengths`, a histogram of the rows ([up to
    tokens, rows])."""
    task, processor = tasks.of(config_of(folder)), processor_of(folder)
    tokens = task.examples(data, processor, settings.max_length, settings.assistant_only_loss)
    task.require(tokens, processor, lambda: limits_of(folder, processor))
    units = Packs.of(tokens, settings.max_length) if settings.packing else tokens
    rows, long, labelled = tokens.lengths, [task.tokens(n) for n in units.lengths], units.labelled
    together = 1 if settings.preference is None else settings.preference.together
    by_size, size = {}, settings.per_device_train_batch_size
    for b in parts(size, together) if "micro_batch" in settings.levers else [size]:
        passes = settings.gradient_accumulation_steps * (size // b)
        used = met(long, b, settings.seed, passes, settings.max_steps, settings.num_train_epochs, together)
        pairs = [(levers.padded(max(long[i] for i in rows)), sum(labelled[i] for i in rows)) for rows in used]
        first = sorted(map(task.tokens, rows[: settings.calibration_rows]), reverse=True)
        padded = sum(first[i] * len(first[i : i + b]) for i in range(0, len(first), b))
        by_size[str(b)] = {
            "worst": [[*p, 1] if at < passes else [*p] for p, at in memory.worst(pairs, passes).items()],
            "widths": len({t for t, _ in pairs}),
            "calibration": [first[0], padded],
        }
    edges = [settings.max_length * (i + 1) // 16 for i in range(16)]
    bins = [[e, sum(a < task.tokens(n) <= e for n in rows)] for a, e in zip([0, *edges], edges, strict=False)]
    return {"batches": by_size, "lengths": bins}


def scored(folder: Path, rows: Any, settings: Settings, levers: Levers) -> list[int]:
    """Rows, tokens of a padded row and labels of the largest batch that scoring meets: rows of like length share one, and no batch has more of
    either."""
    task = tasks.of(config_of(folder))
    tokens = task.examples(rows, processor_of(folder), settings.max_length, settings.assistant_only_loss)
    ranked = sorted(zip(map(task.tokens, tokens.lengths), tokens.labelled, strict=True), key=lambda row: -row[0])
    size = settings.per_device_eval_batch_size
    labels = [sum(n for _, n in ranked[i : i + size]) for i in range(0, len(ranked), size)]
    return [min(size, len(ranked)), levers.padded(ranked[0][0]), max(labels)]


def _workload(s: Settings) -> Workload:
    """What the settings say of memory; what was counted of rows comes to it."""
    stored, compute = dtypes(s.dtype, s.device)
    levers = Levers(
        dtype=stored,
        compute=None if compute == stored else compute,
        device=s.device,
        max_length=s.max_length,
        per_device_train_batch_size=s.per_device_train_batch_size,
        gradient_accumulation_steps=s.gradient_accumulation_steps,
        gradient_checkpointing=s.gradient_checkpointing,
        loss_chunk=s.loss_chunk,
        optim=s.optim,
        dropout=s.dropout,
        together=None if s.preference is None or s.preference.together == 1 else s.preference.together,
    )
    start = Start(s.calibration, s.calibration_rows, s.assistant_only_loss, tuple(s.refine))
    return Workload(levers, Counted(runtime=s.runtime, evaluated=s.eval_strategy != "no" or s.eval_on_start or None), start)
