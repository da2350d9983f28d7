"""Laws of the folders: one file, one method, one public class, data both ways."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re

import pytest

import finebits as fb
from finebits import registry
from variants import methods, variants

FILES = [(shape, name) for shape in registry.SHAPES for name in registry.names(shape)]
VALUES = [
    v
    for shape in ("formats", "quantizers", "init", "adapters", "planners", "ranks", "refine")
    for n in registry.names(shape)
    for v in variants(registry.load(shape, n))
]
every = pytest.mark.parametrize(("shape", "name"), FILES, ids=lambda v: str(v))


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape in registry.OPEN for name in registry.names(shape)], ids=str)
def test_a_file_of_an_open_folder_is_a_value_with_a_head(shape: str, name: str) -> None:
    value = registry.load(shape, name)()
    assert value == type(value)() and type(value).__doc__
    assert len(registry.head(shape, name)) > 20


@pytest.mark.parametrize("shape", registry.SHAPES)
def test_folder_is_not_empty(shape: str) -> None:
    assert methods(shape)


@every
def test_a_file_is_a_method(shape: str, name: str) -> None:
    cls = registry.load(shape, name)
    assert cls.__doc__ and cls.__doc__.strip()
    assert registry.find(cls.__name__) is cls
    assert getattr(fb, cls.__name__) is cls
    cls()  # every setting has a default


@every
def test_the_head_says_what_it_is(shape: str, name: str) -> None:
    head = registry.head(shape, name)
    assert len(head) > 20 and "\n" not in head
    numbers = re.findall(r"arXiv:\S+", head)
    assert all(re.fullmatch(r"arXiv:\d{4}\.\d{4,5}v\d+[.,;)]*", n) for n in numbers), f"a version is missing in {numbers}"


@pytest.mark.parametrize("shape", ["adapters", "rules", "ranks"])
def test_what_is_chosen_for_training_says_when(shape: str) -> None:
    for name in registry.names(shape):
        assert " Use it" in registry.head(shape, name), f"{shape}/{name}.py does not say in its head when to use it"


def test_class_names_are_unique() -> None:
    names = [registry.load(*file).__name__ for file in FILES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_method_is_data(value: object) -> None:
    shape = type(value).__module__.split(".")[1]
    line = json.dumps(registry.to_json(value))
    assert registry.from_json(shape, json.loads(line)) == value
    assert hash(value) == hash(dataclasses.replace(value))  # type: ignore[type-var]
    assert type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]


@every
def test_an_unknown_setting_is_named_with_its_neighbour(shape: str, name: str) -> None:
    known = list(inspect.signature(registry.load(shape, name)).parameters)
    with pytest.raises(ValueError, match="no setting 'nonsense_'"):
        registry.from_json(shape, {"paper": name, "nonsense_": 1})
    if known:
        with pytest.raises(ValueError, match=f"Did you mean '{known[0]}'"):
            registry.from_json(shape, {"paper": name, known[0] + "s": 1})


def test_an_unknown_method_is_named_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match="Did you mean 'loftq'"):
        registry.load("init", "loftqq")
    with pytest.raises(ValueError, match="'paper'"):
        registry.from_json("init", {"steps": 3})
    with pytest.raises(AttributeError, match="NoSuchThing"):
        fb.NoSuchThing  # noqa: B018


@pytest.mark.parametrize("name", ["../store", "base", "__init__", "os", "_family"])
def test_a_name_that_is_no_method_is_never_imported(name: str) -> None:
    with pytest.raises(ValueError):
        registry.load("init", name)


@pytest.mark.parametrize(("name", "module"), fb.PUBLIC.items())
def test_every_public_name_is_there(name: str, module: str) -> None:
    importlib.import_module(module)
    assert getattr(fb, name).__name__ == name, "a module must not hide the public name that it shares"
    assert name in dir(fb)
