"""Recurrent layers: RNN, LSTM and GRU.

The products with the inputs are made for all steps at once; a step then costs one product with the state. A sequence
that is shorter than the others keeps its state over the steps that it lacks, so in either direction its own steps
count alone, and its outputs there are 0; one without any step ends in zeros, as in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from onnxmesh.runtime.kernels.numeric import rounded, wide
from onnxmesh.runtime.kernels.registry import Array, Call, kernel

Function = Callable[[Array], Array]
States = tuple[Array, ...]
"""The hidden state [b, h], and the cell of an LSTM."""
Step = Callable[[Array, States], States]
"""The states after a step, from what the input gives to its gates [b, gates * h] and the states before."""


@kernel("RNN")
def rnn(
    call: Call,
    x: Array,
    w: Array,
    r: Array,
    bias: Array | None = None,
    lengths: Array | None = None,
    initial_h: Array | None = None,
) -> tuple[Array, ...]:
    """h = f(W x + R h + biases).

    x [s, b, i], w [d, h, i], r [d, h, h], bias [d, 2h], lengths [b], initial_h [d, b, h] for d directions
    -> all hidden states [s, d, b, h] and the last [d, b, h]; with `layout` 1 the batch comes first.
    """
    hidden, functions = r.shape[-1], _activations(call, ("Tanh",))

    def cell(direction: int, recurrent: Array, own: Array) -> Step:
        (f,) = functions[direction]
        return lambda given, states: (f(given + states[0] @ recurrent + own),)

    return _layer(call, x, w, r, bias, lengths, [initial_h], cell, hidden)


@kernel("GRU")
def gru(
    call: Call,
    x: Array,
    w: Array,
    r: Array,
    bias: Array | None = None,
    lengths: Array | None = None,
    initial_h: Array | None = None,
) -> tuple[Array, ...]:
    """z, r = f(...), n = g(...), h = (1 - z) n + z h (Cho et al., 2014); gates stand in the order z, r, n.

    Shapes as for RNN, with w [d, 3h, i], r [d, 3h, h], bias [d, 6h]. `linear_before_reset` applies the reset gate to
    the product with the state (cuDNN's form), not to the state.
    """
    hidden, functions = r.shape[-1], _activations(call, ("Sigmoid", "Tanh"))
    gates = 2 * hidden
    after = bool(call.attrs.get("linear_before_reset", 0))

    def cell(direction: int, recurrent: Array, own: Array) -> Step:
        f, g = functions[direction]
        of_gates, of_new = recurrent[:, :gates], recurrent[:, gates:]

        def step(given: Array, states: States) -> States:
            (state,) = states
            both = f(given[:, :gates] + state @ of_gates + own[:gates])
            update, reset = both[:, :hidden], both[:, hidden:]
            if after:
                recalled = reset * (state @ of_new + own[gates:])
            else:
                recalled = (reset * state) @ of_new + own[gates:]
            return ((1 - update) * g(given[:, gates:] + recalled) + update * state,)

        return step

    return _layer(call, x, w, r, bias, lengths, [initial_h], cell, hidden)


@kernel("LSTM")
def lstm(
    call: Call,
    x: Array,
    w: Array,
    r: Array,
    bias: Array | None = None,
    lengths: Array | None = None,
    initial_h: Array | None = None,
    initial_c: Array | None = None,
    peepholes: Array | None = None,
) -> tuple[Array, ...]:
    """c = f c + i n, h = o H(c) (Hochreiter and Schmidhuber, 1997); gates stand in the order i, o, f, n.

    Shapes as for RNN, with w [d, 4h, i], r [d, 4h, h], bias [d, 8h], initial_c [d, b, h], peepholes [d, 3h] from the
    cell to i, o, f. A third output is the last cell [d, b, h]. `input_forget` makes f = 1 - i. `clip` bounds what goes
    into the gates, not the cell that goes into H, as in ONNX Runtime.
    """
    xp, hidden, functions = call.xp, r.shape[-1], _activations(call, ("Sigmoid", "Tanh", "Tanh"))
    coupled = bool(call.attrs.get("input_forget", 0))
    if peepholes is None:
        peepholes = xp.zeros((r.shape[0], 3 * hidden), r.dtype)
    looks = wide(xp, peepholes)

    def cell(direction: int, recurrent: Array, own: Array) -> Step:
        f, g, h = functions[direction]
        look_i, look_o, look_f = (looks[direction, k * hidden : (k + 1) * hidden] for k in range(3))

        def step(given: Array, states: States) -> States:
            state, memory = states
            gates = given + state @ recurrent + own
            i, o, forget, new = (gates[:, k * hidden : (k + 1) * hidden] for k in range(4))
            take = f(i + look_i * memory)
            keep = 1 - take if coupled else f(forget + look_f * memory)
            memory = keep * memory + take * g(new)
            return f(o + look_o * memory) * h(memory), memory

        return step

    return _layer(call, x, w, r, bias, lengths, [initial_h, initial_c], cell, hidden)


def _layer(
    call: Call,
    x: Array,
    w: Array,
    r: Array,
    bias: Array | None,
    lengths: Array | None,
    initial: Sequence[Array | None],
    cell: Callable[[int, Array, Array], Step],
    hidden: int,
) -> tuple[Array, ...]:
    """Run a layer in each of its directions; `cell` makes the step of one, of R^T [h, gates * h] and its bias."""
    xp, batch_first = call.xp, call.attrs.get("layout", 0) == 1
    x, w, r = wide(xp, x), wide(xp, w), wide(xp, r)
    x = x.swapaxes(0, 1) if batch_first else x
    steps, batch, _ = x.shape
    directions, width = w.shape[:2]
    biases = xp.zeros((directions, 2 * width), x.dtype) if bias is None else wide(xp, bias)
    alive = None if lengths is None else xp.arange(steps)[:, None, None] < lengths[None, :, None]
    outputs = xp.zeros((steps, directions, batch, hidden), x.dtype)
    last = [xp.zeros((directions, batch, hidden), x.dtype) for _ in initial]
    for d in range(directions):
        given = x @ w[d].T + biases[d, :width]
        step = cell(d, r[d].T, biases[d, width:])
        states = tuple(_first(xp, state, d, batch_first, whole[d]) for state, whole in zip(initial, last))
        for t in _order(call, d, steps):
            after = step(given[t], states)
            outputs[t, d] = after[0] if alive is None else xp.where(alive[t], after[0], 0)
            states = after if alive is None else tuple(xp.where(alive[t], a, b) for a, b in zip(after, states))
        for whole, state in zip(last, states):
            whole[d] = state if alive is None else xp.where(alive[0], state, 0)
    if batch_first:
        outputs, last = outputs.transpose(2, 0, 1, 3), [state.swapaxes(0, 1) for state in last]
    return tuple(rounded(call, value, i) for i, value in enumerate([outputs, *last][: len(call.outs)]))


def _first(xp: Any, state: Array | None, direction: int, batch_first: bool, zeros: Array) -> Array:
    """The state [b, h] that a direction starts from."""
    if state is None:
        return zeros
    return wide(xp, state[:, direction] if batch_first else state[direction])


def _order(call: Call, direction: int, steps: int) -> range:
    """The steps of a direction, in the order in which they run."""
    backwards = direction == 1 or call.attrs.get("direction", "forward") == "reverse"
    return range(steps - 1, -1, -1) if backwards else range(steps)


# --- activations --------------------------------------------------------------------------------------------

MEMORY = 2
"""Which function of an LSTM the cell goes into."""

_PARAMETERS: dict[str, dict[str, float]] = {
    "affine": {"alpha": 1.0, "beta": 0.0},
    "elu": {"alpha": 1.0},
    "hardsigmoid": {"alpha": 0.2, "beta": 0.5},
    "leakyrelu": {"alpha": 0.01},
    "scaledtanh": {"alpha": 1.0, "beta": 1.0},
    "thresholdedrelu": {"alpha": 1.0},
}
"""What an activation has besides its input, with the default of the op of that name."""

_FORMULAS: dict[str, Callable[..., Array]] = {
    "affine": lambda xp, x, alpha, beta: alpha * x + beta,
    "elu": lambda xp, x, alpha: xp.where(x < 0, alpha * xp.expm1(xp.minimum(x, 0)), x),
    "hardsigmoid": lambda xp, x, alpha, beta: xp.clip(alpha * x + beta, 0, 1),
    "leakyrelu": lambda xp, x, alpha: xp.where(x < 0, alpha * x, x),
    "relu": lambda xp, x: xp.maximum(x, 0),
    "scaledtanh": lambda xp, x, alpha, beta: alpha * xp.tanh(beta * x),
    "sigmoid": lambda xp, x: 0.5 * xp.tanh(0.5 * x) + 0.5,
    "softplus": lambda xp, x: xp.logaddexp(x, xp.zeros((), x.dtype)),
    "softsign": lambda xp, x: x / (1 + xp.abs(x)),
    "tanh": lambda xp, x: xp.tanh(x),
    "thresholdedrelu": lambda xp, x, alpha: xp.where(x < alpha, 0, x),
}


def _activations(call: Call, defaults: Sequence[str]) -> list[list[Function]]:
    """The functions of each direction: `activations`, by name, each taking its alpha and beta in turn."""
    directions = 2 if call.attrs.get("direction", "forward") == "bidirectional" else 1
    names = [str(name).lower() for name in call.attrs.get("activations") or [*defaults] * directions]
    given = {name: list(call.attrs.get(f"activation_{name}") or ()) for name in ("alpha", "beta")}
    functions = []
    for i, name in enumerate(names):
        parameters = dict(_PARAMETERS.get(name, {}))
        for key in parameters:
            if given[key]:
                parameters[key] = given[key].pop(0)
        functions.append(_function(call, name, parameters, clipped=i % len(defaults) < MEMORY))
    return [functions[i : i + len(defaults)] for i in range(0, len(functions), len(defaults))]


def _function(call: Call, name: str, parameters: dict[str, float], *, clipped: bool) -> Function:
    xp, formula, bound = call.xp, _FORMULAS[name], call.attrs.get("clip", 0.0) if clipped else 0.0

    def function(x: Array) -> Array:
        return formula(xp, xp.clip(x, -bound, bound) if bound else x, **parameters)

    return function
