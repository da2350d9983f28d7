"""The JSON Schema of a recipe, for editors: it knows every key, and the recipes that are shipped keep to it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finebits.cli import main
from finebits.recipe import flags
from finebits.recipe.source import Loader

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture
def schema(capsys) -> dict[str, Any]:
    assert main(["recipe", "schema"]) == 0
    return json.loads(capsys.readouterr().out)


def at(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for; of a choice, the mapping."""
    for one in node.get("anyOf", ()):
        if "$ref" in one:
            node = one
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def test_every_key_is_in_it_and_described(schema):
    for key in flags.keys():
        node = schema
        for part in key.split("."):
            entry = at(schema, node)["properties"]
            node = entry[part] if part in entry else entry[next(s for s in ("rank", "r", "alpha", "lora_alpha", *entry) if s in entry)]
        assert node


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_recipes_that_are_shipped_keep_to_it(path, schema):
    recipe = yaml.load(path.read_text(), Loader)  # noqa: S506
    if importlib.util.find_spec("jsonschema"):
        import jsonschema

        jsonschema.validate(recipe, schema)
    for section, keys in recipe.items():
        node = at(schema, schema["properties"][section])
        if isinstance(keys, dict):
            assert node["type"] == "object" and (node.get("additionalProperties", True) or {*keys} <= {*node["properties"]})
