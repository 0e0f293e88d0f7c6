"""Measure everything on this host's GPUs, and make the tables: one command for each table.

python benchmarks/gpu/run.py GRAPHS FOLDER                              # all of it
python benchmarks/gpu/run.py GRAPHS FOLDER --only flux-4608             # one table
python benchmarks/gpu/run.py GRAPHS FOLDER --ranks 4 --budget 500       # in slices: lines are added to the files

Ours and the peers are measured after one another on the same GPUs. A part that fails says so, and the rest goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from processes import start

HERE = Path(__file__).parent


def main() -> None:
    """Run the three programs, then make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names of works, or how they begin, with commas")
    parser.add_argument("--ranks", type=int, nargs="*", help="numbers of GPUs; by default all that there are")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all: 45 %% ours, 45 %% the peers")
    parser.add_argument("--first", type=int, default=99, help="so many of our configurations of each work")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--docs", type=Path, help="the document that gets the tables")
    parser.add_argument("--results", type=Path, help="the folder that gets the measurements as JSON")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    common = ["--only", given.only] if given.only else []
    common += ["--ranks", *map(str, given.ranks)] if given.ranks else []
    share = str(0.45 * given.budget)
    graphs, out = str(given.graphs), given.folder
    _program("ours.py", graphs, str(out / "ours.jsonl"), *common, "--budget", share, "--first", str(given.first))
    if not given.no_peers:
        _program("peers.py", str(out / "peers.jsonl"), *common, "--budget", share)
    if not given.no_check:
        _program("check.py", graphs, str(out / "check.jsonl"), *common, "--budget", str(0.1 * given.budget))
    more = ["--docs", str(given.docs)] if given.docs else []
    more += ["--results", str(given.results)] if given.results else []
    sys.exit(subprocess.run([sys.executable, str(HERE / "table.py"), str(out), *more]).returncode)


def _program(name: str, *arguments: str) -> None:
    print(f"== {name}", flush=True)
    code = start([sys.executable, str(HERE / name), *arguments]).wait()
    if code:
        print(f"== {name} ended with {code}", flush=True)


if __name__ == "__main__":
    main()
