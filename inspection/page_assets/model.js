"use strict";
// The plan's data, and what the other scripts look up in it.

const plan = JSON.parse(document.getElementById("data").textContent);
const steps = plan.instructions;
const COLLECTIVES = new Set(["AllReduce", "ReduceScatter", "AllGather", "AllToAll", "Shift",
  "Broadcast", "ReduceTo", "GatherTo", "ScatterFrom"]);
const axisNames = plan.axes.map(([axis]) => axis);

const isCollective = (step) => COLLECTIVES.has(step.name) && step.axis !== undefined;
const buffer = (index) => plan.buffers[index];
const rootOf = (index) => buffer(index)?.root ?? index;

// --- quantities ---

function bytesText(count) {
  if (count === null || count === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${unit ? count.toFixed(count < 10 ? 2 : 1) : count} ${units[unit]}`;
}

function timeText(us) {
  if (us === null || us === undefined) return "";
  if (us >= 1000) return `${(us / 1000).toFixed(us < 10000 ? 2 : 1)} ms`;
  return `${us < 100 ? us.toFixed(1) : us.toFixed(0)} µs`;
}

const percentText = (share) => `${(100 * share).toFixed(1)} %`;
const shapeText = (shape) => shape === undefined ? "" : shape.length ? shape.join("×") : "scalar";
const flopsText = (count) => count >= 1e12 ? `${(count / 1e12).toFixed(1)} TFLOP`
  : count >= 1e9 ? `${(count / 1e9).toFixed(1)} GFLOP` : `${(count / 1e6).toFixed(1)} MFLOP`;
const DTYPES = { float32: "f32", float16: "f16", bfloat16: "bf16", float64: "f64", int64: "i64", int32: "i32" };
const dtypeText = (dtype) => DTYPES[dtype] ?? dtype;

// --- who makes and reads a buffer ---

const makers = new Map(), readers = new Map();
steps.forEach((step, at) => {
  for (const made of step.outs) push(makers, made, at);
  step.ins.forEach((read) => { if (read >= 0) push(readers, read, at); });
});

function push(map, key, value) {
  const known = map.get(key);
  if (known === undefined) map.set(key, [value]);
  else if (known[known.length - 1] !== value) known.push(value);
}

const ofRoot = new Map();
for (const index of Object.keys(plan.buffers)) push(ofRoot, rootOf(Number(index)), Number(index));
const together = (index) => ofRoot.get(rootOf(index)) ?? [index];
const allOf = (map, index) => [...new Set(together(index).flatMap((other) => map.get(other) ?? []))].sort((a, b) => a - b);

// --- names ---

const weightOf = (index) => buffer(index)?.weight === undefined ? undefined : plan.weights[buffer(index).weight];

function tensorName(index) {
  const weight = weightOf(index);
  if (weight !== undefined) return weight.name;
  const own = buffer(index)?.name ?? together(index).map((other) => buffer(other)?.name).find((name) => name);
  return own ?? `buffer ${index}`;
}

function placementOf(index) {
  const found = weightOf(index)?.placement ?? buffer(index)?.placement ?? sharedPlacement(index);
  return found && Object.keys(found).length ? found : undefined;
}

// That of all pieces of a buffer, where they agree.
function sharedPlacement(index) {
  const known = together(index).map((other) => buffer(other)?.placement).filter((placement) => placement);
  return new Set(known.map((placement) => JSON.stringify(placement))).size === 1 ? known[0] : undefined;
}

function stepName(at) {
  const step = steps[at];
  return step.module || step.nodes[0] || step.name;
}

// The tensors that people look for: one for each name and placement, weights apart.
const tensors = [];
{
  const seen = new Map();
  for (const [key, item] of Object.entries(plan.buffers)) {
    const index = Number(key);
    if (item.weight !== undefined || item.name === undefined || item.piece) continue;
    const id = `${item.name}|${JSON.stringify(item.placement)}|${item.local}`;
    if (!seen.has(id)) { seen.set(id, index); tensors.push(index); }
  }
}

// --- blocks ---

// Where every instruction is: the chain of [fold, number of the block] around it.
const places = steps.map(() => []);
let foldCount = 0;
const foldsById = [];
function enter(folds) {
  for (const fold of folds) {
    fold.id = foldCount++;
    foldsById.push(fold);
    fold.shown = 0;
    fold.open = false;
    fold.blocks.forEach((block, number) => {
      for (const at of block.instructions) places[at].push([fold, number]);
      enter(block.folds ?? []);
    });
  }
}
enter(plan.folds);

function foldTitle(fold) {
  const name = fold.name.split(".").pop() === fold.name ? fold.name : fold.name.replace(/^(module|model)\./, "");
  return name || "block";
}
const blockNumber = (block) => block.name.slice(block.name.lastIndexOf(".") + 1);
function foldRange(fold) {
  const first = blockNumber(fold.blocks[0]), last = blockNumber(fold.blocks[fold.blocks.length - 1]);
  return fold.blocks.length > 1 ? `${first} – ${last}` : first;
}

// What an instruction is called inside of its block: its module without the block's path.
function shortModule(at) {
  const step = steps[at], around = places[at];
  const prefix = around.length ? around[around.length - 1][0].blocks[around[around.length - 1][1]].name : "";
  let module = step.module;
  if (prefix && (module === prefix || module.startsWith(`${prefix}.`))) module = module.slice(prefix.length + 1);
  else module = module.replace(/^module\./, "");
  return module || step.nodes[0] || "";
}

// --- search ---

const findable = [
  ...tensors.map((index) => ({ kind: "tensor", name: tensorName(index), more: placementText(placementOf(index)), buffer: index })),
  ...plan.weights.map((weight, number) => ({ kind: "weight", name: weight.name, more: placementText(weight.placement), weight: number })),
];
{
  const weightBuffers = new Map();
  for (const [key, item] of Object.entries(plan.buffers)) if (item.weight !== undefined) weightBuffers.set(item.weight, Number(key));
  for (const entry of findable) if (entry.kind === "weight") entry.buffer = weightBuffers.get(entry.weight);
  for (const [number, weight] of plan.weights.entries()) {
    for (const source of weight.sources) {
      if (source !== weight.name) findable.push({ kind: "weight", name: source, more: `in ${weight.name}`, buffer: weightBuffers.get(number) });
    }
  }
  const seen = new Set();
  steps.forEach((step, at) => {
    for (const node of step.nodes) {
      if (!seen.has(node)) findable.push({ kind: "node", name: node, more: step.title, step: at });
      seen.add(node);
    }
    if (step.module && !seen.has(`.${step.module}`)) {
      seen.add(`.${step.module}`);
      findable.push({ kind: "module", name: step.module, more: step.title, step: at });
    }
  });
}
for (const entry of findable) entry.lower = entry.name.toLowerCase();

function placementText(placement) {
  if (!placement) return "";
  return Object.entries(placement).map(([axis, cut]) => `${axis} ${cut}`).join("  ");
}

function search(text, most = 40) {
  const words = text.toLowerCase().split(/\s+/).filter((word) => word);
  if (!words.length) return [];
  const hits = [];
  for (const entry of findable) {
    let score = 0;
    for (const word of words) {
      const at = entry.lower.indexOf(word);
      if (at < 0) { score = -1; break; }
      score += at === 0 ? (entry.lower.length === word.length ? 100 : 20) : /[._/]/.test(entry.lower[at - 1]) ? 10 : 1;
    }
    if (score >= 0) hits.push([score - entry.lower.length / 200, entry]);
  }
  hits.sort((a, b) => b[0] - a[0]);
  return hits.slice(0, most).map(([, entry]) => entry);
}

// --- a little DOM ---

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== ""));
  return made;
}
