"use strict";
// The drawing of the graph: boxes and edges as SVG, zoom, selection and the keyboard.

const view = { svg: null, stage: null, zoom: null, root: null, selected: null, focus: null, near: new Set() };

function buildGraph(panel) {
  const svg = d3.select(panel).append("svg").attr("id", "graph").attr("role", "application").attr("tabindex", 0)
    .attr("aria-label", "The graph. Arrow keys go along it, Enter selects or opens.");
  const marks = svg.append("defs");
  for (const [name, colour, size] of [["arrow", "context-stroke", 7], ["arrow-send", "context-stroke", 3.6]]) {
    marks.append("marker").attr("id", name).attr("viewBox", "0 0 8 8").attr("refX", 7).attr("refY", 4)
      .attr("markerWidth", size).attr("markerHeight", size).attr("orient", "auto").attr("markerUnits", name === "arrow" ? "userSpaceOnUse" : "strokeWidth")
      .append("path").attr("d", "M0 0L8 4L0 8z").attr("fill", colour);
  }
  view.svg = svg;
  view.stage = svg.append("g");
  view.zoom = d3.zoom().scaleExtent([0.05, 3]).on("zoom", (event) => view.stage.attr("transform", event.transform))
    .filter((event) => event.type !== "dblclick" && !event.button);
  svg.call(view.zoom).on("keydown", graphKey).on("focus", function (event) {
    if (event.target !== this || !this.matches(":focus-visible")) return;
    setTimeout(() => { if (document.activeElement === this) focusBox(view.byKey.get(view.focus) ?? firstBox()); });
  });
  panel.append(legend(), element("div", { class: "zoom" },
    element("button", { type: "button", "aria-label": "Zoom in", onclick: () => zoomBy(1.35) }, "+"),
    element("button", { type: "button", "aria-label": "Zoom out", onclick: () => zoomBy(1 / 1.35) }, "−"),
    element("button", { type: "button", "aria-label": "Fit the whole graph", onclick: fitAll }, "Fit"),
    element("button", { type: "button", id: "close-all", onclick: closeAll }, "Close blocks")));
  drawGraph();
  home();
}

function legend() {
  const row = (style, text) => element("div", {}, element("i", { style }), text);
  return element("div", { class: "legend", "aria-label": "Legend" },
    row("border-top: 5px solid var(--send)", "collective: sent between ranks"),
    ...plan.axes.map(([axis, size], i) => row(`border-color: var(${AXIS_COLOURS[i % AXIS_COLOURS.length]})`, `S(dim): cut on ${axis}, ${size} ranks`)),
    row("border-color: var(--whole)", "R: whole on every rank"),
    row("border-top: 3px dashed var(--partial)", "P: partial sums, not yet added"),
    row("border-color: transparent", "W: the weight that a box reads"));
}

function drawGraph() {
  view.root = rootScope();
  view.boxes = everyBox(view.root);
  view.byKey = new Map(view.boxes.map((box) => [box.key, box]));
  view.stage.selectAll("*").remove();
  drawScope(view.stage, view.root);
  markSelected();
}

function drawScope(group, scope) {
  const under = group.append("g"), over = group.append("g");
  const path = d3.line((point) => point.x, (point) => point.y).curve(d3.curveBumpY);
  for (const line of scope.lines) {
    const indices = [...line.buffers];
    const d = path(line.points);
    under.append("path").attr("class", `edge${line.sends ? " send" : ""}${line.far ? " far" : ""}`).attr("d", d)
      .attr("data-edge", line.key).attr("data-from", line.from.key).attr("data-to", line.to.key)
      .style("stroke", line.sends ? null : edgeColour(placementOf(indices[0])))
      .attr("stroke-dasharray", !line.sends && isPartial(placementOf(indices[0])) ? "6 4" : null)
      .attr("marker-end", `url(#${line.sends ? "arrow-send" : "arrow"})`);
    under.append("path").attr("class", "edge-hit").attr("d", d)
      .on("click", (event) => { event.stopPropagation(); select({ buffer: indices[0] }); })
      .on("mousemove", (event) => tip(event, edgeText(indices))).on("mouseleave", () => tip());
  }
  for (const box of scope.boxes) drawBox(over, box);
}

function edgeText(indices) {
  return indices.slice(0, 6).map((index) => {
    const placed = placementText(placementOf(index));
    return `${tensorName(index)}  ${shapeText(buffer(index).local)} ${dtypeText(buffer(index).dtype)}${placed ? `  ${placed}` : ""}`;
  }).join("\n") + (indices.length > 6 ? `\nand ${indices.length - 6} more` : "");
}

function tip(event, text) {
  let shown = document.querySelector(".tip");
  if (!event) { shown?.remove(); return; }
  shown ??= document.body.appendChild(element("div", { class: "tip", style: "white-space: pre-wrap" }));
  shown.textContent = text;
  shown.style.left = `${Math.min(event.clientX + 14, innerWidth - 430)}px`;
  shown.style.top = `${event.clientY + 14}px`;
}

// --- boxes ---

function drawBox(group, box) {
  const item = group.append("g").attr("class", `item ${box.kind}`).attr("data-key", box.key)
    .attr("data-buffer", box.buffer === undefined ? null : rootOf(box.buffer))
    .attr("transform", `translate(${box.x},${box.y})`).attr("tabindex", -1).attr("role", "button").attr("aria-label", boxLabel(box));
  item.on("click", (event) => { event.stopPropagation(); activate(box); });
  if (box.kind === "op") drawCard(item, box);
  else if (box.kind === "send") drawPill(item, box);
  else if (box.kind === "fold") (box.fold.open ? drawOpen : drawClosed)(item, box);
  else drawPort(item, box);
}

const write = (item, name, x, y, text) => item.append("text").attr("class", name).attr("x", x).attr("y", y).text(text);

function boxLabel(box) {
  if (box.kind === "fold") {
    const times = box.fold.blocks.length;
    return `${foldTitle(box.fold)} ${foldRange(box.fold)}, ${times} block${times > 1 ? "s" : ""}, ${box.fold.open ? "open" : "closed"}`;
  }
  if (box.buffer !== undefined) return `${box.kind} ${tensorName(box.buffer)} ${placementText(placementOf(box.buffer))}`;
  const step = steps[box.at];
  if (box.kind === "send") return `${step.name} on ${step.axis}, ${bytesText(step.bytes)}, ${timeText(step.us)}`;
  return `${step.title} ${shortModule(box.at)} ${placementText(placementOf(step.outs[0]))} ${timeText(step.us)}`;
}

// The colours of a tensor's placement as a bar at a card's left, one part for each axis.
function drawBar(item, placement, height) {
  const parts = placementParts(placement);
  const colours = parts.length ? parts.map(([colour]) => `var(${colour})`) : ["var(--whole)"];
  colours.forEach((colour, i) => item.append("rect").attr("x", 1).attr("y", 6 + i * (height - 12) / colours.length)
    .attr("width", 5).attr("height", (height - 12) / colours.length).attr("rx", 2).style("fill", colour));
}

function drawChips(item, placement, x, y, room) {
  for (const [colour, axis, cut] of placementParts(placement)) {
    const text = fitted(`${axis} ${cut}`, "mono", room - 14), width = textWidth(text, "mono") + 12;
    item.append("rect").attr("x", x).attr("y", y - 12).attr("width", width).attr("height", 17).attr("rx", 5)
      .style("fill", `var(${colour}-soft)`).style("stroke", `var(${colour})`).style("stroke-width", 0.8);
    write(item, "shape mono", x + 6, y, text).style("fill", `var(${colour})`);
    x += width + 5;
    room -= width + 5;
  }
}

function drawCard(item, box) {
  const step = steps[box.at], made = step.outs[0], placement = placementOf(made);
  item.append("rect").attr("class", "card").attr("width", box.width).attr("height", box.height).attr("rx", 8);
  drawBar(item, placement, box.height);
  const time = timeText(step.us);
  write(item, "side", box.width - 10, 20, time).attr("text-anchor", "end");
  write(item, "title", 15, 20, fitted(shortTitle(step.title), "title", box.width - 36 - textWidth(time, "side")));
  write(item, "second", 15, 37, fitted(shortModule(box.at), "second", box.width - 26));
  drawTensor(item, made, 60, box.width);
  const weight = mainWeight(box.at);
  if (weight === undefined) return;
  item.append("line").attr("class", "rule").attr("x1", 15).attr("x2", box.width - 10).attr("y1", 71.5).attr("y2", 71.5);
  drawTensor(item, weight, 88, box.width, "W ");
}

const shortTitle = (title) => title.replaceAll("Normalization", "Norm");

// A tensor's local shape at the left, its placement at the right.
function drawTensor(item, index, y, width, name = "") {
  const placement = placementOf(index);
  const parts = placementParts(placement), room = width - 30;
  const wanted = d3.sum(parts, ([, axis, cut]) => textWidth(`${axis} ${cut}`, "mono") + 17);
  const shape = `${name}${shapeText(buffer(index).local)}`, dtype = ` ${dtypeText(buffer(index).dtype)}`;
  const free = Math.max(room - wanted, Math.min(room - 110, textWidth(shape, "mono") + 1));
  const text = textWidth(shape + dtype, "mono") <= free ? shape + dtype : fitted(shape, "mono", free);
  write(item, "second mono", 15, y, text);
  const left = Math.max(15 + textWidth(text, "mono") + 8, width - 5 - wanted);
  if (parts.length) drawChips(item, placement, left, y, width - 8 - left);
}

function drawPill(item, box) {
  const step = steps[box.at];
  item.append("rect").attr("class", "pill").attr("width", box.width).attr("height", box.height).attr("rx", box.height / 2);
  write(item, "pill-title", box.width / 2, 20, `${step.name} on ${step.axis}`).attr("text-anchor", "middle");
  write(item, "pill-more", box.width / 2, 36.5, `${bytesText(step.bytes)} · ${timeText(step.us)}${step.outs.length > 1 ? ` · ${step.outs.length} tensors` : ""}`)
    .attr("text-anchor", "middle");
}

const PORTS = { input: "input", output: "output", enter: "from outside", leave: "to outside" };
function drawPort(item, box) {
  item.append("rect").attr("class", "port card").attr("width", box.width).attr("height", box.height).attr("rx", 8);
  drawBar(item, placementOf(box.buffer), box.height);
  const source = box.kind === "enter" ? whereText(box.source) : box.kind === "leave" ? whereText(box.source) : "";
  write(item, "side", 15, 16, fitted(`${box.kind === "enter" ? "from" : box.kind === "leave" ? "to" : PORTS[box.kind]} ${source}`, "side", box.width - 24));
  write(item, "title", 15, 34, fitted(tensorName(box.buffer), "title", box.width - 24));
}

function whereText(at) {
  const around = places[at];
  if (!around.length) return stepName(at);
  const [fold, number] = around[0];
  return fold.blocks[number].name.replace(/^(module|model)\./, "");
}

function totals(block) {
  const found = { us: 0, sent: new Map(), count: block.instructions.length };
  for (const at of block.instructions) {
    found.us += steps[at].us ?? 0;
    if (!isCollective(steps[at])) continue;
    const key = `${steps[at].name} on ${steps[at].axis}`;
    const known = found.sent.get(key) ?? { count: 0, bytes: 0, us: 0 };
    found.sent.set(key, { count: known.count + 1, bytes: known.bytes + steps[at].bytes, us: known.us + steps[at].us });
  }
  return found;
}

function drawClosed(item, box) {
  const fold = box.fold, times = fold.blocks.length, own = totals(fold.blocks[fold.shown]);
  const front = box.height - (times > 1 ? 12 : 0);
  if (times > 1) {
    for (const step of [2, 1]) {
      item.append("rect").attr("class", "back").attr("x", 7 * step).attr("y", 6 * step).attr("width", box.width - 14 * step)
        .attr("height", front).attr("rx", 10);
    }
  }
  item.append("rect").attr("class", "card").attr("width", box.width).attr("height", front).attr("rx", 10);
  const badge = times > 1 ? `× ${times}` : "";
  if (badge) {
    const width = textWidth(badge, "title") + 18;
    item.append("rect").attr("class", "badge").attr("x", box.width - width - 10).attr("y", 11).attr("width", width).attr("height", 22).attr("rx", 11);
    write(item, "badge-text", box.width - width / 2 - 10, 26.5, badge).attr("text-anchor", "middle");
  }
  write(item, "title", 16, 26, fitted(`${foldTitle(fold)} ${foldRange(fold)}`, "title", box.width - 90));
  const also = alsoText(box);
  write(item, "second", 16, 44, fitted(`${own.count} instructions${times > 1 ? " each" : ""}${fold.alike ? "" : ", not all alike"}${also}`, "second", box.width - 32));
  const each = times > 1 ? `${timeText(own.us)} each, ${timeText(d3.sum(fold.blocks, (block) => totals(block).us))} in all` : timeText(own.us);
  write(item, "second", 16, 60, each);
  write(item, "side", box.width - 14, 60, "open ▸").attr("text-anchor", "end").style("fill", "var(--accent)");
  [...own.sent.entries()].forEach(([name, { count, bytes, us }], i) => {
    const y = 72 + i * SENT, more = `${bytesText(bytes)} · ${timeText(us)}`;
    item.append("rect").attr("class", "pill").attr("x", 14).attr("y", y).attr("width", box.width - 28).attr("height", 28).attr("rx", 14);
    write(item, "pill-title", 28, y + 18.5, fitted(`${count > 1 ? `${count} × ` : ""}${name}`, "pill", box.width - 64 - textWidth(more, "side")));
    write(item, "pill-more", box.width - 28, y + 18.5, more).attr("text-anchor", "end");
  });
  if (!own.sent.size) write(item, "second", 16, 90, "nothing is sent");
}

// What a block reads too, without an edge of its own.
function alsoText(box) {
  const names = [...new Set((box.also ?? []).map((index) => rootOf(index)))];
  return names.length ? `, reads ${names.length} shared tensor${names.length > 1 ? "s" : ""}` : "";
}

function drawOpen(item, box) {
  const fold = box.fold, block = fold.blocks[fold.shown], times = fold.blocks.length;
  item.append("rect").attr("class", "opened").attr("width", box.width).attr("height", box.height).attr("rx", 12);
  write(item, "title", 18, 25, fitted(block.name.replace(/^(module|model)\./, ""), "title", box.width - 200));
  const own = totals(block);
  write(item, "second", 18, 43, `${own.count} instructions · ${timeText(own.us)}${times > 1 ? ` · one of ${times}${fold.alike ? " alike" : ""}` : ""}`);
  let x = box.width - 16;
  const button = (text, label, width, act) => {
    x -= width;
    const made = item.append("g").attr("class", "small-button").attr("role", "button").attr("aria-label", label)
      .attr("transform", `translate(${x},14)`).on("click", (event) => { event.stopPropagation(); act(); });
    made.append("rect").attr("width", width - 5).attr("height", 25).attr("rx", 6);
    made.append("text").attr("x", (width - 5) / 2).attr("y", 17).text(text);
  };
  button("close", "Close the block", 56, () => toggle(fold));
  if (times > 1) {
    button("›", "The next block", 32, () => turn(fold, 1));
    button("‹", "The block before", 32, () => turn(fold, -1));
  }
  drawScope(item.append("g").attr("transform", `translate(${(box.width - box.scope.width) / 2},${HEAD})`), box.scope);
}

// --- opening, selecting, going along ---

function toggle(fold, keep = `fold-${fold.id}`) {
  const before = view.byKey.get(keep), transform = d3.zoomTransform(view.svg.node());
  fold.open = !fold.open;
  drawGraph();
  const after = view.byKey.get(keep);
  if (before && after) {  // the block stays where it was on the screen
    const dx = (before.x + before.width / 2 - after.x - after.width / 2) * transform.k, dy = (before.y - after.y) * transform.k;
    view.svg.call(view.zoom.transform, d3.zoomIdentity.translate(transform.x + dx, transform.y + dy).scale(transform.k));
  }
  focusBox(after);
}

function turn(fold, by) {
  fold.shown = (fold.shown + by + fold.blocks.length) % fold.blocks.length;
  drawGraph();
  focusBox(view.byKey.get(`fold-${fold.id}`));
}

function closeAll() {
  for (const fold of foldsById) fold.open = false;
  drawGraph();
  home();
}

function activate(box) {
  view.focus = box.key;
  if (box.kind === "fold") { showFold(box.fold); toggle(box.fold); }
  else if (box.at !== undefined) select({ step: box.at });
  else select({ buffer: box.buffer });
}

// Open the blocks around an instruction, so that it is drawn.
function reveal(at) {
  let changed = false;
  for (const [fold, number] of places[at]) {
    if (!fold.open || fold.shown !== number) { fold.open = true; fold.shown = number; changed = true; }
  }
  if (changed) drawGraph();
  return view.byKey.get(`step-${at}`);
}

function markSelected() {
  const keys = new Set();
  const chosen = view.selected;
  if (chosen?.step !== undefined) keys.add(`step-${chosen.step}`);
  if (chosen?.buffer !== undefined) {
    for (const box of view.boxes) if (box.buffer !== undefined && rootOf(box.buffer) === rootOf(chosen.buffer)) keys.add(box.key);
    const weight = buffer(chosen.buffer).weight !== undefined;
    for (const at of allOf(weight ? readers : makers, chosen.buffer)) keys.add(`step-${at}`);
  }
  view.stage.selectAll(".item").classed("selected", function () { return keys.has(this.dataset.key); });
  view.stage.selectAll("path[data-edge]").classed("near", function () { return keys.has(this.dataset.from) || keys.has(this.dataset.to); });
}

const firstBox = () => view.boxes.reduce((a, b) => b.y < a.y ? b : a, view.boxes[0]);

function focusBox(box, center = false) {
  if (!box) return;
  view.focus = box.key;
  const node = view.stage.selectAll(".item").filter(function () { return this.dataset.key === box.key; }).node();
  node?.focus({ preventScroll: true });
  const frame = view.svg.node().getBoundingClientRect();
  if (!frame.width) return;
  const now = d3.zoomTransform(view.svg.node()), k = center ? Math.max(now.k, 0.8) : now.k;
  const left = now.applyX(box.x), top = now.applyY(box.y), right = left + box.width * k, bottom = top + Math.min(box.height, 160) * k;
  if (!center && left > 10 && top > 10 && right < frame.width - 10 && bottom < frame.height - 10) return;
  const height = Math.min(box.height, frame.height / k - 80);
  const x = frame.width / 2 - (box.x + box.width / 2) * k, y = frame.height / 2 - (box.y + height / 2) * k;
  view.svg.call(view.zoom.transform, d3.zoomIdentity.translate(x, y).scale(k));
}

function graphKey(event) {
  const box = view.byKey.get(view.focus);
  const ahead = { ArrowDown: "down", ArrowUp: "up", ArrowLeft: "left", ArrowRight: "right" }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (ahead && box) focusBox(neighbour(box, ahead));
  else if ((event.key === "Enter" || event.key === " ") && box) activate(box);
  else if ((event.key === "[" || event.key === "]") && box) {
    const fold = box.fold ?? (box.at !== undefined ? places[box.at].at(-1)?.[0] : undefined);
    if (fold?.open) turn(fold, event.key === "]" ? 1 : -1);
  } else if (event.key === "+" || event.key === "=") zoomBy(1.35);
  else if (event.key === "-") zoomBy(1 / 1.35);
  else if (event.key === "0") fitAll();
  else return;
  event.preventDefault();
  event.stopPropagation();
}

// Up and down go along edges and into open blocks; left and right to what is drawn beside.
function neighbour(box, ahead) {
  const middle = (other) => other.x + other.width / 2;
  if (ahead === "left" || ahead === "right") {
    const sign = ahead === "right" ? 1 : -1;
    const beside = view.boxes.filter((other) => other !== box && sign * (middle(other) - middle(box)) > 5 && Math.abs(other.y - box.y) < 90);
    return beside.sort((a, b) => sign * (middle(a) - middle(b)) + Math.abs(a.y - box.y) - Math.abs(b.y - box.y))[0];
  }
  if (ahead === "down" && box.kind === "fold" && box.fold.open) {
    const inside = new Set(box.scope.boxes.map((other) => other.key));
    return view.boxes.filter((other) => inside.has(other.key)).sort((a, b) => a.y - b.y)[0];
  }
  const keys = box.links.filter((line) => (ahead === "down" ? line.from : line.to).key === box.key)
    .map((line) => (ahead === "down" ? line.to : line.from).key);
  const linked = keys.map((key) => view.byKey.get(key)).sort((a, b) => Math.abs(a.y - box.y) - Math.abs(b.y - box.y));
  if (linked.length) return linked[0];
  const sign = ahead === "down" ? 1 : -1;
  return view.boxes.filter((other) => sign * (other.y - box.y) > 5).sort((a, b) => sign * (a.y - b.y))[0];
}

function zoomBy(factor) { view.svg.call(view.zoom.scaleBy, factor); }

function fitAll() {
  const frame = view.svg.node().getBoundingClientRect();
  const k = Math.min(1, (frame.width - 60) / view.root.width, (frame.height - 60) / view.root.height);
  view.svg.call(view.zoom.transform, d3.zoomIdentity.translate((frame.width - view.root.width * k) / 2, 30).scale(k));
}

// The first look: as much of the graph as can be read, from its top, about the blocks.
function home() {
  const frame = view.svg.node().getBoundingClientRect();
  const k = Math.max(0.66, Math.min(1, (frame.width - 40) / view.root.width, (frame.height - 40) / view.root.height));
  const first = view.root.boxes.filter((box) => box.kind === "fold").sort((a, b) => a.y - b.y)[0] ?? firstBox();
  const fits = view.root.width * k < frame.width;
  const x = fits ? (frame.width - view.root.width * k) / 2 : frame.width / 2 - (first.x + first.width / 2) * k;
  const y = view.root.height * k < frame.height || first.y * k < frame.height * 0.6 ? 24 : frame.height * 0.4 - first.y * k;
  view.svg.call(view.zoom.transform, d3.zoomIdentity.translate(x, y).scale(k));
}
