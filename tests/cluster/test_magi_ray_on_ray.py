"""The command itself, with a Ray of its own: killed, interrupted, resumed."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from on_ray import SMALL, wait_until
from runs import MakeRun, contents, prepared, stage_commits
from typed import Command

from magi_ray.cli import cli
from magi_ray.commands.console import FAILED_ROWS, INTERRUPTED
from magi_ray.drivers.status_file import log_path
from magi_ray.manifest import write_manifest
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import Run, open_run
from magi_ray.render.runs.submission import create
from magi_ray.settings import preset
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore

# Long enough to be caught in the middle.
ROW: dict[str, Any] = {"job_id": "text", "prompt": "sea", "num_chunks": 16, **SMALL}


@pytest.fixture
def magi_ray(tmp_path: Path, tiny_weights: Path) -> Iterator[Callable[..., Command]]:
    """Start ``magi-ray submit`` of one row, or another command, in tmp_path; nothing survives the test."""
    write_manifest([ROW], tmp_path / "m.parquet")
    commands: list[Command] = []

    def start(*arguments: str) -> Command:
        submit = ["submit", "m.parquet", "--weights", str(tiny_weights)]
        commands.append(Command(tmp_path, *(arguments or submit), "--store", "store", "--no-dashboard"))
        return commands[-1]

    yield start
    for command in commands:
        command.clean_up()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def rendering(command: Command, store: LocalStore) -> Callable[[], bool]:
    def enough() -> bool:
        assert command.process.poll() is None, command.stderr
        return len(stage_commits(store)) >= 3

    return enough


def undisturbed(folder: Path, weights: Path) -> tuple[Run, dict[str, bytes]]:
    """The run that ``magi-ray submit m.parquet`` makes, and what it becomes without Ray."""
    store = MemoryStore()
    run, files = prepared(folder / "m.parquet", preset("magi-tiny", weights=weights))
    create(store, run, files)
    render_locally(store, run)
    return run, contents(store, run)


def test_a_run_killed_with_everything_it_started_is_resumed_where_it_stopped(
    magi_ray: Callable[..., Command], store: LocalStore, tmp_path: Path, tiny_weights: Path
) -> None:
    submit = magi_ray()
    wait_until(rendering(submit, store), "the first stages are committed", within_s=120)
    submit.process.kill()
    for process in submit.processes():
        process.kill()
    assert submit.end()[0] == -signal.SIGKILL
    before = stage_commits(store)
    run, expected = undisturbed(tmp_path, tiny_weights)
    assert 3 <= len(before) < run.plans["text"].timeline.num_stages

    resume = magi_ray("resume", run.run_id)
    wait_until(lambda: len(stage_commits(store)) > len(before), "it goes on", within_s=120)
    [worker] = resume.processes("ray::DenoiseWorker")
    worker.kill()
    code, stdout = resume.end()
    assert code == 0, resume.stderr
    assert before.items() <= stage_commits(store).items()
    assert f"{len(before)} reused" in resume.stderr
    assert contents(store, run) == expected
    # Data alone on stdout, though Ray prints there that a worker died; and Ray is quiet otherwise.
    assert stdout == f"{store.uri}/{keys.video(run.run_id, 'text')}\n"
    ours = r"\d+ of 1 videos? |Process \d+ renders|Starting Ray on this machine"
    assert [line for line in resume.stderr.splitlines() if not re.match(ours, line)] == []
    log = log_path(store, run.run_id).read_text().splitlines()
    expected_lines = re.compile(rf"{ours}|.*\(raylet\).* A worker died|{re.escape(stdout)}")
    assert [line for line in log if not expected_lines.match(f"{line}\n")] == []
    wait_until(resume.has_left_nothing, "Ray's processes are gone")


def test_when_only_the_driver_is_killed_ray_goes_with_it(magi_ray: Callable[..., Command]) -> None:
    submit = magi_ray()
    wait_until(lambda: submit.processes("ray::DenoiseWorker"), "there are workers", within_s=120)
    driver = submit.driver()
    assert driver is not None
    driver.kill()
    assert submit.end() == (1, "")
    assert "SIGKILL" in submit.stderr
    assert "magi-ray resume" in submit.stderr.splitlines()[-1]
    wait_until(submit.has_left_nothing, "Ray's processes are gone")


def test_whoever_leaves_a_run_on_ray_leaves_it_rendering_and_cancel_ends_all_of_it(
    magi_ray: Callable[..., Command], store: LocalStore, tmp_path: Path
) -> None:
    write_manifest([ROW | {"num_chunks": 1000}], tmp_path / "m.parquet")
    submit = magi_ray()
    wait_until(rendering(submit, store), "the first stages are committed", within_s=120)
    submit.press_ctrl_c()
    assert submit.end(within_s=30)[0] == INTERRUPTED
    assert "magi-ray watch" in submit.stderr.splitlines()[-1]
    before = len(stage_commits(store))
    wait_until(lambda: len(stage_commits(store)) > before, "it goes on", within_s=60)
    [run_id] = {key.split("/")[1] for key in store.list("runs/")}
    cancelled = CliRunner().invoke(cli, ["cancel", run_id, "--store", store.uri])
    assert cancelled.exit_code == 0, cancelled.stderr
    assert submit.has_left_nothing(), "when the command has ended, everything has"


def submitted(store: LocalStore, folder: Path, weights: Path) -> str:
    """The run that ``magi-ray submit m.parquet`` makes, without rendering it."""
    run, files = prepared(folder / "m.parquet", preset("magi-tiny", weights=weights))
    create(store, run, files)
    return run.run_id


def test_an_interrupted_driver_says_how_to_go_on_and_leaves_nothing_running(
    magi_ray: Callable[..., Command], store: LocalStore, tmp_path: Path, tiny_weights: Path
) -> None:
    run_id = submitted(store, tmp_path, tiny_weights)
    drive = magi_ray("drive", run_id)
    wait_until(rendering(drive, store), "the first stages are committed", within_s=120)
    drive.press_ctrl_c()
    assert drive.end() == (INTERRUPTED, "")
    assert f"magi-ray resume {run_id} --no-dashboard --store store" in drive.stderr.splitlines()[-1]
    wait_until(drive.has_left_nothing, "Ray's processes are gone")


def test_a_terminated_driver_ends_as_an_interrupted_one(
    magi_ray: Callable[..., Command], store: LocalStore, tmp_path: Path, tiny_weights: Path
) -> None:
    drive = magi_ray("drive", submitted(store, tmp_path, tiny_weights))
    wait_until(lambda: drive.processes("ray::DenoiseWorker"), "there are workers", within_s=120)
    drive.process.terminate()
    assert drive.end() == (INTERRUPTED, "")
    assert "magi-ray resume" in drive.stderr.splitlines()[-1]
    wait_until(drive.has_left_nothing, "Ray's processes are gone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_stopped_while_ray_starts_leaves_nothing_running(
    magi_ray: Callable[..., Command], store: LocalStore, tmp_path: Path, tiny_weights: Path, number: signal.Signals
) -> None:
    drive = magi_ray("drive", submitted(store, tmp_path, tiny_weights))
    wait_until(lambda: "Starting Ray" in drive.stderr, "Ray is being started", within_s=120)
    wait_until(lambda: len(drive.processes()) > 2, "its first processes are there")
    os.killpg(drive.process.pid, number)
    assert drive.end()[0] == INTERRUPTED, drive.stderr
    assert "magi-ray resume" in drive.stderr
    wait_until(drive.has_left_nothing, "Ray's processes are gone")


def test_a_poisoned_row_harms_no_other_and_is_told_by_the_exit_code(
    ray_here: None, make_run: MakeRun, store: LocalStore
) -> None:
    image = Path(__file__).parents[2] / "manifests" / "quickstart-image.png"
    rows = [{"job_id": "rotten", "prompt": "dusk", "image": str(image), "num_chunks": 2}, ROW | {"num_chunks": 2}]
    run = make_run(store, rows)
    store.put(keys.media(run.record.media["rotten"].sha256), b"rotten")
    result = CliRunner().invoke(cli, ["drive", run.run_id, "--store", store.uri])
    assert result.exit_code == FAILED_ROWS, result.output
    assert result.stdout == f"{store.uri}/{keys.video(run.run_id, 'text')}\n"
    assert "rotten failed (input, embed)" in result.stderr
    [error] = pq.read_table(store.root / keys.run_errors(run.run_id)).to_pylist()
    assert (error["job_id"], error["class"], error["attempts"]) == ("rotten", "input", 1)
    assert open_run(store, run.run_id).plans == run.plans
