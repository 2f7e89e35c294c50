"""`magi-ray fetch`: videos from a store into a folder, checked."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from runs import MakeRun, flip

from magi_ray.cli import cli
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import Run
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.opening import open_store
from magi_ray.storage.s3 import S3Store
from magi_ray.storage.store import Store

ROWS = [{"job_id": job_id, "prompt": "sea", "num_chunks": 1} for job_id in ("one", "two")]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    return LocalStore(tmp_path / "store")


@pytest.fixture
def rendered(store: Store, make_run: MakeRun) -> Run:
    run = make_run(store, ROWS)
    render_locally(store, run)
    return run


def fetch(store: Store, *words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["fetch", *words, "--store", store.uri])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    return result


def folder() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def counting(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[int]:
    """From which byte on each object is read to a file from now on."""
    starts: list[int] = []
    read: Callable[..., None] = kind.get_to_file

    def get_to_file(self: object, key: str, path: Path, *, start: int = 0) -> None:
        starts.append(start)
        read(self, key, path, start=start)

    monkeypatch.setattr(kind, "get_to_file", get_to_file)
    return starts


def test_all_videos_are_copied_checked_and_not_copied_again(
    store: Store, rendered: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = counting(monkeypatch, LocalStore)
    videos = {job: store.get(keys.video(rendered.run_id, job)) for job in ("one", "two")}
    first = fetch(store, rendered.run_id)
    assert folder() == {f"{rendered.run_id}/{job}.mp4": data for job, data in videos.items()}
    assert first.stdout.splitlines() == [str(Path(rendered.run_id, f"{job}.mp4").absolute()) for job in videos]
    assert len(starts) == 2
    assert fetch(store, rendered.run_id).stdout == first.stdout
    assert len(starts) == 2, "what is there is not read from the store"
    content = json.loads(fetch(store, rendered.run_id, "--job", "two", "-o", "a b", "--json").stdout)
    assert content["videos"] == {"two": str(Path("a b/two.mp4").absolute())}
    assert Path("a b/two.mp4").read_bytes() == videos["two"]


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_copy_that_was_interrupted_goes_on_where_it_stopped(
    place: str, store: Store, make_run: MakeRun, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: type = LocalStore
    if place == "bucket":
        store, kind = open_store(request.getfixturevalue("s3_address")), S3Store
    run = make_run(store, ROWS[:1])
    render_locally(store, run)
    data = store.get(keys.video(run.run_id, "one"))
    starts = counting(monkeypatch, kind)
    for half, reads in ((data[:1000], [1000]), (b"of another take" * 9, [135, 0]), (data, []), (data + b"x", [0])):
        Path("v").mkdir(exist_ok=True)
        Path("v/one.mp4.part").write_bytes(half)
        starts.clear()
        fetch(store, run.run_id, "-o", "v")
        assert folder() == {"v/one.mp4": data}
        assert starts == reads
        Path("v/one.mp4").unlink()


def test_a_file_that_holds_something_else_is_replaced_only_with_force(store: Store, rendered: Run) -> None:
    Path("v").mkdir()
    Path("v/two.mp4").write_bytes(b"mine")
    refused = fetch(store, rendered.run_id, "-o", "v", code=2)
    assert "1 file with the name of a video and other contents: two.mp4" in refused.stderr
    assert folder() == {"v/two.mp4": b"mine"}, "nothing was copied"
    following = shlex.split(refused.stderr.splitlines()[-1])
    result = CliRunner().invoke(cli, following[2:])
    assert result.exit_code == 0, result.stderr
    assert folder()["v/two.mp4"] == store.get(keys.video(rendered.run_id, "two"))


def test_rows_that_are_not_done_are_told_and_the_others_copied(store: Store, rendered: Run) -> None:
    add_take(store, rendered.run_id, "two", 0, num_chunks=1)
    result = fetch(store, rendered.run_id, "-o", "v", code=4)
    assert "1 of 2 videos fetched and checked.\nNot done: two\nnext: magi-ray resume" in result.stderr
    assert list(folder()) == ["v/one.mp4"]
    assert json.loads(fetch(store, rendered.run_id, "--json", code=4).stdout)["not_done"] == ["two"]
    fetch(store, rendered.run_id, "--job", "one")


def test_a_damaged_video_is_not_kept_and_the_next_command_makes_it_again(store: Store, rendered: Run) -> None:
    good = store.get(keys.video(rendered.run_id, "one"))
    flip(store, keys.video(rendered.run_id, "one"))
    result = fetch(store, rendered.run_id, "-o", "v", code=4)
    assert "one failed: The video of job one in" in result.stderr
    assert list(folder()) == ["v/two.mp4"]
    following = shlex.split(result.stderr.splitlines()[-1])
    assert following[1:] == ["magi-ray", "retry", rendered.run_id, "--job", "one", "--store", store.uri]
    render_locally(store, rendered, DriveOptions(retry=frozenset({"one"})))
    fetch(store, rendered.run_id, "-o", "v")
    assert folder()["v/one.mp4"] == good


def test_what_cannot_be_written_is_told_before_anything_is_copied(
    store: Store, rendered: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    assert "'file' is a file" in fetch(store, rendered.run_id, "-o", "file", code=2).stderr
    assert "has no row 'three'" in fetch(store, rendered.run_id, "--job", "three", code=2).stderr
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr("magi_ray.commands.fetch.shutil.disk_usage", lambda _: usage)
    full = fetch(store, rendered.run_id, "-o", "v", code=2)
    assert "but only 100 B are free in" in full.stderr
    assert list(folder()) == ["file"]
