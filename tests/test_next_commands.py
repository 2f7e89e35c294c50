"""Every `next:` line can be pasted as it is, and leads on: each scenario below types a command in some state, then
what it says to type next, and so on until nothing more is said. A command built in `magi_ray/` that no scenario prints
is a failure of the last test: add a scenario, a line in SCENARIOS.

Rendering is in this process, without Ray; everything else is as a stranger would type it.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from runs import flip, prepared

from magi_ray.cli import cli
from magi_ray.commands import background, foreground, stop
from magi_ray.drivers import driver_monitor, process
from magi_ray.drivers.status_file import DriverStatus, status_path
from magi_ray.errors import MediaError, StoreUnavailable
from magi_ray.manifest import write_manifest
from magi_ray.render.driving import leadership
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.runs.submission import create
from magi_ray.settings import job
from magi_ray.storage import keys, leases, probe
from magi_ray.storage.epochs import become_driver
from magi_ray.storage.leases import LeaseRecord
from magi_ray.storage.local import LocalStore
from magi_ray.system import Owner

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "magi_ray"
IMAGE = ROOT / "manifests" / "quickstart-image.png"
IMAGE_ROW = {"job_id": "two", "prompt": "sea", "image": str(IMAGE)}
JOB = """
preset = "magi-tiny"
[runtime]
num_frames = 24
video_size_h = 32
video_size_w = 32
num_steps = 8
[encoder]
preset = "ultrafast"
"""
LONGEST_CHAIN = 5
ELSEWHERE = Owner(name="driver", host="farm-7", boot="another", pid=4711, started=1)


class Place:
    """A folder to type in, with a job file, manifests and a store; all have names that need quoting."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, stages: Path) -> None:
        """stages: of all that is rendered here, in a store of their own, so that it takes a moment."""
        for store in ("my store", "magi-ray-store"):
            shutil.copytree(stages, folder / store)
        self.folder, self.patch = folder, patch
        self.processes: list[subprocess.Popen[bytes]] = []
        self.mends: list[Callable[[], Any]] = []
        (folder / "my job.toml").write_text(JOB)
        self.rows({"job_id": "one", "prompt": "sea"})
        (folder / "my rows.jsonl").write_text('{"job_id": "one", "prompt": "sea"}')

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder / "my store")

    @property
    def run_id(self) -> str:
        return sorted((self.folder / "my store" / "runs").iterdir())[-1].name

    def rows(self, *rows: Mapping[str, Any], name: str = "my rows.parquet") -> None:
        write_manifest([*rows], self.folder / name)

    def submitted(self, name: str = "my rows.parquet") -> str:
        made, files = prepared(self.folder / name, job(self.folder / "my job.toml"))
        create(self.store, made, files)
        return made.run_id

    def drive(self, *more: str, stage: int | None = None) -> None:
        """Render what was submitted; stop at ``stage``."""
        with at_stage(stage):
            type_in("drive", self.run_id, *STORE, "--local", *more)

    def failed(self, *more: str) -> None:
        """One row is done, one has failed; mended by its image."""
        self.rows({"job_id": "one", "prompt": "sea"}, IMAGE_ROW | {"seed": 9})
        self.submitted()
        [media] = self.store.list(keys.MEDIA)
        whole = self.store.get(media)
        self.store.put(media, b"rotten")
        self.mends.append(lambda: self.store.put(media, whole))
        shutil.rmtree(self.folder / "my store" / "prefixes")
        self.drive(*more)

    def rendered_elsewhere(self) -> None:
        become_driver(self.store, self.submitted(), ELSEWHERE, take_over=True)

    def rendered_here(self) -> None:
        """By a process that only sleeps; mended by its end, a moment later."""
        self.submitted()
        process = subprocess.Popen(["sleep", "600"])
        self.processes.append(process)
        started = next(int(line.split(") ")[1].split()[19]) for line in [Path(f"/proc/{process.pid}/stat").read_text()])
        here = Owner.here("driver")
        owner = Owner(name="driver", host=here.host, boot=here.boot, pid=process.pid, started=started)
        become_driver(self.store, self.run_id, owner, take_over=True)
        status = status_path(self.store, self.run_id, process.pid)
        status.parent.mkdir(parents=True, exist_ok=True)
        status.write_text(DriverStatus(driver=owner).model_dump_json())

        def end() -> None:
            process.kill()
            process.wait()

        self.mends.append(lambda: threading.Timer(0.3, end).start())

    def without(self, target: str, *, error: Exception) -> None:
        """Calling ``target`` fails until it is mended."""

        def fail(*_: Any, **__: Any) -> Any:
            raise error

        broken = pytest.MonkeyPatch()
        broken.setattr(target, fail)
        self.mends.append(broken.undo)


@dataclass(frozen=True)
class Scenario:
    """``words`` typed in the state that ``make`` makes end with ``code``; what they say to do first is done by the
    place's ``mends``. ``RUN`` in them is the id of the newest run. stdin: of all that is typed."""

    name: str
    words: tuple[str, ...]
    code: int = 0
    make: Callable[[Place], Any] = field(default=lambda place: None)
    stdin: str = ""


STORE = ("--store", "my store")
SUBMIT = ("submit", "my rows.parquet", "--job", "my job.toml", *STORE)
RENDER = ("render", "--job", "my job.toml", "--prompt", "sea", *STORE)


def start_drivers(patch: pytest.MonkeyPatch, by: Callable[..., Any]) -> None:
    """Background processes are what ``by`` makes."""
    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    patch.setattr(process, "subprocess", SimpleNamespace(Popen=by, **names))


class InThisProcess:
    """In place of ``subprocess.Popen``: ``magi-ray drive`` from beginning to end, here."""

    def __init__(self, command: list[str], *, stdout: Any, **_: Any) -> None:
        self.pid = os.getpid()
        result = CliRunner().invoke(cli, command[3:])
        stdout.write(result.stderr.encode())
        self.returncode: int | None = result.exit_code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, _timeout: float) -> None: ...


@contextmanager
def at_stage(stage: int | None, then: Callable[[], Any] | None = None) -> Iterator[None]:
    """When a video has come to ``stage``: ``then``, once; Ctrl-C without it."""
    todo = [then]

    def show(progress: RunProgress) -> None:
        if stage is not None and todo and any(video.stages_done >= stage for video in progress.videos.values()):
            what = todo.pop()
            if what is None:
                raise KeyboardInterrupt
            what()

    @contextmanager
    def follow(_console: object) -> Iterator[Callable[[RunProgress], None]]:
        yield show

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreground, "follow", follow)
        yield


def killed(place: Place) -> None:
    class Killed(InThisProcess):
        def __init__(self, *_: Any, **__: Any) -> None:
            self.pid, self.returncode = 4711, -9

    start_drivers(place.patch, Killed)
    place.mends.append(place.patch.undo)


def taken_over(place: Place) -> None:
    """A driver is followed, and another takes the run from it."""
    run_id = place.submitted()
    wanted = at_stage(1, lambda: become_driver(place.store, run_id, ELSEWHERE, take_over=True))
    wanted.__enter__()
    place.mends.append(lambda: wanted.__exit__(None, None, None))


def ctrl_c(place: Place) -> None:
    wanted = at_stage(1)
    wanted.__enter__()
    place.mends.append(lambda: wanted.__exit__(None, None, None))


def beating(place: Place) -> None:
    """A driver elsewhere is alive, until it is mended."""
    place.rendered_elsewhere()
    key, ended = keys.run_lease(place.run_id), threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            lease = LeaseRecord.model_validate_json(place.store.get(key))
            place.store.put(key, lease.model_copy(update={"beat": lease.beat + 1}).model_dump_json().encode())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    place.mends.append(lambda: (ended.set(), thread.join()))


def half_deleted(place: Place) -> None:
    place.submitted()
    place.drive()
    place.store.put("probes/x/y", b"left behind")


def damaged(which: str, how: Callable[[LocalStore, str], Any] = flip) -> Callable[[Place], None]:
    """A run that is done, of which the object that ``which`` names is damaged."""

    def make(place: Place) -> None:
        place.rows(IMAGE_ROW)
        assert type_in(*SUBMIT, "--local").exit_code == 0
        [*_, key] = [key for key in place.store.list("") if which in key]
        how(place.store, key)

    return make


def unknown_here(place: Place) -> None:
    """The run was submitted elsewhere; mended by submitting it there again."""
    damaged("run.json")(place)
    for note in (place.folder.parent / "cache" / "runs").glob("*/*.submitted"):
        note.unlink()
    place.mends.append(lambda: type_in(*SUBMIT))


def damaged_take(place: Place) -> None:
    with_takes(place)
    flip(place.store, keys.take(place.run_id, 1))


def with_takes(place: Place) -> None:
    place.submitted()
    place.drive()
    assert type_in("retry", "--job", "one", "--from-chunk", "0", "--local", *STORE).exit_code == 0


def copied(place: Place) -> None:
    place.submitted()
    runs = place.folder / "my store" / "runs"
    shutil.copytree(runs / place.run_id, runs / "other-1")


def left_out(place: Place) -> None:
    place.rows({"job_id": "one", "prompt": "sea"}, {"job_id": "bad", "prompt": " "})


def two_runs(place: Place) -> None:
    place.submitted()
    place.rows({"job_id": "two", "prompt": "sea"})
    place.submitted()
    (place.folder / "my rows.parquet").unlink()


def two_rendered(place: Place) -> None:
    place.rendered_elsewhere()
    place.rows({"job_id": "two", "prompt": "sea"})
    place.rendered_elsewhere()


def no_weights(place: Place) -> None:
    weights = place.folder / "my weights"
    shutil.copytree(Path(os.environ["MAGI_RAY_CACHE"]) / "magi-tiny", weights)
    assert type_in(*SUBMIT, "--weights", "my weights", "--dry-run").exit_code == 0
    made, files = prepared(place.folder / "my rows.parquet", job(place.folder / "my job.toml", weights=weights))
    create(place.store, made, files)
    weights.rename(place.folder / "away")
    place.mends.append(lambda: (place.folder / "away").rename(weights))


def bad_rows(place: Place) -> None:
    good = (place.folder / "my rows.parquet").read_bytes()
    left_out(place)
    place.mends.append(lambda: (place.folder / "my rows.parquet").write_bytes(good))


def bad_source(place: Place) -> None:
    good = (place.folder / "my rows.jsonl").read_text()
    (place.folder / "my rows.jsonl").write_text(good.replace("sea", " "))
    place.mends.append(lambda: (place.folder / "my rows.jsonl").write_text(good))


def bad_image(place: Place) -> None:
    (place.folder / "a b.png").write_bytes(b"not a picture")
    place.rows({"job_id": "one", "prompt": "sea", "image": str(place.folder / "a b.png")})
    place.mends.append(lambda: shutil.copy(IMAGE, place.folder / "a b.png"))


def cut_off(place: Place) -> None:
    """A driver of this machine, and a store that is out of reach."""
    place.rendered_here()
    place.mends.clear()
    place.without("magi_ray.commands.stop.open_named_run", error=StoreUnavailable("the store is out of reach"))


def bad_store(place: Place) -> None:
    check = probe._Check(name="locks", good="are there", why="They are needed.", fault=lambda *_: "there are none")
    place.patch.setattr(probe, "_NEEDED", (check,))
    place.mends.append(place.patch.undo)


def no_space(place: Place) -> None:
    place.rows({"job_id": "one", "prompt": "sea", "seed": 3})
    place.patch.setattr("magi_ray.commands.plan.free_bytes", lambda _store: 10)
    place.mends.append(place.patch.undo)


def ffmpeg_fails(place: Place) -> None:
    place.without("magi_ray.render.tasks.finish.join", error=MediaError("not today"))


def rows_fail(place: Place) -> None:
    place.submitted()
    ffmpeg_fails(place)


SCENARIOS = [
    Scenario("plan", ("plan", *SUBMIT[1:])),
    Scenario("plan with json", ("plan", *SUBMIT[1:], "--json")),
    Scenario("plan what is left out", ("plan", *SUBMIT[1:], "--skip-invalid"), 0, left_out),
    Scenario("plan rows from stdin", ("plan", "-", *SUBMIT[2:]), 0, stdin="job_id,prompt\none,sea\n"),
    Scenario("plan a folder", ("plan", "my parts", *SUBMIT[2:]), 0, lambda place: (
        (place.folder / "my parts").mkdir(), shutil.move("my rows.parquet", "my parts"))),
    Scenario("no space", SUBMIT, 2, no_space),
    Scenario("dry run", (*SUBMIT, "--dry-run", "--local")),
    Scenario("build", ("build", "my rows.jsonl", "-o", "b c.parquet", "--job", "my job.toml", "--device", "cpu")),
    Scenario("build unchecked", ("build", "my rows.jsonl", "-o", "b.parquet", "--no-check", "--job", "my job.toml")),
    Scenario("validate", ("manifest", "validate", "my rows.parquet", "--job", "my job.toml", "--json")),
    Scenario("validate at the top", ("validate", "my rows.parquet", "--job", "my job.toml")),
    Scenario("another kind of file", ("submit", "my job.toml"), 3),
    Scenario("rows of another tool", ("validate", "my rows.jsonl", "--job", "my job.toml")),
    Scenario("a misspelt file", ("submit", "my row.parquet", *SUBMIT[2:]), 2),
    Scenario("bad rows", SUBMIT, 3, bad_rows),
    Scenario("show bad rows", ("manifest", "show", *SUBMIT[1:4]), 3, bad_rows),
    Scenario("bad rows of another tool", ("build", "my rows.jsonl", "-o", "b.parquet"), 3, bad_source),
    Scenario("build into no folder", ("build", "my rows.jsonl", "-o", "no such folder/b.parquet"), 2),
    Scenario("a bad image", SUBMIT, 3, bad_image),
    Scenario("an unknown preset", ("submit", "my rows.parquet", "--preset", "magi-tny"), 2),
    Scenario("a preset without its weights", ("plan", "my rows.parquet", "--preset", "24B"), 2),
    Scenario("a misspelt command", ("statsu",), 2),
    Scenario("a missing argument", ("manifest", "show"), 2),
    # One video
    Scenario("another suffix", (*RENDER, "-o", "a b.mov"), 2),
    Scenario("no such folder", (*RENDER, "-o", "no such/b.mp4"), 2),
    Scenario("an interrupted video", (*RENDER, "-o", "b.mp4"), 130, ctrl_c),
    Scenario("a video that fails", (*RENDER, "-o", "b.mp4"), 4, ffmpeg_fails),
    # Stores and names
    Scenario("no store", ("status", "x"), 2, lambda place: shutil.rmtree(place.folder / "magi-ray-store")),
    Scenario("no store, but one here", ("status", "x", "--store", "no store"), 2),
    Scenario("no runs", ("list", *STORE)),
    Scenario("no runs to look at", ("status", *STORE), 2),
    Scenario("nonsense", ("resume", "zzzzzz", *STORE), 2, Place.submitted),
    Scenario("a misspelt run", ("retry", "my-row-1", "--failed", *STORE), 2, Place.submitted),
    Scenario("a misspelt run to stop", ("cancel", "my-row-1", *STORE), 2, Place.submitted),
    Scenario("many runs", ("resume", "my-rows", *STORE), 2, two_runs),
    Scenario("many runs of a file", ("status", "my rows.parquet", *STORE), 2, two_runs),
    Scenario("too far back", ("resume", "my-rows@-7", *STORE), 2, two_runs),
    Scenario("nothing to cancel", ("cancel", *STORE), 2, Place.submitted),
    Scenario("which to pause", ("pause", *STORE), 2, two_rendered),
    Scenario("a store that will not do", SUBMIT, 1, bad_store),
    Scenario("doctor", ("doctor",), 1, lambda place: place.without(
        "magi_ray.media.encoder.find_ffmpeg", error=MediaError("none", remedy="install one"))),
    # Runs at rest
    *(Scenario(f"{verb} a new run", (verb, *STORE), code, Place.submitted)
      for verb, code in (("status", 0), ("watch", 1))),
    *(Scenario(f"{verb} a stopped run", (verb, *STORE), code, lambda place: (place.submitted(), place.drive(stage=1)))
      for verb, code in (("status", 0), ("watch", 1))),
    *(Scenario(f"{verb} a cancelled run", (verb, *STORE), code, lambda place: (
        place.submitted(), type_in("cancel", "RUN", *STORE))) for verb, code in (("status", 0), ("watch", 5))),
    *(Scenario(f"{verb} a failed run", (verb, *STORE), code, Place.failed) for verb, code in (
        ("status", 0), ("watch", 4), ("resume", 4), ("drive", 4))),
    Scenario("fetch a failed run", ("fetch", *STORE), 4, Place.failed),
    Scenario("fetch a stopped run", ("fetch", *STORE), 4, lambda place: (place.submitted(), place.drive(stage=1))),
    Scenario("fetch a damaged video", ("fetch", *STORE), 4, damaged("videos/two.mp4")),
    Scenario("fetch over another file", ("fetch", "-o", "my videos", *STORE), 2, lambda place: (
        place.submitted(), place.drive(), (place.folder / "my videos").mkdir(),
        (place.folder / "my videos" / "one.mp4").write_text("mine"))),
    Scenario("watch a broken run", ("watch", *STORE), 4, lambda place: place.failed("--max-failed-rows", "0")),
    Scenario("break", (*SUBMIT, "--max-failed-rows", "0"), 4, rows_fail),
    Scenario("retry without failures", ("retry", *STORE), 0, Place.submitted),
    Scenario("retry what is done", ("retry", *STORE), 0, lambda place: (place.submitted(), place.drive())),
    Scenario("retry no such row", ("retry", "--job", "ones", *STORE), 2, Place.submitted),
    Scenario("retry a row that was left out", ("retry", "--job", "bad", *STORE), 2, lambda place: (
        left_out(place), type_in(*SUBMIT, "--skip-invalid", "--local"))),
    Scenario("takes", ("takes", *STORE), 0, with_takes),
    Scenario("no such take", ("retry", "--job", "one", "--take", "7", *STORE), 2, Place.submitted),
    Scenario("a damaged take", ("status", *STORE), 1, damaged_take),
    Scenario("pause a run at rest", ("pause", "RUN", *STORE), 0, Place.submitted),
    Scenario("pause with json", ("pause", "RUN", *STORE, "--json"), 0, Place.submitted),
    Scenario("cancel a run at rest", ("cancel", "RUN", *STORE), 0, Place.submitted),
    Scenario("resume without weights", ("resume", *STORE), 2, no_weights),
    Scenario("a driver that is interrupted", ("drive", *STORE), 130, lambda place: (place.submitted(), ctrl_c(place))),
    # Runs being rendered
    Scenario("no wait", (*SUBMIT, "--no-wait", "--no-dashboard"), 0),
    Scenario("a killed driver", SUBMIT, 1, killed),
    Scenario("a driver that lost its run", ("drive", *STORE), 8, taken_over),
    Scenario("a second driver", ("drive", *STORE), 8, beating),
    Scenario("status of a run elsewhere", ("status", *STORE), 0, Place.rendered_elsewhere),
    Scenario("pause a run elsewhere", ("pause", "--timeout", "0.1", *STORE), 1, Place.rendered_elsewhere),
    Scenario("cancel a run elsewhere", ("cancel", *STORE), 1, Place.rendered_elsewhere),
    Scenario("resume a run rendered here", ("resume", *STORE), 8, Place.rendered_here),
    Scenario("retry a run rendered here", ("retry", *STORE), 8, Place.rendered_here),
    Scenario("submit a run rendered here", (*SUBMIT, "--no-wait"), 0, Place.rendered_here),
    Scenario("pause a run rendered here", ("pause", *STORE, "--timeout", "0"), 1, Place.rendered_here),
    Scenario("pause with json what is rendered here", ("pause", *STORE, "--timeout", "0", "--json"), 1,
             Place.rendered_here),
    Scenario("cancel a run rendered here", ("cancel", *STORE), 0, Place.rendered_here),
    Scenario("cancel without the store", ("cancel", *STORE), 0, cut_off),
    # Upkeep
    Scenario("verify a damaged video", ("verify", *STORE), 1, damaged("videos/two.mp4")),
    Scenario("verify what nobody needs", ("verify", *STORE), 1, lambda place: (
        damaged("text-")(place), shutil.rmtree(place.folder / "my store" / "runs"))),
    Scenario("verify a damaged image", ("verify", "my rows.parquet", *STORE), 1, damaged("media/")),
    Scenario("verify a run from elsewhere", ("verify", *STORE), 1, unknown_here),
    Scenario("list a damaged run", ("list", *STORE), 0, damaged("run.json")),
    Scenario("a copied run", ("status", "other-1", *STORE), 1, copied),
    Scenario("a renamed run", ("status", "other-1", *STORE), 1, lambda place: (
        place.submitted(), shutil.move(f"my store/runs/{place.run_id}", "my store/runs/other-1"))),
    Scenario("verify a damaged take", ("verify", *STORE), 1, damaged_take),
    Scenario("forget a misspelt run", ("gc", "--forget=my-row-1", *STORE), 2, Place.submitted),
    Scenario("a damaged run", ("status", "RUN", *STORE), 1, damaged("run.json")),
    Scenario("a lost manifest", ("status", *STORE), 1, damaged("manifest.parquet", LocalStore.delete)),
    Scenario("gc", ("gc", "--min-age", "0s", *STORE), 0, half_deleted),
    Scenario("gc of a damaged run", ("gc", *STORE), 1, damaged("run.json")),
    Scenario("forget a run rendered here", ("gc", "--forget", "RUN", *STORE), 2, beating),
]  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """A store with the stages, segments and texts of every video that scenarios render, but no run."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "job.toml").write_text(JOB)
    write_manifest([{"job_id": "text", "prompt": "sea"}, IMAGE_ROW], folder / "rows.parquet")
    made, files = prepared(folder / "rows.parquet", job(folder / "job.toml", weights=tiny_weights))
    store = LocalStore(folder / "store")
    create(store, made, files)
    assert len(render_locally(store, made).published) == 2
    for done in ("runs", "media"):
        shutil.rmtree(folder / "store" / done)
    return folder / "store"


@pytest.fixture
def place(tmp_path: Path, tiny_weights: Path, stages: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "magi-tiny").symlink_to(tiny_weights)
    monkeypatch.setenv("MAGI_RAY_CACHE", str(cache))
    folder = tmp_path / "my folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    start_drivers(monkeypatch, InThisProcess)
    monkeypatch.setattr(background, "FOLLOW_REFRESH_S", 0.05)
    for module in (driver_monitor, leadership, leases):
        monkeypatch.setattr(module, "TTL_S", 1.0)
    monkeypatch.setattr(stop, "ASKED_S", 0.05)
    monkeypatch.setattr(stop, "PAUSE_REFRESH_S", 0.1)
    monkeypatch.setattr("magi_ray.commands.look.WATCH_REFRESH_S", 0.1)

    @contextmanager
    def no_ray(**_: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr("magi_ray.cluster.local_ray.local_ray", no_ray)
    monkeypatch.setattr("magi_ray.cluster.workers.render_on_ray", render_locally)
    with pytest.MonkeyPatch.context() as patch:
        place = Place(folder, patch, stages)
        yield place
    for each in place.processes:
        each.kill()
        each.wait()


def type_in(*words: str, stdin: str = "") -> Result:
    """`magi-ray` with these words, in this process."""
    if "RUN" in words:
        [*_, newest] = sorted((Path("my store") / "runs").iterdir())
        words = tuple(newest.name if word == "RUN" else word for word in words)
    return CliRunner().invoke(cli, list(words), input=stdin)


def said_next(result: Result) -> list[str]:
    """The commands that it says to type, on stderr and in the object that --json prints."""
    found = [line.removeprefix("next: ") for line in result.stderr.splitlines() if line.startswith("next: ")]
    if result.stdout.startswith("{"):
        told = json.loads(result.stdout)
        found += filter(None, [told.get("next_command") or told.get("error", {}).get("next_command")])
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_what_a_command_says_to_type_next_leads_on(scenario: Scenario, place: Place, tracer: Tracer) -> None:
    scenario.make(place)
    with tracer.on():
        result = type_in(*scenario.words, stdin=scenario.stdin)
        assert result.exit_code == scenario.code, result.stderr
        for mend in place.mends:
            mend()
        waiting = said_next(result)
        assert waiting, result.stderr
        assert ("from stdin again" in result.stderr) == bool(scenario.stdin)
        typed = []
        while waiting:
            command = waiting.pop(0)
            typed.append(command)
            assert len(typed) <= LONGEST_CHAIN, typed
            program, *words = shlex.split(command)
            if program != "magi-ray":
                subprocess.run([program, *words], check=True, timeout=10)
                return
            result = type_in(*words, stdin=scenario.stdin)
            assert result.exit_code != 2, (command, result.stderr)
            assert "Traceback (most" not in result.stderr, (command, result.stderr)
            assert command not in said_next(result), f"it leads to itself: {command}\n{result.stderr}"
            waiting = [following for following in said_next(result) if following not in typed]
    assert result.exit_code == 0, (typed, result.stderr)


# That all are typed -------------------------------------------------------------------------------------------------

# A file and the lines of a statement in it that builds a command.
Site = tuple[str, int, int]
BUILDERS = {"command_line", "magi_ray_command", "run_command", "delete_command", "move_command", "verify_command"}
# Statements that no scenario reaches, by "module.function: " and the text that follows there, and why.
OUT_OF_REACH = {
    "api.runs._command: ": "for Python: tests/test_submitted_run.py",
    "commands.outcome.report_exit: say_next(stored.command('fetch'))": "on S3: tests/test_s3_runs.py",
    "render.driving.leadership.check: raise StoreError": "a run deleted while it is rendered",
    "render.runs.record.read_run: raise RunNotFound": "a run deleted between two calls to the store",
}


def sites() -> dict[Site, str]:
    """The statements that build a command to type, with "module.function: statement" of each."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text())
        module = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or function.name in BUILDERS:
                continue
            for node in ast.walk(function):
                simple = isinstance(node, ast.stmt) and not hasattr(node, "body") and not isinstance(node, ast.Match)
                if simple and any(map(builds, ast.walk(node))):
                    found[str(path), node.lineno, node.end_lineno or 0] = (
                        f"{module}.{function.name}: {ast.unparse(node)}"
                    )
    return found


def builds(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in BUILDERS or (name == "command" and isinstance(node.func, ast.Attribute))
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("magi-ray ")


class Tracer:
    """Notes which of ``sites`` are executed in this thread while it is on."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._by_file: dict[str, list[Site]] = {}
        for site in sites:
            self._by_file.setdefault(site[0], []).append(site)
        self._left: dict[CodeType, set[Site]] = {}
        self.reached: set[Site] = set()

    @contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(lambda frame, _event, _: self._line if self._left_in(frame.f_code) else None)
        try:
            yield
        finally:
            sys.settrace(before)

    def _left_in(self, code: CodeType) -> set[Site]:
        """Those in ``code`` that have not been executed."""
        if code not in self._left:
            last = max((line for *_, line in code.co_lines() if line), default=0)
            there = self._by_file.get(code.co_filename, ())
            self._left[code] = {site for site in there if code.co_firstlineno <= site[1] <= last}
        return self._left[code]

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            left = self._left_in(frame.f_code)
            now = {site for site in left if site[1] <= frame.f_lineno <= site[2]}
            left -= now
            self.reached |= now
        return self._line


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer(sites())


def test_every_command_that_is_built_is_typed_in_some_scenario(tracer: Tracer, request: pytest.FixtureRequest) -> None:
    ran = [item for item in request.session.items if "leads_on[" in item.name]
    if len(ran) < len(SCENARIOS):
        pytest.skip("only with all scenarios")
    found = sites()
    left = {found[site] for site in found.keys() - tracer.reached}
    excused = {where: known for where in left for known in OUT_OF_REACH if where.startswith(known)}
    missed = sorted(left - excused.keys())
    assert not missed, "add scenarios that print what these build:\n" + "\n".join(missed)
    assert OUT_OF_REACH.keys() == set(excused.values()), "these are reached, or are no more"
