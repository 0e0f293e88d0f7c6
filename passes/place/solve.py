"""Choose one strategy for every class: the least predicted time, as an integer program (HiGHS through SciPy).

Variables: x[c, s], one-hot over the strategies of class c. For every edge and consumer, y[a, b] carries the value from
the producer's placement a to the consumer's b; its marginals equal both choices. A reshard is paid once for all
consumers, and there are two ways to serve them: directly, each placement once; or by gathering the tensor, after which
everybody slices it for nothing. Keeping the two apart makes the linear relaxation tighter than one inequality for both.

The relaxation is solved first. Its optimum bounds the answer from below, and a variable's reduced cost says how much
more than that any answer with this variable costs; so most variables are out before the integer program starts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array

from onnxmesh.compiler import cost
from onnxmesh.compiler.errors import CompilerDefect
from onnxmesh.compiler.ir.rule import Port, Strategy
from onnxmesh.passes.place.candidates import Space
from onnxmesh.passes.place.roles import Allowed
from onnxmesh.passes.place.tie import Edge
from onnxmesh.runtime.placement import Partial, Placement, R, Replicate, Shard

TIE_BREAK = 1e-3
"""Microseconds that make the simpler of two equal choices cheaper."""

NODE_LIMIT = 200
"""Branch-and-bound nodes. Nearly every graph is solved at the first; a count, unlike a time, is the same everywhere."""

FIRST_GAP, GROWTH = 0.0025, 2.0
"""How much worse than the relaxation the answer is assumed to be at first, as a part; and the factor if it is not."""

Terms = dict[int, float]


class _Program:
    """Rows and columns of an integer program while it is built."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.integral: list[int] = []
        self.rows: list[tuple[Terms, float, float]] = []

    def variable(self, price: float, *, integral: bool = False) -> int:
        self.costs.append(price)
        self.integral.append(int(integral))
        return len(self.costs) - 1

    def equal(self, terms: Terms, value: float = 0.0) -> None:
        self.rows.append((terms, value, value))

    def at_most_zero(self, terms: Terms) -> None:
        self.rows.append((terms, -np.inf, 0.0))

    def solve(self) -> np.ndarray:
        """The values of the variables at the least cost."""
        matrix, low, high = self._matrix(), *np.array([(low, high) for _, low, high in self.rows]).T
        bound, reduced = self._relaxed(matrix, low, high)
        gap = FIRST_GAP * abs(bound) + TIE_BREAK
        while True:
            kept = np.flatnonzero(reduced <= gap)
            result = self._integer(matrix[:, kept], low, high, kept)
            best = np.inf if result.x is None else result.fun - bound
            if best <= gap or len(kept) == len(reduced):
                break
            gap = best if best < np.inf else GROWTH * gap
        if result.x is None:
            raise CompilerDefect(f"no placement found: {result.message}")
        values = np.zeros(len(self.costs))
        values[kept] = result.x
        return values

    def _matrix(self) -> csr_array:
        data, rows, columns = [], [], []
        for i, (terms, _, _) in enumerate(self.rows):
            for column, factor in terms.items():
                rows.append(i)
                columns.append(column)
                data.append(factor)
        return csr_array((data, (rows, columns)), shape=(len(self.rows), len(self.costs)))

    def _relaxed(self, matrix: csr_array, low: np.ndarray, high: np.ndarray) -> tuple[float, np.ndarray]:
        """The optimum of the linear relaxation, and the reduced cost of every variable."""
        equal = low == high
        found = linprog(
            self.costs, A_eq=matrix[equal], b_eq=high[equal], A_ub=matrix[~equal], b_ub=high[~equal], bounds=(0, 1),
            method="highs-ds",
        )  # fmt: skip
        if found.x is None:
            raise CompilerDefect(f"no placement found: {found.message}")
        return float(found.fun), np.asarray(found.lower.marginals)

    def _integer(self, matrix: csr_array, low: np.ndarray, high: np.ndarray, kept: np.ndarray) -> OptimizeResult:
        """The integer program with only the variables `kept`; the others are 0."""
        return milp(
            np.array(self.costs)[kept],
            integrality=np.array(self.integral)[kept],
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": 1e-6, "node_limit": NODE_LIMIT},
        )


def solve(space: Space, allowed: Allowed, *, shard_outputs: bool) -> list[Strategy]:
    """The chosen strategy of every class."""
    program = _Program()
    choice = [_choices(program, space, index, options) for index, options in enumerate(allowed.strategies)]
    for edge in space.quotient.edges:
        _transport(program, space, edge, allowed, choice, shard_outputs)
    if not program.costs:
        return []
    values = program.solve()
    return [
        options[max(range(len(options)), key=lambda i: values[columns[i]])]
        for options, columns in zip(allowed.strategies, choice)
    ]


def _choices(program: _Program, space: Space, index: int, options: list[Strategy]) -> list[int]:
    cls = space.quotient.classes[index]
    columns = []
    for strategy in options:
        price = cost.computation(cls.view, strategy) + TIE_BREAK * _complexity(strategy)
        columns.append(program.variable(price * len(cls.nodes), integral=True))
    program.equal(dict.fromkeys(columns, 1.0), 1.0)
    return columns


def _complexity(strategy: Strategy) -> float:
    """Fewer segments first, outer dims last of equals, plain ops before expansions."""
    shards = [p for p in strategy.ins + strategy.outs if isinstance(p, Shard)]
    segments = sum(len(p.segments) + 0.1 * p.has_copies for p in shards)
    return segments / max(1, len(shards)) + 0.1 * bool(strategy.expand)


def _transport(
    program: _Program,
    space: Space,
    edge: Edge,
    allowed: Allowed,
    choice: list[list[int]],
    shard_outputs: bool,
) -> None:
    """Link the producer's placement of an edge with those of its consumers."""
    made = _made(edge, allowed, choice)
    users = [_by_placement(allowed.strategies[owner], choice[owner], port) for owner, port in edge.consumers]
    if edge.is_output:
        users.append(_output_placements(program, made, shard_outputs))
    if not users or (list(made) == [R] and all(list(user) == [R] for user in users)):
        return
    size, ranks, count = cost.nbytes(edge.shape, edge.dtype), space.quotient.ranks, len(edge.values)

    def price(a: Placement, b: Placement) -> float:
        return count * cost.reshard(size, a, b, ranks)

    arriving: list[dict[Placement, Terms]] = [defaultdict(dict) for _ in users]
    for a, columns in made.items():
        ways = [program.variable(0.0)]
        _directly(program, a, ways[0], users, arriving, price)
        if not isinstance(a, Replicate) and len(users) > 1:
            ways.append(program.variable(price(a, R)))
            _gathered(program, a, ways[1], users, arriving, price)
        # a graph input has no choice: all of it is there, on every rank
        program.equal(dict.fromkeys(ways, 1.0) | dict.fromkeys(columns, -1.0), 0.0 if edge.producer else 1.0)
    for user, terms in zip(users, arriving):
        for b, columns in user.items():
            program.equal(terms[b] | dict.fromkeys(columns, -1.0))


Price = Callable[[Placement, Placement], float]
Users = list[dict[Placement, list[int]]]


def _directly(
    program: _Program, a: Placement, way: int, users: Users, arriving: list[dict[Placement, Terms]], price: Price
) -> None:
    """Every placement that some consumer wants is made from `a`, once for all consumers."""
    paid: dict[Placement, int] = {}
    for user, terms in zip(users, arriving):
        leaving: Terms = {}
        for b in user:
            cost_of = price(a, b)
            if cost_of == cost.INFINITE or (len(users) > 1 and b == R != a):
                continue  # where one consumer wants it whole, all of them gather (below)
            shared = len(users) > 1 and not isinstance(a, Replicate) and a != b
            y = program.variable(0.0 if shared else cost_of)
            leaving[y] = terms[b][y] = 1.0
            if shared:
                if b not in paid:
                    paid[b] = program.variable(cost_of)
                program.at_most_zero({y: 1.0, paid[b]: -1.0})
        program.equal(leaving | {way: -1.0})


def _gathered(
    program: _Program, a: Placement, way: int, users: Users, arriving: list[dict[Placement, Terms]], price: Price
) -> None:
    """The whole tensor is made first; every consumer slices what it wants for nothing."""
    for user, terms in zip(users, arriving):
        leaving: Terms = {}
        for b in user:
            if not isinstance(b, Partial):
                y = program.variable(price(R, b))
                leaving[y] = terms[b][y] = 1.0
        program.equal(leaving | {way: -1.0})


def _made(edge: Edge, allowed: Allowed, choice: list[list[int]]) -> dict[Placement, list[int]]:
    if edge.producer is None:
        return {R: []}
    owner, port = edge.producer
    return _by_placement(allowed.strategies[owner], choice[owner], port)


def _by_placement(options: list[Strategy], columns: list[int], port: Port) -> dict[Placement, list[int]]:
    result: dict[Placement, list[int]] = defaultdict(list)
    for strategy, column in zip(options, columns):
        result[strategy.at(port)].append(column)
    return dict(result)


def _output_placements(
    program: _Program, made: dict[Placement, list[int]], shard_outputs: bool
) -> dict[Placement, list[int]]:
    """A graph output is whole on every rank; or, by request, whatever is cheapest but not Partial."""
    wanted: list[Placement] = [R, *(p for p in made if isinstance(p, Shard))] if shard_outputs else [R]
    columns: dict[Placement, list[int]] = {p: [program.variable(0.0)] for p in wanted}
    program.equal({c[0]: 1.0 for c in columns.values()}, 1.0)
    return columns
