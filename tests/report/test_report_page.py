"""The page: one file, nothing fetched, nothing unescaped, no panel without its data."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folder import MIB, SCRIPT, chosen, write_run

from finebits.formats.nf import NF
from finebits.plan.base import Plan, Spec
from finebits.plan.levers import Levers
from finebits.report import svg
from finebits.report.folder import read
from finebits.report.page import plan_page, run_page

VOID = {"meta", "br", "img", "link", "input", "hr"}
OPEN_ENDED = {"tr", "td", "th", "tbody", "thead"}  # html lets these end by themselves


class Page(HTMLParser):
    """Parses strictly: every element but cells and rows must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str, str]] = []
        self.handlers: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.charts = self.scripts = 0
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {k: v or "" for k, v in attrs}
        self.ids += [held["id"]] if "id" in held else []
        self.links += [(tag, k, v) for k, v in held.items() if k in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")]
        self.handlers += [k for k in held if k.startswith("on")]
        self.charts += tag == "svg"
        self.scripts += tag == "script"
        if tag == "table":
            self.tables[held["data-name"]] = []
        if tag == "tr" and self.tables:
            list(self.tables.values())[-1].append([])
        if tag == "td":
            list(self.tables.values())[-1][-1].append(held.get("data-v", ""))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack[-1] != tag and self.stack[-1] in OPEN_ENDED:
            self.stack.pop()
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.stack:
            self.text.setdefault(self.stack[-1], []).append(data)
        if self.stack and self.stack[-1] == "td":
            row = list(self.tables.values())[-1][-1]
            row[-1] = row[-1] or data.strip()


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return run_page(run)


ALL = ["memory", "bits", "ranks", "loss", "evaluation", "samples", "export", "data", "reproduce"]


def panels(text: str) -> list[str]:
    return [i for i in Page(text).ids if i in ALL]


def test_whole_page_parses_and_is_small(html: str) -> None:
    page = Page(html)
    assert [i for i in page.ids if i in ALL] == ALL
    assert page.charts == 2 * 11 and page.scripts == 2
    assert len(html.encode()) < 400_000


def test_nothing_is_requested(html: str) -> None:
    assert all(value.startswith("#") and tag == "a" for tag, _, value in Page(html).links)
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style and not re.search(r"url\(|@import", style[1])
    addresses = re.findall(r"https?://\S+", html)
    assert addresses == ["https://example.org/models"]  # in the recipe's own text
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html


def test_strangers_text_stays_text(html: str) -> None:
    assert SCRIPT not in html and "<img" not in html and "<b>bold?" not in html
    page = Page(html.replace("<ins>", "").replace("</ins>", ""))  # words that are new are marked
    assert SCRIPT in page.text["pre"] and '"><img src=x onerror=alert(1)>' in page.text["pre"]
    assert page.handlers == []


def test_names_cannot_leave_a_script_or_an_attribute() -> None:
    evil = '</script><script>alert(1)</script>"'
    plan = Plan(
        {f"model.layers.0.{evil}": Spec(NF(4, 64))},
        model=evil,
        memory={evil: 5 * MIB},
        levers=Levers(attn_implementation=evil),
        solver={"name": evil},
    )
    page = Page(plan_page(plan))
    assert page.scripts == 2 and page.handlers == []


@pytest.mark.parametrize(
    ("missing", "panel"),
    [("evaluation.json", "evaluation"), ("samples.json", "samples"), ("export.json", "export"), ("data.json", "data"), ("runs", "loss")],
)
def test_a_missing_file_leaves_its_panel_out(run: Path, tmp_path: Path, missing: str, panel: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    gone = folder / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert panels(run_page(folder)) == [p for p in ALL if p != panel]


def test_what_was_chosen_and_refined_is_shown(run: Path, plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert "start" not in Page(run_page(folder)).ids
    tried = lambda *errors: [{"init": {"paper": p}, "error": e} for p, e in zip(("zeros", "loftq", "qera"), errors, strict=True)]  # noqa: E731
    choices = {n: {"tried": tried(2.0, 1.5, 0.5), "won": 2, "share": 0.25} for n in plan.modules}
    one, two = list(choices)[:2]
    choices[one] = {"tried": tried(2.0, 1.0, 1.4), "won": 1, "share": 0.5}
    choices[two] = {"tried": tried(0.0, 0.0, 0.0), "won": 0, "share": 1.0}  # a weight that its format holds exactly
    choices["<b>elsewhere</b>"] = choices[one]
    here = folder / "runs" / "loftq"
    (here / "choices.json").write_text(json.dumps(choices))
    (here / "refined.json").write_text(
        json.dumps({f"model.layers.{i}": [0.4 - i / 100, 0.1] for i in range(30)} | {"": [float("nan"), 0.3]})
    )
    html = run_page(folder)
    page = Page(html)
    assert "start" in page.ids and page.charts == 2 * 13 and len(html.encode()) < 400_000 and "<b>elsewhere" not in html
    listed = page.tables["start of every matrix"][1:]
    assert len(listed) == len(choices) and listed[0] == [one, "loftq", "0.5", "qera", "0.7"] and listed[1][1:3] == ["zeros", "1"]
    won = page.tables["starts"][1:]
    assert [(row[0], row[2]) for row in won] == [("qera", "208"), ("loftq", "2"), ("zeros", "1")] and won[0][3] == "0.25"
    refined = page.tables["refinement"][1:]
    assert refined[0] == ["model.layers.0", "0.4", "0.1", "-0.75"] and refined[-1][0] == "the whole model"
    (here / "choices.json").unlink()
    (here / "refined.json").write_text(json.dumps({"": [0.5, 0.25]}))
    assert Page(run_page(folder)).charts == 2 * 11 and Page(run_page(folder)).tables["refinement"][1][1:] == ["0.5", "0.25", "-0.5"]


def test_blocks_trials_and_ranks_are_shown(plan: Plan) -> None:
    assert "blocks" not in Page(plan_page(plan)).ids
    assert [r[2] for r in Page(plan_page(plan)).tables["adapters"][1:]] == ["210"] and "All 210 adapters are lora(rank=16" in plan_page(
        plan
    )
    html = plan_page(chosen(plan))
    page = Page(html)
    assert {"blocks", "ranks"} <= {*page.ids} and len(html.encode()) < 400_000
    assert "the share that is allowed (R6); on 30 matrices blocks begin anew with every head of 64 columns" in html
    assert [r[:2] for r in page.tables["block sizes"][1:]] == [["16", "70"], ["64", "139"], ["dense", "1"]]
    names = list(plan.modules)
    assert page.tables["block of every matrix"][1][:2] == [names[0], "16"] and page.tables["block of every matrix"][1][4] == "a reason"
    tried = page.tables["what was tried"][1:]
    assert [r[0] for r in tried] == ["uniform 64", "optimum", f"{names[7]} at 16"] and tried[0][3] == "taken" and tried[1][3] == ""
    assert [r[:2] for r in page.tables["ranks"][1:]] == [["0", "1"], ["8", "105"], ["32", "104"]]
    assert page.tables["ranks"][1][2] == "q_proj 1" and "4,168 ranks over 210 matrices" in html
    alone = replace(chosen(plan), solver={"ranks": {"paper": "lamda_pp"}})
    assert "blocks" not in Page(plan_page(alone)).ids and "given out by lamda_pp" in plan_page(alone)


def test_a_plan_alone_is_a_page(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert panels(run_page(tmp_path)) == panels(plan_page(plan)) == ["memory", "bits", "ranks", "reproduce"]
    plan.to_html(tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text() == plan_page(plan)
    assert panels(plan_page(Plan({}))) == ["reproduce"]


def test_memory_sums_on_the_page(html: str, plan: Plan) -> None:
    rows = [r for r in Page(html).tables["memory of loftq"] if r]
    names = [r[0] for r in rows]
    end = names.index("training peak")
    assert sum(int(r[1]) for r in rows[:end]) == int(rows[end][1]) == plan.peak
    assert names[end + 1 :] == ["load peak", "eval peak", "save peak", "export peak", "stored weights"]


def test_every_matrix_is_on_the_map_with_its_menu(html: str, plan: Plan) -> None:
    assert sorted(map(int, re.findall(r'data-m="(\d+)"', html))) == sorted([*range(210), *range(210)])
    menu = json.loads(re.search(r'id="menu">(.*?)</script>', html, re.S)[1])
    name = "model.layers.1.mlp.down_proj"
    row = next(r for r in menu["rows"] if str(r[1]).join(menu["kinds"][r[0]]) == name)
    cost = plan.costs[name]
    assert menu["names"][row[3]] == "int8-b128-bf16" and row[4] == cost["bytes"]
    assert [size for _, size in menu["sizes"][row[6]]] == [o["bytes"] for o in cost["menu"]]
    assert row[7] == pytest.approx([o["loss"] for o in cost["menu"]], rel=5e-3)


def test_the_headline_is_of_the_run_that_followed_the_plan(run: Path, html: str) -> None:
    assert read(run).main == "loftq" and read(run).runs[0] == "loftq"
    tiles = html[html.index('id="headline"') : html.index("<main>")]
    assert "1.982 → 1.423" in tiles and "376.9 MiB" in tiles and "passed" in tiles and "bad" not in tiles


def test_over_budget_and_a_failed_export_are_said(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    memory = json.loads((folder / "runs/loftq/memory.json").read_text())
    (folder / "runs/loftq/memory.json").write_text(json.dumps(memory | {"measured_peak": 401 * MIB}))
    export = json.loads((folder / "export.json").read_text())
    export["targets"][1]["verdict"] = "fail"
    (folder / "export.json").write_text(json.dumps(export))
    html = run_page(folder)
    tiles = html[html.index('id="headline"') : html.index("<main>")]
    assert "over the budget" in tiles and "failed" in tiles and tiles.count("tile bad") == 2


def test_an_unverified_export_is_not_called_passed(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "export.json").write_text(json.dumps({"targets": [{"name": "merged", "path": "m", "bytes": 5}]}))
    html = run_page(folder)
    assert "1 not verified" in html and "Written and not verified." in html and "passed" not in html


def test_what_was_not_measured_is_left_out(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "runs/loftq/memory.json"
    held = json.loads(path.read_text()) | {
        "measured_peak": None,
        "baseline": None,
        "rows": [{"phase": "load", "planned": None, "measured": None}],
    }
    path.write_text(json.dumps(held))
    html = run_page(folder)
    assert "training peak, planned" in html and "load planned" not in html


def test_a_local_model_is_named_by_its_last_part() -> None:
    assert "<h1>model.gguf</h1>" in plan_page(Plan({}, model="/somewhere/model.gguf"))
    assert "<h1>owner/name</h1>" in plan_page(Plan({}, model="owner/name"))


def test_a_larger_model_and_a_longer_run_still_fit(tmp_path: Path) -> None:
    html = run_page(write_run(tmp_path / "big", layers=80, steps=2000))
    assert len(html.encode()) < 400_000
    assert "every point is the mean of 20 steps" in html


def test_killed_resumed_and_diverged_runs(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "runs/zeros/events.jsonl"
    lines = path.read_text().splitlines()[:30]
    again = json.loads(lines[10]) | {"loss": 0.125}
    nan = json.loads(lines[12]) | {"loss": float("nan")}
    path.write_text("\n".join([*lines, json.dumps(again), json.dumps(nan), '{"t": 3, "eve']))
    html = run_page(folder)
    assert "zeros: the last line of events.jsonl is cut off" in html
    assert "zeros: the loss of 1 steps is not finite" in html
    row = next(r for r in Page(html).tables["loss of every step"] if r and r[0] == str(again["step"]))
    assert "0.125" in row
    path.write_text("\n".join([*lines[:3], "{broken", *lines[4:]]))
    with pytest.raises(ValueError, match=r"zeros/events.jsonl, line 4, is not JSON"):
        run_page(folder)


def test_broken_files_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no plan at"):
        run_page(tmp_path)
    shutil.copy(run / "plan.json", tmp_path)
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(ValueError, match=r"data.json is not JSON \(line 1\)"):
        run_page(tmp_path)


def test_the_page_is_the_same_every_time(run: Path, html: str) -> None:
    assert run_page(run) == html


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 477.3), (1.1, 3.2), (0.0, 3e-5), (0.0, 9.1e9), (2.0, 2.0)])
def test_ticks_are_round_and_inside(lo: float, hi: float) -> None:
    found = svg.ticks(lo, hi)
    assert all(lo - 1e-12 <= t <= hi * (1 + 1e-9) for t in found) and (len(found) >= 3 or lo == hi)
    assert all(float(f"{t:.2g}") == pytest.approx(t) or float(f"{t:.3g}") == pytest.approx(t) for t in found)


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 1.1), (2.9, 4.1), (-0.011, 0.013), (0.0, 3e-5), (0.0, 9.1e9), (2.4, 2.61)])
def test_ticks_say_where_they_stand(lo: float, hi: float) -> None:
    at = svg.ticks(lo, hi)
    assert [float(word) for word in svg.labels(at)] == at and len({len(word.partition(".")[2]) for word in svg.labels(at)}) == 1


def test_an_axis_in_quarters_is_labelled_in_quarters() -> None:
    drawn = svg.dots("t", [svg.Dot("a", 1.0, 0.1, 1.1, "x", "1")], "axis", zero=True)
    assert re.findall(r'class="tick"[^>]*>([^<]*)<', drawn) == ["0.00", "0.25", "0.50", "0.75", "1.00"]


def test_labels_keep_apart() -> None:
    placed = svg.apart([50.0, 51.0, 52.0, 99.0], 10, 0, 100)
    assert all(b - a >= 10 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    assert max(placed) <= 100 and placed == sorted(placed)


def test_bars_start_at_zero_and_are_to_scale() -> None:
    drawn = svg.bars("t", [svg.Bar("a", [("", 2.0, "x")]), svg.Bar("b", [("", 1.0, "x")])], str, "")
    spans = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)]
    assert spans[0][0] == spans[1][0]
    assert spans[0][1] + 1 == pytest.approx(2 * (spans[1][1] + 1), rel=1e-3)
