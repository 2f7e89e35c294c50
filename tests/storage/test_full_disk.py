"""Disks that are full or read-only: real ones where this user may mount them, errors injected at the file calls where
not."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from runs import MakeRun, by_progress, contents

from magi_ray.cli import cli
from magi_ray.commands.stores import store_to_write
from magi_ray.errors import InputError, OutputError, StoreUnwritable, TemporaryFull
from magi_ray.media.encoder import run_ffmpeg
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.runs.record import Run
from magi_ray.storage.leases import acquire
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.probe import check_store
from magi_ray.storage.records import measure
from magi_ray.system import Owner, sweep_temporary, temporary_folder

ROW: dict[str, Any] = {"job_id": "a", "prompt": "sea", "num_chunks": 3}


class Disk:
    """A small file system of its own. ``fill`` leaves ``left`` bytes or, with ``inodes``, no name for a new file."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fill(self, left: int = 0, *, inodes: bool = False) -> None:
        if inodes:
            with suppress(OSError):
                for number in range(10_000):
                    (self.root / f"ballast-{number}").touch()
            return
        found = os.statvfs(self.root)
        if (size := found.f_bavail * found.f_frsize - left) > 0:
            with (self.root / "ballast").open("ab") as file:
                os.posix_fallocate(file.fileno(), file.tell(), size)

    def empty(self) -> None:
        for path in self.root.glob("ballast*"):
            path.unlink()

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "magi-ray-test", str(self.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this user may not mount a small disk: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A tmpfs of 4 MiB and 2000 files. Skips where it cannot be mounted."""
    root = tmp_path / "disk"
    root.mkdir()
    made = Disk(root)
    made.mount("size=4m,nr_inodes=2000")
    yield made
    subprocess.run(["umount", "-l", str(root)], check=True)


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


CAUSES = [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota exceeded"), (errno.EROFS, "Read-only file system")]


@pytest.mark.parametrize(("number", "says"), CAUSES)
@pytest.mark.parametrize("call", ["os.fsync", "os.link", "_make_folder"])
def test_whatever_write_fails_it_is_told_that_nobody_can_write_and_what_helps(
    number: int, says: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"before")
    monkeypatch.setattr(f"magi_ray.storage.local.{call}", failing(number))
    for write in (
        lambda: store.put_if_absent("c/d", b"after"),
        lambda: check_store(store),
        lambda: acquire(store, "lease.json", Owner.here("driver"), epoch=1),
    ):
        with pytest.raises(StoreUnwritable, match=rf"failed on .*{says}.* \(.* MiB are free\)") as caught:
            write()
        assert ("gc" in caught.value.remedy) == (number != errno.EROFS)
        assert ("Mount it writable" in caught.value.remedy) == (number == errno.EROFS)
    assert store.get("a/b") == b"before"
    assert [*(tmp_path / ".tmp").iterdir()] == []


def test_a_check_that_meets_a_full_disk_in_the_middle_says_so_not_that_the_store_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, writes = LocalStore(tmp_path), 0
    fsync = os.fsync

    def full_later(handle: int) -> None:
        nonlocal writes
        writes += 1
        (failing(errno.ENOSPC) if writes > 20 else fsync)(handle)

    monkeypatch.setattr("magi_ray.storage.local.os.fsync", full_later)
    with pytest.raises(StoreUnwritable, match="No space left"):
        check_store(store)


@pytest.mark.parametrize("inodes", [False, True], ids=["bytes", "inodes"])
def test_a_disk_that_fills_up_ends_the_run_which_goes_on_to_the_same_bytes(
    inodes: bool, disk: Disk, make_run: MakeRun
) -> None:
    alone, store = MemoryStore(), LocalStore(disk.root / "store")
    expected = make_run(alone, [ROW])
    render_locally(alone, expected)
    run: Run = make_run(store, [ROW])

    def fill(progress: RunProgress) -> None:
        if progress.videos["a"].stages_done == 2:
            disk.fill(inodes=inodes)

    with pytest.raises(StoreUnwritable) as caught:
        render_locally(store, run, observers=by_progress(fill))
    error = caught.value
    assert error.message.startswith(f"Run {run.run_id} has stopped: The store at {store.uri} failed on ")
    room = "as many as it can: no inode is free" if inodes else "0.0 of 4.0 MiB are free"
    assert room in error.message
    with pytest.raises(StoreUnwritable, match="No space left"):
        check_store(store)
    with pytest.raises(StoreUnwritable, match="No space left"):
        render_locally(store, run)
    assert [*store.leftovers()] == []
    disk.empty()
    ended = render_locally(store, run)
    assert (ended.published, ended.failed) == (("a",), ())
    assert contents(store, run) == contents(alone, expected)


def test_a_disk_too_small_for_the_run_is_full_at_every_point_of_it(disk: Disk, make_run: MakeRun) -> None:
    """As much room as there is ends somewhere: each time the same error, and nothing half written."""
    store = LocalStore(disk.root / "store")
    run = make_run(store, [ROW])
    stopped = 0
    for left in (16, 64, 128, 256):
        disk.empty()
        disk.fill(left * 1024)
        with suppress(StoreUnwritable):
            render_locally(store, run)
            stopped -= 1
        stopped += 1
        assert [*store.leftovers()] == []
    disk.empty()
    assert stopped >= 2
    assert render_locally(store, run).failed == ()


def test_a_read_only_mount_is_told_as_such(disk: Disk, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(disk.root / "store")
    run = make_run(store, [ROW])
    subprocess.run(["mount", "-o", "remount,ro", str(disk.root)], check=True)
    with pytest.raises(InputError, match=rf"cannot be written: {store.root} is mounted read-only"):
        store_to_write(str(store.root))
    with pytest.raises(StoreUnwritable, match=r"has stopped: .*Read-only file system \(.* is mounted read-only\)"):
        render_locally(store, run)
    monkeypatch.setenv("MAGI_RAY_CACHE", str(disk.root.parent / "cache"))
    told = CliRunner().invoke(cli, ["drive", run.run_id, "--local", "--store", str(store.root)])
    assert told.exit_code == 1
    assert "mounted read-only" in told.stderr
    assert told.stderr.splitlines()[-1] == f"next: magi-ray resume {run.run_id} --local --store {store.root}"
    subprocess.run(["mount", "-o", "remount,rw", str(disk.root)], check=True)
    assert render_locally(store, run).failed == ()


def test_no_room_for_temporary_files_fails_rows_with_what_helps_and_the_retry_goes_on(
    disk: Disk, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW | {"num_chunks": 1}])
    monkeypatch.setattr(tempfile, "tempdir", str(disk.root))
    disk.fill()
    [failed] = render_locally(store, run).failed
    assert failed.failure == "infrastructure"
    assert "There is no room for temporary files" in failed.message
    assert f"inodes are free in {disk.root}" in failed.message
    assert "set TMPDIR" in failed.message
    disk.empty()
    assert [*disk.root.iterdir()] == []
    assert render_locally(store, run, DriveOptions(retry=frozenset({"a"}))).published == ("a",)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_download_into_a_full_folder_is_no_failure_of_the_store(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(MemoryStore):
        def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
            failing(number)()

    with pytest.raises(TemporaryFull, match=r"There is no room for temporary files on .* MiB and .* inodes are free"):
        measure(Full(), "a")

    def unusable() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", unusable)
    with pytest.raises(TemporaryFull, match="none can be written"), temporary_folder():
        pass


def test_an_ffmpeg_that_finds_no_room_is_told_from_one_that_fails() -> None:
    says = "[out#0] Error opening output /tmp/x/segment.mp4: No space left on device"
    with pytest.raises(TemporaryFull, match=r"ffmpeg, joining 3 segments, said: .*No space left"):
        run_ffmpeg(["sh", "-c", f"echo '{says}' >&2; exit 1"], feed=[], deadline_s=60, purpose="joining 3 segments")
    with pytest.raises(OutputError, match="Invalid data"):
        run_ffmpeg(["sh", "-c", "echo Invalid data >&2; exit 1"], feed=[], deadline_s=60, purpose="joining")


def test_temporary_folders_of_killed_processes_are_swept_and_those_in_use_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = tmp_path / "magi-ray-files-killed"
    killed.mkdir()
    (killed / "video.mp4").write_bytes(b"x")
    others = tmp_path / "somebody-elses"
    others.mkdir()
    with temporary_folder() as used:
        sweep_temporary()
        assert {*tmp_path.iterdir()} == {killed, others, used}, "what is a minute old may be about to be used"
        for folder in (killed, others, used):
            os.utime(folder, (1, 1))
        sweep_temporary()
        assert {*tmp_path.iterdir()} == {others, used}
    assert {*tmp_path.iterdir()} == {others}
