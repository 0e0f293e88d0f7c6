"""Draws the pictures of these pages: python docs/pictures/draw.py [FOLDER]

SVG without scripts or fonts of its own. Colours follow the reader's light or dark by a media query inside the file; the
ground is painted too, so that a picture can be read wherever it stands.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

STYLE = """
  :root { --ground: #ffffff; --ink: #1c2430; --soft: #5d6b7c; --line: #aab4c0; --panel: #f3f5f8; --hot: #b3372f;
    --c0: #cfe2ff; --c1: #ffe0b8; --c2: #cdeed0; --c3: #ecd5f7; --e0: #2f6fc4; --e1: #b86a00; --e2: #2f8540;
    --e3: #8641a8; }
  @media (prefers-color-scheme: dark) {
    :root { --ground: #14181e; --ink: #e6ebf2; --soft: #a2aebd; --line: #566372; --panel: #1f252d; --hot: #ff8f85;
      --c0: #1d3a63; --c1: #593a0c; --c2: #1d4a28; --c3: #472459; --e0: #7db4ff; --e1: #ffb454; --e2: #7fd18d;
      --e3: #d29bee; } }
  text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
  .b { font-weight: 600; } .s { fill: var(--soft); font-size: 12.5px; } .hot { fill: var(--hot); }
  .m { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
  .a { stroke: var(--soft); stroke-width: 1.6; fill: none; } .h { stroke: var(--hot); stroke-width: 2; fill: none; }
"""
RANKS = 4


class Picture:
    """An SVG while it is drawn; lengths are in pixels of the view box."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        """A line of text; `kind`: b bold, s soft, m monospace, hot."""
        style = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(text)}</text>')

    def box(self, x: float, y: float, w: float, h: float, rank: int | None = None, *, dashed: bool = False) -> None:
        """A rectangle in a rank's colour, or a panel."""
        fill, edge = ("var(--panel)", "var(--line)") if rank is None else (f"var(--c{rank})", f"var(--e{rank})")
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{fill}" stroke="{edge}"{dash}/>'
        )

    def both(self, x: float, y: float, w: float, h: float, first: int, second: int) -> None:
        """A rectangle that two ranks hold: a triangle in the colour of each."""
        for rank, corner in ((first, f"{x:g},{y:g}"), (second, f"{x + w:g},{y + h:g}")):
            points = f"{corner} {x + w:g},{y:g} {x:g},{y + h:g}"
            self.parts.append(f'<polygon points="{points}" fill="var(--c{rank})" stroke="var(--e{rank})"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, hot: bool = False, bend: float = 0) -> None:
        """An arrow; `hot` where something is sent; `bend` pixels to the side."""
        kind, head = ("h", "hot") if hot else ("a", "soft")
        mx, my = (x1 + x2) / 2, (y1 + y2) / 2
        length = max(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5, 1)
        cx, cy = mx - bend * (y2 - y1) / length, my + bend * (x2 - x1) / length
        path = f"M{x1:g} {y1:g} Q{cx:g} {cy:g} {x2:g} {y2:g}"
        self.parts.append(f'<path class="{kind}" d="{path}" marker-end="url(#{head})"/>')

    def cut(self, x: float, y: float, w: float, h: float, *, dim: int | None, label: str = "", ranks: int = 4) -> None:
        """A matrix as its ranks hold it: cut along rows (0) or columns (1), or whole (None)."""
        for rank in range(ranks):
            if dim == 0:
                self.box(x, y + rank * h / ranks, w, h / ranks, rank)
            elif dim == 1:
                self.box(x + rank * w / ranks, y, w / ranks, h, rank)
        if dim is None:
            self.box(x, y, w, h)
        if label:
            self.text(x + w / 2, y + h + 18, label, "s")

    def svg(self) -> str:
        """The file."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="var(--{name})"/></marker>'
            for name in ("soft", "hot")
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'width="{self.width}" height="{self.height}">\n<title>{escape(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n<defs>{heads}</defs>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="var(--ground)"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def way() -> Picture:
    """From a model to ranks."""
    p = Picture(760, 190, "A model becomes a plan, and a plan runs on ranks")
    p.box(20, 60, 110, 70)
    p.text(75, 92, "model.onnx", "b")
    p.text(75, 112, "no hints", "s")
    p.arrow(132, 95, 178, 95)
    p.box(182, 30, 262, 130)
    p.text(313, 55, "onnxmesh compile --tp 2 --cp 2", "m")
    for i, (step, what) in enumerate(
        (("recognise", "attention, norms, ..."), ("place", "where each tensor lives"), ("partition", "what is sent"))
    ):
        p.text(266, 84 + 24 * i, step, "b", "end")
        p.text(278, 84 + 24 * i, what, "s", "start")
    p.arrow(446, 95, 480, 95)
    p.box(484, 56, 120, 78)
    p.text(544, 86, "model.plan", "b")
    p.text(544, 105, "one program,", "s")
    p.text(544, 121, "weights in shards", "s")
    for rank in range(RANKS):
        p.arrow(606, 95, 652, 35 + 40 * rank)
        p.box(656, 20 + 40 * rank, 84, 30, rank)
        p.text(698, 40 + 40 * rank, f"rank {rank}")
    return p


def placements() -> Picture:
    """The three placements, and what leads from one to another."""
    p = Picture(760, 330, "The placements whole, sharded and partial, and the collectives between them")
    p.text(120, 34, "R: whole on every rank", "b")
    p.text(608, 34, "S(1): columns on each rank", "b")
    p.text(370, 214, "P: each rank has a summand", "b")
    for rank in range(RANKS):
        p.box(40 + 42 * rank, 46, 36, 50, rank)
        p.text(58 + 42 * rank, 76, "A", "b")
        p.box(530 + 46 * rank, 46, 36, 50, None, dashed=True)
        p.box(530 + 46 * rank + 9 * rank, 46, 9, 50, rank)
        p.box(282 + 46 * rank, 226, 36, 50, rank)
        p.text(300 + 46 * rank, 256, f"A{'₀₁₂₃'[rank]}", "b")
    p.text(370, 300, "A = A₀ + A₁ + A₂ + A₃", "s")
    p.arrow(225, 58, 515, 58)
    p.text(370, 50, "cut: nothing is sent", "s")
    p.arrow(515, 88, 225, 88, hot=True)
    p.text(370, 108, "AllGather", "hot b")
    p.arrow(300, 194, 150, 108, hot=True)
    p.text(160, 166, "AllReduce", "hot b")
    p.arrow(440, 194, 570, 108, hot=True)
    p.text(574, 166, "ReduceScatter", "hot b")
    p.arrow(718, 60, 718, 90, hot=True, bend=-46)
    p.text(664, 124, "S(1) → S(0): AllToAll", "hot b")
    return p


def product() -> Picture:
    """Three ways to share a product."""
    p = Picture(760, 260, "Three ways to divide a matrix product over four ranks")
    ways = (
        ("rows of X", 0, None, 0, "Y in rows", "tokens are shared; W whole"),
        ("columns of W", None, 1, 1, "Y in columns", "W is shared; X whole"),
        ("the summed dim", 1, 0, "P", "Y in summands", "both are shared; Y is a sum"),
    )
    for i, (title, x_dim, w_dim, y_dim, y_label, what) in enumerate(ways):
        left = 20 + 248 * i
        p.text(left + 112, 30, title, "b")
        p.cut(left, 62, 64, 96, dim=x_dim, label="X")
        p.text(left + 75, 114, "·", "b")
        p.cut(left + 86, 78, 60, 64, dim=w_dim, label="W")
        p.text(left + 157, 114, "=", "b")
        if y_dim == "P":
            for rank in range(RANKS):
                p.box(left + 166 + 5 * rank, 56 + 5 * rank, 44, 92, rank)
            p.text(left + 196, 182, "Y: partial", "s")
        else:
            p.cut(left + 168, 62, 56, 96, dim=int(y_dim), label="Y")
        p.text(left + 112, 216, y_label, "b")
        p.text(left + 112, 236, what, "s")
    return p


def tensor_parallel() -> Picture:
    """A gated MLP or an attention under tensor parallelism."""
    p = Picture(760, 300, "Tensor parallelism: columns, then rows, then one all-reduce")
    stages = (
        (20, "X", None, "R"),
        (222, "H = f(X · W₁)", 1, "S(1)"),
        (434, "Y = H · W₂", "P", "P"),
        (640, "Y", None, "R"),
    )
    for x, label, dim, placed in stages:
        if dim == "P":
            for rank in range(RANKS):
                p.box(x + 6 * rank, 60 + 6 * rank, 72, 70, rank)
        else:
            p.cut(x, 70, 92 if dim == 1 else 84, 76, dim=dim if isinstance(dim, int) else None)
        p.text(x + 44, 48, label, "b")
        p.text(x + 44, 172, placed, "m")
    p.arrow(112, 106, 214, 106)
    p.arrow(322, 106, 426, 106)
    p.arrow(534, 106, 630, 106, hot=True)
    p.text(582, 96, "AllReduce", "hot b")
    p.cut(120, 196, 86, 44, dim=1, label="W₁ by columns: heads, features")
    p.cut(346, 190, 44, 56, dim=0, label="W₂ by rows")
    p.arrow(163, 192, 163, 112)
    p.arrow(368, 186, 368, 112)
    p.text(582, 214, "per layer: one after attention,", "s")
    p.text(582, 232, "one after the MLP", "s")
    return p


def attention(kind: str) -> Picture:
    """Self-attention where the sequence is shared: what each strategy moves."""
    titles = {
        "allgather": "AllGather-KV: every rank gathers all keys and values, and keeps its own queries",
        "ulysses": "Ulysses: an all-to-all from tokens to heads, attention, and back",
        "ring": "Ring: keys and values go round, and partial results are merged",
    }
    p = Picture(760, 300, titles[kind])
    {"allgather": _allgather, "ulysses": _ulysses, "ring": _ring}[kind](p)
    return p


def _allgather(p: Picture) -> None:
    p.text(90, 34, "q, k, v by tokens", "b")
    for i, name in enumerate("qkv"):
        p.cut(20 + 52 * i, 52, 40, 180, dim=0)
        p.text(40 + 52 * i, 250, name, "m")
    p.arrow(176, 142, 300, 142, hot=True)
    p.text(238, 128, "AllGather", "hot b")
    p.text(238, 164, "k, v", "hot m")
    p.text(410, 34, "rank 1 computes", "b")
    p.box(312, 97, 40, 45, 1)
    p.text(332, 250, "q", "m")
    p.text(374, 125, "attends to", "s", "start")
    for i, name in enumerate("kv"):
        p.cut(450 + 52 * i, 52, 40, 180, dim=0)
        p.text(470 + 52 * i, 250, name, "m")
    p.arrow(552, 142, 640, 142)
    p.text(690, 34, "o by tokens", "b")
    p.cut(668, 52, 40, 180, dim=0)
    p.text(380, 284, "sent by a rank: (n − 1)/n of all of k and v", "s")


def _ulysses(p: Picture) -> None:
    for x, title, dim in ((20, "by tokens", 0), (236, "by heads", 1), (462, "by heads", 1), (660, "by tokens", 0)):
        p.text(x + 42, 34, title, "b")
        p.cut(x, 52, 84, 170, dim=dim)
    p.text(62, 244, "q, k, v", "m")
    p.text(278, 244, "q, k, v", "m")
    p.text(504, 244, "o", "m")
    p.text(702, 244, "o", "m")
    p.arrow(110, 137, 230, 137, hot=True)
    p.text(170, 126, "AllToAll", "hot b")
    p.arrow(326, 137, 456, 137)
    p.text(391, 126, "attention", "s")
    p.text(391, 158, "whole sequence,", "s")
    p.text(391, 174, "h/n heads", "s")
    p.arrow(552, 137, 654, 137, hot=True)
    p.text(603, 126, "AllToAll", "hot b")
    p.text(380, 284, "sent by a rank: (n − 1)/n of its own q, k, v and o", "s")


def _ring(p: Picture) -> None:
    order = [(100, 70), (230, 70), (230, 200), (100, 200)]
    for rank, (x, y) in enumerate(order):
        p.box(x - 44, y - 26, 88, 52, rank)
        p.text(x, y - 4, f"rank {rank}", "b")
        p.text(x, y + 15, f"q{rank}, k{rank}, v{rank}", "m")
    p.arrow(148, 70, 182, 70, hot=True)
    p.arrow(230, 100, 230, 170, hot=True)
    p.arrow(182, 200, 148, 200, hot=True)
    p.arrow(100, 170, 100, 100, hot=True)
    p.text(165, 140, "Shift k, v", "hot b")
    p.text(540, 34, "rank 1, step by step", "b")
    for step in range(RANKS):
        x = 330 + 108 * step
        who = (1 - step) % RANKS
        p.text(x + 44, 62, f"step {step}", "s")
        p.box(x, 74, 38, 44, 1)
        p.text(x + 19, 101, "q1", "m")
        p.box(x + 46, 74, 42, 44, who)
        p.text(x + 67, 92, f"k{who}", "m")
        p.text(x + 67, 110, f"v{who}", "m")
        p.arrow(x + 44, 124, x + 44, 150)
        p.box(x + 4, 154, 80, 34, 1)
        p.text(x + 44, 176, "o, m, l", "m")
        if step:
            p.arrow(x - 22, 171, x + 2, 171)
    p.text(540, 222, "results of the steps are merged by their row maxima and sums;", "s")
    p.text(540, 240, "the next k and v travel while this step computes", "s")
    p.text(380, 284, "sent by a rank: n − 1 times its own k and v", "s")


def data_parallel() -> Picture:
    """The batch shared."""
    p = Picture(760, 220, "Data parallelism: every rank has some of the batch, and nothing is sent")
    p.text(70, 34, "batch", "b")
    p.cut(30, 52, 80, 130, dim=0)
    for rank in range(RANKS):
        y = 52 + 32.5 * rank
        p.arrow(112, y + 16, 240, y + 16)
        p.box(244, y + 2, 260, 28, rank)
        p.text(374, y + 21, "the whole model, all weights")
        p.arrow(506, y + 16, 634, y + 16)
    p.text(678, 34, "outputs", "b")
    p.cut(638, 52, 80, 130, dim=0)
    p.text(380, 206, "only outputs that are to be whole on every rank are gathered, at the very end", "s")
    return p


def mesh() -> Picture:
    """A mesh of two axes."""
    p = Picture(760, 270, "A mesh of two axes: cp = 2 and tp = 2")
    p.text(130, 34, "--cp 2 --tp 2", "m")
    for rank in range(RANKS):
        x, y = 60 + 90 * (rank % 2), 56 + 90 * (rank // 2)
        p.box(x, y, 64, 58, rank)
        p.text(x + 32, y + 34, f"rank {rank}")
    p.arrow(126, 78, 148, 78, hot=True)
    p.arrow(126, 168, 148, 168, hot=True)
    p.arrow(92, 116, 92, 144)
    p.arrow(182, 116, 182, 144)
    p.text(137, 252, "tp: neighbours, sends most", "hot s")
    p.text(137, 232, "cp: the other way", "s")
    p.text(400, 34, "inside a layer", "b")
    for rank in range(RANKS):
        p.box(310 + 90 * (rank % 2), 56 + 74 * (rank // 2), 88, 72, rank)
    p.text(400, 226, "tokens on cp, features on tp", "s")
    p.text(630, 34, "a weight", "b")
    for column in range(2):
        p.both(560 + 71 * column, 56, 68, 146, column, column + 2)
    p.text(630, 226, "columns on tp, whole on cp", "s")
    p.text(630, 244, "two ranks hold each half", "s")
    return p


PICTURES = {
    "way": way,
    "placements": placements,
    "product": product,
    "tensor-parallel": tensor_parallel,
    "allgather": lambda: attention("allgather"),
    "ulysses": lambda: attention("ulysses"),
    "ring": lambda: attention("ring"),
    "data-parallel": data_parallel,
    "mesh": mesh,
}


def main(folder: Path) -> None:
    """Write every picture to the folder."""
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
