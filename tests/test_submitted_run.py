"""magi_ray.submit: a manifest rendered in the background, followed from Python."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import duckdb
import pandas as pd
import polars as pl
import psutil
import pyarrow as pa
import pytest

import magi_ray
from magi_ray.api import Model, SubmittedRun
from magi_ray.api.runs import _manifest
from magi_ray.errors import InputError, MagiRayError, ManifestError, WeightsError
from magi_ray.manifest import write_manifest
from magi_ray.settings import Settings

ROWS: list[dict[str, Any]] = [
    {"job_id": "a", "prompt": "sea", "num_chunks": 1, "seed": 3},
    {"job_id": "b", "prompt": "hills", "num_chunks": 1, "seed": 4},
]


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; nothing that was started there is left running."""
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = children()
    yield tmp_path
    for process in children() - before:
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.mark.parametrize("kind", ["path", "csv", "dicts", "pyarrow", "pandas", "polars", "duckdb"])
def test_every_kind_of_table_is_the_same_manifest(kind: str, here: Path, settings: Settings) -> None:
    write_manifest(ROWS, here / "rows.parquet")
    pd.DataFrame(ROWS).to_csv(here / "rows.csv", index=False)
    table = {
        "path": here / "rows.parquet",
        "csv": str(here / "rows.csv"),
        "dicts": ROWS,
        "pyarrow": pa.Table.from_pylist(ROWS),
        "pandas": pd.DataFrame(ROWS),
        "polars": pl.DataFrame(ROWS),
        "duckdb": duckdb.from_arrow(pa.Table.from_pylist(ROWS)),
    }[kind]
    manifest, name = _manifest(table, settings, "")
    wanted, _ = _manifest(ROWS, settings, "")
    assert (manifest.digest, manifest.rows) == (wanted.digest, wanted.rows)
    assert Path(name).stem == "rows"


def test_a_run_is_waited_for_and_has_its_videos(here: Path, settings: Settings) -> None:
    run = magi_ray.submit(pd.DataFrame(ROWS), Model(settings), store="films", local=True)
    assert run.status().state in ("new", "rendering", "done")
    status = run.wait(120)
    assert status.state == "done"
    assert status.driver is None
    videos = run.videos()
    assert list(videos) == ["a", "b"]
    for path in videos.values():
        with av.open(path) as video:
            assert video.streams.video[0].frames == 24
    assert Path(videos["a"]).is_relative_to(here / "films")
    again = magi_ray.submit(ROWS, Model(settings), store=here / "films")
    assert again.id == run.id
    assert again.wait(0).state == "done", "nothing was left to render"
    assert repr(again) == f"<run {run.id} in {here / 'films'}>"


def test_a_run_is_given_up_waiting_for_found_again_and_cancelled(here: Path, settings: Settings) -> None:
    endless = [{"job_id": "a", "prompt": "sea", "num_chunks": 2000}]

    def submit() -> SubmittedRun:
        return magi_ray.submit(endless, Model(settings), store="films", local=True)

    before = children()
    run = submit()
    with pytest.raises(TimeoutError, match=run.id):
        run.wait(0.2)
    while not list((here / "films").glob("stages/*/*/commit.json")):
        time.sleep(0.1)
    found = submit()
    assert found.status().driver == run.status().driver
    assert found.status().state == "rendering"
    found.cancel()
    assert run.wait(20).state == "cancelled"
    assert run.videos() == {}
    assert children() <= before


def test_what_is_wrong_is_told_before_anything_starts(here: Path, settings: Settings) -> None:
    model = Model(settings)
    with pytest.raises(ManifestError, match=r'row 2 \(job "b"\), column width: 100'):
        magi_ray.submit([ROWS[0], {**ROWS[1], "width": 100}], model, store="films")
    with pytest.raises(InputError, match=r"int is not a table(?s:.*)polars \(collected\)"):
        magi_ray.submit(5, model, store="films")
    with pytest.raises(InputError, match="does not exist"):
        magi_ray.submit("none.parquet", model, store="films")
    with pytest.raises(WeightsError, match="nowhere"):
        magi_ray.submit(ROWS, "4.5B-distill", weights="nowhere", store="films")
    assert not (here / "films").exists()


def test_what_ended_the_process_is_raised(here: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SubmittedRun.start
    monkeypatch.setattr(SubmittedRun, "start", lambda run, options: start(run, [*options, "--no-such-option"]))
    with pytest.raises(MagiRayError, match=r"(?s)ended with exit code 2.*No such option '--no-such-option'"):
        magi_ray.submit(ROWS, Model(settings), store="films", local=True)
