"""Run the test suite of the standard over onnxmesh.backend.

python -m onnxmesh.backend --report --device CPU:2
python -m onnxmesh.backend 'test_gru*'
python -m onnxmesh.backend --sharded
"""

from __future__ import annotations

import fnmatch
import json
import time
from pathlib import Path

import click
import onnx

from onnxmesh.backend import scoreboard, sharded, sharded_board, suite, supports_device


@click.command()
@click.argument("patterns", nargs=-1)
@click.option("--report", is_flag=True, help="Print the scoreboard: counts, the fallback's ops, every exception.")
@click.option("--device", default="CPU", show_default=True, help="CPU, CPU:RANKS, CUDA or CUDA:NUMBER.")
@click.option("--processes", type=click.IntRange(min=1), help="Processes that run tests; one for each CPU without it.")
@click.option("--sharded", "cut", is_flag=True, help="Node tests on two ranks, by every factor; prints the counts.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the row here too.")
@click.option("--store", is_flag=True, help="Keep the row in the repository: JSON, docs/backend.md and README.")
def main(
    patterns: tuple[str, ...],
    report: bool,
    device: str,
    processes: int | None,
    cut: bool,
    json_file: Path | None,
    store: bool,
) -> None:
    """Run the tests whose names match PATTERNS; all without any."""
    if store and patterns:
        raise click.UsageError("--store keeps the outcomes of all tests; leave the patterns out")
    if store and not scoreboard.DOCUMENT.exists():
        raise click.UsageError("--store needs a checkout of the repository")
    if not device.startswith("CUDA") and not supports_device(device):  # a GPU is looked for in the other processes
        raise click.UsageError(f"there is no device {device}")
    wanted = [n for n in suite.names() if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]
    if cut:
        _sharded(wanted, processes, json_file, store)
        return
    start = time.perf_counter()
    outcomes = suite.run(wanted, device, processes)
    row = scoreboard.tally(outcomes, time.perf_counter() - start)
    if report:
        click.echo(f"onnx {onnx.__version__} on {device}\n\n{scoreboard.row_text(row)}")
    else:
        for outcome in outcomes:
            click.echo(f"{outcome.status:11} {outcome.name} {' '.join(outcome.ops)}{outcome.reason}")
    if json_file is not None:
        json_file.write_text(json.dumps(row, indent=1, sort_keys=True) + "\n")
    if store:
        scoreboard.store(device, row, onnx.__version__)


def _sharded(wanted: list[str], processes: int | None, json_file: Path | None, store: bool) -> None:
    """Run the node tests among those wanted on two ranks, and print what was cut.

    Raises:
        SystemExit: something differs from one rank.
    """
    start, nodes = time.perf_counter(), set(sharded.names())
    outcomes = sharded.run([name for name in wanted if name in nodes], processes)
    found = [outcome for outcome in outcomes if outcome is not None]
    row = sharded_board.tally(len(outcomes), found, time.perf_counter() - start)
    click.echo(sharded_board.text(row))
    if json_file is not None:
        json_file.write_text(json.dumps(row, indent=1) + "\n")
    if store:
        sharded_board.store(row, onnx.__version__)
    if row["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
