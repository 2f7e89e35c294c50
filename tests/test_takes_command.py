"""`magi-ray takes`, and `retry --take`; and what `resume` says of another ffmpeg."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from runs import MakeRun, by_progress

from magi_ray.cli import cli
from magi_ray.commands import background
from magi_ray.commands.options import RenderOptions
from magi_ray.commands.stores import StoredRun
from magi_ray.render.driving import local
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.plans.takes import BackTo
from magi_ray.render.runs.record import Run, open_run
from magi_ray.render.tasks import loading
from magi_ray.render.upkeep.gc import collect, garbage
from magi_ray.storage.local import LocalStore

ROWS = [{"job_id": "a", "prompt": "sea", "num_chunks": 2}, {"job_id": "b", "prompt": "hills", "num_chunks": 1}]


class Driving:
    """In place of a background process: renders here, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[StoredRun, RenderOptions]] = []

    def __call__(self, stored: StoredRun, options: RenderOptions, **_: Any) -> None:
        self.asked.append((stored, options))
        render_locally(stored.store, stored.run)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return LocalStore(tmp_path / "magi-ray-store")


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    return result


def takes(run_id: str, *words: str) -> list[dict[str, Any]]:
    content: dict[str, Any] = json.loads(run("takes", run_id, *words, "--json").stdout)
    return list(content["takes"])


def values(found: Sequence[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(take[name] for name in names) for take in found]


def test_takes_are_listed_and_one_is_brought_back_as_the_listing_proposes(
    store: LocalStore, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    driving = Driving()
    monkeypatch.setattr(background, "render_in_background", driving)
    made = make_run(store, ROWS)
    render_locally(store, made)
    assert "No row of run" in run("takes", made.run_id).stderr
    [only] = takes(made.run_id, "--job", "b")
    assert (only["take"], only["in_use"], only["stages_in_store"], only["stages"]) == (1, True, 4, 4)
    assert datetime.fromisoformat(only["asked"]).utcoffset() is not None

    assert "Take 2 of a: anew from chunk 1 on." in run("retry", made.run_id, "--job", "a", "--from-chunk", "1").stderr
    names = ("job_id", "take", "from_chunk", "base", "in_use", "stages_in_store")
    assert values(takes(made.run_id), *names) == [("a", 1, None, None, False, 5), ("a", 2, 1, 1, True, 5)]
    listing = run("takes", made.run_id)
    assert [line.split()[-2:] for line in listing.stdout.splitlines()[1:]][1] == ["in", "use"]
    proposed = shlex.split(listing.stderr.splitlines()[-1])
    assert proposed == ["next:", "magi-ray", "retry", made.run_id, "--job", "a", "--take", "1"]
    assert run(*proposed[2:]).stderr.splitlines() == ["Take 1 of a is brought back."]
    stored, options = driving.asked[-1]
    assert (stored.run.plans["a"].takes, options.retry) == ((1, BackTo(1)), ("a",))
    assert values(takes(made.run_id), "take", "in_use") == [(1, True), (2, False)]
    assert "in use already" in run("retry", made.run_id, "--job", "a", "--take", "1").stderr
    assert open_run(store, made.run_id).plans["a"].takes == (1, BackTo(1)), "nothing more was asked for"

    collect(store, garbage(store, min_age_s=0))
    assert values(takes(made.run_id), "take", "stages_in_store") == [(1, 5), (2, 1)]
    assert "What is gone of a take would be rendered again" in run("takes", made.run_id).stderr
    told = run("retry", made.run_id, "--job", "a", "--take", "2").stderr
    assert "4 stages of it are gone from the store and rendered again: 8 forwards." in told
    for words in (("--take", "3", "--job", "a"), ("--take", "1"), ("--take", "1", "--from-chunk", "0", "--job", "a")):
        run("retry", made.run_id, *words, code=2)


def test_another_ffmpeg_is_told_by_resume_and_retry_before_it_begins(
    store: LocalStore, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(progress: RunProgress) -> None:
        if progress.videos["a"].chunks_done == 1:
            raise KeyboardInterrupt

    made: Run = make_run(store, ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(local, "check_machine", lambda _: "ffmpeg 3.4, x264 152")
        patch.setattr(loading, "encoder_identity", lambda _: "ffmpeg 3.4, x264 152")
        with pytest.raises(KeyboardInterrupt):
            render_locally(store, made, observers=by_progress(interrupt))

    class Begun(Exception):
        pass

    def begin(*_: object, **__: object) -> None:
        raise Begun

    monkeypatch.setattr(background, "DriverProcess", begin)
    for words in (["resume", made.run_id], ["retry", made.run_id, "--job", "a"]):
        result = CliRunner().invoke(cli, words)
        assert "but ffmpeg 3.4, x264 152 encoded what there is" in result.stderr
        assert "decoded and encoded again: 1." in result.stderr.replace("\n", " ")
        assert result.stderr.index("encoded again") < result.stderr.index("Begun")
