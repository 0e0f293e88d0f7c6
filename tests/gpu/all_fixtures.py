"""Every fixture on 1, 2 and 4 GPUs, all strategies, in float32, float16 and bfloat16, against the whole model.

python tests/gpu/all_fixtures.py [--ranks 1,2,4] [--precisions fp32,fp16,bf16] [--only 't5*'] [--json FILE]

Every plan runs launched, captured and from its CUDA graph. Plans are compiled and references computed by the cores
while the GPUs run, several jobs at once where there are more GPUs than ranks. Ends with 1 if a plan failed. With
`--device cpu` ranks are threads: that shows that this program works, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jobs
import plans
from plans import DTYPES, RANKS, Trial
from references import plain
from verdicts import Verdict, judge, summary

HOST = "cpu"


def run(trials: Sequence[Trial], work: Path, gpus: Sequence[str], crowd: int = 1) -> Iterator[list[Verdict]]:
    """The verdicts for each number of ranks in turn; plans that the compiler refuses have none.

    Args:
        work: a folder for plans, outputs and references.
        gpus: the GPUs; none: ranks are threads on the CPU.
        crowd: how many jobs a GPU works for at once.
    """
    base, references = plans.base(work / "plans"), work / "references"
    base.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(initializer=os.nice, initargs=(5,)) as pool:  # after the ranks
        counts = sorted({trial.case.mesh.size for trial in trials})
        sets = [[trial for trial in trials if trial.case.mesh.size == count] for count in counts]
        made = [[pool.submit(plans.make, base, trial) for trial in each] for each in sets[:1]]
        known = [pool.submit(_store, references, name) for name in dict.fromkeys(trial.name for trial in trials)]
        made += [[pool.submit(plans.make, base, trial) for trial in each] for each in sets[1:]]
        before: list[Future[Verdict]] = []
        for count, each, folders in zip(counts, sets, made):
            results = _run(count, each, folders, work / f"ranks{count}", list(gpus) * crowd)
            if before:  # judged while the GPUs ran
                yield [future.result() for future in before]
            wait(known)
            ran = [trial for trial in each if trial.key in results]
            before = [pool.submit(judge, trial, results[trial.key], base, references) for trial in ran]
        yield [future.result() for future in before]


def _run(
    ranks: int, trials: Sequence[Trial], folders: Sequence[Future[Path | None]], out: Path, gpus: Sequence[str]
) -> dict[str, Any]:
    """What rank.py says of every plan; one that does not compile has failed, one that is refused is left out."""
    entries, broken = [], {}
    for trial, future in zip(trials, folders):
        try:
            folder = future.result()
        except Exception as error:
            broken[trial.key] = {"error": f"does not compile: {type(error).__name__}: {error}"}
        else:
            if folder is not None:
                entries.append({"key": trial.key, "name": trial.name, "plan": str(folder)})
    if not entries:
        return broken
    ran = jobs.run_beside("plans", ranks, entries, out, gpus) if gpus else jobs.run("host", 1, entries, out)
    return {**ran, **broken}


def _store(references: Path, name: str) -> None:
    plain(references, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for, print the table, and write all of it as JSON."""
    given = _parse(arguments)
    gpus = [] if given.device == HOST else jobs.gpus()
    most = len(gpus) if given.device != HOST else max(RANKS)
    ranks = [count for count in map(int, given.ranks.split(",")) if count <= most]
    if not ranks:
        print(f"there are {most} GPUs")
        return 1
    asked = list(plans.trials(ranks, given.precisions.split(",")))
    asked = [item for item in asked if any(fnmatch(text, given.only) for text in (item.name, item.key))]
    start = time.perf_counter()
    verdicts: list[Verdict] = []
    with TemporaryDirectory() as folder:
        for some in run(asked, Path(folder), gpus, given.crowd):
            verdicts += some
            print(f"{time.perf_counter() - start:.0f} s: {some[0].ranks if some else 0} ranks done", flush=True)
            if given.json:
                given.json.write_text(json.dumps([asdict(item) for item in verdicts], indent=1))
    print("\n".join(summary(verdicts)))
    seconds = time.perf_counter() - start
    print(f"{len(asked) - len(verdicts)} plans refused by the compiler; {seconds:.0f} s on {len(gpus)} GPUs")
    return int(any(verdict.failure for verdict in verdicts) or not verdicts)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="numbers of ranks")
    parser.add_argument("--precisions", default=",".join(DTYPES), help="among fp32, fp16, bf16")
    parser.add_argument("--only", default="*", help="fixtures, or plans as the table names them; * and ? as in a shell")
    parser.add_argument("--device", choices=("cuda", HOST), default="cuda")
    parser.add_argument("--crowd", type=int, default=1, help="jobs that share a GPU")
    parser.add_argument("--json", type=Path, help="where to write everything about every plan")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
