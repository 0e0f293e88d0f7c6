"use strict";
// Memory over the program: what the arena holds at every instruction, and where each buffer lies in it.

const memory = { at: plan.memory.peak };
const lives = Object.entries(plan.buffers).filter(([, item]) => item.offset !== undefined && item.first !== undefined)
  .map(([key, item]) => ({ ...item, index: Number(key), size: item.bytes }));

function buildMemory(panel) {
  const { alive, arena, weights, inputs } = plan.memory;
  const peak = alive[plan.memory.peak] ?? 0;
  panel.append(
    element("p", {}, `On every rank: weights ${bytesText(weights)}, inputs ${bytesText(inputs)}, and an arena of ${bytesText(arena)} for all activations. `
      + `The most that lives at once is ${bytesText(peak)}, at instruction ${plan.memory.peak}. Move with the pointer or the arrow keys; a click keeps the instruction.`),
    element("h2", {}, "Alive"));
  memory.area = chart(panel, 150, "Bytes that live in the arena at every instruction");
  panel.append(element("h2", {}, "Where it lies in the arena"));
  memory.map = chart(panel, 260, "The place of every buffer in the arena over the program");
  memory.list = panel.appendChild(element("div"));
  drawArea(alive, Math.max(peak, 1));
  drawMap(Math.max(arena, 1));
  new ResizeObserver(() => { if (memory.area.node().clientWidth !== memory.width) { drawArea(alive, Math.max(peak, 1)); drawMap(Math.max(arena, 1)); moveTo(memory.at); } }).observe(panel);
  moveTo(memory.at);
}

function chart(parent, height, label) {
  return d3.select(parent).append("svg").attr("class", "chart").attr("height", height).attr("role", "img").attr("tabindex", 0)
    .attr("aria-label", label)
    .on("pointermove", function (event) { if (!memory.kept) moveTo(xScale(this).invert(d3.pointer(event)[0])); })
    .on("click", function (event) { memory.kept = !memory.kept; moveTo(xScale(this).invert(d3.pointer(event)[0])); })
    .on("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20 }[event.key];
      if (by) moveTo(memory.at + by);
      else if (event.key === "Home") moveTo(plan.memory.peak);
      else return;
      event.preventDefault();
    });
}

const EDGE = { left: 62, right: 12, top: 8, bottom: 20 };
const xScale = (node) => d3.scaleLinear([0, steps.length], [EDGE.left, (node.clientWidth || 900) - EDGE.right]);

function frame(svg, height, most) {
  svg.selectAll("*").remove();
  const width = svg.node().clientWidth || 900;
  memory.width = width;
  svg.attr("viewBox", `0 0 ${width} ${height}`);
  const x = xScale(svg.node()), y = d3.scaleLinear([0, most], [height - EDGE.bottom, EDGE.top]);
  const axis = svg.append("g").attr("class", "axis");
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    axis.append("line").attr("x1", EDGE.left).attr("x2", width - EDGE.right).attr("y1", y(part * most)).attr("y2", y(part * most));
    axis.append("text").attr("x", EDGE.left - 7).attr("y", y(part * most) + 4).attr("text-anchor", "end").text(bytesText(Math.round(part * most)));
  }
  for (const tick of x.ticks(10).filter(Number.isInteger)) axis.append("text").attr("x", x(tick)).attr("y", height - 5).attr("text-anchor", "middle").text(tick);
  return [x, y];
}

function drawArea(alive, most) {
  const [x, y] = frame(memory.area, 150, most);
  const area = d3.area((_, at) => x(at), y(0), (bytes) => y(bytes)).curve(d3.curveStepAfter);
  memory.area.append("path").attr("class", "area").attr("d", area(alive));
  memory.area.append("path").attr("class", "line").attr("d", area.lineY1()(alive));
  steps.forEach((step, at) => { if (isCollective(step)) memory.area.append("rect").attr("class", "strip").attr("x", x(at)).attr("y", y(0) + 1).attr("width", Math.max(1.2, x(1) - x(0))).attr("height", 4); });
  memory.area.append("line").attr("class", "peak").attr("x1", x(plan.memory.peak + 0.5)).attr("x2", x(plan.memory.peak + 0.5)).attr("y1", y(most)).attr("y2", y(0));
  memory.area.append("line").attr("class", "cursor").attr("y1", y(most)).attr("y2", y(0));
}

function drawMap(most) {
  const [x, y] = frame(memory.map, 260, most);
  memory.map.append("g").selectAll("rect").data(lives).join("rect").attr("class", "life")
    .attr("x", (life) => x(life.first)).attr("width", (life) => Math.max(1, x(life.last + 1) - x(life.first)))
    .attr("y", (life) => y(life.offset + life.size)).attr("height", (life) => Math.max(0.7, y(life.offset) - y(life.offset + life.size)))
    .style("fill", (life) => edgeColour(placementOf(life.index))).style("fill-opacity", 0.75)
    .on("click", (event, life) => { event.stopPropagation(); select({ buffer: life.index }); })
    .on("mousemove", (event, life) => tip(event, `${tensorName(life.index)}\n${shapeText(life.local)} ${life.dtype}, ${bytesText(life.size)}, instructions ${life.first} to ${life.last}`))
    .on("mouseleave", () => tip());
  memory.map.append("line").attr("class", "cursor").attr("y1", y(most)).attr("y2", y(0));
}

function moveTo(at) {
  if (!steps.length) return;
  memory.at = Math.max(0, Math.min(steps.length - 1, Math.floor(at)));
  for (const svg of [memory.area, memory.map]) {
    const x = xScale(svg.node())(memory.at + 0.5);
    svg.select(".cursor").attr("x1", x).attr("x2", x);
  }
  const step = steps[memory.at];
  const rows = lives.filter((life) => life.first <= memory.at && memory.at <= life.last)
    .map((life) => ({ ...life, name: tensorName(life.index), placement: placementOf(life.index) }));
  memory.list.replaceChildren(
    element("h2", {}, `${memory.at === plan.memory.peak ? "At the peak, instruction" : "At instruction"} ${memory.at}, ${isCollective(step) ? step.name : step.title}: ${rows.length} buffers, ${bytesText(plan.memory.alive[memory.at])}`),
    dataTable("alive", [nameColumn, placementColumn, { key: "local", label: "Local shape", text: (row) => shapeText(row.local), class: "mono" },
      { key: "dtype", label: "Dtype", class: "mono" }, bytesColumn("size", "Bytes a rank"), { key: "first", label: "From", num: true }, { key: "last", label: "To", num: true }],
    rows, { open: (row) => select({ buffer: row.index }), sorted: "size" }));
}
