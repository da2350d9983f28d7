"""The page in a real browser, where one is installed, as wide as a desk and as wide as a phone, in one start: it lays out, answers pointer and
keys, sorts, copies and asks nobody for anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from finebits.report.page import run_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a headless Chromium, and none is installed")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --enable-logging=stderr --dump-dom --window-size=1500,900 --virtual-time-budget=3000"
)
ASK = """
<script>
const found = {errors: []};
addEventListener("error", e => found.errors.push(e.message));
const visible = e => e.getBoundingClientRect().width > 0;
const cell = [...document.querySelectorAll('[data-m="51"]')].find(visible), box = cell.getBoundingClientRect();
cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true, clientX: box.x, clientY: box.y}));
found.tip = document.getElementById("tip").innerText;
found.menu = document.querySelectorAll("#tip tr").length;
found.chosen = document.querySelector("#tip tr.chosen td").textContent;
document.querySelector("h1").dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
found.hidden = document.getElementById("tip").hidden;
found.panels = [...document.querySelectorAll(".panel")].map(p => [p.id, p.getBoundingClientRect().height]);
const charts = [...document.querySelectorAll("svg")].filter(visible);
found.charts = charts.map(s => s.getBoundingClientRect().width);
found.type = Math.min(...charts.map(s => 11 * s.getBoundingClientRect().width / s.viewBox.baseVal.width));
found.bare = [...document.querySelectorAll(".panel")].filter(p => p.querySelector("svg") && !p.querySelector("table")).map(p => p.id);
found.unnamed = [...document.querySelectorAll("svg, table, button, select")].filter(e =>
  !(e.getAttribute("aria-label") || e.caption?.textContent || e.textContent.trim())).length;
found.wide = document.documentElement.scrollWidth - innerWidth;
found.requests = performance.getEntriesByType("resource").map(e => e.name);
found.cut = charts.flatMap(s => [...s.querySelectorAll("text")]).filter(t => {
  const own = t.getBoundingClientRect(), all = t.ownerSVGElement.getBoundingClientRect();
  return own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1;
}).map(t => t.textContent);
const table = document.querySelector('[data-name="evaluation"]');
found.csv = csv(table);
const head = [...table.tHead.rows[0].cells].find(c => c.textContent.trim() === "held-out loss");
const order = () => [...table.tBodies[0].rows].map(r => parseFloat(r.cells[head.cellIndex].dataset.v));
head.firstChild.click();
found.up = order();
head.firstChild.click();
found.down = order();
const press = (on, key) => on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const map = cell.ownerSVGElement;
for (const key of ["Home", "ArrowRight", "ArrowDown", "Enter"]) press(map, key);
found.keys = document.getElementById("tip").innerText;
found.picked = [document.querySelectorAll("#picked svg").length, csv(document.querySelector("#picked table")).split("\\n")[0]];
const loss = charts.find(s => s.closest("#memory"));
press(loss, "ArrowRight");
found.mark = document.getElementById("tip").innerText;
const folds = () => document.querySelectorAll("details:not([open])").length;
found.folds = [folds()];
for (const moment of ["beforeprint", "afterprint"]) {
  dispatchEvent(new Event(moment));
  found.folds.push(folds());
}
found.after = document.documentElement.scrollWidth - innerWidth;
parent.postMessage(JSON.stringify(found), "*");
</script></body>"""
FRAMES = """<!doctype html><style>iframe { border: 0; height: 900px; }</style>
<iframe width="1440" srcdoc="PAGE"></iframe><iframe width="390" srcdoc="PAGE"></iframe>
<script>
const heard = [];
addEventListener("message", event => {
  heard.push(JSON.parse(event.data));
  if (heard.length < 2) return;
  document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
  document.getElementById("found").textContent = JSON.stringify(heard);
});
</script>"""


def test_in_a_real_browser(run: Path, tmp_path: Path) -> None:
    page, inside = tmp_path / "page.html", run_page(run).replace("</body>", ASK)
    page.write_text(FRAMES.replace("PAGE", escape(inside)))
    command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    answer = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert answer, done.stderr
    both = json.loads(unescape(answer[1]))
    for found in both:
        assert found["errors"] == [] and found["requests"] == []
        assert found["wide"] <= 0 and found["after"] <= 0 and found["cut"] == []
        assert found["tip"].startswith("model.layers.7.") and found["menu"] == 7 and "-b" in found["chosen"] and found["hidden"]
        names = {"memory", "bits", "ranks", "loss", "evaluation", "samples", "export", "data", "reproduce"}
        assert dict(found["panels"]).keys() == names and min(h for _, h in found["panels"]) > 80
        assert len(found["charts"]) == 11 and min(found["charts"]) > 250 and found["type"] > 8.5
        assert found["bare"] == [] and found["unnamed"] == 0
        assert found["up"] == sorted(found["up"]) and found["down"] == found["up"][::-1]
        heads, first = (line.split(",") for line in found["csv"].splitlines()[:2])
        assert heads[3:6] == ["loss", "loss low", "loss high"] and first[0] == '"full precision'
        assert len(heads) == 14 and float(first[4]) == pytest.approx(1.982)
        assert found["keys"].startswith("model.layers.") and found["picked"] == [2, "format,stored,loss,plan"]
        assert found["folds"][0] == found["folds"][2] > 5 and found["folds"][1] == 0
        assert "weights" in found["mark"] and "MiB" in found["mark"]


def test_on_paper_it_is_whole(run: Path, tmp_path: Path) -> None:
    """All tables that are folded on the screen take pages of their own: 210 matrices and 60 steps do not fit on ten."""
    page, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(run_page(run))
    flags = [flag for flag in FLAGS.split() if flag != "--dump-dom"]
    command = [str(BROWSER), *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={printed}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    assert len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) > 14
