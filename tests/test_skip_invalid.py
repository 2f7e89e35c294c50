"""`manifest validate`, `plan` and `submit` find the same problems; `--skip-invalid` renders the good rows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from magi_ray.cli import cli
from magi_ray.commands import background, foreground, stores
from magi_ray.commands.outcome import report_exit
from magi_ray.manifest import write_manifest
from magi_ray.render.runs.record import open_run
from magi_ray.storage.local import LocalStore

MANIFESTS = Path(__file__).parents[1] / "manifests"
SMALL = """
preset = "magi-tiny"
[runtime]
num_frames = 24
video_size_h = 32
video_size_w = 32
num_steps = 4
noise2clean_kvrange = [2, 1]
[encoder]
preset = "ultrafast"
"""
ROWS: list[dict[str, Any]] = [
    {"job_id": "one", "prompt": "sea", "mine": "first"},
    {"job_id": "two", "prompt": "sea", "width": 100, "image": "bad.png", "mine": "second"},
    {"job_id": "three", "prompt": "sea", "image": "bad.png", "mine": "third"},
    {"job_id": "four", "prompt": "sea", "image": "pic.png", "mine": "fourth"},
]
JOB = ("m.parquet", "--job", "small.toml")


@pytest.fixture
def here(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, cache = tmp_path / "here", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    (cache / "magi-tiny").symlink_to(tiny_weights)
    monkeypatch.setenv("MAGI_RAY_CACHE", str(cache))
    monkeypatch.chdir(folder)
    (folder / "small.toml").write_text(SMALL)
    (folder / "bad.png").write_text("no picture")
    shutil.copy(MANIFESTS / "quickstart-image.png", folder / "pic.png")
    write_manifest(ROWS, folder / "m.parquet")
    # What the background process does, in this one.
    monkeypatch.setattr(
        background, "render_in_background",
        lambda stored, options, *, as_json, no_wait=False: report_exit(
            stored, foreground.render_in_foreground(stored, options), as_json=as_json
        ),
    )  # fmt: skip
    return folder


def run(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def told(*words: str, code: int = 0) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == code, result.stderr
    [line] = result.stdout.splitlines()
    content: dict[str, Any] = json.loads(line)
    return content


def places(problems: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(problem["row"], problem["column"]) for problem in problems]


WRONG = [(2, "width"), (2, "image"), (3, "image")]


def test_validate_plan_and_submit_name_the_same_problems_at_once(here: Path) -> None:
    found = told("manifest", "validate", *JOB, code=3)
    assert (found["valid"], found["rows"], found["notes"]) == (False, 4, [])
    assert found["error"]["problems"] == found["problems"]
    assert places(found["problems"]) == WRONG
    assert {"row", "job_id", "column", "value", "rule", "remedy"} == found["problems"][0].keys()
    for words in (("plan",), ("submit",), ("submit", "--dry-run")):
        assert told(*words, *JOB, code=3)["error"]["problems"] == found["problems"]
    assert not (here / "magi-ray-store").exists()
    said = run("manifest", "validate", *JOB)
    assert "render the other 2 now: submit --skip-invalid" in said.stderr
    rows_only = told("manifest", "validate", *JOB, "--no-media", code=3)
    assert places(rows_only["problems"]) == [(2, "width")]

    write_manifest([ROWS[0], ROWS[3]], here / "m.parquet")
    good = run("manifest", "validate", *JOB, "--no-media")
    assert "2 rows, all valid. Media were not opened." in good.stderr
    assert shlex.split(good.stderr.splitlines()[-1]) == ["next:", "magi-ray", "submit", *JOB]
    valid = told("manifest", "validate", *JOB)
    assert (valid["valid"], valid["rows"], valid["problems"]) == (True, 2, [])


def test_a_file_that_is_no_table_is_told_in_the_same_form(here: Path) -> None:
    (here / "m.parquet").write_text("no table")
    found = told("manifest", "validate", *JOB, code=3)
    assert (found["valid"], found["rows"]) == (False, 0)
    assert places(found["problems"]) == [(0, "")]


def test_options_of_render_that_are_wrong_are_a_list_with_the_clip_that_is_none(here: Path) -> None:
    words = ("render", "--prompt", "sea", "--width", "100", "--image", "bad.png", "-o", "out.mp4")
    error = told(*words, code=2)["error"]
    assert places(error["problems"]) == [(1, "width"), (1, "image")]
    assert re.search("^--image: bad.png cannot be read", error["message"], re.MULTILINE)


def test_rows_with_problems_are_left_out_recorded_and_told_wherever_the_run_is_looked_at(here: Path) -> None:
    planned = told("plan", *JOB, "--skip-invalid")
    assert [video["job_id"] for video in planned["videos"]] == ["one", "four"]
    assert places(planned["problems"]) == WRONG

    done = told("submit", *JOB, "--skip-invalid", "--local", code=4)
    assert list(done["videos"]) == ["one", "four"]
    assert (done["state"], done["failed"], places(done["problems"])) == ("failed", [], WRONG)
    run_id = done["run_id"]
    assert run_id == planned["run_id"]

    folder = here / "magi-ray-store" / "runs" / run_id
    lines = pq.read_table(folder / "errors.parquet").to_pylist()
    assert [(line["row"], line["job_id"], line["column"], line["class"]) for line in lines] == [
        (2, "two", "width", "input"), (2, "two", "image", "input"), (3, "three", "image", "input"),
    ]  # fmt: skip
    assert lines[0]["message"] == 'row 2 (job "two"), column width: 100 is not a multiple of 16; use 96 or 112'
    results = pq.read_table(folder / "results.parquet").to_pydict()
    assert (results["job_id"], results["mine"]) == (["one", "four"], ["first", "fourth"])
    # The stored manifest is whole: a number means the same row there as in the file.
    assert pq.read_table(folder / "manifest.parquet")["job_id"].to_pylist() == ["one", "two", "three", "four"]
    assert [plan.row for plan in open_run(LocalStore(folder.parents[1]), run_id).plans.values()] == [1, 4]

    # As on another machine: only the store is there, and what may be lost of it is.
    (folder / "errors.parquet").unlink()
    shutil.move("magi-ray-store", "other")
    (here / "m.parquet").unlink()
    (here / "pic.png").unlink()
    status = told("status", run_id, "--store", "other")
    assert places(status["problems"]) == WRONG
    [listed] = told("list", "--store", "other")["runs"]
    assert (listed["videos"], listed["done"], listed["failed"]) == (4, 2, 2)
    assert listed["state"] == status["state"] == "failed"
    for words in (("resume", run_id, "--local"), ("watch", run_id), ("retry", run_id, "--failed")):
        result = run(*words, "--store", "other")
        assert result.exit_code == (0 if words[0] == "retry" else 4), result.stderr
        assert "2 rows left out as invalid:" in result.stderr
        assert 'row 3 (job "three"), column image: bad.png cannot be read' in result.stderr
    refused = run("retry", run_id, "--job", "three", "--store", "other")
    assert refused.exit_code == 2
    assert "three was left out when run" in refused.stderr


def test_the_corrected_manifest_renders_only_what_is_new(here: Path) -> None:
    before = told("submit", *JOB, "--skip-invalid", "--local", code=4)
    assert told("submit", *JOB, "--skip-invalid", "--local", code=4)["run_id"] == before["run_id"]
    shutil.copy(here / "pic.png", here / "bad.png")
    mended = told("submit", *JOB, "--skip-invalid", "--local", code=4)
    assert places(mended["problems"]) == [(2, "width")]
    assert len({before["run_id"], mended["run_id"]}) == 2
    write_manifest([ROWS[0], ROWS[1] | {"width": 48}, *ROWS[2:]], here / "m.parquet")
    plan = {video["job_id"]: video["stages_left"] for video in told("plan", *JOB)["videos"]}
    assert {job for job, left in plan.items() if left} == {"two"}
    assert list(told("submit", *JOB, "--local")["videos"]) == ["one", "two", "three", "four"]


def test_nothing_is_submitted_of_a_manifest_without_a_good_row(here: Path) -> None:
    write_manifest(ROWS[1:3], here / "m.parquet")
    refused = told("submit", *JOB, "--skip-invalid", code=3)["error"]
    assert places(refused["problems"]) == [(1, "width"), (1, "image"), (2, "image")]
    table = pq.read_table(here / "m.parquet")
    pq.write_table(table.rename_columns(["name", *table.column_names[1:]]), here / "m.parquet")
    found = told("submit", *JOB, "--skip-invalid", code=3)["error"]
    assert "--skip-invalid" not in found["remedy"]
    assert not (here / "magi-ray-store").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(ROWS[:1], here / "m.parquet")
    planned = told("plan", *JOB)
    assert planned["store_bytes_free"] > planned["store_bytes_left"] > 20_000
    space = planned["videos"][0]["space_left"]

    def free(count: int) -> None:
        monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: type("usage", (), {"free": count}))

    free(space["latents"] - 1)
    refused = told("submit", *JOB, code=2)["error"]
    assert re.search(r"takes about \d+\.\d KiB of the store, but \d+\.\d KiB are free", refused["message"])
    assert "--store" in refused["remedy"]
    assert not (here / "magi-ray-store").exists()
    free(space["latents"] + 1)  # what is sure fits
    assert "may take about" in run("submit", *JOB, "--local").stderr
    free(0)
    again = run("submit", *JOB, "--local")  # and nothing is left to do
    assert (again.exit_code, "Nothing to render" in again.stderr) == (0, True)
    write_manifest([ROWS[0] | {"seed": 1}], here / "m.parquet")
    assert run("submit", *JOB).exit_code == 2
    assert run("submit", *JOB, "--local", "--no-space-check").exit_code == 0


def test_prompts_that_are_cut_are_noted_by_validate_and_plan(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "a red fox walks through snow and " * 60
    schedule = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 1, "prompt": prompt}]
    rows = [{"job_id": "a", "prompt": prompt}, {"job_id": "b", "schedule": schedule, "num_chunks": 2}]
    write_manifest(rows, here / "m.parquet")
    found = told("manifest", "validate", *JOB)["notes"]
    pattern = r"Row (1: its prompt|2: the prompt of entry 2) has \d{3,4} tokens, 798 are read; the last words .* “.+”\."
    assert [re.fullmatch(pattern, note) is not None for note in found] == [True, True]
    planned = run("plan", *JOB)
    for note in found:
        assert f"note: {note}" in planned.stderr
    monkeypatch.setenv("MAGI_RAY_CACHE", str(here / "empty"))
    [note] = told("manifest", "validate", *JOB)["notes"]
    assert re.fullmatch(
        r"Row 1 has a long prompt, of which 798 tokens are read\. There is no .*/spiece\.model .*", note
    )
    assert not (here / "empty").exists()
