"""What ``submit`` starts goes on without it: left, killed, paused, cancelled, retried. Without Ray, which is slower."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from rgw import Rgw
from runs import contents, flip, prepared
from typed import Command, wait_until

from magi_ray.cli import cli
from magi_ray.commands import stop
from magi_ray.commands.processes import alive, in_session, kill, tree_below
from magi_ray.drivers.status_file import driver_on_this_machine, last_error, read_status, status_file, status_path
from magi_ray.errors import MagiRayError, ObjectDamaged, StoreDenied, Superseded, WeightsError, WorkerLost
from magi_ray.manifest import write_manifest
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import open_run
from magi_ray.render.runs.submission import create
from magi_ray.settings import job
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.opening import open_store
from magi_ray.system import Owner

IMAGE = Path(__file__).parents[1] / "manifests" / "quickstart-image.png"
JOB = """
preset = "magi-tiny"
[runtime]
num_frames = 48
video_size_h = 32
video_size_w = 32
num_steps = 8
[encoder]
preset = "ultrafast"
"""
# Some seconds of work, so that there is time to step in; and more than any test waits for.
SOME, ENDLESS = 30, 2000

Start = Callable[..., Command]


@pytest.fixture
def here(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "magi-tiny").symlink_to(tiny_weights)
    monkeypatch.setenv("MAGI_RAY_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


@pytest.fixture
def start(here: Path) -> Iterator[Start]:
    """``magi-ray`` with these words, in a terminal of its own; nothing of it survives the test."""
    commands: list[Command] = []

    def start(*words: str) -> Command:
        commands.append(Command(here, *words))
        return commands[-1]

    yield start
    for command in commands:
        command.clean_up()


def rows(here: Path, *rows: dict[str, Any]) -> tuple[str, ...]:
    """A manifest of these rows, and the words that submit it."""
    write_manifest([{"prompt": "sea"} | row for row in rows], here / "m.parquet")
    return "submit", "m.parquet", "--job", "job.toml", "--local"


def run(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def store() -> LocalStore:
    return LocalStore(Path("magi-ray-store").absolute())


def run_id() -> str:
    [found] = (Path("magi-ray-store") / "runs").iterdir()
    return found.name


def rendering(command: Command, stages: int = 3) -> None:
    """Wait until it renders, with so many stages committed."""

    def enough() -> bool:
        assert command.process.poll() is None, command.stderr
        return len(list(Path("magi-ray-store").glob("stages/*/*/commit.json"))) >= stages

    wait_until(enough, "some stages are committed", within_s=120)


def status() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(run("status", run_id(), "--json").stdout)
    return told


def undisturbed() -> dict[str, bytes]:
    """What the submitted rows become when nobody steps in."""
    memory, settings = MemoryStore(), job(Path("job.toml"))
    alone, files = prepared(Path("m.parquet"), settings)
    create(memory, alone, files)
    render_locally(memory, alone)
    return contents(memory, alone)


def rendered() -> dict[str, bytes]:
    return contents(store(), open_run(store(), run_id()))


# Leaving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_leaves_a_submitted_run_leaves_it_rendering(here: Path, start: Start, number: signal.Signals) -> None:
    submit = start(*rows(here, {"job_id": "one", "num_chunks": SOME}), "--json")
    rendering(submit)
    os.killpg(submit.process.pid, number)  # as a terminal does: to all that it sees
    code, stdout = submit.end(within_s=30)
    assert code == 130
    told = json.loads(stdout)
    assert (told["run_id"], told["next_command"]) == (run_id(), f"magi-ray watch {run_id()}")
    *_, left, following = submit.stderr.splitlines()
    assert left == f"Detached; process {told['pid']} goes on rendering."
    assert following == f"next: magi-ray watch {run_id()}"
    now = status()
    assert (now["state"], now["driver"]["pid"]) == ("rendering", told["pid"])
    watched = run("watch", run_id())
    assert watched.exit_code == 0, Path(told["log"]).read_text()
    assert (here / "magi-ray-store" / keys.video(run_id(), "one")).is_file()
    wait_until(submit.has_left_nothing, "the driver has ended")


def test_while_a_run_is_rendered_here_another_command_is_refused_unless_it_takes_over(here: Path, start: Start) -> None:
    words = rows(here, {"job_id": "one", "num_chunks": 60})
    first = start(*words)
    rendering(first)
    driver = first.driver()
    assert driver is not None
    for again in (("resume", run_id(), "--local"), ("retry", run_id(), "--local")):
        refused = run(*again)
        assert refused.exit_code == 8
        assert "being rendered" in refused.stderr
        assert f"by process {driver.pid}." in refused.stderr
    followed = json.loads(run(*words, "--no-wait", "--json").stdout)
    assert followed["pid"] == driver.pid
    second = start(*words, "--take-over")
    assert first.end(within_s=60)[0] == 8, first.stderr
    assert "magi-ray watch" in first.stderr.splitlines()[-1]
    assert second.end()[0] == 0, second.stderr
    assert rendered() == undisturbed()


def test_submits_of_the_same_moment_are_one_rendering(here: Path, start: Start) -> None:
    words = rows(here, {"job_id": "one", "num_chunks": SOME})
    submits = [start(*words) for _ in range(2)]
    ended = [submit.end() for submit in submits]
    assert [code for code, _ in ended] == [0, 0], [submit.stderr for submit in submits]
    assert ended[0] == ended[1]
    assert "is being rendered already, by process" in "".join(submit.stderr for submit in submits)
    assert rendered() == undisturbed()


# Errors of the process that renders -----------------------------------------------------------------------------


def test_a_driver_that_is_killed_is_told_with_its_signal_and_the_way_on(here: Path, start: Start) -> None:
    submit = start(*rows(here, {"job_id": "one", "num_chunks": ENDLESS}))
    rendering(submit)
    driver = submit.driver()
    assert driver is not None
    driver.kill()
    code, stdout = submit.end(within_s=30)
    assert (code, stdout) == (1, "")
    said = submit.stderr
    assert f"Process {driver.pid}, which rendered run {run_id()}, ended with signal 9 (SIGKILL)" in said
    assert "What was committed is kept" in said
    assert said.splitlines()[-1] == f"next: magi-ray resume {run_id()} --local"
    assert "of 1 video done" in said.partition("The end of its log:")[2]
    assert status()["state"] == "stopped"


def test_a_driver_that_is_terminated_ends_submit_as_ctrl_c_did(here: Path, start: Start) -> None:
    submit = start(*rows(here, {"job_id": "one", "num_chunks": ENDLESS}))
    rendering(submit)
    driver = submit.driver()
    assert driver is not None
    driver.terminate()
    assert submit.end(within_s=60) == (130, "")
    assert submit.stderr.splitlines()[-2:] == [
        "Stopped. What was committed is kept.", f"next: magi-ray resume {run_id()} --local",
    ]  # fmt: skip


def test_an_error_of_the_driver_reads_as_if_it_had_happened_here(here: Path, tiny_weights: Path, start: Start) -> None:
    shutil.copytree(tiny_weights, here / "weights")
    submit = start(*rows(here, {"job_id": "one", "num_chunks": ENDLESS}), "--weights", "weights")
    rendering(submit)
    assert run("cancel", run_id()).exit_code == 0
    submit.end()
    [vae] = (here / "weights" / "vae").glob("*.safetensors")
    vae.unlink()
    apart, itself = run("resume", run_id(), "--local"), run("drive", run_id(), "--local", "--resume")
    assert apart.exit_code == itself.exit_code == 2
    told = [line for line in itself.stderr.splitlines() if not line.startswith("next:")]
    assert told
    assert told[0].startswith("Error: ")
    assert str(here / "weights" / "vae") in itself.stderr
    assert set(told) <= set(apart.stderr.splitlines())
    assert apart.stderr.splitlines()[-1] == f"next: magi-ray resume {run_id()} --local"
    as_json = json.loads(run("resume", run_id(), "--local", "--json").stdout)
    assert as_json["error"]["kind"] == "WeightsError"
    left = run("resume", run_id(), "--local", "--no-wait")
    assert left.exit_code == 0
    watched = run("watch", run_id())
    assert watched.exit_code == 1
    assert told[0].removeprefix("Error: ") in watched.stderr


@pytest.mark.parametrize("kind", [ObjectDamaged, StoreDenied, Superseded, WeightsError, WorkerLost])
def test_errors_reach_the_other_process_whole(here: Path, kind: type[MagiRayError]) -> None:
    error = kind("what", remedy="how", next_command="magi-ray list")
    with pytest.raises(kind), status_file(store(), "run"):
        raise error
    written = read_status(status_path(store(), "run", os.getpid()))
    assert written is not None
    assert written.ended is not None
    assert written.ended.error is not None
    again = written.ended.error.error()
    assert (type(again), vars(again)) == (kind, vars(error) | {"exit_code": kind.exit_code})
    assert written.ended.error.traceback == ""


def test_a_bug_reaches_the_other_process_with_its_traceback(here: Path) -> None:
    with pytest.raises(ZeroDivisionError), status_file(store(), "run"):
        _ = 1 / 0
    told = last_error(store(), "run")
    assert told is not None
    assert "ZeroDivisionError: division by zero" in told.traceback
    assert "This is a bug in magi-ray" in told.message
    assert told.exit_code == 1


def test_a_status_file_of_another_version_is_left_unread(here: Path) -> None:
    path = status_path(store(), "run", os.getpid())
    path.parent.mkdir(parents=True)
    driver = Owner.here("driver").model_dump()
    path.write_text(json.dumps({"driver": driver, "end": {"outcome": None, "error": None, "seconds": 1.0}}))
    assert read_status(path) is None
    assert last_error(store(), "run") is None
    assert driver_on_this_machine(store(), "run") is None
    with status_file(store(), "run"):
        assert driver_on_this_machine(store(), "run") is not None


# Processes ------------------------------------------------------------------------------------------------------


def test_the_processes_of_a_driver_are_found_below_it_and_in_its_session_and_killed_for_good() -> None:
    program = "import subprocess, time; subprocess.Popen(['sleep', '300']); time.sleep(300)"
    driver = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        wait_until(lambda: len(tree_below(driver.pid)) == 2, "it has a child")
        tree = tree_below(driver.pid)
        assert tree == in_session(driver.pid) == alive(tree)
        driver.kill()
        wait_until(lambda: len(alive(tree)) == 1, "it has ended, though nobody has waited for it: a zombie")
        assert driver.pid not in {process.pid for process in alive(tree)}
        [left] = alive(in_session(driver.pid))
        driver.wait()
        assert tree_below(driver.pid) == set()
        kill(tree)
        wait_until(lambda: not alive(tree), "its child was killed too")
        assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
        kill(tree)
    finally:
        kill(in_session(driver.pid))
        driver.wait()


# Pausing and cancelling -----------------------------------------------------------------------------------------


def test_a_paused_run_goes_on_to_the_same_bytes(here: Path, start: Start) -> None:
    words = rows(here, {"job_id": "one", "num_chunks": SOME}, {"job_id": "two", "num_chunks": 2, "seed": 2})
    submit = start(*words)
    rendering(submit)
    paused = run("pause", run_id())
    assert paused.exit_code == 0, paused.stderr
    assert "Paused. What was committed is kept." in paused.stderr
    assert paused.stderr.splitlines()[-1] == f"next: magi-ray resume {run_id()} --local"
    assert submit.end(within_s=60)[0] == 6
    assert "Paused. What was committed is kept." in submit.stderr
    assert submit.has_left_nothing()
    assert status()["state"] == "paused"
    [line] = json.loads(run("list", "--json").stdout)["runs"]
    assert line["state"] == "paused"
    assert run("watch", run_id()).exit_code == 6
    # What job systems start leaves it alone.
    kept = len(list(Path("magi-ray-store").glob("stages/*/*/commit.json")))
    assert run("drive", run_id(), "--local").exit_code == 6
    assert len(list(Path("magi-ray-store").glob("stages/*/*/commit.json"))) == kept
    again = run("pause", run_id())
    assert again.exit_code == 0
    assert "is not being rendered: there is nothing to pause" in again.stderr
    resumed = run("resume", run_id(), "--local")
    assert resumed.exit_code == 0, resumed.stderr
    assert f"Run {run_id()} was paused; going on with it." in resumed.stderr
    assert rendered() == undisturbed()
    assert status()["state"] == "done"


def test_cancel_stops_at_once_and_leaves_no_process(here: Path, start: Start) -> None:
    submit = start(*rows(here, {"job_id": "one", "num_chunks": ENDLESS}))
    rendering(submit)
    cancelled = run("cancel", run_id())
    assert cancelled.exit_code == 0, cancelled.stderr
    assert submit.end(within_s=15)[0] == 5
    assert submit.has_left_nothing()
    assert "has ended" in cancelled.stderr
    assert status()["state"] == "cancelled"
    assert run("watch", run_id()).exit_code == 5


def test_cancel_ends_a_driver_that_does_not_listen(here: Path, start: Start) -> None:
    assert stop.ASKED_S + stop.TERMINATED_S + 2 * stop.KILLED_S < 15
    submit = start(*rows(here, {"job_id": "one", "num_chunks": ENDLESS}))
    rendering(submit)
    driver = submit.driver()
    assert driver is not None
    driver.suspend()
    begun = time.monotonic()
    cancelled = run("cancel", run_id())
    assert cancelled.exit_code == 0, cancelled.stderr
    assert time.monotonic() - begun < 20
    assert f"process {driver.pid} was killed" in cancelled.stderr
    assert submit.end(within_s=30)[0] == 1, "it did not end by itself"
    assert submit.has_left_nothing()
    assert status()["state"] == "cancelled"


def test_cancel_ends_a_driver_of_this_machine_also_while_the_store_is_out_of_reach(
    here: Path, start: Start, rgw: Rgw, s3_address: str
) -> None:
    submit = start(*rows(here, {"job_id": "one", "num_chunks": ENDLESS}), "--store", s3_address)
    bucket = open_store(s3_address)

    def enough() -> bool:
        assert submit.process.poll() is None, submit.stderr
        return any(True for _ in bucket.list("stages/"))

    wait_until(enough, "a stage is committed", within_s=120)
    rgw.kill_gateway()
    begun = time.monotonic()
    cancelled = run("cancel", "m-", "--store", s3_address)
    assert time.monotonic() - begun < 15
    rgw.start()
    assert cancelled.exit_code == 0, cancelled.stderr
    assert "The store cannot be reached; process" in cancelled.stderr
    assert f"--store {s3_address}" in cancelled.stderr.splitlines()[-1]
    submit.end(within_s=60)
    assert submit.has_left_nothing()


def test_a_run_that_nobody_renders_is_cancelled_and_goes_on_when_submitted_again(here: Path, start: Start) -> None:
    words = rows(here, {"job_id": "one", "num_chunks": 2})
    submit = start(*words)
    wait_until(lambda: submit.driver() is not None, "it has a driver")
    submit.clean_up()
    cancelled = run("cancel", run_id())
    assert cancelled.exit_code == 0
    assert "nobody was rendering it" in cancelled.stderr
    assert status()["state"] == "cancelled"
    again = run(*words)
    assert again.exit_code == 0, again.stderr
    assert "was cancelled; going on with it" in again.stderr
    nothing = run("cancel", run_id())
    assert (nothing.exit_code, status()["state"]) == (0, "done")
    assert "nothing to cancel" in nothing.stderr


# Trying again ---------------------------------------------------------------------------------------------------


def test_failed_rows_stay_failed_until_they_are_retried(here: Path) -> None:
    words = rows(here, {"job_id": "good", "num_chunks": 1}, {"job_id": "bad", "num_chunks": 1, "image": str(IMAGE)})
    settings = job(Path("job.toml"))
    made, files = prepared(Path("m.parquet"), settings)
    create(store(), made, files)
    [media] = store().list("media/")
    whole = store().get(media)
    store().put(media, b"rotten")
    failed = run("resume", run_id(), "--local", "--json")
    assert failed.exit_code == 4
    assert failed.stderr.splitlines()[-1] == f"next: magi-ray retry {run_id()} --failed --local"
    assert set(json.loads(failed.stdout)["videos"]) == {"good"}
    store().put(media, whole)
    left = run("resume", run_id(), "--local")
    assert left.exit_code == 4, "resume leaves it alone"
    assert "bad failed (input, embed)" in left.stderr
    watched = run("watch", run_id())
    assert watched.exit_code == 4
    assert watched.stderr.splitlines()[-1] == f"next: magi-ray retry {run_id()} --failed --local"
    retried = run("retry", run_id(), "--failed", "--local")
    assert retried.exit_code == 0, retried.stderr
    assert "Trying 1 row" in retried.stderr
    assert rendered() == undisturbed()
    nothing = run("retry", run_id(), "--local")
    assert nothing.exit_code == 0
    assert "No row" in nothing.stderr
    assert run(*words).exit_code == 0


def test_a_run_in_which_too_many_rows_fail_is_stopped(here: Path) -> None:
    bad = [{"job_id": f"bad-{n}", "num_chunks": 1, "seed": n, "image": str(IMAGE), "priority": 1} for n in range(3)]
    rows(here, {"job_id": "good", "num_chunks": 200}, *bad)
    made, files = prepared(Path("m.parquet"), job(Path("job.toml")))
    create(store(), made, files)
    [media] = store().list("media/")
    store().put(media, b"rotten")
    broken = run("resume", run_id(), "--local", "--max-failed-rows", "1", "--json")
    assert broken.exit_code == 4
    assert json.loads(broken.stdout)["state"] == "broken"
    assert "more rows failed than --max-failed-rows allows" in broken.stderr
    assert status()["state"] == "broken"
    assert run("watch", run_id()).exit_code == 4


def test_a_damaged_video_is_mended_and_a_whole_one_left_alone(here: Path) -> None:
    words = rows(here, {"job_id": "one", "num_chunks": 2}, {"job_id": "two", "num_chunks": 1})
    assert run(*words).exit_code == 0
    before = rendered()
    whole = run("retry", run_id(), "--job", "one", "--local")
    assert whole.exit_code == 0, whole.stderr
    assert "0 stages rendered" in whole.stderr or "Nothing to render" in whole.stderr
    flip(store(), keys.video(run_id(), "one"))
    assert rendered() != before
    mended = run("retry", run_id(), "--job", "one", "--local")
    assert mended.exit_code == 0, mended.stderr
    assert rendered() == before


def test_another_take_is_another_video_from_its_chunk_on(here: Path) -> None:
    words = rows(here, {"job_id": "one", "num_chunks": 3})
    assert run(*words).exit_code == 0
    before = rendered()
    again = run("retry", run_id(), "--job", "one", "--from-chunk", "2", "--local")
    assert again.exit_code == 0, again.stderr
    assert "Take 2 of one: anew from chunk 2 on." in again.stderr
    after = rendered()
    assert status()["state"] == "done"
    assert after["one/0"] == before["one/0"]
    assert run("retry", run_id(), "--job", "one", "--from-chunk", "3").exit_code == 2
