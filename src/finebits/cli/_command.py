"""The command: its verbs, found by their files; its exit code, whatever happens."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any

import typer
import typer.core

from finebits import __version__
from finebits.cli._screen import Form, Screen
from finebits.messages import Message, explain, sentence
from finebits.process import interrupt, stoppable

CODES = (
    "Exit codes: 0 done, 1 failed, 2 bad usage or recipe, 3 does not fit the budget, 4 data gate, 5 out of memory, "
    "6 verification failed, 130 interrupted."
)
KEYS = (
    "Every key of a recipe is an option here too, and so are the names that other tools have for it: --learning-rate 2e-4, --lora_r 16, "
    "--no-verify, or training.learning_rate=2e-4. finebits recipe show names them."
)
GLOBAL = {"--format": 1, "--traceback": 0}


def verbs() -> dict[str, ModuleType]:
    """{verb: its file}, in the order of the work."""
    package = importlib.import_module("finebits.cli")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    modules = {name: importlib.import_module(f"finebits.cli.{name}") for name in names}
    return dict(sorted(modules.items(), key=lambda verb: verb[1].ORDER))


def parts(verb: ModuleType) -> list[Callable[..., None]]:
    """The public functions that a verb's file defines."""
    own = [f for f in vars(verb).values() if inspect.isfunction(f) and f.__module__ == verb.__name__]
    return [f for f in own if not f.__name__.startswith("_")]


class OfRecipe(typer.core.TyperCommand):
    """A verb that is given a recipe: an option that is none of its own is a key of that."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        params = self.get_params(ctx)
        own = {name: p for p in params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
        rest, words = list(args), []
        while rest:
            if rest[0] == "--":
                return super().parse_args(ctx, [*words, *rest])
            option, sign, value = rest[0].partition("=")
            known = own.get(option) or own.get(option.replace("_", "-"))
            if known is not None:
                words.append(option.replace("_", "-") + sign + value)
                del rest[0]
                if not sign and not getattr(known, "is_flag", False) and not getattr(known, "count", False):
                    words += rest[: known.nargs]
                    del rest[: known.nargs]
            elif option.startswith("--"):
                from finebits.recipe import flags

                overrides, taken = flags.words(rest, [name for name in own if name.startswith("--")])
                words += overrides
                del rest[:taken]
            else:
                words.append(rest.pop(0))
        return super().parse_args(ctx, words)


class Verbs(typer.core.TyperGroup):
    """The verbs in the order of the work."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(verbs())


def application() -> typer.Typer:
    """The verbs as typer has them."""
    common: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(name="finebits", cls=Verbs, pretty_exceptions_enable=False, context_settings=settings, epilog=CODES, **common)
    app.callback()(_start)
    for name, verb in verbs().items():
        commands = parts(verb)
        if len(commands) == 1:
            app.command(name, **_kind(commands[0]))(commands[0])
            continue
        group = typer.Typer(help=verb.__doc__, **common)
        for part in commands:
            group.command(part.__name__, **_kind(part))(part)
        app.add_typer(group, name=name)
    return app


def _kind(part: Callable[..., None]) -> dict[str, Any]:
    """How typer is to make a command of a part: those that are given a recipe take its keys."""
    return {"cls": OfRecipe, "epilog": KEYS} if "words" in inspect.signature(part).parameters else {}


def _version(wanted: bool) -> None:
    if wanted:
        print(f"finebits {__version__}")
        raise typer.Exit()


def _start(
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

    Name a model, rows and a budget: finebits train MODEL DATA --budget 8GiB, or write them into a recipe (finebits init). finebits plans the
    bits, trains, measures, exports and verifies. The options below may stand before or after the verb.
    """
    screen: Screen = context.obj
    screen.form, screen.traceback, screen.verb = form, show_traceback, context.invoked_subcommand or "finebits"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Without `arguments` it is that of the command line, and the process's signals are ours."""
    if arguments is None:
        speakable()
        with stoppable(interrupt):
            return main(sys.argv[1:])
    words = _in_front(arguments)
    screen = Screen()
    with warnings.catch_warnings():
        warnings.showwarning = screen.warned
        try:
            code = application()(args=words, prog_name="finebits", standalone_mode=False, obj=screen)
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
            screen.failed(message._replace(hint=screen.stopped()) if message.code == 130 else message)
            return message.code


def speakable() -> None:
    """Streams that anything can be written to: one that was closed before the start leads nowhere, and a character that the encoding of stdout
    does not have becomes a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _usage(error: Any) -> Message:
    """What to say about a wrong option or argument, which typer raises under names that change with its versions."""
    context = getattr(error, "ctx", None)
    hint = f"see {context.command_path} --help" if context else "see finebits --help"
    return Message(sentence(error.format_message()), 2, hint)


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
