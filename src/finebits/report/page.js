"use strict";
const tip = document.getElementById("tip");
let menu = JSON.parse(document.getElementById("menu").textContent);

// Put the panels of a newer page in the place of these; what was opened stays open.
function renew(page) {
  const open = [...document.querySelectorAll("details[open] > summary")].map(s => s.textContent);
  const picked = document.querySelector(".picked select")?.value;
  for (const part of ["#headline", "main", ".sub", "nav"]) document.querySelector(part).replaceWith(page.querySelector(part));
  for (const summary of document.querySelectorAll("details > summary")) summary.parentNode.open = open.includes(summary.textContent);
  menu = JSON.parse(page.getElementById("menu").textContent);
  tip.hidden = true;
  picker();
  if (picked && menu.rows[picked]) pick(+picked);
}

// On paper nothing is folded.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
});
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });

const bytes = n => {
  if (n === null) return "–";
  for (const [unit, step, digits] of [["GiB", 2 ** 30, 2], ["MiB", 2 ** 20, 2], ["KiB", 2 ** 10, 1]])
    if (n >= step) return `${(n / step).toFixed(digits)} ${unit}`;
  return `${n} B`;
};

const nameOf = ([kind, layer]) => menu.kinds[kind].join(layer ?? "");

function matrix(index) {
  const row = menu.rows[index], name = nameOf(row), [, , shape, chosen, held, loss, sizes, losses] = row;
  const head = document.createElement("div");
  head.textContent = `${name}   ${menu.shapes[shape]}`;
  const listed = menu.sizes[sizes].map(([format, size], i) => [format, size, losses[i]]);
  if (!listed.some(([format, size]) => format === chosen && size === held)) listed.push([chosen, held, loss]);
  listed.sort((a, b) => a[1] - b[1]);
  const table = document.createElement("table");
  for (const [format, size, lost] of listed) {
    const line = table.insertRow();
    if (format === chosen && size === held) line.className = "chosen";
    const said = lost === null ? "" : `loss ${lost && Math.abs(lost) < 1e-4 ? lost.toExponential(2) : lost.toPrecision(3)}`;
    for (const text of [menu.names[format], bytes(size), said, line.className ? "chosen" : ""]) line.insertCell().textContent = text;
  }
  return [head, table];
}

// The small drawing of a chart leaves its words to the large one.
function told(mark) {
  const large = mark.closest(".small")?.previousElementSibling;
  if (mark.dataset.tip || !large) return mark.dataset.tip;
  return large.querySelectorAll("[data-tip]")[[...mark.ownerSVGElement.querySelectorAll("[data-tip]")].indexOf(mark)]?.dataset.tip ?? "";
}

function move(event) {
  const gap = 14, { offsetWidth: w, offsetHeight: h } = tip;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + gap, innerWidth - w - 6))}px`;
  tip.style.top = `${event.clientY + gap + h > innerHeight ? Math.max(4, event.clientY - h - gap) : event.clientY + gap}px`;
}

document.addEventListener("pointerover", event => {
  const mark = event.target.closest("[data-tip], [data-m]");
  tip.hidden = !mark;
  if (!mark) return;
  if (mark.dataset.m) tip.replaceChildren(...matrix(+mark.dataset.m));
  else tip.textContent = told(mark);
  move(event);
});
document.addEventListener("pointermove", event => tip.hidden || move(event));

// By keyboard: a chart that has the focus shows one mark after the other; in a heat map arrows go to the neighbour.
const centre = mark => { const b = mark.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; };
const WAYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

function here(svg, mark) {
  svg.querySelector(".here")?.classList.remove("here");
  tip.hidden = !mark;
  if (!mark) return;
  mark.classList.add("here");
  if (mark.dataset.m) tip.replaceChildren(...matrix(+mark.dataset.m));
  else tip.textContent = told(mark);
  const [x, y] = centre(mark);
  move({ clientX: x, clientY: y });
}

document.addEventListener("keydown", event => {
  const svg = event.target.closest?.("svg[tabindex]"), way = WAYS[event.key];
  if (!svg) return;
  const marks = [...svg.querySelectorAll("[data-tip], [data-m]")], at = svg.querySelector(".here");
  let next = null;
  if (event.key === "Escape") { here(svg, null); return; }
  if ((event.key === "Enter" || event.key === " ") && at?.dataset.m) at.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  else if (event.key === "Home" || way && !at) next = marks[0];
  else if (event.key === "End") next = marks.at(-1);
  else if (way && at.dataset.m) {
    const [x, y] = centre(at);
    const ahead = marks.map(m => { const [a, b] = centre(m); return [way[0] * (a - x) + way[1] * (b - y), Math.abs(way[1] * (a - x)) + Math.abs(way[0] * (b - y)), m]; });
    next = ahead.filter(([d]) => d > 2).sort((p, q) => p[0] + 20 * p[1] - q[0] - 20 * q[1])[0]?.[2] ?? at;
  } else if (way) next = marks[Math.max(0, Math.min(marks.length - 1, marks.indexOf(at) + way[0] + way[1]))];
  else return;
  event.preventDefault();
  if (next) here(svg, next);
});
document.addEventListener("focusout", event => event.target.closest?.("svg[tabindex]") && here(event.target, null));

function sort(head) {
  const row = head.parentNode, at = [...row.children].indexOf(head), body = row.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of row.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = line => line.cells[at].dataset.v ?? line.cells[at].textContent.trim();
  const lines = [...body.rows].filter(line => !line.classList.contains("sum"));
  lines.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const [p, q] = [parseFloat(x), parseFloat(y)];
    const order = head.classList.contains("n") || !isNaN(+x) && !isNaN(+y) ? p - q : x.localeCompare(y);
    return down ? -order : order;
  });
  body.append(...lines, ...[...body.rows].filter(line => line.classList.contains("sum")));
}

function csv(table) {
  const quote = text => {
    const safe = /^[=+@\t\r-]/.test(text) && isNaN(+text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const heads = [...table.tHead.rows[0].cells];
  const parts = heads.map(head => head.dataset.parts?.split("|") ?? [head.textContent.trim()]);
  const lines = [...table.tBodies[0].rows].map(line => [...line.cells].flatMap((cell, i) => {
    const held = cell.dataset.v ?? cell.textContent.trim();
    return heads[i].dataset.parts ? held.split("|") : [held];
  }));
  return [parts.flat(), ...lines].map(line => line.map(quote).join(",")).join("\n") + "\n";
}

async function copy(button) {
  const place = button.parentNode;
  const text = button.dataset.copy === "csv" ? csv(place.querySelector("table")) : place.querySelector("pre").textContent;
  let done = true;
  try { await navigator.clipboard.writeText(text); } catch {
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text;
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  const said = button.textContent;
  button.textContent = done ? "copied" : "could not copy";
  setTimeout(() => { button.textContent = said; }, 1500);
}

document.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.copy) copy(button);
  else if (button.parentNode.tagName === "TH") sort(button.parentNode);
});
