"""The page of a plan in a real browser: read, searched, clicked, sorted, printed, and all of it without a mouse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as headless
import inputs
import pytest
from command import Command

import onnxmesh
from onnxmesh.inspection.page import write_page
from onnxmesh.models.catalogue import CATALOGUE
from onnxmesh.runtime.mesh import Mesh
from onnxmesh.runtime.plan import Plan

LAYERS = 6


@pytest.fixture(scope="module")
def plan() -> Plan:
    return onnxmesh.compile(CATALOGUE["demo"].build(LAYERS), tp=2, cp=2)


def bench_of(plan: Plan) -> dict[str, Any]:
    """A result as `onnxmesh bench` writes it."""
    times = {f"{name}_us": 10.0 for name in ("compute", "communication", "waiting", "beside", "idle", "total")}
    return {
        "mesh": plan.mesh.to_json(),
        "device": "a GPU",
        "runs": 5,
        "latency_us": dict.fromkeys(("p50", "p90", "p99", "min", "max"), 123.0),
        "back_to_back_us": 111.0,
        "predicted": None,
        "kernels": [
            {"kernel": "MatMul", "count": 3, "measured_us": 30.0, "predicted_us": 20.0},
            {"kernel": "AllReduce", "count": 2, "measured_us": 90.0, "predicted_us": None},
        ],
        "per_rank": [{"rank": rank, **times} for rank in range(plan.mesh.size)],
    }


@pytest.fixture(scope="module")
def file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    write_page(plan, path, "demo.plan", bench_of(plan))
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with headless.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Any, file: Path) -> Iterator[Any]:
    with headless.opened(chromium, file) as page:
        yield page


def details(page: Any) -> str:
    return str(page.inner_text("#details"))


def rows(page: Any, table: str) -> list[list[str]]:
    """The cells of a table as it is shown."""
    script = "(trs) => trs.map((tr) => [...tr.children].map((td) => td.innerText.trim()))"
    return list(page.eval_on_selector_all(f"#{table} tbody tr", script))


def folded(page: Any) -> Any:
    """The fold of most blocks."""
    page.get_by_label("Fit the whole graph").click()
    return page.locator(".item.fold:has(.badge)")


# --- the graph ----------------------------------------------------------------------------------------------


def test_the_summary_is_that_of_the_report(page: Any, plan: Plan) -> None:
    assert page.inner_text("#title") == "demo.plan"
    assert "4 ranks (cp 2 × tp 2)" in page.inner_text("#subtitle")
    stats = page.inner_text("#stats")
    assert f"{len(plan.report['collectives'])} collectives" in stats
    assert str(plan.report["rank"]["instructions"]) in stats
    shown = page.locator("#warnings p").all_inner_texts()
    assert shown == [f"{own['code']} {own['reason']}" for own in plan.report["warnings"]]


def test_blocks_that_repeat_are_shown_once_and_open(page: Any) -> None:
    assert page.locator(".item.fold").count() < LAYERS
    closed = page.locator(".item.op").count()
    fold = folded(page)
    assert "in all" in fold.text_content()
    fold.click()
    inside = page.locator(".item.fold .item.op")
    assert inside.count() > 3
    assert page.locator(".item.fold .item.send").count() >= 1
    page.get_by_role("button", name="Close the block").click()
    assert page.locator(".item.op").count() == closed


def test_another_block_of_a_fold(page: Any) -> None:
    folded(page).click()
    before = page.locator(".item.fold .opened + .title").text_content()
    page.get_by_role("button", name="The next block").click()
    after = page.locator(".item.fold .opened + .title").text_content()
    assert int(after.rpartition(".")[2]) == int(before.rpartition(".")[2]) + 1


def test_a_collective_says_kind_axis_bytes_and_time(page: Any, plan: Plan) -> None:
    last = plan.report["collectives"][-1]
    page.get_by_label("Fit the whole graph").click()
    pill = page.locator(f"[data-key=step-{last['instruction']}]")
    text = pill.text_content()
    assert f"{last['kind']} on {last['axis']}" in text
    assert "KiB" in text
    assert "µs" in text
    assert page.locator("path.edge.send").count() >= 2
    pill.click()
    assert last["reason"] in details(page)


def test_a_node_says_where_it_comes_from_and_why(page: Any, plan: Plan) -> None:
    at, entry = next(
        (at, entry)
        for at, entry in enumerate(plan.report["instructions"])
        if entry["module"] == "lm_head" and entry["decisions"]
    )
    page.get_by_label("Fit the whole graph").click()
    page.locator(f"[data-key=step-{at}]").click()
    text = details(page)
    assert entry["nodes"][0] in text
    assert "lm_head" in text
    chosen = plan.report["decisions"][entry["decisions"][0]]
    shown = page.locator("#details .choices").all_inner_texts()
    assert any(chosen["chosen"]["placement"] in table for table in shown)
    assert any(other["placement"] in table for other in chosen["alternatives"] for table in shown)


def test_edges_select_their_tensor(page: Any) -> None:
    page.locator(".edge-hit").first.dispatch_event("click")
    assert "Local shape" in details(page)
    assert page.locator("path.edge.near").count() >= 1


def test_placements_are_colours_and_text(page: Any) -> None:
    folded(page).click()
    texts = page.locator(".item.op .shape").all_text_contents()
    assert {"cp S(1)", "cp R"} <= set(texts)
    assert any(text.startswith("tp S") for text in texts)
    colours = page.eval_on_selector_all("path.edge:not(.send)", "(all) => all.map((edge) => edge.style.stroke)")
    assert {"var(--cut-0)", "var(--whole)"} <= set(colours)


# --- search -------------------------------------------------------------------------------------------------


def test_searching_a_tensor_opens_its_block(page: Any, plan: Plan) -> None:
    weight = next(own for own in plan.report["weights"] if own["name"].startswith("model.layers.4.mlp.down"))
    page.keyboard.press("/")
    page.keyboard.type("layers.4 down_proj")
    assert weight["name"] in page.inner_text("#found")
    page.keyboard.press("Enter")
    text = details(page)
    assert weight["name"] in text
    assert "×".join(map(str, weight["local_shape"])) in text
    assert page.locator(".item.fold .item.op.selected").count() == 1
    assert "layers.4" in page.locator(".item.fold .opened + .title").first.text_content()


def test_searching_by_arrows_and_clicks(page: Any) -> None:
    page.fill("#search", "attention")
    options = page.locator("#found li")
    assert options.count() > 1
    page.keyboard.press("ArrowDown")
    assert options.nth(1).get_attribute("aria-selected") == "true"
    name = options.nth(1).locator(".name").inner_text()
    options.nth(1).click()
    assert name in details(page)
    assert page.locator("#found").is_hidden()


def test_searching_nonsense_says_so(page: Any) -> None:
    page.fill("#search", "no such thing")
    assert "no name holds this" in page.inner_text("#found")
    page.keyboard.press("Escape")
    assert page.locator("#found").is_hidden()


# --- tables -------------------------------------------------------------------------------------------------


def test_a_table_sorts_both_ways(page: Any, plan: Plan) -> None:
    page.click("#tab-weights")
    largest = max(own["local_bytes"] for own in plan.report["weights"])
    names = {own["name"] for own in plan.report["weights"] if own["local_bytes"] == largest}
    assert rows(page, "weights")[0][0] in names
    head = page.locator("#weights th button", has_text="Name")
    head.click()
    shown = [row[0] for row in rows(page, "weights")]
    assert shown == sorted(shown)
    head.click()
    assert [row[0] for row in rows(page, "weights")] == shown[::-1]
    assert page.locator("#weights th[aria-sort=descending]").count() == 1


def test_a_table_filters(page: Any, plan: Plan) -> None:
    page.click("#tab-collectives")
    assert len(rows(page, "collectives")) == len(plan.report["collectives"])
    page.get_by_label("Filter collectives").fill("reducescatter tp")
    kinds = {(row[1], row[2]) for row in rows(page, "collectives")}
    expected = {(own["kind"], own["axis"]) for own in plan.report["collectives"]} & {("ReduceScatter", "tp")}
    assert kinds == expected
    page.get_by_label("Filter collectives").fill("")
    page.get_by_label("Any axis").select_option("cp")
    assert {row[2] for row in rows(page, "collectives")} == {"cp"}


def test_a_row_shows_its_details(page: Any, plan: Plan) -> None:
    page.click("#tab-program")
    row = page.locator("#program tbody tr").nth(5)
    row.click()
    assert f"instruction 5 of {len(plan.report['instructions'])}" in details(page)
    assert row.get_attribute("aria-selected") == "true"


def test_findings_tell_patterns_and_what_is_replicated(page: Any, plan: Plan) -> None:
    page.click("#tab-findings")
    text = page.inner_text("#view-findings")
    assert "Patterns missed" in text
    for entry in plan.report["patterns"][:3]:
        assert entry["pattern"] in text
    assert sum(int(row[2]) for row in rows(page, "replicated")) == len(plan.report["replicated"])


def test_measured_beside_predicted(page: Any) -> None:
    page.click("#tab-measured")
    assert rows(page, "kernels")[0][:3] == ["AllReduce", "2", "90.0 µs"]
    assert rows(page, "kernels")[0][3].endswith(" µs")  # the plan's own prediction
    assert rows(page, "kernels")[1][:5] == ["MatMul", "3", "30.0 µs", "20.0 µs", "1.50"]


# --- memory -------------------------------------------------------------------------------------------------


def test_memory_shows_what_lives_at_the_peak(page: Any, plan: Plan) -> None:
    page.click("#tab-memory")
    heading = page.locator("#view-memory h2").last
    assert "At the peak" in heading.inner_text()
    count = int(page.locator("#alive [role=status]").inner_text().split(" ")[0])
    assert count == len(rows(page, "alive")) > 0
    before = heading.inner_text()
    page.locator("#view-memory .chart").first.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#view-memory h2").last.inner_text() != before


# --- keyboard, colours, print -------------------------------------------------------------------------------


def test_everything_by_keyboard(page: Any) -> None:
    page.focus("#tab-graph")
    page.keyboard.press("Tab")  # into the graph
    page.wait_for_selector(".item:focus")
    for _ in range(12):
        page.keyboard.press("ArrowDown")
        if "fold" in page.evaluate("document.activeElement.getAttribute('class')"):
            break
    key = page.evaluate("document.activeElement.dataset.key")
    assert key.startswith("fold-")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.key") == key
    assert page.locator(".item .opened").count() == 1
    page.keyboard.press("ArrowDown")
    inside = page.evaluate("document.activeElement.parentElement.closest('.item').dataset.key")
    assert inside == key
    page.keyboard.press("3")
    assert page.locator("#view-collectives").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#view-program").is_visible()
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#keys").is_hidden()


def background(page: Any) -> int:
    """How bright the page is, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return max(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))


def test_dark_as_the_system_says_and_by_the_switch(chromium: Any, file: Path) -> None:
    with headless.opened(chromium, file, color_scheme="dark") as page:
        assert background(page) < 60
        page.click("#theme")
        assert "Light" in page.inner_text("#theme")
        assert background(page) > 200
    with headless.opened(chromium, file, color_scheme="light") as page:
        assert background(page) > 200
        page.click("#theme")
        page.click("#theme")
        assert background(page) < 60


def test_it_prints_every_view_in_light_colours(chromium: Any, file: Path) -> None:
    with headless.opened(chromium, file, color_scheme="dark") as page:
        printed = page.pdf(format="A4", print_background=True)
        assert printed.startswith(b"%PDF")
        assert len(printed) > 50_000
        page.emulate_media(media="print")
        page.evaluate("beforePrint()")
        assert page.locator("#view-tensors table").is_visible()
        assert page.locator("#search").is_hidden()
        assert background(page) == 255
        page.evaluate("afterPrint()")


def test_labels_do_not_leave_their_boxes(page: Any) -> None:
    folded(page).click()
    outside = page.evaluate(
        """() => [...document.querySelectorAll(".item:not(.fold)")].flatMap((item) => {
          const box = item.querySelector("rect").getBoundingClientRect();
          return [...item.querySelectorAll("text")].filter((text) => {
            const own = text.getBoundingClientRect();
            return own.right > box.right + 1 || own.left < box.left - 1 || own.bottom > box.bottom + 1;
          }).map((text) => text.textContent);
        })"""
    )
    assert outside == []


def test_boxes_do_not_overlap(page: Any) -> None:
    folded(page).click()
    overlapping = page.evaluate(
        """() => {
          const meet = (a, b, from, size) => a[from] < b[from] + b[size] && b[from] < a[from] + a[size];
          const over = (a, b) => meet(a, b, "x", "width") && meet(a, b, "y", "height");
          const check = (scope) => scope.boxes.flatMap((a, i) => [
            ...scope.boxes.slice(i + 1).filter((b) => over(a, b)).map((b) => `${a.key} ${b.key}`),
            ...(a.kind === "fold" && a.fold.open ? check(a.scope) : [])]);
          return check(view.root);
        }"""
    )
    assert overlapping == []


# --- what is given ------------------------------------------------------------------------------------------


def test_names_from_a_model_cannot_become_markup(chromium: Any, tmp_path: Path) -> None:
    model = CATALOGUE["demo"].build(2)
    evil = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"
    for node in model.graph.node:
        node.name = f"{evil}{node.name}"
    plan = onnxmesh.compile(model, tp=2)
    write_page(plan, tmp_path / "evil.html", evil)
    with headless.opened(chromium, tmp_path / "evil.html") as page:
        for tab in ("tensors", "program", "findings"):
            page.click(f"#tab-{tab}")
        assert page.title().startswith("</script>")
        assert page.locator("img").count() == 0


@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"cp": 2, "cp_strategy": "ring"}], ids=str)
@pytest.mark.parametrize("name", ["bert_ts17", "swin_op23", "t5_op18", "mlp_op18"])
def test_pages_of_other_models_open(name: str, options: dict[str, Any], chromium: Any, tmp_path: Path) -> None:
    fixture = inputs.load(name)
    options = {**options, "allow_replicated": True}
    plan = onnxmesh.compile(fixture.path, dims=fixture.bindings(), **options)
    write_page(plan, tmp_path / "plan.html", name)
    with headless.opened(chromium, tmp_path / "plan.html") as page:
        for fold in page.locator(".item.fold").all()[:1]:
            fold.click()
        for tab in page.locator("#tabs button").all():
            tab.click()


def test_the_command_writes_a_page(command: Command, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "a.plan", weights=False)
    (tmp_path / "bench.json").write_text(json.dumps(bench_of(plan)))
    target = tmp_path / "a.html"
    done = command("inspect", tmp_path / "a.plan", "--html", target, "--bench", tmp_path / "bench.json")
    assert done.code == 0, done.err
    assert done.out.startswith(f"{target}: ")
    text = target.read_text()
    assert "a.plan" in text
    assert "a GPU" in text


def test_a_benchmark_of_another_plan_is_refused(command: Command, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "a.plan", weights=False)
    (tmp_path / "bench.json").write_text(json.dumps({**bench_of(plan), "mesh": Mesh.of(tp=8).to_json()}))
    (tmp_path / "text.json").write_text("[]")
    for name, message in (("bench.json", "of the mesh"), ("text.json", "not the result of a benchmark")):
        done = command("inspect", tmp_path / "a.plan", "--html", tmp_path / "a.html", "--bench", tmp_path / name)
        assert done.code != 0
        assert message in done.err
    assert not (tmp_path / "a.html").exists()
    assert command("inspect", tmp_path / "a.plan", "--bench", tmp_path / "bench.json").code == 2
