"""The site: a page for every method, and no link into nothing."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from doc_pages import ROOT
from finebits import PUBLIC, registry

FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]+src=[\"']?(?:https?:)?//|<link[^>]+rel=[\"']?(?:stylesheet|preload)[^>]+href=[\"']?(https?:)?//"
)
LINK = re.compile(r"\]\(([^)\s#]*)(?:#[^)\s]*)?\)")


sys.path.insert(0, str(ROOT / "docs"))
generate = importlib.import_module("_generate")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    generate.main(place)
    return place


def named(nav: Any) -> set[str]:
    """All pages of a navigation."""
    if isinstance(nav, str):
        return {nav}
    return set().union(*(named(item) for item in (nav.values() if isinstance(nav, dict) else nav)))


def test_examples_in_the_generator() -> None:
    assert not any(doctest.testmod(module).failed for module in (generate, sys.modules["_python"]))


def test_every_method_has_a_page_with_its_head(site: Path) -> None:
    for shape in generate.SHAPES:
        for name in registry.names(shape):
            text = (site / "pages" / generate.page_of(shape, name)).read_text()
            first = registry.head(shape, name).split("arXiv:")[0].split()
            assert generate.prose(" ".join(first))[:60] in " ".join(text.split()), (shape, name)
            assert shape not in registry.SHAPES or f"```python\nclass {registry.load(shape, name).__name__}(" in text


def test_all_pages_are_in_the_navigation_and_all_of_it_is_there(site: Path) -> None:
    pages = {p.relative_to(site / "pages").as_posix() for p in (site / "pages").rglob("*.md")}
    assert named(yaml.safe_load((site / "site.yml").read_text())["nav"]) == pages


def test_links_lead_to_pages(site: Path) -> None:
    broken = []
    for page in (site / "pages").rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in LINK.findall(re.sub(r"`[^`]*`", "", text)):
            if target and "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(site / 'pages')}: {target}")
    assert not broken


def test_keys_of_recipes_are_all_there(site: Path) -> None:
    from finebits.recipe import Recipe

    schema = Recipe.model_json_schema()
    text = (site / "pages" / "reference" / "recipe.md").read_text()
    for about in (schema, *schema["$defs"].values()):
        for key in about.get("properties", {}):
            assert f"| `{key}` |" in text or f"## {key}\n" in text, key
    for where in generate.WHERE.values():  # what names methods is a key
        section, _, key = where.rpartition(".")
        assert f"| `{key}` |" in text.partition(f"## {section or 'On top'}\n")[2].partition("\n## ")[0], where


def test_public_names_and_verbs_are_all_there(site: Path) -> None:
    python = (site / "pages" / "reference" / "python.md").read_text()
    assert [name for name in PUBLIC if f"\n## {name}\n" not in python] == []
    commands = (site / "pages" / "reference" / "commands.md").read_text()
    assert [verb for verb in generate._command.verbs() if f"\n## {verb}\n" not in commands] == []


def test_notebooks_are_kept_without_what_came_out() -> None:
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name


def test_it_builds_and_fetches_nothing(site: Path) -> None:
    zensical = shutil.which("zensical", path=str(Path(sys.executable).parent)) or shutil.which("zensical")
    if zensical is None:
        pytest.skip("zensical is not installed: pip install '.[docs]'")
    done = subprocess.run([zensical, "build", "-f", str(site / "site.yml"), "--strict"], capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    for page in (site / "site").rglob("*.html"):
        assert not FETCHED.search(page.read_text()), page
