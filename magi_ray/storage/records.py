"""Commits make results durable. Payload first, commit last; a commit without a whole payload does not count.

A commit is one small JSON object that names its payloads with size and sha256, says what the result is (``pre_image``,
whose digest is usually the key) and what made it (``provenance``). It is created only if absent, so a late worker
cannot replace a result, and each attempt has its own names for payloads, so it cannot overwrite them either.

Repair. A commit that is unreadable, or whose payload is gone or altered, is replaced with one atomic ``put`` by the
next attempt that made the result again. (Deleting it first was rejected: a slow second repairer would delete the first
one's good commit.) That is safe: the commit there was read and found damaged; the new payloads are whole before it is
replaced; there is a commit at every moment; and of two workers that repair at once, either's commit is whole, names
payloads that nobody deletes, and holds the result of the same key, that is the same bytes.

A writer may sleep for so long that its payloads are collected as garbage before it commits. So it looks for them once
its commit is there, and writes again those that are gone.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from magi_ray.errors import InputError, ObjectDamaged, ObjectMissing
from magi_ray.settings import Frozen
from magi_ray.storage import keys
from magi_ray.storage.keys import CommitKind
from magi_ray.storage.store import Store
from magi_ray.system import temporary_folder

FORMAT_VERSION = 1


class Payload(Frozen):
    """``name``: of the object, beside the commit.  ``size``: bytes.  ``sha256``: hex."""

    name: str
    size: int
    sha256: str

    def unlike(self, found: Payload) -> str:
        """How ``found`` differs from what was committed, with both numbers; '' if it does not."""
        if found.size != self.size:
            return f"has {found.size} bytes, but {self.size} were committed"
        if found.sha256 != self.sha256:
            return f"has sha256 {found.sha256}, but {self.sha256} was committed"
        return ""


class Commit(Frozen):
    """One durable result. ``payloads`` by role (``keys.COMMITS``)."""

    version: int = FORMAT_VERSION
    kind: CommitKind
    key: str
    payloads: dict[str, Payload]
    pre_image: dict[str, Any]
    provenance: dict[str, Any]
    write_id: str


def canonical_json(value: Any) -> bytes:
    """``value`` as JSON with keys sorted, no spaces, in UTF-8: equal values have equal bytes. Raises ValueError for NaN
    and infinity."""
    return _json(value, indent=None)


def _json(value: Any, *, indent: int | None) -> bytes:
    # To JSON and back first: tuples and numeric keys become the lists and strings that a reader will find.
    plain = json.loads(json.dumps(value, allow_nan=False))
    separators = (",", ":") if indent is None else None
    return json.dumps(plain, sort_keys=True, separators=separators, indent=indent, ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def seal(body: Mapping[str, Any]) -> bytes:
    """``body`` as canonical JSON with its own digest as the field ``sha256``, so that every altered byte is found."""
    return canonical_json({**body, "sha256": digest(body)})


def unseal(data: bytes) -> dict[str, Any]:
    """The body that ``seal`` was given. Raises ObjectDamaged for bytes that ``seal`` did not write."""
    return _unsealed(data, field="sha256", indent=None)


def record_bytes(body: Mapping[str, Any]) -> bytes:
    """The record of a run or a video: as ``seal``, but indented for people, and the field of the digest is ``seal``."""
    return _json({**body, "seal": digest(body)}, indent=1)


def read_record(data: bytes) -> dict[str, Any]:
    """The body that ``record_bytes`` was given. Raises ObjectDamaged.

    Format 1 had no seal, so altered bytes may go unseen in it.
    """
    with suppress(ObjectDamaged):
        content = json_object(data)
        if content.get("format") == 1 and "seal" not in content:
            return content
    return _unsealed(data, field="seal", indent=1)


def _unsealed(data: bytes, *, field: str, indent: int | None) -> dict[str, Any]:
    try:
        content = json_object(data)
        body = {name: value for name, value in content.items() if name != field}
        recorded, found = content[field], digest(body)
        written = _json(content, indent=indent)
    except (ValueError, KeyError, ObjectDamaged, RecursionError) as exc:
        raise ObjectDamaged(f"its {len(data)} bytes are not a whole record") from exc
    if recorded != found:
        raise ObjectDamaged(f"its content has sha256 {found}, but says that it has {recorded}")
    if written != data:
        raise ObjectDamaged(f"its {len(data)} bytes are not spelled as they were written")
    return body


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``, which has no digest. Raises ObjectDamaged for bytes that hold none."""
    with suppress(ValueError, RecursionError):
        content = json.loads(data)
        if isinstance(content, dict):
            return content
    raise ObjectDamaged(f"its {len(data)} bytes are no JSON object")


def require_readable(what: str, found: int, up_to: int) -> None:
    """Raises InputError if the format of ``what``, ``found``, is newer than ``up_to``."""
    if found > up_to:
        raise InputError(
            f"{what} has format {found}, but this magi-ray reads up to {up_to}.",
            remedy="Install the magi-ray that wrote it, or a newer one.",
        )


def new_write_id() -> str:
    """A unique id for one attempt to write: 32 hex digits."""
    return uuid.uuid4().hex


def write_commit(
    store: Store,
    *,
    kind: CommitKind,
    key: str,
    payloads: Mapping[str, bytes | Path],
    pre_image: Mapping[str, Any],
    provenance: Mapping[str, Any],
    write_id: str,
) -> Commit:
    """Makes a result durable. Returns the commit that counts: ours, or the whole one that was there before.

    payloads: bytes, or the path of a file, by role.  pre_image, provenance: JSON values.
    write_id: of this attempt only (``new_write_id``).  Raises StoreError.
    """
    if earlier := verified_commit(store, kind, key):
        return earlier
    described = {
        role: _describe(keys.payload_name(kind, role, write_id), content) for role, content in payloads.items()
    }
    objects = {keys.commit_folder(kind, key) + described[role].name: content for role, content in payloads.items()}
    for name, content in objects.items():
        _put(store, name, content)
    commit = Commit(
        kind=kind,
        key=key,
        payloads=described,
        pre_image=json.loads(canonical_json(pre_image)),
        provenance=json.loads(canonical_json(provenance)),
        write_id=write_id,
    )
    data = seal(commit.model_dump())
    if not store.put_if_absent(keys.commit(kind, key), data):
        winner = verified_commit(store, kind, key)
        if winner is not None and winner.write_id != write_id:
            # Nobody else knows these names: the commit that would hold them was never created.
            for name in objects:
                store.delete(name)
            return winner
        if winner is None:
            store.put(keys.commit(kind, key), data)
    for name, content in objects.items():
        if not store.exists(name):
            _put(store, name, content)
    return commit


def read_commit(store: Store, kind: CommitKind, key: str) -> Commit | None:
    """The commit, or None when there is none or it is damaged itself. Payloads are not checked.

    Raises InputError when a newer magi-ray wrote it.
    """
    try:
        body = unseal(store.get(keys.commit(kind, key)))
        require_readable(keys.commit(kind, key), body["version"], FORMAT_VERSION)
        commit = Commit.model_validate(body)
    except (ObjectMissing, ObjectDamaged, KeyError, TypeError, ValidationError):
        return None
    folder = keys.commit_folder(kind, key)
    names = {role: keys.kind_of(folder + payload.name) for role, payload in commit.payloads.items()}
    ours = all(found == f"{kind} {role}" for role, found in names.items())
    return commit if ours and (commit.kind, commit.key) == (kind, key) else None


def verified_commit(store: Store, kind: CommitKind, key: str) -> Commit | None:
    """As ``read_commit``, but None also when a payload is missing or altered: reads and hashes all of them."""
    commit = read_commit(store, kind, key)
    if commit is None:
        return None
    try:
        for role in commit.payloads:
            read_payload(store, commit, role)
    except ObjectDamaged:
        return None
    return commit


def read_payload(store: Store, commit: Commit, role: str) -> bytes:
    """The bytes of one payload. Raises ObjectDamaged if they are missing or not those that were committed."""
    payload = commit.payloads[role]
    try:
        data = store.get(keys.commit_folder(commit.kind, commit.key) + payload.name)
    except ObjectMissing as exc:
        raise _damaged(store, commit, payload, "is missing") from exc
    _check(store, commit, payload, _describe(payload.name, data))
    return data


def payload_to_file(store: Store, commit: Commit, role: str, path: Path) -> None:
    """Writes one payload to ``path``, in constant memory. Raises ObjectDamaged, and then leaves no file."""
    payload = commit.payloads[role]
    try:
        store.get_to_file(keys.commit_folder(commit.kind, commit.key) + payload.name, path)
        _check(store, commit, payload, _describe(payload.name, path))
    except ObjectMissing as exc:
        raise _damaged(store, commit, payload, "is missing") from exc
    except ObjectDamaged:
        path.unlink(missing_ok=True)
        raise


def measure(store: Store, key: str) -> Payload:
    """Size and digest of an object, read in constant memory. Raises ObjectMissing."""
    with temporary_folder() as folder:
        path = folder / "object"
        store.get_to_file(key, path)
        return _describe(key.rpartition("/")[2], path)


def holds(store: Store, key: str, sha256: str) -> bool:
    """Whether the object exists and its bytes have that digest."""
    try:
        return measure(store, key).sha256 == sha256
    except ObjectMissing:
        return False


def file_sha256(path: Path) -> str:
    """sha256 of the file's bytes, as hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(name: str, content: bytes | Path) -> Payload:
    if isinstance(content, bytes):
        return Payload(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    return Payload(name=name, size=content.stat().st_size, sha256=file_sha256(content))


def _check(store: Store, commit: Commit, expected: Payload, found: Payload) -> None:
    if unlike := expected.unlike(found):
        raise _damaged(store, commit, expected, unlike)


def _damaged(store: Store, commit: Commit, payload: Payload, what: str) -> ObjectDamaged:
    return ObjectDamaged(
        f"{keys.commit_folder(commit.kind, commit.key)}{payload.name} in {store.uri} {what}.",
        remedy="Resume or retry makes it again; check the disk if this happens often.",
    )


def _put(store: Store, key: str, content: bytes | Path) -> None:
    if isinstance(content, Path):
        store.put_file(key, content)
    else:
        store.put(key, content)
