"""Other people's files in a store, and objects in the wrong place: told as what they are, and in nobody's way."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from magi_ray.cli import cli
from magi_ray.drivers.status_file import note_submission
from magi_ray.errors import StoreError
from magi_ray.manifest import Defaults, manifest_of, write_manifest
from magi_ray.render.driving.local import render_locally
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import Run, open_run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.render.upkeep.gc import collect, garbage
from magi_ray.render.upkeep.verify import verify
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.leases import acquire
from magi_ray.storage.local import LocalStore
from magi_ray.storage.records import record_bytes, seal
from magi_ray.system import Owner

IMAGE = Path(__file__).parents[1] / "manifests" / "quickstart-image.png"
ROWS: list[dict[str, Any]] = [
    {"job_id": "one", "prompt": "sea", "num_chunks": 2},
    {"job_id": "two", "prompt": "hills", "image": "image.png", "num_chunks": 1},
]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> tuple[Path, Run, Run]:
    """A folder with a manifest and a store: its run, finished but for the row `two`, and another one, finished."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copy(IMAGE, folder / "image.png")
    write_manifest(ROWS, folder / "m.parquet")
    store = LocalStore(folder / "magi-ray-store")
    runs = []
    for rows in (ROWS, [{"job_id": "only", "prompt": "wood", "num_chunks": 1}]):
        manifest = manifest_of(rows, Defaults.of(settings), base=folder)
        run, files = prepare(manifest, name="m.parquet", settings=settings)
        create(store, run, files)
        render_locally(store, run)
        runs.append(run)
    for key in (keys.video(runs[0].run_id, "two"), keys.video_record(runs[0].run_id, "two")):
        store.delete(key)
    return folder, runs[0], runs[1]


@pytest.fixture
def store(tmp_path: Path, rendered: tuple[Path, Run, Run], monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """A copy of that folder's store."""
    shutil.copytree(rendered[0], tmp_path / "here")
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    return LocalStore(tmp_path / "here" / "magi-ray-store")


@pytest.fixture
def run(rendered: tuple[Path, Run, Run]) -> Run:
    return rendered[1]


@pytest.fixture
def other(rendered: tuple[Path, Run, Run]) -> Run:
    return rendered[2]


def magi_ray(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr, result.stderr
    return result


def next_commands(result: Result) -> list[list[str]]:
    lines = [line for line in result.stderr.splitlines() if line.startswith("next: ")]
    return [shlex.split(line.removeprefix("next: ")) for line in lines]


def listed() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(magi_ray("list", "--json").stdout)
    return told


STRAY = [
    "runs/.DS_Store", "runs/notes.txt", "runs/notes/todo.txt", "runs/old results/results.csv", "runs/{run}/.DS_Store",
    "runs/{run}/takes/.DS_Store", "runs/{run}/takes/1.json", "runs/{run}/takes/copy of 0001.json",
    "runs/{run}/epoch/.nfs0001", "runs/{run}/epoch/000001.json~", "runs/{run}/epoch/sub/000009.json",
    "runs/{run}/videos/._one.json", "runs/{run}/videos/notes.json", "runs/{run}/videos/one.mp4.part",
    "runs/{run}/jobs/.DS_Store", "media/.DS_Store", "media/ab/notes", "probes/.DS_Store", "stages/.DS_Store",
    "{commit}/a-note", "{commit}/cache/thumb.json", "{commit}/.nfs0002", "lost+found/x",
]  # fmt: skip


def test_other_peoples_files_are_in_nobodys_way_and_stay(store: LocalStore, run: Run) -> None:
    [commit, *_] = store.list("stages/")
    names = [name.format(run=run.run_id, commit=commit.rpartition("/")[0]) for name in STRAY]
    before = magi_ray("list").stdout, magi_ray("status", run.run_id).stdout
    whole = verify(store)
    for name in names:
        (store.root / name).parent.mkdir(parents=True, exist_ok=True)
        (store.root / name).write_bytes(b"theirs")
    (store.root / "runs" / "loop").symlink_to(store.root)
    assert (magi_ray("list").stdout, magi_ray("status", run.run_id).stdout) == before
    assert listed()["damaged"] == []
    assert verify(store) == whole
    assert [*garbage(store, min_age_s=0, watch_s=0)] == []
    assert magi_ray("gc", "--min-age", "0s").exit_code == 0
    assert render_locally(store, run).published == ("one", "two")
    assert verify(store).damages == []
    assert all((store.root / name).read_bytes() == b"theirs" for name in names)


def test_a_file_of_somebody_else_among_the_objects_of_a_commit_does_not_make_them_garbage(
    store: LocalStore, run: Run
) -> None:
    # It used to split the commit's group in two, and the second half looked as if its commit were missing.
    for commit in [key for key in store.list("stages/") if key.endswith("commit.json")]:
        (store.root / commit).with_name("m").mkdir()
        ((store.root / commit).with_name("m") / "thumb").write_bytes(b"x")
    assert [*garbage(store, min_age_s=0, watch_s=0)] == []


def table(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


UNKNOWN = {
    "job_id": ["nobody"], "class": ["code"], "message": ["m"], "task": ["denoise"], "index": [0], "stage": [0],
    "attempts": [1], "log": [""],
}  # fmt: skip
CONTENTS = [
    b"", b"garbage", b"[1]", b"null", b'"x"', b"{}", b"[" * 100_000, b'{"version": 1}', b"\xff\xfe",
    seal({"format": 1, "number": 7}), record_bytes({"format": 2, "job_id": 5}), record_bytes({"format": 1}),
    table(x=[1]), table(**UNKNOWN), table(**(UNKNOWN | {"task": ["?"]})), table(job_id=[]),
]  # fmt: skip


@pytest.mark.parametrize(
    "key_of",
    [
        keys.run_record, keys.run_manifest, keys.run_lease, keys.run_wanted, keys.run_progress, keys.run_errors,
        keys.run_results, lambda run_id: keys.epoch(run_id, 1), lambda run_id: keys.take(run_id, 1),
        lambda run_id: keys.video_record(run_id, "one"), lambda run_id: keys.row_lease(run_id, "one"),
    ],
    ids=lambda key_of: keys.kind_of(key_of("x")),
)  # fmt: skip
def test_whatever_is_in_place_of_an_object_is_told_and_hides_no_other_run(
    key_of: Callable[[str], str], store: LocalStore, run: Run, other: Run
) -> None:
    key = key_of(run.run_id)
    for number, content in enumerate(CONTENTS):
        store.put(key, content)
        assert [found["run_id"] for found in listed()["runs"] if found["run_id"] == other.run_id]
        slower = (("verify", run.run_id), ("gc",)) if number % 5 == 0 else ()
        for words in (("status", run.run_id), *slower):
            result = magi_ray(*words)
            assert result.exit_code in (0, 1, 2), result.stderr
            assert result.exit_code == 0 or next_commands(result), result.stderr
    assert "All videos are done" in magi_ray("status", other.run_id).stderr


def test_a_table_that_names_other_rows_is_not_this_runs(store: LocalStore, run: Run) -> None:
    store.put(keys.run_errors(run.run_id), table(**UNKNOWN))
    [found] = [found for found in listed()["runs"] if found["run_id"] == run.run_id]
    assert (found["videos"], found["done"], found["failed"]) == (2, 1, 0)
    assert "No row of run" in magi_ray("retry", run.run_id).stderr


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_whose_folder_was_copied_or_renamed_is_told_and_what_to_type_helps(
    gone: bool, store: LocalStore, run: Run, other: Run
) -> None:
    folder = store.root / "runs"
    (shutil.move if gone else shutil.copytree)(folder / run.run_id, folder / "copy")
    told = listed()
    assert (
        f"that of run {run.run_id}: its folder was copied or renamed"
        in {each["run_id"]: each["what"] for each in told["damaged"]}["copy"]
    )
    assert {found["run_id"] for found in told["runs"]} == {other.run_id} | (set() if gone else {run.run_id})
    # What it needs is known, so it keeps nobody from collecting garbage, and loses nothing.
    assert [*garbage(store, min_age_s=0, watch_s=0)] == []
    for words in (("status", "copy"), ("verify", "copy"), ("verify",), ("resume", "copy"), ("cancel", "copy")):
        result = magi_ray(*words)
        assert result.exit_code == 1
        [command] = next_commands(result)
        assert command[0] == "mv"
    subprocess.run(command, check=True)
    assert listed()["damaged"] == []
    assert verify(store).damages == []
    assert (folder / run.run_id / "run.json").exists()


@pytest.mark.parametrize("record", [b"", None])
def test_a_run_that_has_lost_its_record_or_manifest_is_told_so_by_every_command(
    record: bytes | None, store: LocalStore, run: Run
) -> None:
    note_submission(store, run.run_id, ["submit", "m.parquet"])
    for key in (keys.run_record(run.run_id), keys.run_manifest(run.run_id)):
        before = store.get(key)
        store.delete(key) if record is None else store.put(key, record)
        assert run.run_id in {each["run_id"] for each in listed()["damaged"]}
        for words in (("status", run.run_id), ("resume", run.run_id), ("gc",), ("verify", run.run_id)):
            result = magi_ray(*words)
            assert result.exit_code == 1, result.stderr
            assert "Submit " in result.stderr
            leads_to = ["submit", "m.parquet"] if words[0] == "verify" else ["verify", run.run_id]
            assert next_commands(result)[0][1:3] == leads_to
        store.put(key, before)


def test_a_damaged_take_is_deleted_with_what_the_message_says(store: LocalStore, run: Run) -> None:
    add_take(store, run.run_id, "one", 1, num_chunks=2)
    good = store.get(keys.take(run.run_id, 1))
    for content in (b"", good[:-5], seal({"job_id": "one"}), seal({"format": 1, "job_id": "one", "from_chunk": "x"})):
        store.put(keys.take(run.run_id, 1), content)
        for words in (("status", run.run_id), ("gc",)):
            result = magi_ray(*words)
            assert result.exit_code == 1
            [command] = next_commands(result)
            assert command == ["rm", str(store.root / keys.take(run.run_id, 1))]
    subprocess.run(command, check=True)
    assert open_run(store, run.run_id).plans == run.plans


def test_a_folder_where_an_object_should_be_and_the_reverse_are_refused_by_name(store: LocalStore, run: Run) -> None:
    record, lease = store.root / keys.run_record(run.run_id), store.root / keys.run_lease(run.run_id)
    epochs = store.root / keys.epochs(run.run_id)
    for path in (record, lease):
        path.unlink(missing_ok=True)
        path.mkdir()
    shutil.rmtree(epochs)
    epochs.write_bytes(b"a file")
    assert run.run_id in {each["run_id"] for each in listed()["damaged"]}
    for words in (("status", run.run_id), ("verify",), ("gc",)):
        assert magi_ray(*words).exit_code == 1
    with pytest.raises(StoreError, match=r"run\.json: .* folder is in the place of the object\n.*move it away"):
        create(store, run, {})
    # This used to be tried for ever.
    with pytest.raises(StoreError, match=r"lease\.json: .* folder is in the place of the object"):
        acquire(store, keys.run_lease(run.run_id), Owner.here("driver"), epoch=1)
    with pytest.raises(StoreError, match=r"epoch/000001\.json: File exists: .*/epoch\n.*move it away"):
        store.put(keys.epoch(run.run_id, 1), b"{}")
    assert [*store.list(keys.epochs(run.run_id))] == []


def test_a_pipe_in_the_place_of_an_object_is_not_waited_for(store: LocalStore, run: Run) -> None:
    path = store.root / keys.run_progress(run.run_id)
    path.unlink()
    os.mkfifo(path)
    assert magi_ray("status", run.run_id).exit_code == 0


def test_verify_tells_what_is_gone_and_what_it_says_to_type_helps(
    store: LocalStore, run: Run, settings: Settings
) -> None:
    assert verify(store).damages == []
    [medium], [prefix] = store.list("media/"), [key for key in store.list("prefixes/") if key.endswith("commit.json")]
    [text, *_] = [keys.commit("text", key) for key in run.plans["two"].caption_digests]
    stage = keys.commit("stage", run.plans["two"].stage_keys[1])
    for key in (medium, prefix, text, stage):
        good = store.get(key)
        store.delete(key)
        for run_ids in (None, [run.run_id]):
            [damage] = verify(store, run_ids).damages
            assert (damage.key, damage.what) == (key, "is missing, though it was there")
            assert damage.needed_by == ((run.run_id, "two"),)
        store.put(key, good)
    for key in (medium, prefix, text, stage):
        store.delete(key)
    told = magi_ray("verify")
    assert told.exit_code == 1
    assert "All" not in told.stderr
    retry, check = next_commands(told)
    assert check == ["magi-ray", "verify"]
    assert f"Submit the manifest of run {run.run_id} again" in told.stderr
    assert "Only the file with sha256" in told.stderr
    again, files = prepare(
        manifest_of(ROWS, Defaults.of(settings), base=Path.cwd()), name="m.parquet", settings=settings
    )
    create(store, again, files)
    assert retry[1:5] == ["retry", run.run_id, "--job", "two"]
    done = magi_ray(*retry[1:], "--local")
    assert done.exit_code == 0, done.stderr
    assert "All is as it was committed" in magi_ray("verify").stderr


def test_what_finished_videos_were_made_from_is_noted_when_it_is_gone(store: LocalStore, run: Run) -> None:
    render_locally(store, run)
    for key in [*store.list("media/"), *store.list("prefixes/")]:
        store.delete(key)
    told = magi_ray("verify")
    assert told.exit_code == 0
    assert f"Of run {run.run_id}, 2 objects that its finished videos were made from are gone" in told.stderr
    assert "All that is there is as it was committed" in told.stderr


class Stopped(BaseException):
    """Not an Exception: as SIGKILL."""


def test_gc_stopped_at_any_delete_and_continued_loses_nothing_that_is_needed(
    store: LocalStore, run: Run, other: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [*garbage(store, min_age_s=0, watch_s=0, forget=[other.run_id])]
    assert len(items) > 5
    deletes = 0

    def delete(self: LocalStore, key: str) -> None:
        nonlocal deletes
        deletes += 1
        if deletes % 2:  # each time one more goes, then it dies
            raise Stopped
        (self.root / key).unlink()

    monkeypatch.setattr(LocalStore, "delete", delete)
    deletes = 1
    for left in range(len(items) - 1, -1, -1):
        with pytest.raises(Stopped) if left else nullcontext():
            collect(store, garbage(store, min_age_s=0, watch_s=0, forget=[other.run_id]))
        deletes = 1
    assert verify(store).damages == []
    assert [*garbage(store, min_age_s=0, watch_s=0, forget=[other.run_id])] == []
    ended = render_locally(store, run)
    assert (ended.published, ended.stages_rendered) == (("one", "two"), 0)
