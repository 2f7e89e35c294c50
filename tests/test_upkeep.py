"""doctor, verify and gc as somebody meets them who looks after a store."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from runs import flip

from magi_ray.cli import cli
from magi_ray.commands.console import print_table
from magi_ray.errors import MediaError
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.render.upkeep.gc import Item
from magi_ray.report import garbage_table
from magi_ray.settings import Settings
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore

ROWS: list[dict[str, Any]] = [{"job_id": "one", "prompt": "sea"}, {"job_id": "two", "prompt": "hills", "num_chunks": 1}]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> tuple[Path, Run]:
    """A store with one finished run."""
    folder = tmp_path_factory.mktemp("upkeep")
    manifest = manifest_of(ROWS, Defaults.of(settings), base=folder)
    run, files = prepare(manifest, name="m.parquet", settings=settings)
    store = LocalStore(folder / "magi-ray-store")
    create(store, run, files)
    render_locally(store, run)
    return folder, run


@pytest.fixture
def here(tmp_path: Path, rendered: tuple[Path, Run], settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of that store."""
    shutil.copytree(rendered[0] / "magi-ray-store", tmp_path / "magi-ray-store")
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_id(rendered: tuple[Path, Run]) -> str:
    return rendered[1].run_id


@pytest.fixture
def store(here: Path) -> LocalStore:
    return LocalStore(here / "magi-ray-store")


def run(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def next_command(result: Result) -> list[str]:
    last = result.stderr.splitlines()[-1]
    assert last.startswith("next: magi-ray "), result.stderr
    return shlex.split(last.removeprefix("next: magi-ray "))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_says_what_this_machine_has_and_what_a_store_does(tmp_path: Path) -> None:
    result = run("doctor", "--store", str(tmp_path / "a store"))
    assert result.exit_code == 0, result.stderr
    for name in ("torch", "ray", "ffmpeg", "Create once", "Stale swap"):
        assert re.search(rf"^ok +{name}  ", result.stdout, re.MULTILINE), name
    assert "Everything that is needed is there" in result.stderr
    assert [path for path in (tmp_path / "a store").rglob("*") if path.is_file() and ".locks" not in path.parts] == []
    told = json.loads(run("doctor", "--store", str(tmp_path / "a store"), "--json").stdout)
    assert told["ok"] is True
    assert {"magi-ray", "torch", "ffmpeg"} <= {finding["name"] for finding in told["machine"]}
    assert all(finding["ok"] for finding in told["findings"])


def test_doctor_names_what_is_missing_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise MediaError("No ffmpeg with libx264 was found.", remedy="Install one.")

    monkeypatch.setattr("magi_ray.media.encoder.find_ffmpeg", none)
    # A store that lets everybody create.
    monkeypatch.setattr(LocalStore, "put_if_absent", lambda self, key, data: self.put(key, data) or True)
    result = run("doctor", "--store", str(tmp_path))
    assert result.exit_code == 1
    assert re.search(r"^missing +ffmpeg  ", result.stdout, re.MULTILINE)
    assert re.search(r"^missing +Create once  ", result.stdout, re.MULTILINE)
    assert "No ffmpeg with libx264 was found. Install one." in result.stderr
    assert next_command(result)[0] == "doctor"
    told = run("doctor", "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["ok"] is False


# verify ---------------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_says_who_needs_it_and_what_mends_it(store: LocalStore, run_id: str) -> None:
    whole = run("verify")
    assert whole.exit_code == 0, whole.stderr
    assert whole.stdout == ""
    assert "All is as it was committed" in whole.stderr
    video = keys.video(run_id, "two")
    flip(store, video)
    before = contents(store.root)
    for words in (("verify",), ("verify", run_id[:3])):
        damaged = run(*words)
        assert damaged.exit_code == 1
        [line] = [line for line in damaged.stdout.splitlines() if line.startswith(video)]
        assert f"{run_id} two" in line
        assert next_command(damaged)[:4] == ["retry", run_id, "--job", "two"]
    assert contents(store.root) == before, "verify changes nothing"
    [told] = json.loads(run("verify", "--json").stdout)["damages"]
    assert told["key"] == video
    mended = run(*next_command(damaged), "--local")
    assert mended.exit_code == 0, mended.stderr
    assert run("verify").exit_code == 0


def test_verify_of_a_run_that_is_not_there_proposes_one_that_is(store: LocalStore, run_id: str) -> None:
    wrong = run("verify", run_id[:-3] + "zzz")
    assert wrong.exit_code == 2
    assert next_command(wrong) == ["verify", run_id]


# gc -------------------------------------------------------------------------------------------------------------


def age(root: Path, days: float) -> None:
    """As if everything in the store had been written so long ago."""
    then = time.time() - days * 86400
    for path in root.rglob("*"):
        os.utime(path, (then, then))


def test_gc_shows_what_no_run_needs_and_deletes_it_only_with_yes(store: LocalStore, run_id: str) -> None:
    age(store.root, 30)
    nothing = run("gc")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "holds nothing older than" in nothing.stderr
    before = contents(store.root)
    shown = run("gc", "--forget", run_id, "--min-age", "10d")
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"^stages/\S+ +\d+ +[\d.]+ \S?i?B +30 d +no run needs this stage$", shown.stdout, re.MULTILINE)
    assert "Nothing was deleted" in shown.stderr
    assert contents(store.root) == before
    following = next_command(shown)
    assert following == ["gc", "--forget", run_id, "--min-age", "10d", "--yes"]
    assert "holds nothing older than" in run("gc", "--forget", run_id, "--min-age", "31d").stderr
    deleted = run(*following)
    assert deleted.exit_code == 0, deleted.stderr
    assert list(store.list("stages/")) == list(store.list("segments/")) == []
    assert contents(store.root / "runs") == {
        path: data for path, data in before.items() if path.startswith(str(store.root / "runs"))
    }
    assert run("status", run_id).exit_code == 0


def test_gc_tells_every_object_as_json(store: LocalStore, run_id: str) -> None:
    told = json.loads(run("gc", "--forget", run_id, "--min-age", "0s", "--json").stdout)
    assert told["objects"] == len(told["garbage"]) > 10
    assert told["bytes"] == sum(item["size"] for item in told["garbage"])
    assert (told["deleted_objects"], told["deleted_bytes"]) == (0, 0)
    assert all(store.exists(item["key"]) for item in told["garbage"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--min-age", "7"), "'7' is not a duration; write 30m, 12h or 7d"),
        (("--min-age", "-1d"), "is not a duration"),
        (("--forget", "nonsense"), "There is no run 'nonsense'"),
    ],
)
def test_what_gc_does_not_understand_deletes_nothing(store: LocalStore, words: tuple[str, ...], says: str) -> None:
    before = contents(store.root)
    result = run("gc", "--yes", *words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert next_command(result)
    assert contents(store.root) == before


def test_thousands_of_objects_are_shown_in_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = ("no run needs this stage", "its commit was never written")
    items = [
        Item(key=f"stages/aa/{n:064}/commit.json", size=1024, age_s=86400.0 * (8 + n % 30), reason=reasons[n % 2])
        for n in range(3000)
    ]
    print_table(garbage_table(items))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["where", "stages/…", "stages/…"]
    assert re.search(r"1500 +1\.5 MiB +8 d to 36 d", lines[1])
