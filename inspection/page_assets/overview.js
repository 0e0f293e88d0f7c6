"use strict";
// The figures at the top, what was found and missed, and the measured times.

function buildStats() {
  const { rank, time, model, axes } = plan.summary;
  const mesh = plan.axes.map(([axis, size]) => `${axis} ${size}`).join(" × ") || "one rank";
  document.getElementById("title").textContent = plan.title;
  document.title = `${plan.title} · onnxmesh`;
  document.getElementById("subtitle").textContent = [`${plan.ranks} rank${plan.ranks > 1 ? "s" : ""} (${mesh})`,
    plan.axes.some(([axis]) => axis === "cp") ? strategies() : "", plan.producer].filter((text) => text).join(" · ");
  const stat = (name, value, more) => value ? element("dl", { class: "stat" }, element("dt", {}, name), element("dd", {}, value, element("small", { title: more }, more))) : "";
  document.getElementById("stats").append(...[
    stat("Predicted time of a run", timeText(time.total_us), comparison(time)),
    stat("Kernels", timeText(time.compute_us), `${flopsText(rank.flops ?? 0)} a rank`),
    stat("Sending", timeText(time.communication_us), `${timeText(time.hidden_us)} of it beside kernels`),
    stat("Sent by a rank", bytesText(d3.sum(axes ?? [], (axis) => axis.bytes_sent)), `${d3.sum(axes ?? [], (axis) => axis.collectives)} collectives`),
    stat("Weights on a rank", bytesText(rank.weight_bytes), `${percentText(rank.weight_share ?? 1)} of ${bytesText(model.weight_bytes)}`),
    stat("Activations on a rank", bytesText(rank.activation_bytes), `${bytesText(rank.device_bytes)} on a GPU in all`),
    stat("Instructions", rank.instructions === undefined ? "" : String(rank.instructions), `for ${model.nodes} nodes`),
  ].filter((made) => made));
  document.getElementById("warnings").append(...plan.warnings.map((warning) => element("p", {}, warning.code ? element("b", {}, `${warning.code} `) : "", warning.reason ?? warning)));
}

function comparison({ one_device_us: alone, total_us: total }) {
  if (!alone || plan.ranks === 1) return "";
  return alone >= total ? `${(alone / total).toFixed(1)} × faster than one device` : `${(total / alone).toFixed(1)} × slower than one device`;
}

function strategies() {
  const names = [...new Set(plan.attention.filter((entry) => entry.axis === "cp").map((entry) => entry.strategy))];
  return names.length ? `attention by ${names.join(", ")}` : "";
}

const nodesColumn = { key: "nodes", label: "Nodes", text: (row) => row.nodes.join(" "), class: "mono", cell: (row) => {
  const first = row.nodes.slice(0, 2).join(", ");
  return row.count > 2 ? element("details", {}, element("summary", {}, `${first} and ${row.count - 2} more`),
    row.nodes.slice(2).join(", ") + (row.count > row.nodes.length ? ` and ${row.count - row.nodes.length} more` : "")) : first;
} };
const codeColumn = { key: "code", label: "Code", text: (row) => row.code ?? "", class: "mono" };
const countColumn = { key: "count", label: "Count", num: true };

function buildFindings(panel) {
  const part = (title, explanation, table) => [element("h2", {}, title), explanation ? element("p", {}, explanation) : "", table];
  const add = (...content) => panel.append(...content.flat().filter((item) => item));
  const missed = plan.patterns.filter((entry) => !entry.found), found = plan.patterns.filter((entry) => entry.found);
  const patterns = (id, rows) => dataTable(id, [{ key: "pattern", label: "Pattern" }, countColumn, { key: "reason", label: id === "missed" ? "What broke it" : "What it is" }, ...(id === "missed" ? [codeColumn] : []), nodesColumn], rows, { sorted: "count" });
  add(part("Patterns missed", missed.length ? "They would be faster as one op; the reason says what broke them." : "None: nothing looked nearly like a pattern.", missed.length ? patterns("missed", missed) : ""),
    part("Patterns found", "", patterns("patterns", found)),
    part("Computed by every rank", "Nodes that cost something and that an axis does not divide.",
      dataTable("replicated", [{ key: "axis", label: "Axis" }, { key: "op", label: "Op" }, countColumn, { key: "microseconds", label: "Predicted", num: true, text: (row) => timeText(row.microseconds) },
        { key: "share", label: "Share of the axis", num: true, text: (row) => percentText(row.share) }, { key: "reason", label: "Why" }, codeColumn, nodesColumn], plan.replicated, { sorted: "microseconds" })),
    plan.attention.length ? part("Attention", "", dataTable("attention", [{ key: "axis", label: "Axis" }, { key: "strategy", label: "Strategy" }, countColumn,
      { key: "q", label: "q", text: (row) => shapeText(row.q), class: "mono" }, { key: "k", label: "k", text: (row) => shapeText(row.k), class: "mono" },
      { key: "placement", label: "q, k, v", text: (row) => row.placement.join("  "), class: "mono" }, nodesColumn], plan.attention)) : [],
    plan.uneven.length ? part("What does not divide", "", dataTable("uneven", [{ key: "axis", label: "Axis" }, { key: "name", label: "Name", class: "mono" }, { key: "what", label: "What" }, { key: "dim", label: "Dim", num: true },
      { key: "placement", label: "Placement", class: "mono" }, { key: "reason", label: "Why" }, codeColumn], plan.uneven)) : [],
    plan.fallback.length ? part("By onnx's reference implementation", "There is no kernel for these: they run on the host, slowly (OM2106).",
      dataTable("fallback", [{ key: "node", label: "Node", class: "mono" }, { key: "op", label: "Op" }, { key: "version", label: "Opset", num: true }], plan.fallback)) : []);
}

function buildMeasured(panel) {
  const bench = plan.bench, latency = bench.latency_us, predicted = bench.predicted;
  const known = d3.rollup(steps, (own) => d3.sum(own, (step) => step.us ?? 0), (step) => step.name);
  const kernels = bench.kernels.map((entry) => ({ ...entry, predicted_us: entry.predicted_us ?? known.get(entry.kernel) }));
  const most = d3.max(kernels, (entry) => Math.max(entry.measured_us, entry.predicted_us ?? 0)) || 1;
  const bars = (row) => [["", row.measured_us, "measured"], ["second", row.predicted_us, "predicted"]].filter(([, us]) => us !== null && us !== undefined)
    .map(([name, us, label]) => element("div", { title: `${label} ${timeText(us)}`, style: "line-height: 11px" }, element("span", { class: `bar ${name}`, style: `width: ${(220 * us / most).toFixed(1)}px` })));
  panel.append(element("p", {}, `Measured on ${bench.device}, ${bench.runs} runs: latency ${timeText(latency.p50)} (p50), ${timeText(latency.p99)} (p99); back to back ${timeText(bench.back_to_back_us)} a run. `
    + (predicted ? `Predicted ${timeText(predicted.total_us)} for ${predicted.device}: the latency is ${predicted.latency_ratio.toFixed(2)} times that.` : `Predicted ${timeText(plan.summary.time.total_us)} for ${plan.summary.time.device}, another device.`)),
  element("h2", {}, "By kernel"),
  dataTable("kernels", [{ key: "kernel", label: "Kernel" }, { key: "count", label: "Count", num: true },
    { key: "measured_us", label: "Measured", num: true, text: (row) => timeText(row.measured_us) }, { key: "predicted_us", label: "Predicted", num: true, text: (row) => timeText(row.predicted_us) },
    { key: "ratio", label: "Ratio", num: true, sort: (row) => row.measured_us / (row.predicted_us || Infinity), text: (row) => row.predicted_us ? (row.measured_us / row.predicted_us).toFixed(2) : "" },
    { key: "bars", label: "Measured, and predicted below", sort: (row) => row.measured_us, text: () => "", cell: bars }], kernels, { sorted: "measured_us" }),
  element("h2", {}, "By rank"),
  dataTable("by-rank", ["rank", "compute_us", "communication_us", "waiting_us", "beside_us", "idle_us", "total_us"].map((key) => ({ key, num: true,
    label: { rank: "Rank", compute_us: "Kernels", communication_us: "Sending", waiting_us: "Waiting", beside_us: "Beside kernels", idle_us: "Idle", total_us: "In all" }[key],
    text: (row) => key === "rank" ? row.rank : timeText(row[key]) })), bench.per_rank, { sorted: "rank", down: false }));
}
