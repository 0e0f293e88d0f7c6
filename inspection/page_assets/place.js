"use strict";
// How placements look: a colour for each axis that cuts, grey for whole, amber for partial sums; and always the text.

const AXIS_COLOURS = ["--cut-0", "--cut-1", "--cut-2", "--cut-3"];

function kindOf(cut) {
  return cut === "R" ? "whole" : cut.startsWith("S") ? "cut" : "partial";
}

function colourOf(axis, cut) {
  const kind = kindOf(cut);
  return kind === "cut" ? AXIS_COLOURS[Math.max(0, axisNames.indexOf(axis)) % AXIS_COLOURS.length] : `--${kind}`;
}

// [colour variable, text] of every axis.
function placementParts(placement) {
  return Object.entries(placement ?? {}).map(([axis, cut]) => [colourOf(axis, cut), axis, cut]);
}

// The one colour of an edge: that of an axis that cuts the tensor, of partial sums, or of whole tensors.
function edgeColour(placement) {
  const parts = placementParts(placement);
  const told = parts.find(([, , cut]) => kindOf(cut) === "partial") ?? parts.find(([, , cut]) => kindOf(cut) === "cut") ?? parts[0];
  return told ? `var(${told[0]})` : "var(--whole)";
}

const isPartial = (placement) => placementParts(placement).some(([, , cut]) => kindOf(cut) === "partial");

function chips(placement) {
  return placementParts(placement).map(([colour, axis, cut]) =>
    element("span", { class: "chip", style: `background: var(${colour}-soft); color: var(${colour}); border-color: var(${colour})` },
      element("b", {}, axis), cut));
}

const measuring = document.createElement("canvas").getContext("2d");
const FONTS = {
  title: "620 13px system-ui, sans-serif", side: "11px system-ui, sans-serif", second: "11px system-ui, sans-serif",
  mono: "11px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace", pill: "680 12.5px system-ui, sans-serif",
};
const widths = new Map();
function textWidth(text, font) {
  const key = font + text;
  let found = widths.get(key);
  if (found === undefined) {
    measuring.font = FONTS[font];
    found = measuring.measureText(text).width;
    widths.set(key, found);
  }
  return found;
}

// A text that fits a width; where it is too long the middle goes, for names differ at either end.
function fitted(text, font, width) {
  if (textWidth(text, font) <= width) return text;
  let keep = Math.max(4, Math.floor(text.length * width / textWidth(text, font)) - 1);
  const cut = () => `${text.slice(0, Math.ceil(keep / 2))}…${text.slice(text.length - Math.floor(keep / 2))}`;
  while (keep > 4 && textWidth(cut(), font) > width) keep -= 1;
  return cut();
}
