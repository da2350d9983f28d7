"""The command line: verbs that read a recipe and call one function of `finebits.job` each.

Nothing heavy is imported before a verb runs. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from finebits import __version__, registry
from finebits.messages import Message, explain, sentence
from finebits.process import interrupt, stoppable
from finebits.progress import alive

if TYPE_CHECKING:
    from finebits.recipe import Recipe


HERE = Path(__file__).parent
BOLD, RED, GREEN, YELLOW, PLAIN = "\x1b[1m", "\x1b[31;1m", "\x1b[32m", "\x1b[33m", "\x1b[0m"


class Form(StrEnum):
    """How results are printed."""

    auto = "auto"
    human = "human"
    json = "json"
    quiet = "quiet"


class Shape(StrEnum):
    """The folders of methods."""

    formats = "formats"
    quantizers = "quantizers"
    init = "init"
    adapters = "adapters"
    stats = "stats"
    plan = "plan"
    rules = "rules"
    refine = "refine"


@dataclass
class Screen:
    """Where results go. One result a command: `show` prints it in the form that was asked for."""

    form: Form = Form.auto
    traceback: bool = False
    verb: str = "finebits"
    code: int = 0
    warnings: list[dict[str, str]] = field(default_factory=list)

    @property
    def colour(self) -> bool:
        """Paint stdout? Never under NO_COLOR; where nobody said, only on a terminal."""
        return not os.environ.get("NO_COLOR") and (self.form is Form.human or (self.form is Form.auto and sys.stdout.isatty()))

    def show(self, data: Any, human: Callable[[], str], quiet: str = "", schema: str | None = None) -> None:
        """The result: `data` in JSON, `human()` for people, `quiet` (a path, or nothing) for scripts."""
        if self.form is Form.json:
            self.envelope(data, schema or f"finebits.{self.verb}/1")
        elif self.form is Form.quiet:
            if quiet:
                print(quiet)
        else:
            print(human().rstrip("\n"))

    def envelope(self, data: Any, schema: str) -> None:
        """One JSON object on stdout."""
        whole = {"schema": schema, "ok": not self.code, "exit": self.code, "data": data, "warnings": self.warnings}
        print(json.dumps(whole, ensure_ascii=False, default=str))

    def failed(self, message: Message) -> None:
        """The sentence on stderr; in JSON the envelope on stdout as well."""
        self.code = message.code
        if self.form is Form.json:
            self.envelope({"message": message.text, "hint": message.hint, **message.data}, "finebits.error/1")
        lines = message.text.splitlines() or ["stopped"]
        hint = [f"   {message.hint}"] if message.hint else []
        mark = f"{RED}x{PLAIN}" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else "x"
        print("\n".join([f"{mark}  {lines[0]}", *(f"   {line}" for line in lines[1:]), *hint]), file=sys.stderr)

    def warned(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        """Takes the place of warnings.showwarning: ours become results, others go to stderr as ever."""
        if Path(filename).is_relative_to(HERE):
            self.warnings.append({"code": category.__name__, "hint": str(message)})
            print(f"!  {message}", file=sys.stderr)
        elif self.form is not Form.quiet:
            print(warnings.formatwarning(message, category, filename, lineno).rstrip(), file=sys.stderr)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While a job runs, which is never silent for long: where a program reads stdout, only the result may go there; quiet silences
        progress too."""
        with contextlib.ExitStack() as stack:
            if self.form is Form.json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            elif self.form is Form.quiet:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(alive("starting"))
            yield


class Verbs(typer.core.TyperGroup):
    """The verbs in the order of the work."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = ["plan", "data", "train", "eval", "export", "report", "serve", "list", "recipe", "doctor"]
        return sorted(super().list_commands(ctx), key=order.index)


app = typer.Typer(
    name="finebits",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 bad usage or recipe, 3 does not fit the budget, 4 data gate, 5 out of memory, "
    "6 verification failed, 130 interrupted.",
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the rows as the trainer will see them.")
recipe_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at a recipe.")
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE|SECTION.KEY=VALUE", help="A recipe file, then values to lay over it.", show_default=False),
]
File = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="The recipe file, where it is not the first argument.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"finebits {__version__}")
        raise typer.Exit()


@app.callback()
def start(
    context: typer.Context,
    form: Annotated[
        Form, typer.Option("--format", help="auto paints on a terminal only, human always; json is one object; quiet is paths alone.")
    ] = Form.auto,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Print Python's traceback where something unexpected happens.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Fine-tune a language model inside a memory budget.

    Name a model, rows and a budget in a recipe; finebits plans the bits, trains, measures, exports and verifies.
    The options below may stand before or after the verb.
    """
    screen: Screen = context.obj
    screen.form, screen.traceback, screen.verb = form, show_traceback, context.invoked_subcommand or "finebits"


def _recipe(words: list[str] | None, file: Path | None, more: Sequence[str] = ()) -> Recipe:
    from finebits.recipe import Recipe

    words = list(words or [])
    if file is None:
        if not words or "=" in words[0]:
            raise typer.BadParameter("name a recipe first, such as recipes/quickstart.yaml")
        file = Path(words.pop(0))
    return Recipe.load(file, [*words, *more])


@app.command()
def plan(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the plan; output_dir/plan.json if not given.", show_default=False)
    ] = None,
    pareto: Annotated[
        int | None, typer.Option(min=0, help="Also solve this many budgets (24), for the curve of memory against loss.", show_default=False)
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="From the model's config alone, without its weights.")] = False,
    objective: Annotated[
        str | None, typer.Option(help="weight, output, fisher or kl; else the recipe's quantization.objective.", show_default=False)
    ] = None,
    lock: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER=FORMAT", help="A module (or the end of its name, or a pattern with *) and its format, or dense."),
    ] = None,
    serve_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="A second budget: what the tuned model may take as it is saved.", show_default=False)
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Train the worst batches once, and plan with the memory that they took.")] = False,
    what_fits: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Compare models within this budget instead: name them in place of a recipe.", show_default=False),
    ] = None,
) -> None:
    """Choose the bits of every matrix for the budget. Nothing is trained."""
    screen: Screen = context.obj
    if what_fits is not None:
        one = {"--objective": objective, "--lock": lock, "--serve-budget": serve_budget, "--probe": probe, "--out": out, "--pareto": pareto}
        named = [word for word, value in one.items() if value]
        if named:
            raise typer.BadParameter(f"--what-fits compares models and {named[0]} is about one of them: leave one of the two out")
        return _what_fits(screen, what_fits, words or [], recipe, fast)
    if probe and fast:
        raise typer.BadParameter("--probe trains the model and --fast does not read it: choose one")
    more = [f"quantization.objective={objective}"] if objective is not None else []
    more += [f"budget.serve_memory={serve_budget}"] if serve_budget is not None else []
    r = _recipe(words, recipe, [*more, *(_lock(text) for text in lock or [])])
    from finebits import job

    with screen.working():
        made = job.plan(r, out, 24 if pareto is None else pareto, fast, probe)
    from finebits.runfolder import RunFolder

    path = out or RunFolder(r.output_dir).plan_path(made)

    def human() -> str:
        from finebits.report.text import plan_summary

        return f"{plan_summary(made, screen.colour)}\nwrote {path}"

    screen.show(made.to_json(), human, str(path))


def _lock(text: str) -> str:
    """LAYER=FORMAT as an override of the recipe."""
    layer, sign, format = text.partition("=")
    if not (layer and sign and format):
        raise typer.BadParameter(f"a lock is written LAYER=FORMAT, such as down_proj=nf4-b64 or layers.0.*=dense, and {text!r} came")
    return f"quantization.locks.{layer}={'null' if format == 'dense' else format}"


def _what_fits(screen: Screen, budget: str, words: list[str], file: Path | None, fast: bool) -> None:
    from dataclasses import asdict

    from finebits.recipe import Recipe

    models, more = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if not models:
        raise typer.BadParameter("--what-fits wants the models to compare: folders, hub ids, .gguf files or package:NAME")
    changes = [*more, f"budget.memory={json.dumps(budget)}", f"model.model_name_or_path={json.dumps(models[0])}"]
    r = Recipe.load(file, changes) if file is not None else Recipe.parse("recipe: 1", "command line", changes)
    from finebits import job

    with screen.working():
        offers = job.what_fits(r, models, fast)

    def human() -> str:
        from finebits.plan.compare import verdict
        from finebits.report.text import buys_table

        return buys_table(offers, verdict(offers), r.budget.total or 0, job.device(r), screen.colour)

    best = [o.model for o in offers if o.effective is not None][:1]
    screen.code = 0 if best else 3
    screen.show([asdict(o) for o in offers], human, "".join(best), "finebits.what_fits/1")
    if screen.code:
        raise typer.Exit(screen.code)


def _gate(screen: Screen, r: Recipe, human: Callable[[Any], str]) -> None:
    """Check the data and show what was found, also where the gate stays shut: then its exception follows."""
    from finebits import job
    from finebits.data.check import GateFailed

    try:
        with screen.working():
            found = job.check(r)
    except GateFailed as e:
        if screen.form in (Form.auto, Form.human):
            print(human(e.check))
        raise
    screen.show(found.to_json(), lambda: human(found), schema="finebits.data/1")


@data_app.command()
def check(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """The gate: exit code 4 if rows must not be trained on."""
    screen: Screen = context.obj
    _gate(screen, _recipe(words, recipe), lambda found: found.text(screen.colour))


@data_app.command()
def preview(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    show: Annotated[int, typer.Option(min=1, help="At most this many of the rows that the check keeps.")] = 3,
) -> None:
    """The first rows, trained tokens marked.

    They are shown after the chat template; what is trained on is green, or in [[ ]] where there is no colour.
    """
    screen: Screen = context.obj

    def human(found: Any) -> str:
        rows = found.to_json()["preview"][:show]
        return "\n\n".join(f"line {row['line']}\n" + _painted(row["pieces"], screen.colour).rstrip("\n") for row in rows)

    _gate(screen, _recipe(words, recipe), human)


def _painted(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    out = []
    for text, trained in pieces:
        text = "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)  # rows must not steer the terminal
        before, after = (GREEN, PLAIN) if colour else ("[[", "]]")
        out.append(f"{before}{text}{after}" if trained else text)
    return "".join(out)


@app.command()
def train(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    plan: Annotated[Path | None, typer.Option(help="A plan to follow instead of making one.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir, from its last whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that output_dir holds; files of others stay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before the first step.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.", show_default=False)] = None,
) -> None:
    """The whole way: plan, gate, quantize, fine-tune, measure, export.

    What is done is said in output_dir, where events.jsonl grows while it runs.
    """
    screen: Screen = context.obj
    r = _recipe(words, recipe)
    from finebits import job

    with screen.working():
        begun = time.time()
        job.train(r, plan, resume, dry_run, max_steps, overwrite)
    found = _written(Path(r.output_dir), begun)

    def human() -> str:
        from finebits.report import text

        table = lambda found, colour: text.evaluation_table(found, colour, text.columns())  # noqa: E731
        tables = {"memory": text.memory_table, "evaluation": table, "export": text.export_table}
        return "\n\n".join(
            [*(show(found[k], screen.colour).rstrip("\n") for k, show in tables.items() if k in found), f"done: {r.output_dir}"]
        )

    screen.show({"output_dir": r.output_dir} | found, human, r.output_dir)


def _written(folder: Path, since: float) -> dict[str, Any]:
    """The results that a run has just written to its folder; the memory is that of the first of its runs."""
    from finebits.runfolder import EVALUATION, EXPORTED, MEMORY, RUNS

    files = {"evaluation": folder / EVALUATION, "export": folder / EXPORTED}
    runs = sorted((folder / RUNS).glob(f"*/{MEMORY}"), key=lambda path: path.stat().st_mtime)
    files |= {"memory": path for path in reversed(runs) if path.stat().st_mtime >= since}
    return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists() and path.stat().st_mtime >= since}


@app.command("eval")
def evaluate(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """Loss, perplexity, KL and agreement on the held-out rows."""
    screen: Screen = context.obj
    r = _recipe(words, recipe)
    from finebits import job
    from finebits.runfolder import EVALUATION

    with screen.working():
        found = job.evaluate(r)

    def human() -> str:
        from finebits.report.text import columns, evaluation_table

        return evaluation_table(found, screen.colour, columns())

    screen.show(found, human, str(Path(r.output_dir) / EVALUATION), "finebits.evaluation/1")


@app.command()
def export(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    to: Annotated[
        str | None, typer.Option(help="adapter, merged, or both with a comma; else the recipe's export.to.", show_default=False)
    ] = None,
    verify: Annotated[
        bool | None, typer.Option("--verify/--no-verify", help="Load the export with stock libraries and compare; else the recipe's.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what else the target's folder holds under the same names.")
    ] = False,
) -> None:
    """Write the tuned model for other tools, and verify it."""
    screen: Screen = context.obj
    r = _recipe(words, recipe, [f"export.to=[{to}]"] if to is not None else [])
    from finebits import job

    with screen.working():
        found = job.export(r, list(r.export.to), r.export.verify if verify is None else verify, overwrite)
    if any(target.get("verdict") == "fail" for target in found["targets"]):
        screen.code = 6

    def human() -> str:
        from finebits.report.text import export_table

        return export_table(found, screen.colour)

    screen.show(found, human, "\n".join(str(target["path"]) for target in found["targets"]))
    if screen.code:
        raise typer.Exit(screen.code)


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Argument(help="A run's output_dir, or the recipe that names it.", show_default=False)] = None,
    recipe: File = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the page; FOLDER/report.html if not given.", show_default=False)] = None,
) -> None:
    """Make the HTML page of a run again."""
    screen: Screen = context.obj
    if recipe is not None and folder is not None:
        raise typer.BadParameter("name a folder or --recipe, not both")
    if folder is None and recipe is None:
        raise typer.BadParameter("name the output_dir of a run, or its recipe")
    if recipe is None and folder is not None and folder.is_file():
        folder, recipe = None, folder
    if recipe is not None:
        folder = Path(_recipe([], recipe).output_dir)
    from finebits import job

    with screen.working():
        page = job.report(folder, out)
    screen.show({"path": str(page)}, lambda: f"wrote {page}", str(page))


@app.command()
def serve(
    what: Annotated[Path, typer.Argument(metavar="PLAN|FOLDER", help="A plan.json, or the output_dir that holds one.")],
    studio: Annotated[
        bool, typer.Option("--studio", help="The page of the plan, with a slider for the budget that solves it again.")
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine alone.")] = 8765,
) -> None:
    """A local page of a plan: move the budget and see the bits."""
    if not studio:
        raise typer.BadParameter("finebits serves the page of a plan and no models: add --studio")
    from finebits import serve as server

    server.plan_at(what)  # what cannot be read fails before anything listens
    print(f"http://127.0.0.1:{port}   Ctrl-C ends it", file=sys.stderr)
    server.studio(what, port)


@app.command("list")
def methods(
    context: typer.Context,
    shape: Annotated[Shape | None, typer.Option(help="One kind of method alone.", show_default=False)] = None,
    cite: Annotated[Path | None, typer.Option(help="The references of the methods that this plan uses.", show_default=False)] = None,
) -> None:
    """Every method, with its paper."""
    screen: Screen = context.obj
    wanted = [shape.value] if shape else list(registry.SHAPES)
    used = None if cite is None else _used(cite)
    found = {s: {name: registry.head(s, name) for name in registry.names(s) if used is None or (s, name) in used} for s in wanted}
    found = {s: heads for s, heads in found.items() if heads}

    def human() -> str:
        wide = max((len(name) for heads in found.values() for name in heads), default=0)
        bold, plain = (BOLD, PLAIN) if screen.colour else ("", "")
        if used is not None:
            return "\n\n".join(
                f"{bold}{s}/{name}{plain}  {used[s, name]}\n{head}" for s, heads in found.items() for name, head in heads.items()
            )
        blocks = [[f"{bold}{s}{plain}", *(f"  {name:{wide}}  {head}" for name, head in heads.items())] for s, heads in found.items()]
        return "\n\n".join("\n".join(block) for block in blocks)

    screen.show(found, human, "\n".join(f"{s}/{name}" for s, heads in found.items() for name in heads))


def _used(path: Path) -> dict[tuple[str, str], str]:
    """{(shape, method): how many matrices use it} of a plan, read as the data that it is."""
    from finebits.recipe import Problem, RecipeError

    try:
        plan = json.loads(path.read_text())
        modules = plan["modules"] if str(plan["schema"]).startswith("finebits.plan/") else None
    except (OSError, ValueError, KeyError, TypeError):
        modules = None
    if not isinstance(modules, dict):
        raise RecipeError([Problem(f"--cite wants the plan.json that finebits plan writes, and {path} is none")])
    slots = {"format": "formats", "quantizer": "quantizers", "adapter": "adapters", "init": "init"}
    counts: dict[tuple[str, str], int] = {}

    def walk(shape: str, entry: Any) -> None:
        if isinstance(entry, dict):
            if "paper" in entry:
                counts[shape, str(entry["paper"])] = counts.get((shape, str(entry["paper"])), 0) + 1
            for value in entry.values():
                walk(shape, value)

    for spec in modules.values():
        for slot, shape in slots.items():
            if slot == "quantizer" and not spec.get("format"):
                continue  # a dense weight is not quantized, whatever the slot's default
            if slot == "init" and not spec.get("adapter"):
                continue
            walk(shape, spec.get(slot))
    for entry in plan.get("levers", {}).get("refine", ()):
        walk("refine", entry)
    walk("plan", plan.get("solver", {}).get("ranks"))
    return {key: f"{n} {'matrix' if n == 1 else 'matrices'}" for key, n in counts.items()}


@recipe_app.command()
def schema() -> None:
    """The JSON Schema, for completion in editors."""
    from finebits.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@recipe_app.command("show")
def show_recipe(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """Every key with its value, defaults and overrides included."""
    r = _recipe(words, recipe)
    context.obj.show(r.model_dump(), lambda: r.to_yaml().rstrip(), r.to_yaml().rstrip())


@recipe_app.command()
def validate(context: typer.Context, words: Words = None, recipe: File = None) -> None:
    """Every mistake at its line, and exit code 2; or ok."""
    r = _recipe(words, recipe)
    context.obj.show({"valid": True, "output_dir": r.output_dir}, lambda: "ok")


@app.command()
def doctor(context: typer.Context) -> None:
    """Versions, devices, and the kernels that run here."""
    screen: Screen = context.obj
    rows = [*_versions(), *_devices(), *_kernels()]

    def human() -> str:
        ink = {"ok": GREEN, "warn": YELLOW, "fail": RED}
        marks = {mark: f"{ink[mark]}{mark:<5}{PLAIN}" if screen.colour else f"{mark:<5}" for mark in ink}
        bad = sum(row["mark"] == "fail" for row in rows)
        wide = max(len(row["what"]) for row in rows)
        lines = [f" {marks[row['mark']]} {row['what']:<{wide}}  {row['found']}" for row in rows]
        return "\n".join([*lines, f" {bad} problem{'' if bad == 1 else 's'}"])

    screen.show(rows, human, "\n".join(f"{row['what']} {row['found']}" for row in rows if row["mark"] == "fail"))


def _row(mark: str, what: str, found: str) -> dict[str, str]:
    return {"mark": mark, "what": what, "found": found}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _versions() -> Iterator[dict[str, str]]:
    yield _row("ok", "finebits", __version__)
    yield _row("ok", "python", f"{platform.python_version()}   {platform.platform()}")
    try:
        wanted_ones = importlib.metadata.requires("finebits") or []
    except importlib.metadata.PackageNotFoundError:
        yield _row("warn", "packages", "not checked: finebits runs from a folder and is not installed (pip install -e FOLDER)")
        return
    for line in wanted_ones:
        wanted = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)(?:; extra == \"(\w+)\")?", line)
        if wanted is None or wanted[3] == "test":
            continue
        package, least, extra = wanted.groups()
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            why = f"not installed: pip install 'finebits[{extra}]'" if extra else "not installed, and nothing runs without it"
            yield _row("warn" if extra else "fail", package, why)
            continue
        old = _numbers(found) < _numbers(least)
        yield _row("fail" if old else "ok", package, f"{found}; finebits needs {least} or newer" if old else found)


def _devices() -> Iterator[dict[str, str]]:
    import torch

    from finebits.sizes import show

    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f"   {show(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} memory"
    capability = torch.backends.cpu.get_cpu_capability()
    yield _row("ok", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {capability}{memory}")
    if not torch.cuda.is_available():
        yield _row("ok", "cuda", "none")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        name = f"{torch.cuda.get_device_name(i)}   sm_{major}{minor}   {show(free)} of {show(total)} free"
        yield _row("ok", f"cuda:{i}", f"{name}   bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")


def _kernels() -> Iterator[dict[str, str]]:
    import torch

    from finebits import kernels
    from finebits.kernels import cpu

    for body, reason in kernels.bodies():
        runs = f"runs here, with {cpu.LEVELS[cpu.level()]}" if body is cpu and reason is None else "runs here"
        yield _row("ok" if reason is None else "warn", "kernels", f"{body.name}: {reason or runs}")
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        for task in kernels.JOBS:
            by_body: dict[str, list[int]] = {}
            for bits in (2, 3, 4, 8):
                by_body.setdefault(kernels.chosen(task, device, bits).name, []).append(bits)
            chosen = ", ".join(f"{name} for {'/'.join(map(str, widths))} bits" for name, widths in by_body.items())
            yield _row("ok", f"{task}", f"on {device.type}: {chosen}")
    setting = os.environ.get(kernels.VARIABLE)
    if setting:
        yield _row("warn", kernels.VARIABLE, f"is {setting}, so the choice above is not the fastest" if setting != "auto" else "is auto")


def _usage(error: Any) -> Message:
    """What to say about a wrong option or argument, which typer raises under names that change with its versions."""
    context = getattr(error, "ctx", None)
    hint = f"see {context.command_path} --help" if context else "see finebits --help"
    option = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_").split("=")[0]
    if option:
        from finebits.recipe import leaves

        hint = f"keys of a recipe are written without dashes: {option}=VALUE" if option.split(".")[-1] in leaves() else hint
    return Message(sentence(error.format_message()), 2, hint)


GLOBAL = {"--format": 1, "--traceback": 0}


def _in_front(words: Sequence[str]) -> list[str]:
    """The same words with the global options first, so that they may stand anywhere."""
    front, rest, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*front, *rest, word, *words]
        takes = GLOBAL.get(word)
        if takes is not None:
            front += [word, *words[:takes]]
            del words[:takes]
        else:
            (front if word.split("=")[0] in GLOBAL else rest).append(word)
    return [*front, *rest]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Without `arguments` it is that of the command line, and the process's signals are ours."""
    if arguments is None:
        with stoppable(interrupt):
            return main(sys.argv[1:])
    words = _in_front(arguments)
    screen = Screen()
    with warnings.catch_warnings():
        warnings.showwarning = screen.warned
        try:
            code = app(args=words, prog_name="finebits", standalone_mode=False, obj=screen)
            if code == 130:  # typer makes this of Ctrl-C
                raise KeyboardInterrupt
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except BrokenPipeError:  # the reader went away: `finebits list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (Exception, KeyboardInterrupt) as e:
            if type(e).__name__ == "NoArgsIsHelpError":
                print(e, file=sys.stderr)
                return 2
            message = _usage(e) if hasattr(e, "format_message") else explain(e)
            if screen.traceback and message.code != 130:
                traceback.print_exception(e)
            screen.failed(message)
            return message.code


if __name__ == "__main__":
    sys.exit(main())
