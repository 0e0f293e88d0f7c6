"""The command line: parsing and printing only. The work is done by the compiler and the runtime, imported when used."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import click

from onnxmesh import cli_options as take

if TYPE_CHECKING:
    from onnxmesh.compiler.api import Compilation
    from onnxmesh.compiler.choose import Choice
    from onnxmesh.compiler.verification import Verification

F = TypeVar("F", bound=Callable[..., Any])
Named = tuple[str, tuple[int, ...]]

INTERRUPTED, USAGE, DEFECT = 130, 2, 1


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and leave with its exit code; no traceback, and what was begun is cleaned up."""
    given = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(_run(given))


def _run(arguments: list[str]) -> int:
    try:
        return int(cli.main(arguments, prog_name="onnxmesh", standalone_mode=False) or 0)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "onnxmesh"
        _complain(error.format_message(), f"see {command} --help")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        return _report(error, verbose="-v" in arguments or "--verbose" in arguments)


def _report(error: Exception, *, verbose: bool) -> int:
    """One line for an error, and its exit code; the traceback only with -v."""
    from onnxmesh.runtime.errors import OnnxMeshError

    if verbose:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OnnxMeshError):
        _complain(str(error.args[0]), error.hint, error.code)
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        _complain(f"{error.filename or 'the system'}: {error.strerror}")
        return DEFECT
    _complain(
        f"{type(error).__name__}: {error} (this is a defect of onnxmesh)",
        "" if verbose else "run it again with -v for the traceback, and report it",
    )
    return DEFECT


def _complain(message: str, hint: str = "", code: str = "") -> None:
    """The one `error:` line, with the code where there is one, and perhaps a `hint:` line."""
    click.echo(f"error{f'[{code}]' if code else ''}: {' '.join(message.split())}", err=True)
    if hint:
        click.echo(f"hint: {' '.join(hint.split())}", err=True)


# --- commands -----------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxmesh", prog_name="onnxmesh")
def cli() -> None:
    """Compile a plain ONNX file into a sharded engine for many devices, run it and prove it."""


@cli.command("compile")
@click.argument("models", metavar="MODEL...", type=click.Path(), nargs=-1, required=True)
@take.mesh_options
@click.option("-o", "--output", type=click.Path(), help="The plan's folder; MODEL with .plan if not given.")
@click.option("--no-weights", is_flag=True, help="Write the plan alone; run --weights MODEL reads them.")
@click.option("--dump", type=click.Path(file_okay=False), help="A folder for the printed graph after each pass.")
@click.option("--own-input", "own_inputs", multiple=True, help="Of MODELs made elsewhere: each rank has its own.")
@click.option("--annotate", type=click.Path(), help="Write MODEL with its placements, in ONNX's own form, there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--auto", is_flag=True, help="Choose the mesh and strategy that are predicted to be the fastest.")
@take.choice_options
@take.quiet
@take.verbose
def compile_(models: tuple[str, ...], output: str | None, no_weights: bool, dump: str | None, **given: Any) -> None:
    """Compile MODEL for dp x cp x tp ranks and write a plan; or the MODELs that another tool made for each rank."""
    if given["auto"] != (given["ranks"] is not None) or (given["auto"] and len(models) != 1):
        raise click.UsageError("--auto goes with --ranks N and one MODEL")
    if given["auto"]:
        given |= _chosen(models[0], given)
    target = Path(output) if output is not None else Path(Path(models[0]).with_suffix(".plan").name)
    compilation = _compile(models[0] if len(models) == 1 else models, given, target, dump=dump, weights=not no_weights)
    assert compilation.plan is not None
    report = compilation.plan.report
    written = compilation.annotate(given["annotate"]) if given["annotate"] is not None else None
    if given["as_json"]:
        click.echo(json.dumps(report, indent=1, sort_keys=True))
    elif not given["quiet"]:
        from onnxmesh.compiler.report_text import report_text

        click.echo(report_text(report))
        click.echo(f"\n{target}: {report['ranks']} ranks{', without weights' if no_weights else ''}")
        if written is not None:
            click.echo(f"{given['annotate']}: {written}")


@cli.command()
@click.argument("model", type=click.Path())
@take.mesh_options
@take.choice_options
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@take.quiet
@take.verbose
def estimate(model: str, as_json: bool, **given: Any) -> None:
    """Compare every division of --ranks N into dp x cp x tp, by what each is predicted to take; write nothing."""
    if given["ranks"] is None:
        raise click.UsageError("give --ranks N")
    choice = _estimate(model, given)
    if as_json:
        click.echo(json.dumps(choice.to_json(), indent=1))
        return
    from onnxmesh.compiler.choose_text import choice_text

    click.echo(choice_text(choice))


@cli.command()
@click.argument("plan", type=click.Path())
@click.option("--inputs", type=click.Path(), help="An .npz file, or a folder of .npy or .pb files.")
@click.option("--random-inputs", "seed", type=int, help="Make inputs from this seed instead.")
@click.option("--outputs", type=click.Path(), help="An .npz file, or a folder, to write the outputs to.")
@click.option("--weights", type=click.Path(), help="Read the weights from this ONNX file (or plan).")
@click.option(
    "--io",
    type=click.Choice(["all", "root"]),
    default="all",
    show_default=True,
    help="Who has inputs and outputs: every rank, or rank 0 alone.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda: one process for each GPU.")
@click.option("--random-weights", is_flag=True, help="Make up weights, for a plan without any.")
@click.option("--no-graph", is_flag=True, help="Launch every kernel by itself, not a CUDA graph of all.")
@take.tf32
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Run so many times.")
@take.quiet
@take.verbose
def run(
    plan: str, inputs: str | None, seed: int | None, no_graph: bool, quiet: bool, verbose: bool, **given: Any
) -> None:
    """Run PLAN: on local ranks, or as one rank of a job (mpirun -n 4 onnxmesh run ..., torchrun, srun)."""
    if (inputs is None) == (seed is None):
        raise click.UsageError("give either --inputs or --random-inputs")
    if given["random_weights"] and given["weights"]:
        raise click.UsageError("give either --weights or --random-weights")
    from onnxmesh.runtime import launch
    from onnxmesh.runtime.loose import describe

    request = launch.Request(plan, inputs, seed or 0, **given, graph=not no_graph, plain_read=verbose)
    result = launch.run(request)
    if quiet or result.rank != 0:
        return
    for name, value in result.outputs.items():
        click.echo(f"{name}: {describe(value)}")
    click.echo(f"{result.ranks} ranks: loaded in {result.load_seconds:.2f} s, {_runs(result.run_seconds)}")
    click.echo(result.load)


def _runs(seconds: Sequence[float]) -> str:
    first = f"ran in {1000 * seconds[0]:.1f} ms"
    if len(seconds) == 1:
        return first
    rest = sorted(seconds[1:])
    return f"first {first}, {len(rest)} more in {1000 * rest[len(rest) // 2]:.2f} ms each (median)"


@cli.command()
@click.argument("model", type=click.Path())
@take.mesh_options
@click.option("--plan", type=click.Path(), help="Verify this plan of MODEL instead of compiling one.")
@click.option("--inputs", type=click.Path(), help="An .npz file, or a folder; random ones if not given.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@click.option("--tolerance", type=click.FloatRange(min=0), help="Relative; 1e-4, or 2e-2 in half precision.")
@click.option("--each", is_flag=True, help="Compare every tensor; name the first node, rank and element that differ.")
@click.option("--save", "folder", type=click.Path(file_okay=False), help="Of --each: for the first difference.")
@click.option("--reduce", "reduced", type=click.Path(), help="With --each: write the smallest part that still fails.")
@click.option("--plan2", "other", type=click.Path(), help="Compare with this plan of MODEL, not with MODEL.")
@click.option("--device", default="cpu", show_default=True, help="cuda: compare ranks on GPUs with ranks on the host.")
@click.option("--json", "as_json", is_flag=True, help="With --each: print what was found as JSON.")
@take.quiet
@take.verbose
def verify(model: str, plan: str | None, inputs: str | None, seed: int, **given: Any) -> None:
    """Run MODEL sharded and whole, and compare every output, or --each tensor. Exit code 6 if one differs."""
    given["each"] = given["each"] or given["reduced"] is not None
    from onnxmesh.compiler import verification
    from onnxmesh.runtime import io, launch
    from onnxmesh.runtime.serialize import load

    compiled = load(plan) if plan is not None else _compile(model, given, None).plan
    assert compiled is not None
    stored = all(weight.shards for weight in compiled.weights)
    weights = launch.weights_source(model) if plan is not None and not stored else None
    ports = compiled.programs[0].inputs
    feeds = io.read_inputs(inputs, ports) if inputs is not None else io.random_inputs(compiled, seed)
    asked = {name: given[name] for name in ("device", "each", "other", "reduced", "folder", "quiet", "as_json")}
    if given["each"] or given["other"] is not None or given["device"] != "cpu":
        from onnxmesh.verification import command

        request = command.Request(compiled, model, feeds, weights, tolerance=given["tolerance"], **asked)
        if not request.is_pair:
            command.compare_each(request).check()
            return
        result = command.compare_pair(request)
    else:
        result = verification.verify(compiled, model, feeds, weights=weights, tolerance=given["tolerance"])
    if not given["quiet"]:
        _show(result)
    result.check()


@cli.command()
@click.argument("plan", type=click.Path())
@click.option("--what", type=click.Choice(take.VIEWS), help="Show one view in full width.")
@click.option("--node", help="Show one node, weight, tensor or instruction (#12).")
@click.option("--json", "as_json", is_flag=True, help="Print the report, the view or the node as JSON.")
@click.option("--all", "full", is_flag=True, help="Print the whole report, or all of the view.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page that shows all of it to this file.")
@click.option("--bench", type=click.Path(), help="With --html: show the times of this result of bench --json too.")
def inspect(
    plan: str, what: str | None, node: str | None, as_json: bool, full: bool, html: str | None, bench: str | None
) -> None:
    """Show what PLAN does: placements, memory, collectives, what is replicated and why."""
    from onnxmesh.inspection.show import show

    if bench is not None and html is None:
        raise click.UsageError("--bench goes with --html")
    if html is not None:
        from onnxmesh.inspection.page import write

        click.echo(write(plan, html, bench))
        return
    if what is not None and node is not None:
        raise click.UsageError("give either --what or --node")
    click.echo(show(plan, what=what, node=node, as_json=as_json, full=full))


@cli.command()
@click.argument("code", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the page as JSON.")
def explain(code: str | None, as_json: bool) -> None:
    """Say what CODE means, as OM1203 in error[OM1203], why it happens and what to do; without CODE, list them all."""
    from onnxmesh.inspection import codes

    if code is None:
        pages = list(codes.codes().values())
        click.echo(json.dumps([vars(page) for page in pages], indent=1) if as_json else codes.list_text())
        return
    page = codes.find(code)
    if page is None:
        near = ", ".join(codes.near(code))
        raise click.UsageError(f"there is no code {code!r}{f'; did you mean {near}?' if near else ''}")
    click.echo(json.dumps(vars(page), indent=1) if as_json else codes.page_text(page))


@cli.command()
@click.argument("first", metavar="PLAN_A", type=click.Path())
@click.argument("second", metavar="PLAN_B", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
@click.option("--all", "full", is_flag=True, help="Cut no table short.")
@take.quiet
def diff(first: str, second: str, as_json: bool, full: bool, quiet: bool) -> int:
    """Show how PLAN_B differs from PLAN_A. Exit code 0 where they do the same, 1 where not."""
    from onnxmesh.inspection.difference import difference
    from onnxmesh.inspection.difference_text import difference_text
    from onnxmesh.runtime.serialize import load

    found = difference(load(first), load(second))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    elif not quiet:
        click.echo(difference_text(found, Path(first).name, Path(second).name, full=full))
    return int(bool(found))


@cli.command()
@click.argument("plan", type=click.Path())
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda: one process for each GPU.")
@click.option("--runs", type=click.IntRange(min=1), default=50, show_default=True, help="Timed runs.")
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Runs before them.")
@click.option("--inputs", type=click.Path(), help="An .npz file, or a folder; random ones if not given.")
@click.option("--weights", type=click.Path(), help="Read the weights from this ONNX file (or plan).")
@click.option("--random-weights", is_flag=True, help="Make up weights, for a plan without any.")
@click.option("--tokens-per-run", "tokens", type=click.IntRange(min=1), help="If not the input's first two dims.")
@click.option("--no-graph", is_flag=True, help="Launch every kernel by itself, not a CUDA graph of all.")
@take.tf32
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True)
@click.option("--json", "json_file", type=click.Path(), help="Write the result to this file, or - for the output.")
@click.option("--trace", type=click.Path(), help="Write a Chrome trace of all ranks to this file.")
@click.option("--all", "full", is_flag=True, help="Cut no table short.")
@take.verbose
def bench(plan: str, json_file: str | None, full: bool, **given: Any) -> None:
    """Measure PLAN: latency, throughput, memory, and what the time of every rank goes to."""
    from onnxmesh.runtime.bench import Request, Work
    from onnxmesh.runtime.bench import bench as measure
    from onnxmesh.runtime.bench_text import bench_text
    from onnxmesh.runtime.random_weights import RANDOM

    if given["random_weights"] and given["weights"]:
        raise click.UsageError("give either --weights or --random-weights")
    work = Work(given["runs"], given["warmup"], given["inputs"])
    weights = RANDOM if given["random_weights"] else given["weights"]
    tokens, graph = given["tokens"] or 0, not given["no_graph"]
    result = measure(Request(plan, work, weights, given["device"], given["timeout"], tokens, graph, given["trace"]))
    if result is not None:
        _write_json(json_file, result)
        if json_file != "-":
            click.echo(bench_text(result, full=full))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@click.option("--quick", is_flag=True, help="Measure nothing.")
@click.option("--profile", type=click.Path(), help="Measure a device profile, and write it to this file.")
@take.verbose
def doctor(as_json: bool, quick: bool, profile: str | None, verbose: bool) -> None:
    """What this host has for running plans, what is missing and what that costs, and how fast its links are."""
    from onnxmesh.runtime import doctor as checks
    from onnxmesh.runtime.doctor_text import doctor_text

    if quick and profile is not None:
        raise click.UsageError("--quick measures nothing, --profile does")
    found = checks.examine(measure=not quick, profile=profile)
    click.echo(json.dumps(found, indent=1) if as_json else doctor_text(found))


@cli.command()
@click.option("--keep", type=click.Path(file_okay=False), help="Keep the model and the plan in this folder.")
def demo(keep: str | None) -> None:
    """Build a small transformer, shard it over tp=2 x cp=2, run it on four local ranks and verify it."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="onnxmesh-") as folder:
        _demo(Path(keep or folder))


def _demo(folder: Path) -> None:
    from onnxmesh.compiler import verification
    from onnxmesh.compiler.report_text import report_text
    from onnxmesh.models import catalogue
    from onnxmesh.runtime import io
    from onnxmesh.runtime.serialize import load

    folder.mkdir(parents=True, exist_ok=True)
    model, target = folder / "demo.onnx", folder / "demo.plan"
    click.echo(f"$ python -m onnxmesh.models demo {model.name}")
    catalogue.save("demo", model)
    click.echo(f"$ onnxmesh compile {model.name} --tp 2 --cp 2 -o {target.name}")
    given = {"tp": 2, "cp": 2, "dp": 1, "shapes": (), "dims": (), "cp_strategy": "auto"}
    _compile(str(model), {**given, "shard_outputs": False, "allow_replicated": False, "quiet": True}, target)
    plan = load(target)
    click.echo(f"\n{report_text(plan.report)}\n")
    click.echo(f"$ onnxmesh verify {model.name} --plan {target.name}")
    result = verification.verify(plan, model, io.random_inputs(plan, 0))
    _show(result)
    result.check()


# --- choosing a mesh ----------------------------------------------------------------------------------------


def _estimate(model: str, given: dict[str, Any]) -> Choice:
    """Compare the divisions of the ranks, in a process for each core."""
    from onnxmesh.compiler import choose

    if max(given["tp"], given["cp"], given["dp"]) > 1:
        raise click.UsageError("--ranks divides all ranks: leave out --tp, --cp and --dp")
    with _progress(given["quiet"] or given.get("as_json", False)) as show:
        return choose.compare(
            model,
            take.options(given),
            given["ranks"],
            memory=given["memory"],
            jobs=os.cpu_count() or 1,
            told=lambda done, total: show("estimate", done, total),
        )


def _chosen(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """The mesh and strategy of the best division, as options."""
    choice = _estimate(model, given)
    best = choice.best.candidate
    if choice.warning:
        click.echo(f"warning: {choice.warning}", err=True)
    if not given["quiet"]:
        click.echo(f"compile: {best}, the best of {len(choice.estimates)}", err=True)
    return best.arguments


# --- work and printing --------------------------------------------------------------------------------------


def _compile(
    model: str | Sequence[str],
    given: dict[str, Any],
    target: Path | None,
    *,
    dump: str | None = None,
    weights: bool = True,
) -> Compilation:
    """Compile, write the plan if there is a target, and show how it goes."""
    from onnxmesh.compiler.api import compile_model

    with _progress(bool(given.get("quiet"))) as show:
        compilation = compile_model(model, take.options(given), dump=dump, progress=show)
        assert compilation.plan is not None
        if target is not None:
            show("write")
            compilation.plan.save(target, weights=weights, progress=lambda done, total: show("write", done, total))
    if given.get("verbose"):
        for name, seconds in compilation.seconds.items():
            click.echo(f"{name:12} {seconds:8.3f} s", err=True)
    return compilation


class _Show(Protocol):
    def __call__(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is being done; `done` of `total` where that is known."""


@contextmanager
def _progress(quiet: bool) -> Iterator[_Show]:
    """Where a compile is: a bar on a terminal, plain lines elsewhere."""
    if quiet:
        yield lambda name, done=None, total=None: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield lambda name, done=None, total=None: None if done else click.echo(f"compile: {name}", err=True)


@contextmanager
def _bar() -> Iterator[_Show]:
    """A bar that moves while weights are written, and runs to and fro where nobody knows how long it takes."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("compile: {task.description:10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(name: str, done: int | None = None, total: int | None = None) -> None:
            progress.update(task, description=name, completed=done, total=total)

        yield show


def _write_json(path: str | None, result: dict[str, Any]) -> None:
    """JSON to a file, or to the output for `-`."""
    text = json.dumps(result, indent=1)
    if path == "-":
        click.echo(text)
    elif path is not None:
        Path(path).write_text(text + "\n")


def _show(result: Verification) -> None:
    """The table of a verification."""
    from onnxmesh.compiler.report_text import table

    rows = [
        [
            item.name,
            f"{item.dtype}{list(item.shape)}",
            f"{item.error:.2e}",
            f"{item.tolerance:g}",
            "agrees" if item.agrees else f"differs: {item.note}" if item.note else "differs",
        ]
        for item in result.outputs
    ]
    click.echo(table(["output", "global", "relative error", "allowed", ""], rows))
    click.echo(f"compared with {result.reference}")
