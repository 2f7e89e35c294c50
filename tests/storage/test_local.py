from __future__ import annotations

import errno
import fcntl
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from contract import StoreContract

from magi_ray.errors import InputError, StoreError, StoreUnavailable
from magi_ray.storage.local import LocalStore
from magi_ray.storage.opening import open_store
from magi_ray.storage.probe import check_store


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(tmp_path / "not" / "yet" / "there")


def _start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


RACER = """
import sys, time
from pathlib import Path
from magi_ray.storage.local import LocalStore
root, racer, start = sys.argv[1:]
store = LocalStore(Path(root))
time.sleep(max(0, float(start) - time.time()))
print("".join(str(int(store.put_if_absent(f"race/{n}", racer.encode() * 200_000))) for n in range(30)))
"""


def test_of_racing_processes_exactly_one_creates_each_key(tmp_path: Path) -> None:
    start = str(time.time() + 1)
    racers = [_start(RACER, str(tmp_path), str(n), start) for n in range(4)]
    won = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    store = LocalStore(tmp_path)
    for n in range(30):
        winners = [racer for racer in range(4) if won[racer][n] == "1"]
        assert len(winners) == 1
        assert store.get(f"race/{n}") == str(winners[0]).encode() * 200_000
    assert sum("1" in line for line in won) > 1, "the processes did not race"


WRITER = """
import itertools, sys
from pathlib import Path
from magi_ray.storage.local import LocalStore
store = LocalStore(Path(sys.argv[1]))
print("ready", flush=True)
for n in itertools.count():
    data = b"%08d" % n * 250_000
    store.put("same", data)
    store.put_if_absent(f"new/{sys.argv[2]}-{n}", data)
    print(n, flush=True)
"""


def test_kill_9_in_mid_write_leaves_nothing_half_written_and_loses_nothing_that_returned(tmp_path: Path) -> None:
    store, pause, leftovers = LocalStore(tmp_path), random.Random(7), 0
    for life in range(12):
        writer = _start(WRITER, str(tmp_path), str(life))
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(pause.uniform(0.01, 0.06))
        os.kill(writer.pid, signal.SIGKILL)
        returned = len(writer.communicate()[0].split())
        assert all(store.exists(f"new/{life}-{n}") for n in range(returned))
        for key in store.list(""):
            data = store.get(key)
            assert len(data) == 2_000_000
            assert data == data[:8] * 250_000
            if key.startswith("new/"):
                store.delete(key)
        leftovers = len(list((tmp_path / ".tmp").iterdir()))
    assert leftovers, "no writer was hit in mid-write; the test shows nothing"


def test_a_pickled_store_is_the_same_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy.get("a") == b"x"


def test_a_full_disk_is_a_store_error_with_its_remedy_and_no_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = LocalStore(tmp_path)
    store.put("a/b", b"before")
    monkeypatch.setattr("magi_ray.storage.local.os.fsync", full)
    with pytest.raises(StoreError, match=r"failed on a/b: No space left.*\nFree some space"):
        store.put("a/b", b"after")
    assert store.get("a/b") == b"before"
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_root_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="file"):
        check_store(LocalStore(tmp_path / "file"))


def test_a_file_system_without_hard_links_is_found_by_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("magi_ray.storage.local.os.link", no_links)
    with pytest.raises(StoreError, match="hard links"):
        check_store(LocalStore(tmp_path))


def test_a_store_that_creates_twice_fails_the_check(tmp_path: Path) -> None:
    class Lying(LocalStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    with pytest.raises(StoreError, match="Create once: an object that was there was created a second time"):
        check_store(Lying(tmp_path))


def test_paths_and_file_addresses_open_the_same_absolute_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = LocalStore(tmp_path / "my store")
    for uri in ("my store", "./my store", str(tmp_path / "my store"), f"file://{tmp_path}/my%20store"):
        assert open_store(uri) == expected
    assert list(tmp_path.iterdir()) == [], "opening writes nothing"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://Films/x", "lower-case"),
        ("gs://bucket/x", "'gs'"),
        ("file://host/x", "three slashes"),
        ("", "empty"),
    ],
)
def test_an_address_that_cannot_be_opened_is_an_input_error(uri: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_store(uri)


def test_a_lock_that_a_stopped_process_holds_is_waited_for_no_longer_than_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magi_ray.storage.local.LOCK_DEADLINE_S", 0.1)
    store = LocalStore(tmp_path)
    store.put("a/lease", b"1")
    version = store.swap("a/lease", b"2", store.get_versioned("a/lease")[1])
    assert version is not None
    [name] = (tmp_path / ".locks").iterdir()
    with name.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match=f"{name} has been locked for 0 s"):
            store.swap("a/lease", b"3", version)
    assert store.swap("a/lease", b"3", version) is not None
