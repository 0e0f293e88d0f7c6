"use strict";
// From instructions to boxes with places: the items of a scope, the edges between them, and dagre's layout of both.
//
// A scope is the whole program or one block. Its items are instructions, folds (blocks that repeat, drawn as one),
// the program's inputs and outputs, and, inside of a block, what comes in and what goes out.

const CARD = { width: 284, height: 78 }, WEIGHT = 23, PILL = { width: 220, height: 48 }, PORT = { width: 184, height: 44 };
const CLOSED = { width: 356, height: 88 }, SENT = 33, HEAD = 60, PAD = 22;
const MANY = 3;  // readers of which only the first gets an edge: the others name what they read

function scopeOf(instructions, folds, inner = "") {
  const items = [], owner = new Map();
  const add = (item) => { items.push(item); return item; };
  for (const fold of folds) {
    const item = add({ kind: "fold", key: `fold-${fold.id}`, fold });
    for (const block of fold.blocks) for (const at of block.instructions) owner.set(at, item);
  }
  for (const at of instructions) {
    if (!owner.has(at)) owner.set(at, add({ kind: isCollective(steps[at]) ? "send" : "op", key: `step-${at}`, at }));
  }
  const scope = { items, owner, edges: new Map(), ports: new Map(), inner };
  const inputs = new Map(plan.inputs.map((input) => [input.buffer, input]));
  for (const at of instructions) {
    steps[at].ins.forEach((read, position) => {
      if (read < 0 || buffer(read).weight !== undefined) return;
      const input = inputs.get(rootOf(read));
      if (input !== undefined) connect(scope, port(scope, `input-${rootOf(read)}`, "input", rootOf(read)), owner.get(at), read);
      for (const source of steps[at].from[position]) {
        const from = owner.get(source) ?? (inner ? port(scope, `enter-${rootOf(read)}`, "enter", rootOf(read), source) : undefined);
        if (from !== undefined) connect(scope, from, owner.get(at), read);
      }
    });
  }
  if (inner) leaving(scope, instructions);
  else for (const output of plan.outputs) {
    for (const at of allOf(makers, output.buffer)) {
      connect(scope, owner.get(at), port(scope, `output-${output.buffer}`, "output", output.buffer), output.buffer);
    }
  }
  scope.items.push(...scope.ports.values());
  shorten(scope);
  return scope;
}

function port(scope, key, kind, index, source) {
  key = `${scope.inner}${key}`;
  if (!scope.ports.has(key)) scope.ports.set(key, { kind, key, buffer: index, source });
  return scope.ports.get(key);
}

// What instructions elsewhere read of a block.
function leaving(scope, instructions) {
  for (const at of instructions) {
    for (const made of steps[at].outs) {
      const outside = allOf(readers, made).find((reader) => !scope.owner.has(reader) && steps[reader].from.some((each) => each.includes(at)));
      if (outside !== undefined) connect(scope, scope.owner.get(at), port(scope, `leave-${rootOf(made)}`, "leave", rootOf(made), outside), made);
    }
  }
}

// What many read (a condition, tables of positions) would be drawn across the whole picture: the first reader keeps its
// edge, and the others say what they read too.
function shorten(scope) {
  const order = (item) => item.at ?? item.fold?.blocks[0].instructions[0] ?? 0;
  const leavingFrom = d3.group(scope.edges.values(), (edge) => edge.from);
  for (const [from, edges] of leavingFrom) {
    if (from.kind === "send" || edges.filter((edge) => edge.to.kind === "fold").length < MANY) continue;
    const [, ...others] = edges.filter((edge) => edge.to.kind === "fold").sort((a, b) => order(a.to) - order(b.to));
    for (const edge of others) {
      if (from.kind === "fold" && others.length < 2) continue;
      scope.edges.delete(edge.key);
      edge.to.also = [...(edge.to.also ?? []), ...edge.buffers];
    }
  }
}

function connect(scope, from, to, index) {
  if (from === to || from === undefined || to === undefined) return;
  const key = `${from.key}>${to.key}`;
  if (!scope.edges.has(key)) scope.edges.set(key, { key, from, to, buffers: new Set() });
  scope.edges.get(key).buffers.add(index);
}

const layouts = new Map();  // of scopes, by what is shown in them

function rootScope() {
  return laidOut("root", () => scopeOf(d3.range(steps.length), plan.folds), plan.folds);
}

function blockScope(fold) {
  const block = fold.blocks[fold.shown];
  return laidOut(`fold-${fold.id}-${fold.shown}`, () => scopeOf(block.instructions, block.folds ?? [], `fold-${fold.id}-`), block.folds ?? []);
}

// Lay the graph out with one more block open, for later.
function layoutOpen(fold) {
  if (fold.open) return;
  fold.open = true;
  rootScope();
  fold.open = false;
}

function laidOut(name, make, folds) {
  const state = `${name}|${stateOf(folds)}`;
  if (!layouts.has(state)) layouts.set(state, arrange(make()));
  return layouts.get(state);
}

function stateOf(folds) {
  return folds.map((fold) => fold.open ? `${fold.shown}(${stateOf(fold.blocks[fold.shown].folds ?? [])})` : "").join(",");
}

function sizeOf(item) {
  if (item.kind === "op") return { width: CARD.width, height: CARD.height + (mainWeight(item.at) === undefined ? 0 : WEIGHT) };
  if (item.kind === "send") return PILL;
  if (item.kind !== "fold") return PORT;
  if (!item.fold.open) return { width: CLOSED.width, height: CLOSED.height + SENT * Math.max(1, kindsSent(item.fold)) };
  item.scope = blockScope(item.fold);
  return { width: Math.max(CLOSED.width + 120, item.scope.width + 2 * PAD), height: item.scope.height + HEAD + PAD };
}

const kindsSent = (fold) => totals(fold.blocks[fold.shown]).sent.size;

// The weight that an instruction multiplies by or looks up: its largest one, if it has more than one dim.
function mainWeight(at) {
  const found = steps[at].ins.filter((index) => index >= 0 && weightOf(index) && weightOf(index).shape.length > 1);
  return d3.greatest(found, (index) => weightOf(index).bytes);
}

// Edges leave a box at its lower side and arrive at the upper one, beside each other.
function anchor(boxes, lines) {
  const rows = new Map(boxes.map((box) => [box.key, box]));
  for (const line of lines) line.points = line.points.slice(1, -1);
  const place = (end, other, side, at) => {
    for (const [key, own] of d3.group(lines, (line) => line[end].key)) {
      const box = rows.get(key), toward = (line) => (line.points.at(at) ?? middle(rows.get(line[other].key))).x;
      own.sort((a, b) => toward(a) - toward(b));
      own.forEach((line, i) => { line[side] = { x: box.x + box.width * (0.16 + 0.68 * (i + 0.5) / own.length), y: box.y + (end === "from" ? box.height : 0) }; });
    }
  };
  place("from", "to", "start", 0);
  place("to", "from", "end", -1);
  for (const line of lines) {
    line.points = [line.start, ...line.points.filter((point) => point.y > line.start.y + 6 && point.y < line.end.y - 6), line.end];
  }
}

const middle = (box) => ({ x: box.x + box.width / 2, y: box.y + box.height / 2 });

function arrange(scope) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 26, ranksep: 48, edgesep: 14, marginx: 0, marginy: 0, ranker: "network-simplex" });
  for (const item of scope.items) graph.setNode(item.key, { ...sizeOf(item) });
  for (const edge of scope.edges.values()) {
    const strong = edge.from.kind === "send" || edge.to.kind === "send";
    graph.setEdge(edge.from.key, edge.to.key, { weight: strong ? 3 : 1 });
  }
  dagre.layout(graph);
  const boxes = scope.items.map((item) => {
    const { x, y, width, height } = graph.node(item.key);
    return { ...item, x: x - width / 2, y: y - height / 2, width, height };
  });
  const lines = [...scope.edges.values()].map((edge) => ({
    ...edge, points: graph.edge(edge.from.key, edge.to.key).points,
    sends: edge.from.kind === "send" || edge.to.kind === "send",
  }));
  anchor(boxes, lines);
  const rows = new Map(boxes.map((box) => [box.key, box]));
  for (const line of lines) line.far = !line.sends && rows.get(line.to.key).y - (rows.get(line.from.key).y + rows.get(line.from.key).height) > 190;
  return { boxes, lines, width: Math.ceil(graph.graph().width), height: Math.ceil(graph.graph().height) };
}

// All boxes that are drawn, with their places on the whole page; those inside of open blocks too.
function everyBox(scope, x = 0, y = 0, found = []) {
  for (const box of scope.boxes) {
    found.push({ ...box, x: box.x + x, y: box.y + y, links: scope.lines });
    if (box.kind === "fold" && box.fold.open) everyBox(box.scope, x + box.x + (box.width - box.scope.width) / 2, y + box.y + HEAD, found);
  }
  return found;
}
