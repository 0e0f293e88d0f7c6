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
from onnxmesh.runtime.launch import weights_source  # noqa: E402
from onnxmesh.runtime.mesh import Mesh  # noqa: E402
from onnxmesh.runtime.nccl import NcclCommunicator, NcclGroups  # noqa: E402
from onnxmesh.runtime.rendezvous import World, find_place  # noqa: E402
from onnxmesh.runtime.serialize import load  # noqa: E402
from onnxmesh.runtime.session import Session  # noqa: E402

SEEDS = (0, 1, 0, 1, 0, 1)
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
    fixture, plan = fixtures.load(entry["name"]), load(entry["plan"])
    feeds = [fixture.make_inputs(seed) for seed in (0, 1)]
    communicator = NcclCommunicator(plan.mesh, groups=groups)
    weights = weights_source(fixture.path)
    seconds, outputs, differing = [], {}, 0.0
    with Session(plan, "cuda", weights=weights, communicator=communicator) as session:
        names = [port.name for port in session.get_outputs()]
        for seed in SEEDS:
            start = time.perf_counter()
            got = dict(zip(names, session.run(None, feeds[seed])))
            seconds.append(time.perf_counter() - start)
            for name in names:
                before = outputs.get((seed, name))
                differing += before is not None and before.tobytes() != got[name].tobytes()
                outputs[seed, name] = got[name]
        (engine,) = session._engines.values()
        assert isinstance(engine, CudaEngine)
        captured, reason, generic = engine.captured, "; ".join(engine.not_captured), engine.generic
    if communicator.rank == 0:
        raw = {f"{seed}/{name}": x.view(np.uint8) if x.ndim else x for (seed, name), x in outputs.items()}
        kinds = {f"{seed}/{name}": x.dtype.name for (seed, name), x in outputs.items()}
        np.savez(path.with_suffix(".npz"), **raw)
        return {
            **{"captured": captured, "reason": reason, "first": seconds[0], "again": float(np.median(seconds[2:]))},
            **{"kinds": kinds, "differing": int(differing), "generic": generic},
        }
    return {}


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


KINDS = {"plans": run_plan, "collectives": check_collectives}

if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
