"""The command itself, with a Ray of its own: killed, interrupted, resumed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from on_ray import SMALL, processes_with, wait_until
from runs import MakeRun, contents, stage_commits

from magi_ray.cli import FAILED_ROWS, INTERRUPTED, cli
from magi_ray.manifest import write_manifest
from magi_ray.render.local import render_here
from magi_ray.render.run import Run, create, open_run, prepare
from magi_ray.settings import preset
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore

# Long enough to be caught in the middle.
ROW: dict[str, Any] = {"job_id": "text", "prompt": "sea", "num_chunks": 16, **SMALL}
MARK = "MAGI_RAY_TEST_MARK"


class Command:
    """``magi-ray`` in a process group of its own; every process below it carries a mark, however it came to be."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self._stderr = folder / f"{self.mark}.stderr"
        with self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "magi_ray.cli", *arguments],
                cwd=folder,
                env={**os.environ, MARK: self.mark},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def end(self) -> tuple[int, str]:
        """Exit code and stdout."""
        stdout, _ = self.process.communicate(timeout=240)
        return self.process.returncode, stdout

    def has_left_nothing(self) -> bool:
        return not processes_with(MARK, self.mark)


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
        for process in processes_with(MARK, command.mark):
            process.kill()
        command.process.communicate(timeout=60)


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
    data = (folder / "m.parquet").read_bytes()
    run, files = prepare(data, name="m.parquet", base=folder, settings=preset("magi-tiny", weights=weights))
    create(store, run, files)
    render_here(store, run)
    return run, contents(store, run)


def test_a_run_killed_with_everything_it_started_is_resumed_where_it_stopped(
    magi_ray: Callable[..., Command], store: LocalStore, tmp_path: Path, tiny_weights: Path
) -> None:
    submit = magi_ray()
    wait_until(rendering(submit, store), "the first stages are committed", within_s=120)
    submit.process.kill()
    for process in processes_with(MARK, submit.mark):
        process.kill()
    assert submit.end()[0] == -signal.SIGKILL
    before = stage_commits(store)
    run, expected = undisturbed(tmp_path, tiny_weights)
    assert 3 <= len(before) < run.plans["text"].timeline.num_stages

    resume = magi_ray("resume", run.run_id)
    wait_until(lambda: len(stage_commits(store)) > len(before), "it goes on", within_s=120)
    [worker] = processes_with(MARK, resume.mark, title="ray::DenoiseWorker")
    worker.kill()
    code, stdout = resume.end()
    assert code == 0, resume.stderr
    assert before.items() <= stage_commits(store).items()
    assert f"{len(before)} reused" in resume.stderr
    assert contents(store, run) == expected
    # Data alone on stdout, though Ray prints there that a worker died; and Ray is quiet otherwise.
    assert stdout == f"{store.uri}/{keys.video(run.run_id, 'text')}\n"
    expected_lines = re.compile(r"Starting Ray on this machine|\d+ of 1 videos? |.*\(raylet\).* A worker died")
    assert [line for line in resume.stderr.splitlines() if not expected_lines.match(line)] == []
    wait_until(resume.has_left_nothing, "Ray's processes are gone")


def test_when_only_the_driver_is_killed_ray_goes_with_it(magi_ray: Callable[..., Command]) -> None:
    submit = magi_ray()
    wait_until(lambda: processes_with(MARK, submit.mark, title="ray::DenoiseWorker"), "there are workers", within_s=120)
    submit.process.kill()
    wait_until(submit.has_left_nothing, "Ray's processes are gone")


def test_an_interrupted_command_says_how_to_go_on_and_leaves_nothing_running(
    magi_ray: Callable[..., Command], store: LocalStore
) -> None:
    submit = magi_ray()
    wait_until(rendering(submit, store), "the first stages are committed", within_s=120)
    os.killpg(submit.process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
    assert submit.end() == (INTERRUPTED, "")
    [run_id] = [key.split("/")[1] for key in store.list("runs/") if key.endswith("/run.json")]
    assert f"magi-ray resume {run_id} --store store" in submit.stderr.splitlines()[-1]
    wait_until(submit.has_left_nothing, "Ray's processes are gone")


def test_a_terminated_command_ends_as_an_interrupted_one(magi_ray: Callable[..., Command]) -> None:
    submit = magi_ray()
    wait_until(lambda: processes_with(MARK, submit.mark, title="ray::DenoiseWorker"), "there are workers", within_s=120)
    submit.process.terminate()
    assert submit.end() == (INTERRUPTED, "")
    assert "magi-ray resume" in submit.stderr.splitlines()[-1]
    wait_until(submit.has_left_nothing, "Ray's processes are gone")


def test_a_command_interrupted_while_ray_starts_leaves_nothing_running(magi_ray: Callable[..., Command]) -> None:
    submit = magi_ray()
    wait_until(lambda: "Starting Ray" in submit.stderr, "Ray is being started", within_s=120)
    wait_until(lambda: len(processes_with(MARK, submit.mark)) > 2, "its first processes are there")
    os.killpg(submit.process.pid, signal.SIGINT)
    assert submit.end()[0] == INTERRUPTED, submit.stderr
    assert "magi-ray resume" in submit.stderr
    wait_until(submit.has_left_nothing, "Ray's processes are gone")


def test_a_poisoned_row_harms_no_other_and_is_told_by_the_exit_code(
    ray_here: None, make_run: MakeRun, store: LocalStore
) -> None:
    image = Path(__file__).parents[2] / "manifests" / "quickstart-image.png"
    rows = [{"job_id": "rotten", "prompt": "dusk", "image": str(image), "num_chunks": 2}, ROW | {"num_chunks": 2}]
    run = make_run(store, rows)
    store.put(keys.media(run.record.media["rotten"].sha256), b"rotten")
    result = CliRunner().invoke(cli, ["resume", run.run_id, "--store", store.uri])
    assert result.exit_code == FAILED_ROWS, result.output
    assert result.stdout == f"{store.uri}/{keys.video(run.run_id, 'text')}\n"
    assert "rotten failed (input, embed)" in result.stderr
    [error] = pq.read_table(store.root / keys.run_errors(run.run_id)).to_pylist()
    assert (error["job_id"], error["class"], error["attempts"]) == ("rotten", "input", 1)
    assert open_run(store, run.run_id).plans == run.plans
