"use strict";
// The page as a whole: views, search, colours, printing.

const VIEWS = [
  ["graph", "Graph", buildGraph], ["tensors", "Tensors", buildTensors, tensors.length],
  ["collectives", "Collectives", buildCollectives, steps.filter(isCollective).length], ["program", "Program", buildProgram, steps.length],
  ["memory", "Memory", buildMemory], ["weights", "Weights", buildWeights, plan.weights.length], ["findings", "Findings", buildFindings],
  ...(plan.bench ? [["measured", "Measured", buildMeasured]] : []),
];
const built = new Set();

function openView(name) {
  for (const [other] of VIEWS) {
    const active = other === name;
    document.getElementById(`view-${other}`).hidden = !active;
    const tab = document.getElementById(`tab-${other}`);
    tab.setAttribute("aria-selected", String(active));
    tab.tabIndex = active ? 0 : -1;
  }
  buildView(name);
}

function buildView(name) {
  if (built.has(name)) return;
  built.add(name);
  VIEWS.find(([other]) => other === name)[2](document.getElementById(`view-${name}`));
}

function buildTabs() {
  const tabs = document.getElementById("tabs"), main = document.getElementById("views");
  for (const [name, label, , count] of VIEWS) {
    tabs.append(element("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `view-${name}`, onclick: () => openView(name) },
      label, count === undefined ? "" : element("span", { class: "count" }, String(count))));
    main.append(element("section", { id: `view-${name}`, role: "tabpanel", class: `view ${name}`, "aria-label": label, hidden: true }));
  }
  tabs.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const all = [...tabs.children], next = all[(all.indexOf(document.activeElement) + by + all.length) % all.length];
    next.focus();
    next.click();
  });
}

// --- search ---

function buildSearch() {
  const input = document.getElementById("search"), list = document.getElementById("found");
  let hits = [], active = 0;
  const close = () => { list.hidden = true; input.setAttribute("aria-expanded", "false"); input.removeAttribute("aria-activedescendant"); };
  const take = (entry) => {
    close();
    input.blur();
    select(entry.step !== undefined ? { step: entry.step } : { buffer: entry.buffer }, { show: true });
  };
  const mark = (number) => {
    active = (number + hits.length) % hits.length;
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === active)));
    list.children[active].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", `found-${active}`);
  };
  const show = () => {
    hits = search(input.value);
    if (!input.value.trim()) { close(); return; }
    list.replaceChildren(...(hits.length ? hits.map((entry, i) => element("li", { id: `found-${i}`, role: "option", onmousedown: (event) => { event.preventDefault(); take(entry); } },
      element("span", { class: "kind" }, entry.kind), element("span", { class: "name" }, highlighted(entry.name, input.value)), element("span", { class: "more" }, entry.more)))
      : [element("li", { role: "option", "aria-disabled": "true" }, element("span", { class: "kind" }, "nothing"), element("span", {}, "no name holds this"))]));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    if (hits.length) mark(0);
  };
  input.addEventListener("input", show);
  input.addEventListener("focus", () => { if (input.value) show(); });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { close(); input.value = ""; input.blur(); }
    if (list.hidden || !hits.length) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { mark(active + (event.key === "ArrowDown" ? 1 : -1)); event.preventDefault(); }
    if (event.key === "Enter") take(hits[active]);
  });
}

function highlighted(name, text) {
  const word = text.trim().split(/\s+/)[0].toLowerCase(), at = name.toLowerCase().indexOf(word);
  return at < 0 || !word ? [name] : [name.slice(0, at), element("b", {}, name.slice(at, at + word.length)), name.slice(at + word.length)];
}

// --- colours ---

const THEMES = ["system", "light", "dark"];
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let theme = "system";
try { theme = localStorage.getItem("onnxmesh-theme") ?? "system"; } catch { /* a page from disk may have no storage */ }

function applyTheme() {
  const dark = theme === "dark" || (theme === "system" && darkSystem.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  document.getElementById("theme").textContent = { system: "◐ System", light: "☀ Light", dark: "☾ Dark" }[theme];
}

// --- printing: everything, in light colours, the graph as large as the paper ---

function beforePrint() {
  for (const [name] of VIEWS) buildView(name);
  document.documentElement.dataset.theme = "light";
  view.printed = view.stage.attr("transform");
  view.stage.attr("transform", null);
  view.svg.attr("viewBox", `-20 -20 ${view.root.width + 40} ${view.root.height + 40}`);
}

function afterPrint() {
  view.svg.attr("viewBox", null);
  view.stage.attr("transform", view.printed);
  applyTheme();
}

function globalKey(event) {
  if (event.target.closest("input, select, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { document.getElementById("search").focus(); document.getElementById("search").select(); event.preventDefault(); }
  else if (event.key === "?") document.getElementById("keys").showModal();
  else if (event.key === "Escape") { view.selected = null; showNothing(); markSelected(); }
  else if (/^[1-8]$/.test(event.key) && VIEWS[event.key - 1]) { openView(VIEWS[event.key - 1][0]); document.getElementById(`tab-${VIEWS[event.key - 1][0]}`).focus(); }
}

applyTheme();
darkSystem.addEventListener("change", applyTheme);
document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try { localStorage.setItem("onnxmesh-theme", theme); } catch { /* then it is forgotten */ }
  applyTheme();
});
document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
document.addEventListener("keydown", globalKey);
addEventListener("beforeprint", beforePrint);
addEventListener("afterprint", afterPrint);
buildStats();
buildTabs();
buildSearch();
showNothing();
openView("graph");
document.documentElement.dataset.ready = "yes";
if ("requestIdleCallback" in window) {  // the graph with each block open is laid out before it is asked for
  for (const fold of plan.folds) requestIdleCallback(() => layoutOpen(fold));
}
