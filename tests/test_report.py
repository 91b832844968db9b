"""Reports: a page that shows a checkpoint as it is, asks for nothing, and believes no name."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from browser import browser, chromium
from cloudckpt.catalog.traces import joined, read_traces
from cloudckpt.catalog.tree import Leaf
from cloudckpt.cli.report.timeline import MOST_RANKS, timeline_of
from cloudckpt.cli.report.treemap import MOST_NODES, views_of
from cloudckpt.engine.tracing import Event, Outcome, encode
from cloudckpt.errors import ObjectNotFoundError

COMMAND = str(Path(sys.executable).parent / "cloudckpt")
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--"
RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from cloudckpt.dcp import Checkpointer

root, rank, hostile = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=root + "-group", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
half = lambda value: distribute_tensor(torch.full((256, 384), value), mesh, [Shard(0)])
same = torch.arange(90_000, dtype=torch.float32)
with Checkpointer(root) as checkpointer:
    model = {"a": {"w": half(1.0)}, "b": {"w": same, "old": torch.ones(5000)}}
    checkpointer.save(7, {"model": model, "epoch": 1})
with Checkpointer(root, trace=root + "-traces") as checkpointer:
    state = {"model": {"a": {"w": half(2.0)}, "b": {"w": same, hostile: torch.ones(60_000)}}, "epoch": 2}
    state["optim"] = {f"{n}.avg": torch.ones(200 * (n + 1), dtype=torch.bfloat16) for n in range(60)}
    checkpointer.save(9, state, metrics={"loss": 0.25}, metadata={"note": hostile})
    checkpointer.load(state)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run that two ranks saved: step 7, one that never committed, and step 9, which left traces."""
    url = f"file://{tmp_path_factory.mktemp('report')}/run"
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, url, str(rank), HOSTILE]) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    shard = Path(url.removeprefix("file://"), "step-8", "shards", "ab", f"{'ab' * 16}.frames")
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"left behind")
    return url


@pytest.fixture(scope="module")
def page_file(root, tmp_path_factory):
    """The page of step 9."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    made = report(f"{root}/step-9", "-o", str(file), "--trace", f"{root}-traces")
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
    return file


@pytest.fixture
async def page(tmp_path):
    """A tab of a real browser."""
    if os.environ.get("BROWSER") == "none":
        pytest.skip("left out, because BROWSER=none says that there is no browser here")
    if chromium() is None:
        pytest.fail(
            "no chromium is here: install it (apt-get install chromium), or say BROWSER=none to leave this out"
        )
    async with browser(tmp_path / "profile") as tab:
        yield tab


def report(*args, **options):
    return subprocess.run([COMMAND, "report", *args], capture_output=True, text=True, check=False, **options)


TILES = """[...document.querySelectorAll(".tile")].map((tile) => {
  const box = tile.getBoundingClientRect();
  return { path: tile.dataset.path, nbytes: Number(tile.dataset.nbytes), area: box.width * box.height };
})"""


async def tiles(page):
    """What the treemap shows: by path, its bytes and its area."""
    return await page.js(TILES)


async def crumbs(page):
    return await page.js('[...document.querySelectorAll(".crumbs > *")].map((crumb) => crumb.textContent)')


async def test_areas_are_bytes_and_clicks_lead_in_and_back(page, page_file):
    await page.open(page_file.as_uri())
    whole = json.loads(await page.js('document.getElementById("data").textContent'))["totals"]["nbytes"]
    shown = await tiles(page)
    assert sum(tile["nbytes"] for tile in shown) == whole
    scale = sum(tile["area"] for tile in shown) / whole
    for tile in shown:
        assert tile["area"] == pytest.approx(tile["nbytes"] * scale, rel=0.02, abs=2)
    await page.click('.tile[data-path="model.a.w"]')
    assert await crumbs(page) == ["checkpoint", "model"]
    inside = await tiles(page)
    assert {tile["path"] for tile in inside} == {"model.a.w", "model.b.w", f"model.b.{HOSTILE}"}
    assert sum(tile["area"] for tile in inside) == pytest.approx(whole * scale, rel=0.01)
    await page.click(".crumbs button")
    assert await crumbs(page) == ["checkpoint"]
    for kind, tops in (("dtype", {"F32", "BF16"}), ("shard", None)):
        await page.click(f'.switch [value="{kind}"]')
        named = await page.js('[...document.querySelectorAll(".label.top bdi")].map((label) => label.textContent)')
        assert len(named) == 2
        assert tops is None or set(named) == tops
        assert sum(tile["nbytes"] for tile in await tiles(page)) == whole
    assert page.errors == []


async def test_the_treemap_can_be_walked_by_keys(page, page_file):
    await page.open(page_file.as_uri())
    told = 'document.querySelector("#tree .told").textContent'
    await page.js('document.querySelector(".tile").focus()')
    first = await page.js(told)
    await page.press("ArrowRight")
    assert await page.js(told) != first
    label = await page.js("document.activeElement.getAttribute('aria-label')")
    assert all(fact in label for fact in ("model.", "F32", "KiB", " %")), label
    await page.press("Enter", "\r")
    assert await crumbs(page) == ["checkpoint", "model"]
    assert await page.js('document.activeElement.matches(".tile")')
    await page.press("Escape")
    assert await crumbs(page) == ["checkpoint"]


async def test_names_are_harmless_and_the_page_asks_for_nothing(page, page_file):
    await page.open(page_file.as_uri())
    text = await page.js("document.body.textContent")
    assert text.count(f"model.b.{HOSTILE}") >= 2
    assert json.dumps({"note": HOSTILE}, indent=2) in text
    assert await page.js('[document.title, document.querySelectorAll("img").length]') == ["step-9 · cloudckpt", 0]
    assert (page.errors, page.requests) == ([], [page_file.as_uri()])
    image = "<img src='https://127.0.0.1:1/x' onerror='document.title = 1'>"
    await page.js(f'document.body.insertAdjacentHTML("beforeend", {json.dumps(image)})')
    await page.drawn()
    assert len(page.errors) == 2
    assert all("Content Security Policy" in error for error in page.errors)
    assert await page.js("document.title") == "step-9 · cloudckpt"


async def test_the_timeline_has_bars_for_both_ranks_in_their_places(page, page_file):
    await page.open(page_file.as_uri())
    data = json.loads(await page.js('document.getElementById("data").textContent'))
    for line, phases in zip(data["timelines"], ({"upload", "stage"}, {"fetch"}), strict=True):
        assert [rank["rank"] for rank in line["ranks"]] == [0, 1]
        for rank in line["ranks"]:
            assert phases <= {row["phase"] for row in rank["rows"]}
        bars = [bar for rank in line["ranks"] for row in rank["rows"] for lane in row["lanes"] for bar in lane]
        shown = await page.js(
            f'[...document.querySelectorAll("#timeline-{line["kind"]} .work")].map((bar) => {{'
            " const [box, track] = [bar.getBoundingClientRect(), bar.parentElement.getBoundingClientRect()];"
            " return (box.left - track.left) / track.width; })"
        )
        assert shown == pytest.approx([bar["start_s"] / line["span_s"] for bar in bars], abs=0.01)
        heads = await page.js(
            f'[...document.querySelectorAll("#timeline-{line["kind"]} h4")].map((h) => h.innerText)'
        )
        assert [head[:6] for head in heads] == ["rank 0", "rank 1"]


@pytest.mark.parametrize(("width", "is_dark"), [(400, False), (1400, True)])
async def test_nothing_is_wider_than_the_window(page, page_file, width, is_dark):
    await page.open(page_file.as_uri(), width=width, is_dark=is_dark)
    await page.js('document.querySelectorAll("details").forEach((folded) => { folded.open = true; })')
    await page.drawn()
    assert await page.js("document.documentElement.scrollWidth") == width
    ground = await page.js("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, ground[4:-1].split(","))) < 64) is is_dark


async def test_tables_are_sorted_by_a_click(page, page_file):
    await page.open(page_file.as_uri())
    keys = '[...document.querySelectorAll("#largest tbody td:first-child")].map((cell) => cell.textContent)'
    before = await page.js(keys)
    await page.click("#largest th:first-child button")
    assert await page.js(keys) == sorted(before) != before
    await page.click("#largest th:first-child button")
    assert await page.js(keys) == sorted(before, reverse=True)


def test_what_changed_is_told_since_the_committed_step_before(root):
    told = json.loads(report(f"{root}/step-9", "--json").stdout)
    changes = told["changes"]
    assert changes["since"] == f"{root}/step-7"
    rows = {row["key"]: row for row in changes["rows"]}
    assert rows["model.a.w"]["what"] == "other bytes"
    assert rows[f"model.b.{HOSTILE}"]["what"] == "new"
    assert (rows["model.b.old"]["what"], rows["model.b.old"]["before"]) == ("gone", "F32 [5000]")
    assert [rows["epoch"][side] for side in ("what", "before", "after")] == ["another value", "1", "2"]
    assert changes["counts"] == {"the same": 1, "other bytes": 1, "another value": 1, "new": 61, "gone": 1}
    assert sum(changes["nbytes"].values()) == told["totals"]["nbytes"] + 5000 * 4
    assert changes["nbytes"]["the same"] == 90_000 * 4
    assert told["timelines"] is None
    assert json.loads(report(f"{root}/step-7", "--json").stdout)["changes"] is None


def test_a_page_is_written_whole_or_not_at_all(root, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("what was there")
    url = f"{root}/step-9"

    def with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    failed = report(url, "-o", str(file), preexec_fn=with_little_room)
    assert failed.returncode == 1
    assert failed.stderr == f"Error: cannot write {file}: File too large\n"
    assert (file.read_text(), os.listdir(tmp_path)) == ("what was there", ["report.html"])
    link = tmp_path / "link.html"
    link.symlink_to(file)
    assert report(url, "-o", str(link)).returncode == 0
    assert link.is_symlink()
    assert file.read_text().startswith("<!DOCTYPE html>")
    assert report(url, "-o", "-").stdout[:3000] == file.read_text()[:3000]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        ((), 2, "say where to write the page"),
        (("-o", "x.html", "--perfetto", "y.json"), 2, "say with --trace"),
        (("-o", "-", "--json"), 2, "only one thing fits on stdout"),
        (("-o", "x.html", "--trace", "memory://nothing-there"), 1, "no traces lie at memory://nothing-there/step-9"),
        (("-o", "x.html", "--since", "memory://nothing-there"), 1, "memory://nothing-there"),
    ],
    ids=["no output", "nothing to join", "two on stdout", "no traces", "nothing to compare with"],
)
def test_what_cannot_be_done_is_refused_and_no_page_is_left(root, tmp_path, args, status, said):
    refused = report(f"{root}/step-9", *args, cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (status, "")
    assert said in refused.stderr
    assert os.listdir(tmp_path) == []


def leaves(*sizes, prefix="model.layers"):
    return [
        Leaf(name="w", key=f"{prefix}.{n}.w", kind="tensor", dtype="F32", shape=(size,), nbytes=4 * size)
        for n, size in enumerate(sizes)
    ]


def check(node):
    """Each node has the bytes of its children; gives how many there are."""
    assert not node.children or node.nbytes == sum(child.nbytes for child in node.children)
    return 1 + sum(map(check, node.children))


def test_a_tree_of_very_many_entries_is_folded_and_loses_no_bytes():
    many = [leaf for block in range(200) for leaf in leaves(*range(1, 201), prefix=f"model.{block}.experts")]
    views = views_of(many)
    for view in (views["module"], views["dtype"]):
        assert view.nbytes == sum(leaf.nbytes for leaf in many)
        assert check(view) <= MOST_NODES + 50
    assert len(msgspec.json.encode(views)) < 500_000
    [model] = views["module"].children
    assert (model.name, len(model.children)) == ("model", 48)
    assert (model.children[-1].name, model.children[-1].count) == ("153 more", 153 * 200)


def test_keys_with_very_many_dots_are_no_trouble():
    deep = [leaves(1, prefix="a." * depth + "b")[0] for depth in range(3000)]
    assert check(views_of(deep)["module"]) > 64


def trace(rank, count, *, world=1000, save_id="ab", kind="save", url="s3://bucket/step-1"):
    """What the writer leaves: ``count`` uploads of 1 MiB on each of 20 lanes, later on higher ranks."""
    made = Outcome(kind=kind, url=url, rank=rank, world_size=world, save_id=save_id)
    events = [Event("upload", 1e9 + rank + n, 0.9, 1 << 20, "k") for n in range(count) for _ in range(20)]
    return encode(made, events, host="h", writer="a test")


def test_very_many_ranks_and_requests_become_few_bars_that_hold_them_all(tmp_path):
    lay(tmp_path, {f"save-{rank}.json": trace(rank, 100, world=40) for rank in range(40)})
    line = timeline_of(read_traces(f"file://{tmp_path}", "s3://bucket/step-1").found)
    assert [rank.rank for rank in line.ranks] == [0, *range(40 - MOST_RANKS, 40)]
    assert (line.left, line.span_s) == (40, pytest.approx(138.9))
    rows = [row for rank in line.ranks for row in rank.rows]
    bars = [bar for row in rows for lane in row.lanes for bar in lane]
    assert len(bars) <= 2000
    assert sum(bar.count for bar in bars) == sum(row.count for row in rows) == 17 * 2000
    assert [row.busy_s for row in rows] == pytest.approx([90] * 17)


def lay(directory, files, name="step-1"):
    (directory / name).mkdir()
    for key, data in files.items():
        (directory / name / key).write_bytes(data)


def test_traces_that_are_of_another_save_or_none_are_left_out_and_named(tmp_path):
    files = {"save-0.json": trace(0, 1, world=2), "save-1.json": trace(1, 1, world=2, save_id="")}
    files |= {"save-7.json": trace(7, 1, world=8), "save-1.txt": b"no trace", "load-0.json": b"{}"}
    lay(tmp_path, {**files, "load-1.json": trace(0, 1, kind="load")})
    found = read_traces(f"file://{tmp_path}", "s3://bucket/step-1", save_id="ab")
    assert [(t.other_data.kind, t.other_data.rank) for t in found.found] == [("save", 0), ("save", 1)]
    assert [problem.split()[0] for problem in found.problems] == ["load-0.json", "load-1.json", "save-7.json"]
    assert read_traces(f"file://{tmp_path}", "s3://bucket/step-1", save_id="cd").found == ()
    with pytest.raises(ObjectNotFoundError, match="WriteOptions"):
        read_traces(f"file://{tmp_path}", "s3://bucket/step-2")


def test_joined_traces_are_one_trace_with_a_process_for_each_rank(root, tmp_path):
    file = tmp_path / "all.json"
    made = report(f"{root}/step-9", "--json", "--trace", f"{root}-traces", "--perfetto", str(file))
    assert made.returncode == 0, made.stderr
    events = json.loads(file.read_bytes())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [name.split(" on ")[0] for _, name in sorted(names.items())] == [
        f"{kind}: rank {rank}" for rank in range(2) for kind in ("save", "load")
    ]
    one = read_traces(f"{root}-traces", f"{root}/step-9").of("load")[1]
    mine = [event for event in events if event["pid"] == 3 and event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in mine] == [
        (event.name, event.ts, event.dur) for event in one.trace_events if event.ph == "X"
    ]
    assert json.loads(joined([one]))["traceEvents"][-1] == mine[-1]
