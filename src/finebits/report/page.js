"use strict";
const tip = document.getElementById("tip");
let menu = JSON.parse(document.getElementById("menu").textContent);

const bytes = n => {
  if (n === null) return "–";
  for (const [unit, step, digits] of [["GiB", 2 ** 30, 2], ["MiB", 2 ** 20, 2], ["KiB", 2 ** 10, 1]])
    if (n >= step) return `${(n / step).toFixed(digits)} ${unit}`;
  return `${n} B`;
};

function matrix(index) {
  const [name, shape, chosen, held, loss, sizes, losses] = menu.rows[index];
  const head = document.createElement("div");
  head.textContent = `${name}   ${menu.shapes[shape]}`;
  const listed = menu.sizes[sizes].map(([format, size], i) => [format, size, losses[i]]);
  if (!listed.some(([format, size]) => format === chosen && size === held)) listed.push([chosen, held, loss]);
  listed.sort((a, b) => a[1] - b[1]);
  const table = document.createElement("table");
  for (const [format, size, lost] of listed) {
    const row = table.insertRow();
    if (format === chosen && size === held) row.className = "chosen";
    const said = lost === null ? "" : `loss ${lost && Math.abs(lost) < 1e-4 ? lost.toExponential(2) : lost.toPrecision(3)}`;
    for (const text of [menu.names[format], bytes(size), said, row.className ? "chosen" : ""]) row.insertCell().textContent = text;
  }
  return [head, table];
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
  else tip.textContent = mark.dataset.tip;
  move(event);
});
document.addEventListener("pointermove", event => tip.hidden || move(event));

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
  const parts = heads.map(head => head.dataset.parts?.split("|") ?? [head.textContent]);
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
