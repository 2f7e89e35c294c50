"""What every store must do. A store's own test file inherits ``StoreContract`` and gives the ``store`` fixture."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from magi_ray.errors import ObjectMissing
from magi_ray.storage.probe import check_store
from magi_ray.storage.store import Store

BAD_KEYS = ["", "/a", "a/", "a//b", "..", "a/../b", "a/./b", ".tmp/x", "a b", "a\\b", "a\nb", "ä", "a/" + "x" * 256]


class StoreContract:
    def test_what_was_put_is_got(self, store: Store) -> None:
        for data in (b"", b"\x00\xff" * 100_000):
            store.put("a/b/c.bin", data)
            assert store.get("a/b/c.bin") == data

    def test_put_overwrites(self, store: Store) -> None:
        store.put("a", b"long before")
        store.put("a", b"after")
        assert store.get("a") == b"after"

    def test_put_if_absent_creates_once_and_keeps_the_first(self, store: Store) -> None:
        assert store.put_if_absent("a/b", b"first")
        assert not store.put_if_absent("a/b", b"second")
        assert store.get("a/b") == b"first"

    def test_a_deleted_key_can_be_created_again(self, store: Store) -> None:
        store.put("a/b", b"1")
        store.delete("a/b")
        assert store.put_if_absent("a/b", b"2")

    def test_of_racing_creators_exactly_one_wins_and_its_bytes_stay(self, store: Store) -> None:
        racers = 8
        for round_ in range(5):
            barrier = threading.Barrier(racers)

            def create(racer: int, key: str = f"race/{round_}", barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return store.put_if_absent(key, b"%d" % racer * 50_000)

            with ThreadPoolExecutor(racers) as pool:
                won = list(pool.map(create, range(racers)))
            assert won.count(True) == 1
            assert store.get(f"race/{round_}") == b"%d" % won.index(True) * 50_000

    def test_a_missing_object_is_an_error_that_names_it(self, store: Store, tmp_path: Path) -> None:
        store.put("a/b", b"x")
        for key in ("nothing", "a", "a/b/c", "a/c"):
            with pytest.raises(ObjectMissing, match=key):
                store.get(key)
            with pytest.raises(ObjectMissing, match=key):
                store.get_to_file(key, tmp_path / "out")

    def test_exists_is_true_for_objects_only(self, store: Store) -> None:
        store.put("a/b", b"x")
        assert store.exists("a/b")
        assert not store.exists("a")
        assert not store.exists("a/b/c")
        assert not store.exists("b")

    def test_list_gives_every_key_under_a_prefix_in_string_order(self, store: Store) -> None:
        keys = ["a/b/1", "a/b-c/1", "a/b.json", "a/bc", "b", "a/a"]
        for key in keys:
            store.put(key, b"")
        assert list(store.list("")) == sorted(keys)
        assert list(store.list("a/b")) == ["a/b-c/1", "a/b.json", "a/b/1", "a/bc"]
        assert list(store.list("a/b/")) == ["a/b/1"]
        assert list(store.list("a/b/1")) == ["a/b/1"]
        assert list(store.list("nothing/")) == []
        assert list(store.list("b/")) == []
        assert list(store.list("a/b", after="a/b.json")) == ["a/b/1", "a/bc"]
        assert list(store.list("a/b", after="a")) == list(store.list("a/b"))
        assert list(store.list("a/b", after="a/bc")) == []

    def test_deleting_twice_is_fine(self, store: Store) -> None:
        store.put("a/b", b"x")
        store.delete("a/b")
        store.delete("a/b")
        store.delete("never/was")
        assert not store.exists("a/b")
        assert list(store.list("")) == []

    def test_files_go_in_and_come_out_unchanged(self, store: Store, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(bytes(range(256)) * 10_000)
        target.write_bytes(b"something longer before" * 200_000)
        store.put("a/file", b"before")
        store.put_file("a/file", source)
        store.get_to_file("a/file", target)
        assert target.read_bytes() == source.read_bytes() == store.get("a/file")

    def test_a_file_that_came_in_part_goes_on_where_it_stopped(self, store: Store, tmp_path: Path) -> None:
        target = tmp_path / "target"
        store.put("a/file", b"0123456789")
        target.write_bytes(b"abcXXXXXXXXXXXXX")
        store.get_to_file("a/file", target, start=3)
        assert target.read_bytes() == b"abc3456789"

    def test_a_swap_succeeds_only_from_the_version_that_is_there(self, store: Store) -> None:
        assert store.put_if_absent("a/lease", b"write 1")
        data, first = store.get_versioned("a/lease")
        assert data == b"write 1"
        second = store.swap("a/lease", b"write 2", first)
        assert second is not None
        assert store.swap("a/lease", b"write 3", first) is None
        assert store.get_versioned("a/lease") == (b"write 2", second)
        assert store.swap("a/lease", b"write 4", second) is not None
        assert store.get("a/lease") == b"write 4"

    def test_a_missing_object_has_no_version_and_cannot_be_swapped(self, store: Store) -> None:
        store.put_if_absent("a/lease", b"write 1")
        _, version = store.get_versioned("a/lease")
        store.delete("a/lease")
        assert store.swap("a/lease", b"write 2", version) is None
        with pytest.raises(ObjectMissing, match="a/lease"):
            store.get_versioned("a/lease")
        assert not store.exists("a/lease")

    def test_racing_swappers_lose_no_increment(self, store: Store) -> None:
        store.put_if_absent("counter", b"0")

        def increment(swapper: int) -> None:
            done = 0
            while done < 10:
                data, version = store.get_versioned("counter")
                count = int(data.split()[0]) + 1
                done += store.swap("counter", b"%d by %d" % (count, swapper), version) is not None

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(increment, range(4)))
        assert store.get("counter").split()[0] == b"40"

    def test_entries_are_the_list_with_sizes_and_ages(self, store: Store) -> None:
        store.put("a/b", b"12345")
        store.put("a/a", b"")
        found = list(store.entries("a/"))
        assert [(entry.key, entry.size) for entry in found] == [("a/a", 0), ("a/b", 5)]
        assert all(0 <= entry.age_s < 120 for entry in found)

    def test_a_finished_writer_leaves_nothing_to_sweep(self, store: Store) -> None:
        store.put("a", b"x")
        assert list(store.leftovers()) == []
        store.sweep("nothing")

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_a_key_that_could_leave_the_store_is_refused(self, store: Store, key: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        for act in (
            lambda: store.put(key, b""),
            lambda: store.put_if_absent(key, b""),
            lambda: store.put_file(key, tmp_path / "file"),
            lambda: store.get(key),
            lambda: store.get_to_file(key, tmp_path / "out"),
            lambda: store.exists(key),
            lambda: store.get_versioned(key),
            lambda: store.swap(key, b"", "version"),
            lambda: store.delete(key),
        ):
            with pytest.raises(ValueError, match="is not a key"):
                act()

    def test_the_check_before_a_run_passes_and_leaves_nothing(self, store: Store) -> None:
        check_store(store)
        assert list(store.list("")) == []
