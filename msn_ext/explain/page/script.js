"use strict";
// Everything that is shown of tokens is set as text, never as markup.
const at = (id) => document.getElementById(id);
const data = JSON.parse(at("answer").textContent);
const steps = data.passes.map((values) =>
  Object.fromEntries(data.fields.map((field, i) => [field, values[i]])));
const ROW = 44, HEIGHT = 36, GAP = 34, HEAD = 22, BEAT = 1100;
const SVG = "http://www.w3.org/2000/svg";

function make(parent, tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

function draw(parent, tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const gained = (step) => [...step.path.slice(1).map((node) => step.tokens[node]), step.bonus];

function percent(p) {
  if (p > 0 && p < 0.0005) return "<0.1%";
  return `${(100 * p).toFixed(p > 0 && p < 0.0995 ? 1 : 0)}%`;
}

// ---- what is made once

const total = data.text.length;
let ends = [data.opening];  // tokens of the answer after 0, 1, … passes
for (const step of steps) ends.push(ends.at(-1) + step.kept);

function writeFacts() {
  const rate = (total / (steps.length + 1)).toFixed(2);
  const parts = [["", count(total, "token")], [" in ", count(steps.length + 1, "forward pass")
    .replace("passs", "passes")], [", ", `${rate} a pass`]];
  for (const [before, bold] of parts) {
    at("facts").append(before);
    make(at("facts"), "b", "", bold);
  }
  at("facts").append(`. Plain decoding gives the same text in ${total}.`);
}

const spans = [];  // of every pass, the prompt's first
const letters = [];  // of every token

function writeText() {
  for (let pass = 0; pass <= steps.length; pass++) {
    const span = make(at("text"), "span", "pass"), from = pass ? ends[pass - 1] : 0;
    span.addEventListener("click", () => go(pass || 1));
    spans.push(span);
    for (let i = from; i < ends[pass]; i++) {
      const step = steps[pass - 1], last = step ? step.path.length - 1 : data.opening - 1;
      const free = i - from < last;
      const token = make(span, "span", free ? "token free" : "token", data.text[i]);
      if (free && i === from) token.classList.add("from");
      if (free && (i - from === last - 1 || i === ends[pass] - 1)) token.classList.add("to");
      letters.push(token);
    }
  }
}

function writeStrip() {
  const most = Math.max(...steps.map((step) => step.kept));
  const svg = draw(at("strip"), "svg",
    { viewBox: `0 0 ${steps.length} ${most}`, preserveAspectRatio: "none", "aria-hidden": true });
  const gap = 0.12, unit = { width: 1 - 2 * gap };
  draw(svg, "rect", { class: "now", y: 0, width: 1, height: most });
  steps.forEach((step, i) => {
    draw(svg, "rect", { ...unit, class: "own", x: i + gap, y: most - 1, height: 0.92 });
    if (step.kept > 1) draw(svg, "rect",
      { ...unit, class: "free", x: i + gap, y: most - step.kept, height: step.kept - 1 });
  });
  at("strip").setAttribute("aria-valuemax", steps.length);
}

function writeChoices() {
  const least = [...new Set([0, 0.01, 0.05, 0.2, data.least])].sort((a, b) => a - b);
  for (const value of least) {
    const text = value ? `from ${percent(value)}` : "all guesses";
    make(at("least"), "option", "", text).value = value;
  }
  at("least").value = data.least;
  at("least").addEventListener("change", () => writeTree(steps[now - 1]));
}

// ---- the tree

// Lines of nodes that are shown: the accepted child first, then the likeliest.
function outline(step, least) {
  const path = new Set(step.path), root = { node: 0, depth: 0, children: [], folded: 0 };
  const lines = [root], holders = [root];
  for (let node = 1; node < step.tokens.length; node++) {
    const parent = holders[step.parents[node]], shown = parent.node === step.parents[node];
    if (shown && (path.has(node) || step.probability[node] >= least)) {
      const line = { node, depth: parent.depth + 1, children: [], folded: 0 };
      parent.children.push(line);
      lines.push(holders[node] = line);
    } else {
      (holders[node] = parent).folded++;
    }
  }
  for (const line of lines) line.children.sort((a, b) =>
    path.has(b.node) - path.has(a.node) || step.probability[b.node] - step.probability[a.node]);
  const last = holders[step.path.at(-1)], bonus = { node: null, depth: last.depth + 1, children: [] };
  last.children.unshift(bonus);
  return [root, [...lines, bonus]];
}

// Gives rows to a node, its first child, that one's first child, …: one row for all; then to the
// others below, as near as boxes in their columns and lines in the gaps after them allow.
function place(line, columns, gaps) {
  const chain = [];
  for (let one = line; one; one = one.children[0]) chain.push(one);
  const row = Math.max(...chain.map(({ depth, children }) =>
    Math.max(columns[depth] || 0, children.length ? gaps[depth] || 0 : 0)));
  for (const one of chain) {
    one.row = row;
    columns[one.depth] = row + 1;
    if (one.children.length) gaps[one.depth] = row + 1;
  }
  for (const { depth, children } of chain.reverse()) {
    for (const child of children.slice(1)) {
      place(child, columns, gaps);
      gaps[depth] = child.row + 1;
    }
  }
}

function box(list, step, line) {
  const { node } = line, item = make(list, "li");
  const token = data.tokens[node === null ? step.bonus : step.tokens[node]];
  make(item, "bdi", "", token);
  const accepted = step.path.includes(node);
  const kind = node === null ? "bonus" : node === 0 ? "root" : accepted ? "accepted" : "rejected";
  item.className = kind;
  let words = kind;
  if (node === null) words = "bonus: the model’s own next token";
  if (node === 0) words = "root: the text’s last token";
  const small = make(item, "small", "", node ? percent(step.probability[node]) : kind);
  if (node) {
    const sources = data.sources.filter(({ bit }) => step.sources[node] & bit);
    small.append(` ${sources.map(({ letter }) => letter).join("")}`);
    sources.forEach(({ letter }, i) => {
      const bar = make(item, "span", "bar"), tall = (HEIGHT - 12) / sources.length;
      Object.assign(bar.style, { background: `var(--${letter})`, top: `${4 + i * tall}px`,
        height: `${tall}px` });
    });
    words = `${percent(step.probability[node])} probable, from ${
      sources.map(({ word }) => word).join(" and ")}, ${kind}`;
    if (!accepted) item.style.opacity = 0.75 + 0.25 * Math.sqrt(step.probability[node]);
  }
  if (line.folded) make(small, "span", "folded", ` +${line.folded}`);
  item.title = `${token}: ${words}`;
  item.setAttribute("aria-label", item.title);
  return item;
}

function writeTree(step) {
  const [root, lines] = outline(step, Number(at("least").value)), columns = [];
  const tree = at("tree");
  place(root, columns, []);
  tree.replaceChildren();
  const field = make(tree, "div", "field"), svg = draw(field, "svg", { "aria-hidden": true });
  const list = make(field, "ul");
  for (const line of lines) line.box = box(list, step, line);
  const widths = [];
  for (const line of lines) {
    widths[line.depth] = Math.max(widths[line.depth] || 46, Math.ceil(line.box.offsetWidth) + 1);
  }
  const lefts = [0];
  widths.forEach((width, depth) => lefts.push(lefts[depth] + width + GAP));
  const width = lefts.at(-1) - GAP, height = HEAD + ROW * Math.max(...columns);
  Object.assign(field.style, { width: `${width}px`, height: `${height}px` });
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  widths.forEach((wide, depth) => {
    const caption = make(field, "span", "depth", depth ? `+${depth}` : "text’s end");
    Object.assign(caption.style, { left: `${lefts[depth] - 10}px`, width: `${wide + 20}px` });
  });
  for (const line of lines) {
    const style = { left: `${lefts[line.depth]}px`, width: `${widths[line.depth]}px` };
    Object.assign(line.box.style, style, { top: `${HEAD + ROW * line.row}px` });
    const delay = `${45 * line.depth}ms`;
    if (!line.box.classList.contains("rejected")) line.box.style.animationDelay = delay;
    for (const child of line.children) edge(svg, step, line, child, lefts, widths);
  }
  svg.append(...svg.querySelectorAll(".taken"));
  tree.scrollTo(0, 0);
}

function edge(svg, step, line, child, lefts, widths) {
  const x = lefts[line.depth] + widths[line.depth], to = lefts[child.depth];
  const [y, end] = [line, child].map(({ row }) => HEAD + ROW * row + HEIGHT / 2);
  const bend = to - 12;  // near the children: a box without any has no line at its side
  const turn = end > y ? `H${bend - 7}Q${bend} ${y} ${bend} ${y + 7}V${end - 7}`
    + `Q${bend} ${end} ${bend + 7} ${end}` : "";
  const taken = child.node === null || step.path.includes(child.node);
  const path = draw(svg, "path", { class: taken ? "taken" : "edge", d: `M${x} ${y}${turn}H${to}` });
  if (taken) {
    path.setAttribute("pathLength", 1);
    path.style.animationDelay = `${45 * line.depth}ms`;
  } else {
    path.setAttribute("stroke-width", 1 + 3 * step.probability[child.node]);
  }
}

// ---- the pass that is shown

let now = 0, timer = null;

function go(number, options = {}) {
  number = Math.min(Math.max(number, 1), steps.length);
  if (!options.playing) stop();
  if (number === now) return;
  const before = now;
  now = number;
  const step = steps[now - 1];
  showText(before);
  showStrip();
  at("pass-head").textContent = `Pass ${now} gained ${count(step.kept, "token")}`;
  at("outcome").textContent = step.outcome.replace(/^This pass gained \d+ tokens\. /, "");
  const list = at("gained");
  list.replaceChildren();
  gained(step).forEach((token, i) => {
    const item = make(list, "li", i < step.path.length - 1 ? "guess" : "bonus");
    make(item, "bdi", "", data.tokens[token]);
    item.title = item.className === "guess" ? "a guess that was right" : "the model’s own token";
    if (i >= step.kept) item.classList.add("cut");
  });
  at("figures").textContent = `${count(step.tokens.length - 1, "guess").replace("guesss", "guesses")}`
    + `, ${step.expected.toFixed(1)} tokens expected`;
  writeTree(step);
  writeSources(step);
  at("home").disabled = at("back").disabled = now === 1;
  at("end").disabled = at("next").disabled = now === steps.length;
  at("where").textContent = `${now} / ${steps.length}`;
  history.replaceState(null, "", `#${now}`);
}

function showText(before) {
  const shown = (pass) => spans[pass].classList.toggle("later", pass > now);
  spans.forEach((_, pass) => shown(pass));
  if (before) spans[before].classList.remove("now");
  spans[now].classList.add("now");
  document.querySelector("#text .plain")?.classList.remove("plain");
  letters[now + 1]?.classList.add("plain");  // plain decoding: a token a pass, the prompt's too
  const text = at("text"), span = spans[now].getClientRects();
  if (!span.length) return;
  const edge = text.getBoundingClientRect(), low = span[span.length - 1].bottom - edge.bottom + 30;
  const high = span[0].top - edge.top - 30;
  if (low > 0 || high < 0) text.scrollBy({ top: low > 0 ? low : high });
}

function showStrip() {
  const strip = at("strip"), step = steps[now - 1];
  strip.setAttribute("aria-valuenow", now);
  strip.setAttribute("aria-valuetext", `pass ${now} of ${steps.length}, ${count(step.kept, "token")}`);
  strip.querySelector(".now").setAttribute("x", now - 1);
  for (const bar of strip.querySelectorAll(".own, .free")) {
    bar.classList.toggle("past", Number(bar.getAttribute("x")) < now);
  }
}

function writeSources(step) {
  at("sources").replaceChildren();
  for (const { bit, letter, word, is } of data.sources) {
    const made = step.sources.map((bits, node) => (bits & bit ? node : 0)).filter(Boolean);
    const right = made.filter((node) => step.path.includes(node)).length;
    const item = make(at("sources"), "li", made.length ? "" : "none");
    make(item, "i").style.background = `var(--${letter})`;
    const words = make(item, "span");
    make(words, "b", "", `${letter} ${word}`);
    words.append(` ${made.length}, ${right} right: ${is}`);
  }
}

// ---- keys, buttons, the strip

function stop() {
  clearInterval(timer);
  timer = null;
  at("play").setAttribute("aria-pressed", "false");
  at("play").setAttribute("aria-label", "Play");
}

function play() {
  if (timer !== null) return stop();
  if (now === steps.length) go(1);
  timer = setInterval(() => {
    if (now < steps.length) go(now + 1, { playing: true });
    if (now === steps.length) stop();
  }, BEAT);
  at("play").setAttribute("aria-pressed", "true");
  at("play").setAttribute("aria-label", "Pause");
}

const ways = {
  ArrowRight: () => go(now + 1), ArrowDown: () => go(now + 1),
  ArrowLeft: () => go(now - 1), ArrowUp: () => go(now - 1),
  PageDown: () => go(now + 10), PageUp: () => go(now - 10),
  Home: () => go(1), End: () => go(steps.length), " ": play,
};

addEventListener("keydown", (event) => {
  const where = event.target, scrolls = where.matches?.("#text, #tree, #prompt");
  if (event.ctrlKey || event.altKey || event.metaKey || where.matches?.("select")) return;
  if (event.key === " " && where.closest?.("button, summary")) return;
  // up, down and pages scroll, but for the strip
  if (/Up|Down/.test(event.key) && where.id !== "strip") return;
  if (scrolls && event.key.startsWith("Arrow") && where.scrollWidth > where.clientWidth) return;
  if (!Object.hasOwn(ways, event.key)) return;
  event.preventDefault();
  ways[event.key]();
});

for (const [id, key] of [["home", "Home"], ["back", "ArrowLeft"], ["next", "ArrowRight"],
  ["end", "End"], ["play", " "]]) at(id).addEventListener("click", ways[key]);

function scrub(event) {
  if (event.type === "pointermove" && !event.buttons) return;
  const edge = at("strip").getBoundingClientRect();
  go(1 + Math.floor((event.clientX - edge.left) / edge.width * steps.length));
}

at("strip").addEventListener("pointerdown", (event) => {
  at("strip").setPointerCapture(event.pointerId);
  scrub(event);
});
at("strip").addEventListener("pointermove", scrub);
addEventListener("hashchange", () => go(Number(location.hash.slice(1)) || data.first));

writeFacts();
writeText();
writeStrip();
writeChoices();
go(Number(location.hash.slice(1)) || data.first);
