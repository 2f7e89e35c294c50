"""A store in a folder, on a local disk or one that all machines mount.

An object is first written whole under ``<root>/.tmp/``, flushed to disk, and then gets its name in one step: ``rename``
to overwrite, ``link`` to create only, which fails if the name is taken. A crash leaves at most a file in ``.tmp``,
which no key can reach; ``leftovers`` lists them. A swap locks a file in ``.locks`` while the object is compared and
renamed; the system releases the lock however the process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from magi_ray.errors import ObjectMissing, StoreDenied, StoreError, StoreUnavailable, StoreUnwritable
from magi_ray.storage.keys import check_key, is_key
from magi_ray.storage.store import Entry, open_at

LOCK_DEADLINE_S = 10.0

BLOCK_BYTES = 2**20

_REMEDIES = {
    errno.ENOSPC: "Free some space there (`magi-ray gc` shows what no run needs), then go on: commits are kept.",
    errno.EDQUOT: "Free some space there (`magi-ray gc` shows what no run needs), then go on: commits are kept.",
    errno.EROFS: "Mount it writable, or choose another folder with --store. If it was writable before, its disk may be"
    " failing: see dmesg.",
    errno.EACCES: "Allow this user to read and write the folder, or choose another with --store.",
    errno.EPERM: "The file system must allow hard links, and this user must own the folder; or choose another.",
    errno.EOPNOTSUPP: "This file system has no hard links; choose a folder on another one with --store.",
    errno.ENOLCK: "This file system has no locks; choose a folder on another one with --store.",
    errno.EEXIST: "That name is needed for magi-ray's own: move it away, then go on.",
    errno.EISDIR: "That name is needed for magi-ray's own: move it away, then go on.",
    errno.ENOTDIR: "That name is needed for magi-ray's own: move it away, then go on.",
}
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class LocalStore:
    """``root``: an absolute path, made with the first write. Pickles as that path."""

    root: Path

    @property
    def uri(self) -> str:
        return str(self.root)

    def put(self, key: str, data: bytes) -> None:
        self._write(key, BytesIO(data), overwrite=True)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        # The check saves the usual loser a copy; the link decides.
        return not self.exists(key) and self._write(key, BytesIO(data), overwrite=False)

    def put_file(self, key: str, path: Path) -> None:
        with path.open("rb") as source:
            self._write(key, source, overwrite=True)

    def get(self, key: str) -> bytes:
        with self._reading(key) as source:
            return source.read()

    def get_to_file(self, key: str, path: Path, *, start: int = 0) -> None:
        # Errors of the target are the caller's, not the store's.
        with open_at(path, start) as target:
            for block in self._blocks(key, start):
                target.write(block)

    def get_versioned(self, key: str) -> tuple[bytes, str]:
        data = self.get(key)
        return data, _version(data)

    def swap(self, key: str, data: bytes, version: str) -> str | None:
        with self._locked(key):
            try:
                found = self.get(key)
            except ObjectMissing:
                return None
            if _version(found) != version:
                return None
            self.put(key, data)
            return _version(data)

    def exists(self, key: str) -> bool:
        with self._translated(key):
            return self._path(key).is_file()

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        return (key for key in self._walk(folder) if key.startswith(prefix) and key > after and is_key(key))

    def entries(self, prefix: str, after: str = "") -> Iterator[Entry]:
        for key in self.list(prefix, after):
            with self._translated(key), contextlib.suppress(FileNotFoundError):
                yield _entry(key, self._path(key).stat())

    def delete(self, key: str) -> None:
        # Emptied folders stay: removing one could race with a writer that is about to use it.
        with self._translated(key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def leftovers(self) -> Iterator[Entry]:
        with self._translated(".tmp"), contextlib.suppress(FileNotFoundError):
            for found in sorted(os.scandir(self.root / ".tmp"), key=lambda entry: entry.name):
                with contextlib.suppress(FileNotFoundError):
                    yield _entry(found.name, found.stat())

    def sweep(self, name: str) -> None:
        with self._translated(".tmp"):
            (self.root / ".tmp" / check_key(name)).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _write(self, key: str, source: BinaryIO, *, overwrite: bool) -> bool:
        """True when the object was written, False when ``overwrite`` is off and the name is taken."""
        path, temporary = self._path(key), self.root / ".tmp" / uuid.uuid4().hex
        with self._translated(key):
            _make_folder(temporary.parent)
            _make_folder(path.parent)
            try:
                with temporary.open("xb") as target:
                    shutil.copyfileobj(source, target)
                    target.flush()
                    os.fsync(target.fileno())
                if overwrite:
                    temporary.replace(path)
                else:
                    os.link(temporary, path)
            except FileExistsError:
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "a folder is in the place of the object") from None
                return False
            finally:
                temporary.unlink(missing_ok=True)
            _flush_folder(path.parent)
            return True

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        # A few names for all keys: a lock file can never be removed safely.
        name = hashlib.sha256(check_key(key).encode()).hexdigest()[:2]
        with self._translated(key):
            _make_folder(self.root / ".locks")
            with (self.root / ".locks" / name).open("ab") as lock:
                self._lock(lock, key)
                yield

    def _lock(self, lock: BinaryIO, key: str) -> None:
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as exc:
                # Its holder may have been stopped (SIGSTOP), or its machine may be out of reach.
                if time.monotonic() - begun > LOCK_DEADLINE_S:
                    raise StoreUnavailable(
                        f"The store at {self.uri} failed on {key}: {lock.name} has been locked for"
                        f" {LOCK_DEADLINE_S:.0f} s.",
                        remedy="See with lsof who has that file open; end that process.",
                    ) from exc
            time.sleep(0.005)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        with self._translated(key):
            try:
                source = open(self._path(key), "rb", opener=_without_waiting)  # noqa: SIM115
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
                raise ObjectMissing(f"There is no object {key} in {self.uri}") from exc
            with source:
                if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                    raise ObjectMissing(f"{key} in {self.uri} is no file")
                yield source

    def _blocks(self, key: str, start: int) -> Iterator[bytes]:
        with self._reading(key) as source:
            source.seek(start)
            while block := source.read(BLOCK_BYTES):
                yield block

    def _walk(self, folder: str) -> Iterator[str]:
        with self._translated(folder):
            try:
                entries = list(os.scandir(self.root / folder))
            except (FileNotFoundError, NotADirectoryError):
                return
            # Folders are sorted with the '/', as their keys are: "a-b" comes before "a/b".
            names = sorted(entry.name + "/" * entry.is_dir() for entry in entries if not _leads_back(entry))
        for name in names:
            key = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                if not key.startswith("."):
                    yield from self._walk(key[:-1])
            else:
                yield key

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            kind = StoreDenied if exc.errno in (errno.EACCES, errno.EPERM) else StoreError
            what = exc.strerror or str(exc)
            if exc.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR) and exc.filename is not None:
                what += f": {exc.filename}"
            if exc.errno in _UNWRITABLE:
                kind, what = StoreUnwritable, f"{what} ({_room(self.root)})"
            raise kind(
                f"The store at {self.uri} failed on {key or 'its root'}: {what}",
                remedy=_REMEDIES.get(exc.errno or 0, "Check the disk or the mount, then resume."),
            ) from exc


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(key: str, found: os.stat_result) -> Entry:
    return Entry(key=key, size=found.st_size, age_s=max(0.0, time.time() - found.st_mtime))


def _room(root: Path) -> str:
    """How much room the disk of ``root`` has: bytes, or the number of files where it is those that ran out."""
    above = next(folder for folder in (root, *root.parents) if folder.exists())
    found = os.statvfs(above)
    if found.f_flag & os.ST_RDONLY:
        return f"{above} is mounted read-only"
    if found.f_files and not found.f_favail:
        return f"the disk holds {found.f_files} files, as many as it can: no inode is free"
    free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    return f"{free / 2**20:.1f} of {size / 2**20:.1f} MiB are free"


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe, which somebody may have put there, without waiting for its other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _leads_back(entry: os.DirEntry[str]) -> bool:
    """Whether it is a link to a folder that it lies in, so that walking would not end."""
    return entry.is_symlink() and Path(entry.path).parent.resolve().is_relative_to(Path(entry.path).resolve())


def _make_folder(folder: Path) -> None:
    """Makes ``folder`` and its parents. Each is flushed into its parent, or a power cut could lose the whole branch."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
