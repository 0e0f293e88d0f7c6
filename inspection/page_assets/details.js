"use strict";
// The panel at the right: all that is known of what is selected, and why it was placed so.

const panel = () => document.getElementById("details");

function select(chosen, { show = false } = {}) {
  view.selected = chosen;
  if (chosen.step !== undefined) showStep(chosen.step);
  else showTensor(chosen.buffer);
  const at = chosen.step ?? allOf(makers, chosen.buffer)[0] ?? allOf(readers, chosen.buffer)[0];
  if (show && view.stage) {
    openView("graph");
    if (at !== undefined) focusBox(reveal(at), true);
  }
  if (view.stage) markSelected();
  document.dispatchEvent(new CustomEvent("chosen"));
}

function fill(...content) {
  panel().replaceChildren(...content.flat(Infinity).filter((item) => item));
  panel().scrollTop = 0;
}

const fact = (name, ...value) => {
  const given = value.flat(Infinity).filter((item) => item !== undefined && item !== null && item !== "");
  return given.length ? [element("dt", {}, name), element("dd", {}, given)] : [];
};
const facts = (...rows) => element("dl", { class: "facts" }, rows.flat());
const mono = (text) => text ? element("span", { class: "mono" }, text) : undefined;

function head(kicker, title, target) {
  return [element("p", { class: "kicker" }, kicker), element("h2", {}, title),
    target === undefined ? undefined : element("button", { type: "button", class: "link", onclick: () => select(target, { show: true }) }, "show in the graph")];
}

function showNothing() {
  const kinds = d3.rollups(steps, (own) => ({ count: own.length, us: d3.sum(own, (step) => step.us ?? 0), sends: isCollective(own[0]) }),
    (step) => isCollective(step) ? `${step.name} on ${step.axis}` : step.title).sort((a, b) => b[1].us - a[1].us);
  const most = kinds[0]?.[1].us || 1;
  fill(element("p", { class: "empty" }, "Select a box, an edge or a row: its shapes, its placement, where it comes from and why it was placed so stand here."),
    element("h3", {}, "Where the predicted time goes"),
    element("table", { class: "choices times" }, element("tbody", {}, kinds.slice(0, 14).map(([name, own]) => element("tr", {},
      element("td", {}, name, element("span", { class: `bar${own.sends ? " sends" : ""}`, style: `width: ${Math.max(1, 100 * own.us / most).toFixed(1)}%` })),
      element("td", {}, `${own.count} ×`), element("td", {}, timeText(own.us)))))));
}

function showFold(fold) {
  const block = fold.blocks[fold.shown], own = totals(block);
  fill(head(`${fold.blocks.length} block${fold.blocks.length > 1 ? "s" : ""}${fold.alike ? "" : ", not all alike"}`, `${foldTitle(fold)} ${foldRange(fold)}`),
    facts(fact("Each", `${own.count} instructions, ${timeText(own.us)}`),
      fact("In all", timeText(d3.sum(fold.blocks, (each) => totals(each).us))),
      fact("Sends", [...own.sent.entries()].map(([name, sent]) => element("div", {}, `${sent.count} × ${name}: ${bytesText(sent.bytes)}, ${timeText(sent.us)}`)))),
    alsoRead(fold),
    fold.blocks.length > 1 ? [element("h3", {}, "Blocks"), element("p", {}, fold.blocks.map((each, number) => [
      element("button", { type: "button", class: "link", style: "margin: 0 8px 4px 0", "aria-label": each.name,
        onclick: () => { fold.open = true; fold.shown = number; drawGraph(); focusBox(view.byKey.get(`fold-${fold.id}`), true); showFold(fold); } }, blockNumber(each)), " "]))] : []);
}

function alsoRead(fold) {
  const box = view.byKey.get(`fold-${fold.id}`), indices = [...new Map((box?.also ?? []).map((index) => [rootOf(index), index])).values()];
  return indices.length ? [element("h3", {}, "Reads too, without an edge"), indices.map(tensorButton)] : [];
}

function showStep(at) {
  const step = steps[at], sends = isCollective(step);
  fill(head(`${sends ? "collective" : "instruction"} ${at} of ${steps.length}`, sends ? `${step.name} on ${step.axis}` : step.title, { step: at }),
    facts(
      fact("Predicted", timeText(step.us)),
      sends ? fact("Sent", `${bytesText(step.bytes)} by each rank`) : fact("Kernel", mono(step.name)),
      sends ? fact("Why sent", mono(step.reason)) : [],
      fact("Module", mono(step.module)),
      step.module || !places[at].length ? [] : fact("Block", mono(places[at].at(-1)[0].blocks[places[at].at(-1)[1]].name)),
      fact(sends ? "Wanted by" : "ONNX nodes", step.nodes.map((node) => element("div", { class: "mono" }, node))),
      step.stream ? fact("Beside", "runs beside kernels, on a stream of its own") : []),
    element("h3", {}, "Makes"), step.outs.map(tensorButton),
    element("h3", {}, "Reads"), step.ins.filter((index) => index >= 0).map(tensorButton),
    why(step.decisions, sends ? "Why its reader was placed so" : "Why it was placed so"));
}

function tensorButton(index) {
  const item = buffer(index);
  return element("button", { type: "button", class: "tensor", onclick: () => select({ buffer: index }) },
    element("span", { class: "name" }, tensorName(index)), element("span", {}, chips(placementOf(index))),
    element("span", { class: "shape" }, `${weightOf(index) ? "weight, " : ""}${shapeText(item.local)} ${item.dtype}, ${bytesText(item.bytes)}`));
}

function showTensor(index) {
  const item = buffer(index), weight = weightOf(index), root = buffer(rootOf(index));
  const made = allOf(makers, index), read = allOf(readers, index);
  const shape = weight?.shape ?? item.shape;
  fill(head(weight ? "weight" : item.piece ? "piece of a tensor" : "tensor", tensorName(index), weight || made.length || read.length ? { buffer: index } : undefined),
    facts(
      fact(item.piece ? "Whole tensor" : "Global shape", mono(shape ? shapeText(shape) : "")),
      fact(item.piece ? "This piece" : "Local shape", mono(shapeText(item.local))),
      fact("Dtype", mono(item.dtype)),
      fact("Placement", chips(placementOf(index))),
      fact("", Object.entries(placementOf(index) ?? {}).map(([axis, cut]) => element("div", { class: "muted" }, inWords(axis, cut)))),
      fact("Bytes", weight ? `${bytesText(weight.local_bytes)} on a rank, ${bytesText(weight.bytes)} in all` : `${bytesText(item.bytes)} on a rank`),
      weight && weight.sources.length ? fact("From", weight.sources.map((name) => element("div", { class: "mono" }, name))) : [],
      root.first !== undefined ? fact("Lives", `from instruction ${root.first} to ${root.last}, at ${bytesText(root.offset)} of the arena`) : []),
    made.length ? [element("h3", {}, "Made by"), made.slice(0, 12).map(stepButton)] : [],
    read.length ? [element("h3", {}, `Read by${read.length > 12 ? ` ${read.length}, the first 12` : ""}`), read.slice(0, 12).map(stepButton)] : [],
    why((made.length ? steps[made[made.length - 1]] : steps[read[0]])?.decisions ?? [], made.length ? "Why it was placed so" : "Why its reader was placed so"));
}

function stepButton(at) {
  const step = steps[at];
  return element("button", { type: "button", class: "tensor", onclick: () => select({ step: at }, { show: false }) },
    element("span", { class: "name" }, isCollective(step) ? `${step.name} on ${step.axis}` : step.title),
    element("span", { class: "muted" }, timeText(step.us)), element("span", { class: "shape" }, stepName(at)));
}

function inWords(axis, cut) {
  const size = Object.fromEntries(plan.axes)[axis];
  if (cut === "R") return `${axis}: every rank holds all of it`;
  if (!cut.startsWith("S")) return `${axis}: each rank holds a part of the sum`;
  const [, dim, , pieces] = /^S\((\d+)!?(; (.*))?\)$/.exec(cut) ?? [];
  if (dim === undefined) return "";
  const how = pieces === undefined ? `dim ${dim} in ${size} equal parts`
    : `dim ${dim} is ${pieces.split(",").length} segment${pieces.includes(",") ? "s" : ""} (${pieces}), each cut by itself`;
  const extra = [pieces?.includes("*") ? "* whole on every rank" : "", pieces?.includes("~") ? "~n: each part on n ranks" : ""].filter((text) => text).join("; ");
  return `${axis}: ${how}${extra ? `; ${extra}` : ""}`;
}

// --- why ---

const FACTORS = { replicate: "computed whole", m: "rows", n: "columns of the weight", k: "what is summed over", h: "heads", s: "rows of q",
  t: "keys, sent round", kv: "keys", b: "batch", partial: "partial sums go through" };

function why(numbers, title) {
  const known = numbers.map((number) => plan.decisions[number]).filter((decision) => decision)
    .sort((a, b) => b.chosen.computing_us + b.chosen.moving_us - a.chosen.computing_us - a.chosen.moving_us);
  if (!known.length) return [];
  const [first, ...rest] = known;
  return [element("h3", {}, title), decisionTable(first),
    rest.length ? element("details", {}, element("summary", { class: "muted" }, `${rest.length} more node${rest.length > 1 ? "s" : ""} of this instruction`),
      rest.map(decisionTable)) : []];
}

function decisionTable(decision) {
  const row = (option, name) => element("tr", { class: name },
    element("td", {}, element("b", {}, option.expansion || option.factor), FACTORS[option.factor] ? ` ${FACTORS[option.factor]}` : "",
      name === "barred" ? ", not allowed here" : "", element("span", { class: "mono" }, option.placement)),
    element("td", {}, timeText(option.computing_us)), element("td", {}, timeText(option.moving_us)),
    element("td", {}, timeText(option.computing_us + option.moving_us)));
  const others = decision.alternatives;
  return element("div", { class: "decision" },
    element("p", {}, element("b", {}, decision.op), ` on ${decision.axis}, `, mono(decision.node), decision.count > 1 ? ` and ${decision.count - 1} alike` : ""),
    decision.reason ? element("p", { class: "muted" }, decision.reason) : "",
    element("table", { class: "choices" },
      element("thead", {}, element("tr", {}, ["What is cut", "computes", "moves", "µs in all"].map((name) => element("th", { scope: "col" }, name === "µs in all" ? "in all" : name)))),
      element("tbody", {}, row(decision.chosen, "chosen"), others.map((option) => row(option, option.allowed ? "" : "barred")))),
    others.length ? "" : element("p", { class: "muted" }, "Its rule knows no other way to run it on this axis."));
}
