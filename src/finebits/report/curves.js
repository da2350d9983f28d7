// The errors of every format: of one matrix against its size, and over the layers for matrices of its kind. Drawn from the menu of the page.
const NS = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg").namespaceURI;
const place = row => [row[1], menu.kinds[row[0]].at(-1).replace(/^\./, "")];

function options(index) {
  const [, , , chosen, held, loss, sizes, losses] = menu.rows[index];
  const all = menu.sizes[sizes].map(([format, size], i) => ({ format, size, loss: losses[i] }));
  if (!all.some(o => o.format === chosen && o.size === held)) all.push({ format: chosen, size: held, loss });
  for (const o of all) o.chosen = o.format === chosen && o.size === held;
  return all.sort((a, b) => a.size - b.size);
}

function element(parent, name, attributes, text) {
  const made = parent.appendChild(document.createElementNS(NS, name));
  for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
  if (text !== undefined) made.textContent = text;
  return made;
}

// One drawing with a logarithmic y; `lines` are {class, points: [[x, y, tip, ring]]}, `words` [y, word, class] on the right, kept apart.
function plot(title, lines, words, xAxis, ticks, width) {
  const figure = document.createElement("figure"), height = 260, [left, top, bottom] = [56, 30, height - 44];
  const right = 14 + 6.8 * Math.max(...words.map(w => w[1].length));
  const points = lines.flatMap(l => l.points), xs = points.map(p => p[0]), ys = points.map(p => Math.log10(p[1]));
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys) - .08, Math.max(...ys) + .08];
  const x = v => left + 12 + (width - left - right - 24) * (x1 > x0 ? (v - x0) / (x1 - x0) : .5);
  const y = v => bottom - (bottom - top) * (y1 > y0 ? (Math.log10(v) - y0) / (y1 - y0) : .5);
  const svg = element(figure, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": `${title}. The table holds its figures.` });
  element(svg, "text", { x: left, y: 12, class: "title" }, title);
  for (let k = Math.floor(y0); k <= Math.ceil(y1); k++) for (const f of y1 - y0 > 2.5 ? [1] : [1, 2, 5]) {
    const v = f * 10 ** k;
    if (Math.log10(v) < y0 || Math.log10(v) > y1) continue;
    element(svg, "line", { x1: left, x2: width - right, y1: y(v), y2: y(v), class: "grid" });
    element(svg, "text", { x: left - 8, y: y(v) + 4, class: "tick", "text-anchor": "end" }, +v.toPrecision(1));
  }
  for (const [v, word] of ticks) element(svg, "text", { x: x(v), y: bottom + 16, class: "tick", "text-anchor": "middle" }, word);
  element(svg, "line", { x1: left, x2: width - right, y1: bottom, y2: bottom, class: "axis" });
  element(svg, "text", { x: (left + width - right) / 2, y: height - 6, class: "axis-word", "text-anchor": "middle" }, xAxis);
  for (const l of lines) {
    if (l.points.length > 1) element(svg, "path", { d: l.points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join(""), class: `smooth ${l.class}` });
    for (const [a, b, tip, ring] of l.points) {
      if (ring) element(svg, "circle", { cx: x(a), cy: y(b), r: 8, class: `dot hollow ${l.class}` });
      element(svg, "circle", { cx: x(a), cy: y(b), r: l.points.length > 12 ? 2.2 : 3.6, class: `dot ${l.class}`, "data-tip": tip });
    }
  }
  words.sort((p, q) => q[0] - p[0]);
  let edge = top - 10;
  const heights = words.map(([v]) => (edge = Math.max(y(v) + 4, edge + 14)));
  edge = bottom + 14;
  for (let i = words.length - 1; i >= 0; i--) heights[i] = edge = Math.min(heights[i], edge - 14);
  words.forEach(([, word, hue], i) => element(svg, "text", { x: width - right + 6, y: heights[i], class: `name ${hue}` }, word));
  return figure;
}

function listing(name, heads, rows) {
  const box = document.createElement("div"), button = box.appendChild(document.createElement("button"));
  [box.className, button.className, button.type, button.dataset.copy, button.textContent] = ["listing", "copy", "button", "csv", "copy as CSV"];
  button.setAttribute("aria-label", `copy ${name} as CSV`);
  const scroll = box.appendChild(document.createElement("div")), table = scroll.appendChild(document.createElement("table"));
  scroll.className = "scroll";
  table.dataset.name = name;
  table.createCaption().textContent = name;
  const head = table.createTHead().insertRow(), body = table.createTBody();
  table.className = "n2 n3";
  heads.forEach((word, i) => {
    const cell = head.appendChild(document.createElement("th"));
    [cell.textContent, cell.scope, cell.className] = [word, "col", i === 1 || i === 2 ? "n" : ""];
  });
  for (const row of rows) for (const [shown, raw] of ((line, cells) => cells.map(c => [line.insertCell(), c]))(body.insertRow(), row)) {
    shown.textContent = Array.isArray(raw) ? raw[0] : raw;
    if (Array.isArray(raw)) shown.dataset.v = raw[1] ?? "";
  }
  return box;
}

function pick(index) {
  const to = document.getElementById("picked"), name = nameOf(menu.rows[index]), [layer, kind] = place(menu.rows[index]), all = options(index);
  const shown = v => v === null ? "–" : v && Math.abs(v) < 1e-4 ? v.toExponential(2) : v.toPrecision(3);
  document.querySelector(".picked select").value = index;
  for (const cell of document.querySelectorAll("[data-m]")) cell.classList.toggle("chosen", +cell.dataset.m === index);
  const drawn = all.filter(o => o.loss > 0), width = Math.max(300, Math.min(to.clientWidth > 760 ? to.clientWidth / 2 - 18 : to.clientWidth, 620));
  const charts = document.createElement("div");
  charts.className = "pair";
  if (drawn.length) {
    const points = drawn.map(o => [o.size, o.loss, `${menu.names[o.format]}\n${bytes(o.size)}   loss ${shown(o.loss)}`, o.chosen]);
    const ends = drawn.length > 1 ? [drawn[0], drawn[drawn.length - 1]] : [drawn[0]];
    charts.append(plot(`${kind}${layer === null ? "" : `, layer ${layer}`}`, [{ class: "s0", points }],
      drawn.map(o => [o.loss, menu.names[o.format] + (o.chosen ? " ◂" : ""), "s0"]), "bytes stored", ends.map(o => [o.size, bytes(o.size)]), width));
  }
  const same = menu.rows.map((row, i) => [i, ...place(row)]).filter(([, l, k]) => k === kind && l !== null).sort((a, b) => a[1] - b[1]);
  if (same.length > 1) {
    const by = new Map();
    for (const [i, l] of same) for (const o of options(i)) if (o.loss > 0) {
      if (!by.has(o.format)) by.set(o.format, []);
      by.get(o.format).push([l, o.loss, `layer ${l}, ${menu.names[o.format]}${o.chosen ? " (chosen)" : ""}\nloss ${shown(o.loss)}`, i === index && o.chosen]);
    }
    const hue = i => i < 6 ? `s${i}` : "neutral";
    const lines = [...by].map(([, points], i) => ({ class: hue(i), points }));
    const words = [...by].map(([format, points], i) => [points.at(-1)[1], menu.names[format], hue(i)]);
    const step = Math.max(1, Math.ceil(same.length / (width > 400 ? 10 : 5)));
    if (lines.length) charts.append(plot(`${kind} in every layer`, lines, words, "layer", same.filter((_, i) => i % step === 0).map(([, l]) => [l, l]), width));
  }
  const rows = all.map(o => [menu.names[o.format], [bytes(o.size), o.size], [shown(o.loss), o.loss], o.chosen ? "chosen" : ""]);
  to.replaceChildren(charts, listing(`errors of ${name}`, ["format", "stored", "loss", "plan"], rows));
}

function picker() {
  const select = document.querySelector(".picked select");
  if (!select || select.options.length > 1) return;
  menu.rows.forEach((row, i) => select.add(new Option(nameOf(row), i)));
}
picker();
document.addEventListener("change", event => event.target.closest(".picked") && event.target.value !== "" && pick(+event.target.value));
document.addEventListener("click", event => {
  const cell = event.target.closest("[data-m]");
  if (cell && document.getElementById("picked")) pick(+cell.dataset.m);
});
