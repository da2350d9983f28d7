"""The run-time checker of signatures: beartype, with an int where a float is asked for, in a scope of dimension names of its own for each call.

It stands in for jaxtyping's own decorator, which binds every call's arguments to their names, and so takes longer than most of what it checks:
the dimensions of a signature are numbers and names here, and never ask what an argument is. A function inside a function is left alone, since a
checker would have to be made for it whenever the outer one is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import types
import typing
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))


def install(modules: list[str]) -> None:
    """Every function and dataclass of these modules is checked from when it is imported."""
    jaxtyping.install_import_hook(modules, "shapes.check")
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]  # what the hook writes before each


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = checked(fn.__init__)  # type: ignore[misc]
        return fn
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(checked(fn.__func__))
    if isinstance(fn, property):
        return property(*(each and checked(each) for each in (fn.fget, fn.fset, fn.fdel)))
    return checked(fn)


def checked(fn: Any) -> Any:
    if not isinstance(fn, types.FunctionType) or "<locals>" in fn.__qualname__.rpartition(".")[0] or hasattr(fn, "__wrapped__"):
        return fn
    same = known(fn)
    scope = SCOPE if any(map(shaped, same.__annotations__.values())) else contextlib.nullcontext
    strict = check(same)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        with scope():
            return strict(*args, **kwargs)

    return call


def shaped(hint: Any) -> bool:
    """Whether dimensions are named in it."""
    return (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(shaped, typing.get_args(hint)))


SCOPE = functools.partial(jaxtyping.jaxtyped, "context")  # before it is replaced


def known(fn: types.FunctionType) -> types.FunctionType:
    """The same function with annotations as values: Any for one that cannot be had at run time, and for what a generator returns."""
    same = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    same.__kwdefaults__, same.__qualname__, same.__module__, same.__dict__ = (
        fn.__kwdefaults__,
        fn.__qualname__,
        fn.__module__,
        dict(vars(fn)),
    )
    same.__annotations__ = {name: hint(name, said, fn.__globals__) for name, said in fn.__annotations__.items()}
    if inspect.isgeneratorfunction(fn):
        same.__annotations__.pop("return", None)
    return same


def hint(name: str, said: Any, names: dict[str, Any]) -> Any:
    def one() -> None: ...

    one.__annotations__ = {name: said}
    try:
        return typing.get_type_hints(one, names, include_extras=True)[name]
    except Exception:  # a name that is only there for a type checker
        return Any
