"""How fast the page of a plan is in a headless Chromium, for models of full depth.

python benchmarks/viewer.py [--check] [PAGE ...]   the pages of JOBS are made if none is given

Opening is from the navigation to the first frame that shows the graph, in a new profile; a search is from the last
letter to the frame that shows what was found; going to what was found opens its block; opening a block is from the
click to the frame that shows it. Each is the median of RUNS, on whatever else the machine has to do.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import browser as headless

RUNS = 5
LIMITS = {"MB": 5.0, "open s": 2.0, "search ms": 200.0, "go there ms": 200.0, "open a block ms": 200.0}

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux cp8 ulysses": ("flux", {"cp": 8, "cp_strategy": "ulysses"}),
    "llama-70b tp8": ("llama-70b", {"tp": 8}),
}

FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
TIMED = f"""async (act) => {{
  const start = performance.now();
  await eval(act)();
  await {FRAME};
  return performance.now() - start;
}}"""
SEARCH = """() => {
  const input = document.getElementById("search");
  input.focus();
  input.value = "down_proj weight";
  input.value = search(input.value).length ? input.value : "to_out weight";
  input.dispatchEvent(new Event("input"));
}"""
GO = """() => document.getElementById("search").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}))"""
OPEN = """() => {
  const fold = plan.folds.reduce((most, other) => other.blocks.length > most.blocks.length ? other : most);
  document.querySelector(`[data-key=fold-${fold.id}]`).dispatchEvent(new MouseEvent("click", {bubbles: true}));
}"""


def pages(folder: Path) -> dict[str, Path]:
    """The pages of JOBS, by the jobs' names."""
    import onnxmesh
    from onnxmesh.inspection.page import write_page
    from onnxmesh.models.catalogue import save

    found = {}
    for name, (model, options) in JOBS.items():
        save(model, folder / f"{model}.onnx", None, "none")
        plan = onnxmesh.compile(folder / f"{model}.onnx", **options)
        found[name] = folder / f"{model}.html"
        write_page(plan, found[name], name)
    return found


def once(browser: Any, file: Path) -> dict[str, float]:
    """One visit."""
    within = browser.new_context(viewport={"width": 1500, "height": 950})
    page = within.new_page()
    start = time.perf_counter()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]")
    page.evaluate(FRAME)
    opened = time.perf_counter() - start
    page.wait_for_timeout(500)  # what a reader needs to look at it
    figures = {"open s": opened, "open a block ms": page.evaluate(TIMED, OPEN)}
    page.evaluate("closeAll()")
    figures |= {"search ms": page.evaluate(TIMED, SEARCH), "go there ms": page.evaluate(TIMED, GO)}
    within.close()
    return figures


def measure(file: Path) -> dict[str, float]:
    """The medians."""
    with headless.chromium() as browser:
        runs = [once(browser, file) for _ in range(RUNS)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"MB": file.stat().st_size / 1e6, **medians}


def main(arguments: list[str]) -> int:
    given = [Path(name) for name in arguments if name != "--check"]
    slow = False
    with TemporaryDirectory() as folder:
        found = {path.stem: path for path in given} if given else pages(Path(folder))
        print("| page | " + " | ".join(LIMITS) + " |\n|---|" + "---|" * len(LIMITS))
        for name, file in found.items():
            figures = measure(file)
            print(f"| {name} | " + " | ".join(f"{figures[key]:.3g}" for key in LIMITS) + " |", flush=True)
            slow = slow or any(figures[key] > limit for key, limit in LIMITS.items())
    return int(slow and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
