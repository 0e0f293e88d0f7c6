"use strict";
// Tables that sort and filter. A column: { key, label, num, text(row), cell(row), sort(row) }.

const CHUNK = 250;

function dataTable(id, columns, rows, { open, sorted, down = true, filters = [] } = {}) {
  const state = { sort: sorted, down, text: "", limit: CHUNK, picks: {} };
  const value = (row, column) => column.sort ? column.sort(row) : column.num ? row[column.key] ?? -1 : textOf(row, column);
  const textOf = (row, column) => String(column.text ? column.text(row) : row[column.key] ?? "");
  const body = element("tbody"), count = element("span", { class: "muted", role: "status" });
  const more = element("button", { type: "button", hidden: true, onclick: () => { state.limit = Infinity; show(); } }, "Show all");
  const input = element("input", { type: "text", placeholder: "Filter", "aria-label": `Filter ${id}`, spellcheck: "false",
    oninput: (event) => { state.text = event.target.value; state.limit = CHUNK; show(); } });
  const picks = filters.map(({ key, label }) => element("select", { "aria-label": label, onchange: (event) => { state.picks[key] = event.target.value; show(); } },
    element("option", { value: "" }, label), [...new Set(rows.map((row) => textOf(row, columns.find((column) => column.key === key))))].sort()
      .map((option) => element("option", { value: option }, option || "none"))));
  const heads = columns.map((column) => element("th", { scope: "col", class: column.num ? "num" : "" },
    element("button", { type: "button", onclick: () => {
      if (state.sort === column.key) state.down = !state.down;
      else { state.sort = column.key; state.down = Boolean(column.num); }
      show();
    } }, column.label)));
  const haystacks = new Map();
  function haystack(row) {
    if (!haystacks.has(row)) haystacks.set(row, columns.map((column) => textOf(row, column)).join(" ").toLowerCase());
    return haystacks.get(row);
  }
  function show() {
    const words = state.text.toLowerCase().split(/\s+/).filter((word) => word);
    const kept = rows.filter((row) => words.every((word) => haystack(row).includes(word))
      && Object.entries(state.picks).every(([key, pick]) => !pick || textOf(row, columns.find((column) => column.key === key)) === pick));
    const column = columns.find((other) => other.key === state.sort);
    if (column) {
      kept.sort((a, b) => d3.ascending(value(a, column), value(b, column)));
      if (state.down) kept.reverse();
    }
    heads.forEach((th, i) => {
      if (columns[i] === column) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    body.replaceChildren(...kept.slice(0, state.limit).map((row) => {
      const tr = element("tr", { tabindex: open ? 0 : undefined }, columns.map((each) =>
        element("td", { class: `${each.num ? "num" : ""} ${each.class ?? ""}`.trim() }, each.cell ? each.cell(row) : textOf(row, each))));
      if (open) {
        tr.addEventListener("click", () => { mark(tr); open(row); });
        tr.addEventListener("keydown", (event) => {
          if (event.key === "Enter") { mark(tr); open(row); }
          if (event.key === "ArrowDown") { tr.nextElementSibling?.focus(); event.preventDefault(); }
          if (event.key === "ArrowUp") { tr.previousElementSibling?.focus(); event.preventDefault(); }
        });
      }
      return tr;
    }));
    const shown = Math.min(state.limit, kept.length);
    count.textContent = shown < kept.length ? `${shown} of ${kept.length} shown` : `${kept.length} of ${rows.length}`;
    more.hidden = shown === kept.length;
  }
  function mark(tr) {
    for (const other of body.children) other.removeAttribute("aria-selected");
    tr.setAttribute("aria-selected", "true");
  }
  show();
  return element("div", { id, class: "table" }, element("div", { class: "tools" }, input, picks, count, more),
    element("table", { class: "data" }, element("thead", {}, element("tr", {}, heads)), body));
}

const placementColumn = { key: "placement", label: "Placement", text: (row) => placementText(row.placement), cell: (row) => chips(row.placement), class: "fit" };
const shapes = [
  { key: "shape", label: "Global shape", text: (row) => shapeText(row.shape), class: "mono", sort: (row) => d3.max(row.shape ?? [0]) ?? 0 },
  { key: "local", label: "Local shape", text: (row) => shapeText(row.local), class: "mono", sort: (row) => d3.max(row.local ?? [0]) ?? 0 },
  { key: "dtype", label: "Dtype", text: (row) => dtypeText(row.dtype), class: "mono" },
];
const nameColumn = { key: "name", label: "Name", class: "mono" };
const bytesColumn = (key, label) => ({ key, label, num: true, text: (row) => bytesText(row[key]) });

function buildTensors(panel) {
  const rows = tensors.map((index) => {
    const item = buffer(index), at = allOf(makers, index)[0];
    return { ...item, index, name: tensorName(index), made: at === undefined ? "input" : steps[at].title, at: at ?? -1 };
  });
  panel.append(element("p", {}, "Every tensor of the model that the program holds, in each of its placements. Shapes under “local” are one rank's piece."),
    dataTable("tensors", [nameColumn, placementColumn, ...shapes, bytesColumn("bytes", "Bytes a rank"),
      { key: "made", label: "Made by" }, { key: "at", label: "At", num: true, text: (row) => row.at < 0 ? "" : row.at }], rows,
    { open: (row) => select({ buffer: row.index }), sorted: "at", down: false, filters: [{ key: "placement", label: "Any placement" }] }));
}

function buildCollectives(panel) {
  const rows = steps.map((step, at) => ({ ...step, at, place: stepName(at), tensor: step.ins.map(tensorName).join(", "), beside: step.stream ? "yes" : "" }))
    .filter(isCollective);
  const kinds = d3.rollups(rows, (own) => ({ count: own.length, bytes: d3.sum(own, (row) => row.bytes), us: d3.sum(own, (row) => row.us) }),
    (row) => `${row.name} on ${row.axis}`).map(([name, own]) => ({ name, ...own }));
  panel.append(element("h2", {}, "By kind"),
    dataTable("kinds", [{ key: "name", label: "Collective" }, { key: "count", label: "Count", num: true }, bytesColumn("bytes", "Bytes a rank sends"),
      { key: "us", label: "Predicted", num: true, text: (row) => timeText(row.us) }], kinds, { sorted: "us" }),
    element("h2", {}, "One by one"),
    dataTable("collectives", [{ key: "at", label: "At", num: true }, { key: "name", label: "Collective" }, { key: "axis", label: "Axis" },
      bytesColumn("bytes", "Bytes"), { key: "us", label: "Predicted", num: true, text: (row) => timeText(row.us) },
      { key: "tensor", label: "Tensor", class: "mono" }, { key: "reason", label: "Why", class: "mono" }, { key: "beside", label: "Beside kernels" }], rows,
    { open: (row) => select({ step: row.at }), sorted: "at", down: false, filters: [{ key: "name", label: "Any kind" }, { key: "axis", label: "Any axis" }] }));
}

function buildProgram(panel) {
  const rows = steps.map((step, at) => ({ at, title: isCollective(step) ? `${step.name} on ${step.axis}` : step.title, kernel: step.name, module: step.module,
    node: step.nodes.join(", "), us: step.us, placement: placementOf(step.outs[0]), local: buffer(step.outs[0]).local, stream: step.stream ?? 0 }));
  const most = d3.max(rows, (row) => row.us) || 1;
  panel.append(element("p", {}, "The instructions in their order; every rank runs all of them."),
    dataTable("program", [{ key: "at", label: "At", num: true }, { key: "title", label: "Does" }, { key: "kernel", label: "Kernel" }, { key: "module", label: "Module", class: "mono" },
      { key: "node", label: "ONNX nodes", class: "mono" }, placementColumn, { key: "local", label: "Makes", text: (row) => shapeText(row.local), class: "mono" },
      { key: "us", label: "Predicted", num: true, text: (row) => timeText(row.us), cell: (row) => [timeText(row.us), " ", element("span", { class: "bar", style: `width: ${(40 * (row.us ?? 0) / most).toFixed(1)}px` })] }],
    rows, { open: (row) => select({ step: row.at }), sorted: "at", down: false, filters: [{ key: "kernel", label: "Any kernel" }] }));
}

function buildWeights(panel) {
  const whole = d3.sum(plan.weights, (weight) => weight.bytes), held = d3.sum(plan.weights, (weight) => weight.local_bytes);
  const rows = findable.filter((entry) => entry.kind === "weight" && entry.weight !== undefined).map((entry) => {
    const weight = plan.weights[entry.weight];
    return { ...weight, index: entry.buffer, local: weight.local_shape, share: weight.bytes ? weight.local_bytes / weight.bytes : 1,
      from: weight.sources.join(", ") };
  });
  const cut = d3.sum(rows, (row) => row.share < 1 ? row.bytes : 0);
  panel.append(element("p", {}, `Each of ${plan.ranks} ranks holds ${bytesText(held)} of ${bytesText(whole)} (${percentText(whole ? held / whole : 1)}); `
    + `${bytesText(cut)} of the weights are cut, ${bytesText(whole - cut)} are whole on every rank.`),
    dataTable("weights", [nameColumn, placementColumn, ...shapes, bytesColumn("local_bytes", "Bytes a rank"), bytesColumn("bytes", "Bytes in all"),
      { key: "share", label: "Held", num: true, text: (row) => percentText(row.share) }, { key: "from", label: "Made from", class: "mono" }], rows,
    { open: (row) => row.index !== undefined && select({ buffer: row.index }), sorted: "local_bytes", filters: [{ key: "placement", label: "Any placement" }] }));
}
