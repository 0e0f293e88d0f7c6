"""Bind the dynamic dims of the inputs, then walk the graph once: fold constants and give every value its type.

With all inputs static every shape computation is a constant, so one walk in topological order folds it away and
types the rest. Ops of other domains that have a meaning in ONNX ops are expanded on the way. Values whose shape stays
unknown, or that are no tensors of numbers, are set apart in the end, as loose values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxmesh.compiler.errors import ModelError
from onnxmesh.passes.bind.apart import reads_loose, set_apart, strings_as_nodes
from onnxmesh.passes.bind.control import bind_control, is_control
from onnxmesh.passes.bind.grid import gather_in_order
from onnxmesh.passes.bind.scalars import take_scalars
from onnxmesh.passes.bind.sequences import take_apart
from onnxmesh.passes.bind.values import Arrays, bind_values
from onnxmesh.passes.graph.build import Builder
from onnxmesh.passes.graph.fold import fold, inline_if
from onnxmesh.passes.graph.infer import infer, label
from onnxmesh.passes.normalise.expansions import expansion_of


def bind(
    model: ir.Model,
    shapes: Mapping[str, Sequence[int]],
    dims: Mapping[str, int],
    values: Arrays | None = None,
) -> ir.Model:
    """Bind input shapes (`shapes` by input, `dims` by the dim's name) and infer every type, in place.

    Inputs that `values` names become constants (see passes/bind/values.py).

    Raises:
        ModelError: a binding is unknown or contradicts the model; a dim of an input stays unknown; the inputs of a
            node do not fit it.
    """
    values = values or {}
    bind_inputs(model.graph, {**{name: array.shape for name, array in values.items()}, **shapes}, dims)
    bind_values(model.graph, values)
    propagate(model.graph)
    return model


# --- the inputs ---------------------------------------------------------------------------------------------


def bind_inputs(graph: ir.Graph, shapes: Mapping[str, Sequence[int]], dims: Mapping[str, int]) -> None:
    """Give every graph input that is a tensor of numbers a static shape.

    Raises:
        ModelError: as `bind`.
    """
    inputs = {v.name or "": v for v in graph.inputs}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ModelError(
                f"the model has no input '{name}'", hint=f"its inputs are {_listed(inputs)}", code="OM1201"
            )
        if any(size < 0 for size in shape):
            raise ModelError(f"the shape {list(shape)} of input '{name}' has a negative dim", code="OM1206")
    sizes = _bind_names(inputs, shapes, dims)
    for name, value in inputs.items():
        if not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
            continue
        value.shape = ir.Shape(_bound(value, shapes.get(name), sizes))


def _bind_names(
    inputs: Mapping[str, ir.Value], shapes: Mapping[str, Sequence[int]], dims: Mapping[str, int]
) -> dict[str, int]:
    """The size of every named dim, from `dims` and from the shapes of the inputs that have it."""
    known = {symbol for value in inputs.values() for symbol in _symbols(value)}
    for symbol, size in dims.items():
        if symbol not in known:
            has = f"its dims are {_listed(known)}" if known else "all its input dims are static"
            raise ModelError(f"no input of the model has a dim '{symbol}'", hint=has, code="OM1202")
        if size < 0:
            raise ModelError(f"the dim '{symbol}' cannot be {size}", code="OM1206")
    sizes = dict(dims)
    source = {symbol: f"--dim {symbol}={size}" for symbol, size in dims.items()}
    for name, shape in shapes.items():
        for dim, size in zip(_dims(inputs[name], len(shape)), shape):
            named = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if named is None or named not in known:
                continue
            if sizes.setdefault(named, size) != size:
                raise ModelError(
                    f"the dim '{named}' of input '{name}' is {size} in its shape, but {source[named]} "
                    f"says {sizes[named]}",
                    hint=f"give '{named}' one size",
                    code="OM1205",
                )
            source.setdefault(named, f"the shape of input '{name}'")
    return sizes


def _dims(value: ir.Value, rank: int) -> Sequence[int | ir.SymbolicDim]:
    """The dims of an input, to which a shape of `rank` dims is given."""
    if value.shape is None:
        return [ir.SymbolicDim(None)] * rank
    if len(value.shape) != rank:
        raise ModelError(
            f"input '{value.name}' has {len(value.shape)} dims, {_text(value)}, but its shape is given with {rank}",
            hint=f"for example {_option(value)}",
            code="OM1205",
        )
    return value.shape.dims


def _bound(value: ir.Value, shape: Sequence[int] | None, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The static shape of an input."""
    if value.shape is None and shape is None:
        raise ModelError(
            f"input '{value.name}' has no shape in the model",
            hint=f"give it, e.g. --shape {value.name}=1x16",
            code="OM1204",
        )
    dims = value.shape.dims if value.shape is not None else _dims(value, len(shape or ()))
    return tuple(_size(value, axis, dim, shape, sizes) for axis, dim in enumerate(dims))


def _size(
    value: ir.Value, axis: int, dim: int | ir.SymbolicDim, shape: Sequence[int] | None, sizes: Mapping[str, int]
) -> int:
    given = None if shape is None else shape[axis]
    known = dim if isinstance(dim, int) else _evaluate(dim, sizes)
    if known is None and given is None:
        raise _unbound(value, axis, dim)
    if known is None or given is None:
        return int(known if given is None else given)  # type: ignore[arg-type]  # one of the two is known
    if known != given:
        raise ModelError(
            f"dim {axis} of input '{value.name}' is {known} in the model, but {given} in its given shape "
            f"{'x'.join(map(str, shape or ()))}",
            hint=f"the model says {_text(value)}",
            code="OM1205",
        )
    return known


def _evaluate(dim: ir.SymbolicDim | int, sizes: Mapping[str, int]) -> int | None:
    """The size of a dim: a name, or an expression over names such as `past + seq`."""
    if isinstance(dim, int):
        return dim
    if dim.value is None or dim.value in sizes:
        return None if dim.value is None else sizes[dim.value]
    try:
        result = dim.evaluate({name: size for name, size in sizes.items() if name in dim.free_symbols()})
    except (ValueError, TypeError, ArithmeticError):
        return None
    return int(result) if isinstance(result, int) else None


def _symbols(value: ir.Value) -> set[str]:
    """The names in the shape of an input: whole dims, and the names inside an expression."""
    names: set[str] = set()
    for dim in value.shape.dims if value.shape is not None else ():
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            names |= _free(dim) | {dim.value}
    return names


def _free(dim: ir.SymbolicDim) -> set[str]:
    try:
        return {str(s) for s in dim.free_symbols()}
    except (ValueError, TypeError):
        return set()


def _unbound(value: ir.Value, axis: int, dim: ir.SymbolicDim | int) -> ModelError:
    symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
    names = sorted(_free(dim) or {symbol}) if isinstance(dim, ir.SymbolicDim) and symbol else []
    named = f"'{symbol}'" if symbol else "without a name"
    options = [" ".join(f"--dim {n}=..." for n in names)] if names else []
    options.append(_option(value))
    return ModelError(
        f"dim {axis} ({named}) of input '{value.name}' {_text(value)} has no size",
        hint=f"give {' or '.join(options)}",
        code="OM1203",
    )


def _option(value: ir.Value) -> str:
    """A `--shape` option that would bind the input."""
    dims = value.shape.dims if value.shape is not None else ()
    sizes = [str(d) if isinstance(d, int) else ("1" if axis == 0 else "16") for axis, d in enumerate(dims)]
    return f"--shape {value.name}={'x'.join(sizes)}"


def _text(value: ir.Value) -> str:
    dims = value.shape.dims if value.shape is not None else ()
    return "[" + ", ".join(str(d) if isinstance(d, int) else (d.value or "?") for d in dims) + "]"


def _listed(names: Sequence[str] | Mapping[str, object] | set[str]) -> str:
    return ", ".join(f"'{n}'" for n in sorted(names)) or "none"


# --- the walk -----------------------------------------------------------------------------------------------


def propagate(graph: ir.Graph) -> None:
    """Fold constants and infer types, then set apart what is loose; nodes must be in topological order.

    Raises:
        ModelError: a type cannot be inferred, the inputs of a node do not fit it, or nothing computes it.
    """
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
            value.type = ir.TensorType(value.const_value.dtype)
    strings_as_nodes(graph)
    for node in graph:
        if not _rewrite(graph, node):
            if is_control(node):
                bind_control(graph, node, propagate)
            else:
                infer(node, graph.opset_imports)
            _require_types(node)
    set_apart(graph)


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace a node by others, or by constants, where it can be; says whether it did."""
    if reads_loose(node):
        return inline_if(graph, node) or take_apart(graph, node)
    expansion = expansion_of(node)
    if expansion is not None:
        expansion(node, Builder(graph, node))
        return True
    return any(rewrite(graph, node) for rewrite in (inline_if, take_apart, take_scalars, fold, gather_in_order))


def _require_types(node: ir.Node) -> None:
    for output in node.outputs:
        if (output.name or output.uses()) and (output.type is None or output.dtype is None):
            raise ModelError(
                f"no type can be inferred for '{output.name}', made by {label(node)}",
                hint="an op of a custom domain needs a type and a static shape in the file's value_info",
                code="OM1209",
            )
