"""Attention by the kernel of attention_text.py: what cuDNN does not take, and what is too small for it."""

from __future__ import annotations

from onnxmesh.runtime.cuda import raw
from onnxmesh.runtime.cuda.attention_text import INPUTS, OUTPUTS, PRELUDE, Attention
from onnxmesh.runtime.cuda.codegen.operand import Operand, Unsuited
from onnxmesh.runtime.cuda.device import import_cupy
from onnxmesh.runtime.cuda.launchers import Job, Launch, chain


def prepare(job: Job) -> Launch | None:
    """What launches an Attention or AttentionBlock; None for dtypes that are no floats or differ."""
    arrays = dict(zip((*INPUTS[: len(job.ins)], *OUTPUTS[: len(job.outs)]), (*job.ins, *job.outs)))
    try:
        operands = {name: Operand.of(x) for name, x in arrays.items() if x is not None}
        case = Attention(operands, job.attrs, job.kernel == "AttentionBlock")
        sources, nbytes = case.sources(_processors())
    except Unsuited:
        return None
    job.workspace.reserve(nbytes)
    ins = [arrays[name].data.ptr if arrays.get(name) is not None else 0 for name in INPUTS]
    outs: list[raw.Pointer] = [arrays[name].data.ptr if name in arrays else 0 for name in OUTPUTS[:3]]
    launches = [raw.bind(source, PRELUDE, ins, [*outs, (job.workspace, 0)]) for source in sources if source.grid]
    return chain(launches)


def _processors() -> int:
    device = import_cupy().cuda.Device()
    return int(device.attributes["MultiProcessorCount"])
