from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from wrapping import StoreWrapper, T

from magi_ray.errors import InputError, ObjectDamaged
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import (
    Commit,
    canonical_json,
    digest,
    new_write_id,
    payload_to_file,
    read_commit,
    read_payload,
    read_record,
    record_bytes,
    seal,
    unseal,
    verified_commit,
    write_commit,
)
from magi_ray.storage.store import Store

PRE_IMAGE = {"stage": 3, "caption": "ein Boot, grün"}
KEY = digest(PRE_IMAGE)
COMMIT = keys.commit("stage", KEY)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def _write(store: Store, write_id: str = "one", **changes: Any) -> Commit:
    arguments: dict[str, Any] = {
        "kind": "stage",
        "key": KEY,
        "payloads": {"state": b"window", "chunk": b"latent"},
        "pre_image": PRE_IMAGE,
        "provenance": {"host": "here"},
        "write_id": write_id,
    }
    return write_commit(store, **arguments | changes)


def _flips(data: bytes) -> Iterator[bytes]:
    for n in range(len(data)):
        yield data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :]


def test_a_commit_is_read_back_with_its_payloads(store: MemoryStore) -> None:
    commit = _write(store)
    assert read_commit(store, "stage", KEY) == verified_commit(store, "stage", KEY) == commit
    assert read_payload(store, commit, "state") == b"window"
    assert read_payload(store, commit, "chunk") == b"latent"
    assert commit.pre_image == PRE_IMAGE
    assert digest(commit.pre_image) == commit.key
    folder = f"stages/{KEY[:2]}/{KEY}/"
    names = ["chunk-one.safetensors", "commit.json", "state-one.safetensors"]
    assert list(store.list("")) == [folder + name for name in names]


def test_what_was_never_written_is_none(store: MemoryStore) -> None:
    assert read_commit(store, "stage", KEY) is None
    assert verified_commit(store, "stage", KEY) is None


def test_a_segment_goes_in_and_out_as_a_file(store: MemoryStore, tmp_path: Path) -> None:
    source, target = tmp_path / "in.mp4", tmp_path / "out.mp4"
    source.write_bytes(b"video" * 1000)
    commit = _write(store, kind="segment", payloads={"segment": source})
    payload_to_file(store, commit, "segment", target)
    assert target.read_bytes() == source.read_bytes()
    assert list(store.list(""))[1] == f"segments/{KEY[:2]}/{KEY}/segment-one.mp4"


def test_payloads_without_a_commit_are_nothing_and_do_not_stand_in_the_way(store: MemoryStore) -> None:
    class Dies(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            raise KeyboardInterrupt

    half = Dies()
    with pytest.raises(KeyboardInterrupt):
        _write(half)
    for key in half.list(""):
        store.put(key, half.get(key))
    assert len(list(store.list(""))) == 2
    assert verified_commit(store, "stage", KEY) is None
    assert _write(store, "two").write_id == "two"


def test_the_commit_is_written_after_all_its_payloads() -> None:
    written: list[str] = []

    class Watched(StoreWrapper):
        def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
            if verb.startswith("put"):
                written.append(key.rpartition("/")[2])
            return call()

    _write(Watched(MemoryStore()))
    assert written == ["state-one.safetensors", "chunk-one.safetensors", "commit.json"]


def test_the_first_commit_stays_and_a_second_writer_gets_it(store: MemoryStore) -> None:
    first = _write(store)
    before = {key: store.get(key) for key in store.list("")}
    assert _write(store, "late", payloads={"state": b"other"}) == first
    assert {key: store.get(key) for key in store.list("")} == before


def test_a_writer_beaten_between_payload_and_commit_gets_the_winner_and_leaves_nothing() -> None:
    class Beaten(MemoryStore):
        """Somebody else commits just before our commit arrives."""

        def put_if_absent(self, key: str, data: bytes) -> bool:
            if not self.exists(key):
                rival = MemoryStore()
                _write(rival, "rival")
                for other in rival.list(""):
                    self.put(other, rival.get(other))
            return super().put_if_absent(key, data)

    store = Beaten()
    assert _write(store, "ours").write_id == "rival"
    assert not any("ours" in key for key in store.list(""))
    assert verified_commit(store, "stage", KEY) is not None


def test_a_commit_whose_response_was_lost_is_known_as_ours_and_keeps_its_payloads() -> None:
    class Forgetful(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            super().put_if_absent(key, data)
            return False

    store = Forgetful()
    commit = _write(store, "ours")
    assert commit.write_id == "ours"
    assert verified_commit(store, "stage", KEY) == commit


@pytest.mark.parametrize("role", ["state", "chunk"])
def test_every_flipped_byte_of_a_payload_is_found(store: MemoryStore, role: str, tmp_path: Path) -> None:
    commit = _write(store)
    key = keys.commit_folder("stage", KEY) + commit.payloads[role].name
    for damaged in _flips(store.get(key)):
        store.put(key, damaged)
        assert verified_commit(store, "stage", KEY) is None
        with pytest.raises(ObjectDamaged, match=f"{role}-one.*sha256"):
            read_payload(store, commit, role)
        with pytest.raises(ObjectDamaged):
            payload_to_file(store, commit, role, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_every_flipped_byte_of_a_commit_is_found(store: MemoryStore) -> None:
    _write(store)
    for damaged in _flips(store.get(COMMIT)):
        store.put(COMMIT, damaged)
        assert read_commit(store, "stage", KEY) is None


def test_a_cut_or_missing_payload_does_not_count(store: MemoryStore) -> None:
    commit = _write(store)
    key = keys.commit_folder("stage", KEY) + commit.payloads["state"].name
    store.put(key, b"wind")
    with pytest.raises(ObjectDamaged, match="has 4 bytes, but 6 were committed"):
        read_payload(store, commit, "state")
    store.delete(key)
    with pytest.raises(ObjectDamaged, match="is missing"):
        read_payload(store, commit, "state")
    assert verified_commit(store, "stage", KEY) is None


@pytest.mark.parametrize("damage", ["cut commit", "empty commit", "flipped payload", "missing payload"])
def test_a_later_attempt_repairs_what_is_damaged(store: MemoryStore, damage: str) -> None:
    commit = _write(store)
    payload = keys.commit_folder("stage", KEY) + commit.payloads["state"].name
    match damage:
        case "cut commit":
            store.put(COMMIT, store.get(COMMIT)[:100])
        case "empty commit":
            store.put(COMMIT, b"")
        case "flipped payload":
            store.put(payload, b"windox")
        case "missing payload":
            store.delete(payload)
    assert verified_commit(store, "stage", KEY) is None
    repaired = _write(store, "two")
    assert repaired.write_id == "two"
    assert verified_commit(store, "stage", KEY) == repaired


def test_a_commit_copied_to_another_key_does_not_count(store: MemoryStore) -> None:
    _write(store)
    other = digest("other")
    store.put(keys.commit("stage", other), store.get(COMMIT))
    assert read_commit(store, "stage", other) is None


def test_a_commit_of_a_newer_format_is_neither_read_nor_replaced(store: MemoryStore) -> None:
    _write(store)
    body = json.loads(store.get(COMMIT))
    del body["sha256"]
    body |= {"version": 2, "news": True}
    store.put(COMMIT, canonical_json(body | {"sha256": digest(body)}))
    with pytest.raises(InputError, match="format 2, but this magi-ray reads up to 1"):
        read_commit(store, "stage", KEY)
    with pytest.raises(InputError):
        _write(store, "two")


def test_equal_values_have_one_spelling() -> None:
    assert (
        canonical_json({"b": (1, 2.5), "a": "ü", 10: None, 2: True})
        == b'{"10":null,"2":true,"a":"\xc3\xbc","b":[1,2.5]}'
    )
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({1: (0.1,)}) == digest(json.loads(canonical_json({1: (0.1,)})))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_values_without_a_spelling_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


def test_write_ids_differ() -> None:
    assert new_write_id() != new_write_id()


def test_only_a_sha256_names_a_commit() -> None:
    for key in ("", "abc", KEY[:-1], KEY.upper(), "../" + KEY[3:]):
        with pytest.raises(ValueError, match="sha256"):
            keys.commit("stage", key)


def test_every_key_is_one_that_stores_accept_and_stands_in_the_drawing() -> None:
    assert keys.__doc__ is not None
    run_keys = [
        make("2026-11-20-a1b2")
        for make in (keys.run_record, keys.run_manifest, keys.run_progress, keys.run_results, keys.run_errors)
    ]
    for key in run_keys:
        keys.check_key(key)
        assert key.startswith("runs/2026-11-20-a1b2/")
        assert key.rpartition("/")[2] in keys.__doc__
    for job_id in ("boat", ".", "..", ".hidden", "x" * 128):
        assert keys.check_key(keys.video("run", job_id)) == f"runs/run/videos/{job_id}.mp4"
        assert keys.check_key(keys.video_record("run", job_id)) == f"runs/run/videos/{job_id}.json"
    assert keys.check_key(keys.media(KEY)) == f"media/{KEY[:2]}/{KEY}"
    assert keys.check_key(keys.probe("x") + "list/a") == "probes/x/list/a"
    assert keys.PROBES in keys.__doc__
    for kind, layout in keys.COMMITS.items():
        keys.check_key(keys.commit(kind, KEY))
        assert keys.commits(kind) in keys.__doc__
        for role in layout.roles:
            assert keys.payload_name(kind, role, "<write>") in keys.__doc__


def test_every_kind_of_commit_has_a_layout_and_takes_only_its_own_payloads() -> None:
    assert tuple(keys.COMMITS) == get_args(keys.CommitKind)
    with pytest.raises(ValueError, match="a segment has segment, but no state"):
        keys.payload_name("segment", "state", "one")


@pytest.mark.parametrize(("write", "read"), [(seal, unseal), (record_bytes, read_record)])
def test_every_flipped_or_missing_byte_of_a_sealed_record_is_found(
    write: Callable[[dict[str, Any]], bytes], read: Callable[[bytes], dict[str, Any]]
) -> None:
    body = {"format": 2, "name": "grün", "seconds": 0.1, "rows": [1, {"a": None}]}
    data = write(body)
    assert read(data) == body
    for damaged in (*_flips(data), data[:-1], data + b"\n", b"", b"[]", b"{}", b"\xff"):
        with pytest.raises(ObjectDamaged):
            read(damaged)


def test_a_writer_whose_payloads_were_collected_while_it_slept_writes_them_again() -> None:
    class Collected(MemoryStore):
        """The payloads are gone when the writer wakes to commit."""

        def put_if_absent(self, key: str, data: bytes) -> bool:
            for other in list(self.list("")):
                self.delete(other)
            return super().put_if_absent(key, data)

    store = Collected()
    commit = _write(store)
    assert verified_commit(store, "stage", KEY) == commit
