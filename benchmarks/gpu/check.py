"""Are the results right at the sizes that are timed? onnxmesh and torch in bf16, both against torch in float32.

python benchmarks/gpu/check.py GRAPHS OUT.jsonl [--only flux-4608] [--ranks 1 4] [--first 1]

Weights are those of `values`. The error is the norm of the difference over that of the result, as `onnxmesh verify` has
it.
Exit code 1 if ours exceeds 2e-2, or a configuration fails.
"""

from __future__ import annotations

import argparse
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import torch
from ours import ordered
from peer_models import Sizes, flux_inputs, llama_tokens
from processes import Clock, Json, append
from shapes import Work, onnx_path, selected
from values import value

import onnxmesh
from onnxmesh.runtime.onnx_weights import onnx_fetch

ALLOWED = 2e-2


def main() -> None:
    """Check all that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="flux-4608", help="names of works, or how they begin, with commas")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1])
    parser.add_argument("--first", type=int, default=1, help="so many configurations of each work")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which nothing new begins")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    clock, good, plans = Clock(given.budget), True, given.out.parent / "plans"
    for work in selected(given.only):
        store = Store(onnx_path(given.graphs, work))
        device = torch.device(given.device)
        feeds, exact, rounded = reference(work, store, device)
        peer = distance(rounded, exact)
        for ranks in given.ranks:
            for case, report in ordered(given.graphs, plans, work, ranks)[: given.first]:
                line: Json = {"work": work.name, "ranks": ranks, "configuration": case.name, "torch_error": peer}
                if not clock.left:
                    found: Json = {"error": "not run: the time was used up"}
                elif isinstance(report, str):
                    found = {"error": report}
                else:
                    found = _compared(case.folder(plans), given.device, store, feeds, exact)
                good &= found.get("our_error", 1.0) <= ALLOWED  # False for nan too
                append(given.out, {**line, **found})
    sys.exit(0 if good else 1)


def distance(found: np.ndarray, exact: np.ndarray) -> float:
    """The norm of the difference over the norm of what is exact; nan if anything is not finite."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class Store:
    """The parameters by name: made once, however often they are asked for."""

    def __init__(self, model: Path) -> None:
        tensors = onnx.load(model, load_external_data=False).graph.initializer
        shapes = {t.name: tuple(t.dims) for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL}
        self._inside = onnx_fetch(model)
        with ThreadPoolExecutor(8) as pool:
            self._values = dict(zip(shapes, pool.map(value, shapes, shapes.values())))

    def __call__(self, name: str) -> np.ndarray:
        """As a session asks for weights."""
        return self._values[name] if name in self._values else self._inside(name)

    def fill(self, model: torch.nn.Module) -> None:
        """Give a torch model the same values."""
        for name, parameter in model.state_dict().items():
            held = self._values.get(name)
            array = held if held is not None else value(name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16))


@torch.no_grad()
def reference(work: Work, store: Store, device: torch.device) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(inputs by name, torch's result in float32, torch's in bf16)."""
    if work.model == "llama":
        from llama import last_logits

        model: torch.nn.Module = last_logits(Sizes.real().llama, device)
        inputs = {"input_ids": llama_tokens(work, device, Sizes.real())}
    else:
        from diffusers import FluxTransformer2DModel

        with torch.device("meta"):
            model = FluxTransformer2DModel(**Sizes.real().flux)
        model = model.to(torch.bfloat16).to_empty(device=device).eval()
        inputs = flux_inputs(work, device, Sizes.real())
    store.fill(model)
    rounded = _result(model, inputs)
    exact = _result(model.float(), {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()})
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {name: _array(x) for name, x in inputs.items()}, exact, rounded


def _result(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    found = model(**inputs) if "input_ids" in inputs else model(**inputs, return_dict=False)[0]
    return found.float().cpu().numpy()


def _array(x: torch.Tensor) -> np.ndarray:
    x = x.cpu().contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def _compared(folder: Path, device: str, store: Store, feeds: dict[str, np.ndarray], exact: np.ndarray) -> Json:
    """The error of one configuration, and what the session said of loading."""
    try:
        plan = onnxmesh.load(folder)
        with onnxmesh.Session(plan, device, weights=store, timeout=120.0) as session:
            ours = session.run(None, feeds)[0].astype(np.float32)
            again = session.run(None, feeds)[0].astype(np.float32)
            load = str(session.load_report)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return {
        "our_error": distance(ours, exact),
        "repeats": bool((ours == again).all()),
        "load": load,
    }


if __name__ == "__main__":
    main()
