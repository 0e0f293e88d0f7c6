"""One rank of a job (see jobs.py): runs plans, or checks collectives; rank 0 writes what came of each entry."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
from shares import fixtures  # noqa: E402

from onnxmesh.runtime.cuda.engine import CudaEngine  # noqa: E402
from onnxmesh.runtime.dtypes import is_narrow  # noqa: E402
from onnxmesh.runtime.launch import weights_source  # noqa: E402
from onnxmesh.runtime.mesh import Mesh  # noqa: E402
from onnxmesh.runtime.nccl import NcclCommunicator, NcclGroups  # noqa: E402
from onnxmesh.runtime.rendezvous import World, find_place  # noqa: E402
from onnxmesh.runtime.serialize import load  # noqa: E402
from onnxmesh.runtime.session import Session  # noqa: E402

SEEDS = (0, 1, 0, 1)
"""The inputs of the runs: the first run launches, the second captures, the others replay."""


def main(job: dict[str, Any]) -> int:
    """Work through the entries; 3 if one failed and the ranks must be started anew."""
    with World(find_place(), timeout=20) as world:
        groups = NcclGroups(world)
        for entry in job["entries"]:
            path = Path(job["out"]) / f"{entry['key']}.json"
            try:
                result = KINDS[job["kind"]](entry, groups, path)
            except Exception as error:
                print(entry["key"], "".join(traceback.format_exception(error)), flush=True)
                if world.rank == 0:
                    path.write_text(json.dumps({"error": "".join(traceback.format_exception(error))[-3000:]}))
                if world.size > 1:
                    os._exit(3)
                continue
            if world.rank == 0:
                path.write_text(json.dumps(result))
        world.allgather("done")
        groups.close()
    return 0


def run_plan(entry: dict[str, Any], groups: NcclGroups, path: Path) -> dict[str, Any]:
    """Run a plan once for each seed; the outputs of the last run of each go to a file beside."""
    plan = load(entry["plan"])
    communicator = NcclCommunicator(plan.mesh, groups=groups)
    weights = weights_source(fixtures.load(entry["name"]).path)
    start = time.perf_counter()
    with Session(plan, "cuda", weights=weights, communicator=communicator) as session:
        ready = time.perf_counter() - start
        outputs, result = _run_all(entry, session)
        (engine,) = session._engines.values()
        assert isinstance(engine, CudaEngine)
        how = {"captured": engine.captured, "reason": "; ".join(engine.not_captured), "generic": engine.generic}
    if communicator.rank == 0:
        return {**result, **how, "ready": ready, "file": _keep(outputs, path)}
    return {}


def run_on_host(entry: dict[str, Any], groups: NcclGroups, path: Path) -> dict[str, Any]:
    """The same with all ranks as threads of this process, without a GPU."""
    weights = weights_source(fixtures.load(entry["name"]).path)
    with Session(load(entry["plan"]), weights=weights) as session:
        outputs, result = _run_all(entry, session)
    return {**result, "captured": False, "reason": "no GPU", "generic": [], "ready": 0.0, "file": _keep(outputs, path)}


def _run_all(entry: dict[str, Any], session: Session) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The outputs by `seed/name`; the seconds of runs, and how many outputs differed from those of a run before."""
    feeds = [fixtures.load(entry["name"]).make_inputs(seed) for seed in (0, 1)]
    names = [port.name for port in session.get_outputs()]
    seconds: list[float] = []
    outputs: dict[str, np.ndarray] = {}
    differing = 0
    for seed in SEEDS:
        start = time.perf_counter()
        got = session.run(None, feeds[seed])
        seconds.append(time.perf_counter() - start)
        for key, output in zip((f"{seed}/{name}" for name in names), got):
            differing += key in outputs and outputs[key].tobytes() != output.tobytes()
            outputs[key] = output
    return outputs, {"first": seconds[0], "again": float(np.median(seconds[2:])), "differing": differing}


def _keep(outputs: dict[str, np.ndarray], path: Path) -> str:
    """Write the outputs, in float32 where they are narrower; where to."""
    file = path.with_suffix(".npz")
    np.savez(file, **{key: x.astype(np.float32) if is_narrow(x.dtype) else x for key, x in outputs.items()})
    return str(file)


def check_collectives(entry: dict[str, Any], groups: NcclGroups, path: Path) -> dict[str, Any]:
    """Every collective, dtype and reduction over one axis of a mesh: launched, and in a CUDA graph."""
    from collectives import check_all
    from prepared import check_prepared

    communicator = NcclCommunicator(Mesh.of(**entry["mesh"]), groups=groups)
    wrong, count = check_all(communicator, entry["axis"])
    if communicator.mesh.axis_size(entry["axis"]) == communicator.mesh.size > 1:
        more, further = check_prepared(communicator, entry["axis"])
        wrong, count = wrong + more, count + further
    everyone = groups.world.allgather([wrong, count])
    return {"wrong": sorted({text for texts, _ in everyone for text in texts}), "count": count}


KINDS = {"plans": run_plan, "host": run_on_host, "collectives": check_collectives}

if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
