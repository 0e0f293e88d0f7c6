"""What a host has for running plans, what is missing and what that costs, and how fast its links are.

The result is JSON data (docs/profile.md); runtime/doctor_text.py prints it. Nothing here needs a GPU, or CuPy.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from onnxmesh.runtime import nvml, profile_fit
from onnxmesh.runtime.errors import RunError
from onnxmesh.runtime.rendezvous import StoreServer

FORMAT = 1
Json = dict[str, Any]

_EXTRA = "pip install 'onnxmesh[cuda13]', or [cuda12] where the driver is older than 580"
_LIBRARIES = (
    ("CuPy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "no plan runs on a GPU", _EXTRA),
    (
        "NCCL",
        ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
        "plans of more than one rank do not run on GPUs, unless the system has it",
        _EXTRA,
    ),
    (
        "cuBLASLt bindings",
        ("nvmath-python",),
        "products have no epilogue and are in no CUDA graph: every kernel is started from Python, 10 to 30 us each",
        _EXTRA,
    ),
    (
        "cuDNN",
        ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
        "attention is two products and a softmax: about 3 times slower, and all scores lie in memory",
        _EXTRA,
    ),
    (
        "cuDNN frontend",
        ("nvidia-cudnn-frontend",),
        "attention is two products and a softmax: about 3 times slower, and all scores lie in memory",
        "pip install nvidia-cudnn-frontend",
    ),
    ("CUDA bindings", ("cuda-bindings",), "bench times short kernels too long", _EXTRA),
    ("NVRTC", ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"), "no kernel is compiled, unless CUDA is there", _EXTRA),
    ("mpi4py", ("mpi4py",), "CPU ranks are threads of one process: no ranks on several hosts",
     "pip install 'onnxmesh[mpi]'"),
)  # fmt: skip
"""(name, distributions, what it costs where all of them are missing, how to get one)."""

_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "the GPUs that may be seen",
    "CUDA_LAUNCH_BLOCKING": "every launch waits for its kernel: far slower",
    "NCCL_NVLS_ENABLE": "0: no NVLink multicast; large all-reduces are slower, on hosts where it works",
    "NCCL_P2P_DISABLE": "1: GPUs send through the host's memory, many times slower",
    "NCCL_SHM_DISABLE": "1: what cannot go from GPU to GPU goes over the network",
    "NCCL_IB_DISABLE": "1: hosts are linked by sockets only",
    "NCCL_SOCKET_IFNAME": "the network that hosts meet over",
    "NCCL_ALGO": "the algorithms that NCCL may use",
    "NCCL_PROTO": "the protocols that NCCL may use",
    "NCCL_DEBUG": "what NCCL prints",
    "ONNXMESH_CACHE": "where tuned choices are kept",
    "ONNXMESH_PROFILE": "the device profile that plans are compiled for",
    "ONNXMESH_TUNE": "0: the first algorithm is taken, not the fastest",
    "ONNXMESH_NO_CUDNN": "attention without cuDNN",
    "ONNXMESH_NO_CUBLASLT": "products without cuBLASLt",
    "ONNXMESH_PEER": "0: collectives go through NCCL alone",
    "ONNXMESH_TF32": "products of float32 in TF32: faster, and only 10 bits of mantissa",
    "CUPY_CACHE_DIR": "where compiled kernels are kept",
    "OMP_NUM_THREADS": "threads of the CPU's products",
}
_MEASURE = ("-m", "onnxmesh.runtime.cuda.measure")
_SECONDS = {"check": 180.0, "profile": 1200.0}
"""How long a measurement may take."""


def examine(*, measure: bool = True, profile: str | None = None) -> Json:
    """Everything as JSON data.

    Args:
        measure: time the collectives over all GPUs, if there are two or more.
        profile: also measure a device profile, and write it to this file.

    Raises:
        RunError: a profile was asked for and there is no GPU, or a measurement failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's, of what is told here anyway
        gpus, reason = _gpus()
    if profile is not None and not gpus:
        raise RunError(f"a device profile is measured on a GPU, and there is none: {reason}", code="OM5202")
    found: Json = {
        "format": FORMAT,
        "host": _host(),
        "driver": nvml.driver_version(),
        "cuda": _cuda(),
        "gpus": gpus,
        "no_gpu": reason,
        "links": list(_links(gpus)),
        "libraries": [_library(*entry) for entry in _LIBRARIES],
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
        "notes": {name: note for name, note in _VARIABLES.items() if name in os.environ},
        "cache": _cache(),
        "collectives": [],
        "seconds": None,
        "profile": None,
    }
    if measure and gpus and (len(gpus) > 1 or profile is not None):
        start = time.monotonic()
        rows = _measured("check" if profile is None else "profile", len(gpus))
        found["collectives"] = rows["collectives"]
        found["seconds"] = round(time.monotonic() - start, 1)
        if profile is not None:
            _write_profile(profile, rows, found)
            found["profile"] = profile
    found["problems"] = list(_problems(found))
    return found


# --- what there is --------------------------------------------------------------------------------------------


def _host() -> Json:
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxmesh": _version("onnxmesh"),
        "numpy": np.__version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "blas": _blas(),
        "mpirun": shutil.which("mpirun") or shutil.which("mpiexec"),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _blas() -> str | None:
    with suppress(Exception):  # NumPy's build description is no stable interface
        config: Any = np.show_config(mode="dicts")
        blas = config["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    return None


def _gpus() -> tuple[list[Json], str]:
    """The GPUs that this process sees; or none, and why."""
    from onnxmesh.runtime.cuda.device import device_count, import_cupy

    try:
        count, cupy = device_count(), import_cupy()
    except RunError as error:
        return [], str(error.args[0])
    return [_gpu(cupy, index) for index in range(count)], "" if count else "no GPU is visible"


def _gpu(cupy: Any, index: int) -> Json:
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    name, bus = properties["name"], cupy.cuda.runtime.deviceGetPCIBusId(index)
    return {
        "index": index,
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "memory_bytes": int(properties["totalGlobalMem"]),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "processors": int(properties["multiProcessorCount"]),
        "bus": bus.decode() if isinstance(bus, bytes) else str(bus),
    }


def _links(gpus: Sequence[Json]) -> Iterator[Json]:
    """How every pair of GPUs is linked."""
    if len(gpus) < 2:
        return
    from onnxmesh.runtime.cuda.device import import_cupy

    can = import_cupy().cuda.runtime.deviceCanAccessPeer
    for a in gpus:
        for b in gpus[a["index"] + 1 :]:
            direct = bool(can(a["index"], b["index"]))
            nvlink = nvml.over_nvlink(a["bus"], b["bus"])
            links = nvml.nvlinks(a["bus"]) if nvlink else None
            kind = f"NVLink x{links}" if links else "NVLink" if nvlink else "PCIe" if direct else "through the host"
            yield {"a": a["index"], "b": b["index"], "kind": kind, "peer_access": direct}


def _cuda() -> Json:
    """Versions as the libraries themselves say; None for what cannot be loaded."""
    found: Json = {"runtime": None, "driver_supports": None, "nccl": None, "cudnn": None}
    with suppress(Exception):  # whatever a library that does not fit the host may raise
        import cupy

        found["runtime"] = _dotted(cupy.cuda.runtime.runtimeGetVersion(), 1000)
        found["driver_supports"] = _dotted(cupy.cuda.runtime.driverGetVersion(), 1000)
    with suppress(Exception):
        from cupy.cuda import nccl

        found["nccl"] = _dotted(nccl.get_version(), 10000)
    with suppress(Exception):
        import cudnn

        found["cudnn"] = _dotted(cudnn.backend_version(), 10000)
    return found


def _dotted(number: int, base: int) -> str | None:
    """13000 is CUDA 13.0, 22809 NCCL 2.28.9 and 91900 cuDNN 9.19.0; 0 is none."""
    if not number:
        return None
    if base == 1000:
        return f"{number // 1000}.{number % 1000 // 10}"
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def _library(name: str, distributions: Sequence[str], cost: str, install: str) -> Json:
    versions = [f"{each} {version}" for each in distributions if (version := _version(each)) is not None]
    return {"name": name, "installed": versions, "cost": cost, "install": install}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _matters(name: str) -> bool:
    return name in _VARIABLES or name.startswith(("NCCL_", "ONNXMESH_"))


def _cache() -> Json:
    folder = Path(os.environ.get("ONNXMESH_CACHE") or Path("~/.cache/onnxmesh").expanduser())
    exists = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    return {"folder": str(folder), "writable": os.access(exists, os.W_OK)}


def _problems(found: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on what is wrong."""
    if found["driver"] is not None and not found["gpus"]:
        yield f"the driver has {nvml.count()} GPUs, but none can be used: {found['no_gpu']}"
    if len(found["gpus"]) > 1 and found["cuda"]["nccl"] is None:
        yield "NCCL cannot be loaded: plans of more than one rank do not run on these GPUs"
    if not found["cache"]["writable"]:
        yield f"{found['cache']['folder']} cannot be written: kernels are compiled again in every process"
    for link in found["links"]:
        if not link["peer_access"]:
            yield f"GPUs {link['a']} and {link['b']} cannot reach each other's memory"
    names = {gpu["name"] for gpu in found["gpus"]}
    if len(names) > 1:
        yield f"the GPUs are not alike ({', '.join(sorted(names))}): the slowest sets the pace"
    for row in found["collectives"]:
        if not row["correct"]:
            yield f"{row['kind']} of {row['bytes']} bytes on {row['ranks']} ranks gave a wrong result"


# --- measuring ------------------------------------------------------------------------------------------------


def _measured(what: str, ranks: int) -> Json:
    """The rows that `onnxmesh.runtime.cuda.measure` writes, run by a process for every GPU."""
    store = StoreServer()
    with TemporaryDirectory(prefix="onnxmesh-") as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, *_MEASURE, what, str(output)]
        processes = []
        try:
            for rank in range(ranks):
                place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": store.port}
                environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
                environment["MASTER_ADDR"] = "127.0.0.1"
                environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
                processes.append(_start(command, environment, Path(folder) / f"{rank}.log"))
            _wait(processes, time.monotonic() + _SECONDS.get(what, 60.0))
            codes = [process.returncode for process in processes]
            if any(codes):
                rank = next(rank for rank, code in enumerate(codes) if code)
                raise RunError(
                    f"rank {rank} of the measurement failed: {_last_line(Path(folder) / f'{rank}.log')}", code="OM5204"
                )
            return dict(json.loads(output.read_text()))
        finally:
            for process in processes:
                process.kill()
                process.wait()
            store.close()


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], end: float) -> None:
    """Until all have ended, or one has failed."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            time.sleep(2.0)  # the others end by themselves, and say more
            return
        if time.monotonic() > end:
            raise RunError(
                "the measurement did not end in time", hint="NCCL_DEBUG=INFO says what NCCL waits for", code="OM5204"
            )
        time.sleep(0.05)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _write_profile(path: str, rows: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    gpu = found["gpus"][0]
    about = {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu["name"],
        "gpus": len(found["gpus"]),
        "driver": found["driver"],
        **found["cuda"],
        "libraries": [text for library in found["libraries"] for text in library["installed"]],
        "environment": {name: value for name, value in found["environment"].items() if name.startswith("NCCL_")},
        "rows": dict(rows),
    }
    name = gpu["name"].removeprefix("NVIDIA ").strip()
    profile = profile_fit.fit(name, gpu["processors"], rows, about)
    try:
        Path(path).write_text(json.dumps(profile.to_json(), indent=1) + "\n")
    except OSError as error:
        raise RunError(f"'{path}' cannot be written: {error.strerror}", code="OM5010") from error
