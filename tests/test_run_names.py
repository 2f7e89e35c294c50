"""Which run a command means, and what it says of one: names, the default store, completion, states."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from runs import prepared

from magi_ray.cli import cli
from magi_ray.commands import background
from magi_ray.commands.stores import find_run, store_flag
from magi_ray.drivers.status_file import note_submission, submission
from magi_ray.errors import FailureClass, RunNotFound
from magi_ray.events import TaskKind
from magi_ray.manifest import Defaults, manifest_of, write_manifest
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving import requests
from magi_ray.render.driving.inventory import take_inventory_of_run
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.reports import RunReports
from magi_ray.render.driving.scheduler import RowFailed, RunState
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import create, prepare
from magi_ray.settings import Settings, job
from magi_ray.storage import keys
from magi_ray.storage.epochs import become_driver
from magi_ray.storage.local import LocalStore
from magi_ray.storage.store import Store
from magi_ray.system import Owner

ELSEWHERE = Owner(name="driver", host="farm-7", boot="another", pid=4711, started=1)
Submit = Callable[..., Run]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGI_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MAGI_RAY_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def submit(here: Path, settings: Settings) -> Submit:
    """``submit(prompt, …, name=…, store=…)``: a run of a chunk for each prompt, and its manifest as a file."""

    def made(*prompts: str, name: str = "rows.parquet", store: Store | None = None) -> Run:
        rows = [{"job_id": f"row-{n}", "prompt": prompt, "num_chunks": 1} for n, prompt in enumerate(prompts)]
        if name.endswith(".parquet"):
            write_manifest(rows, here / name)
        run, files = prepare(manifest_of(rows, Defaults.of(settings), base=here), name=name, settings=settings)
        assert create(store or LocalStore(here / "magi-ray-store"), run, files)
        return run

    return made


def type_in(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert "Traceback" not in result.stderr, result.stderr
    return result


def told(*words: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(type_in(*words, "--json").stdout)
    return content


# Names --------------------------------------------------------------------------------------------------------------


def test_a_run_is_meant_by_its_age_its_manifest_or_its_rows(here: Path, submit: Submit) -> None:
    first, other, second = submit("sea"), submit("sea", name="film 2.parquet"), submit("hills")
    third = submit("lakes", name="rows.mp4")
    store = LocalStore(here / "magi-ray-store")
    for name, meant in {
        None: third, "@latest": third, "@-1": second, "@-3": first,
        "rows@latest": third, "rows@-1": second, "rows.parquet@-1": first, "film 2.parquet@latest": other,
        "film-2": other, "film 2": other, "film 2.parquet": other, "some/where/film 2.parquet": other,
        "rows.mp4": third, "rows.parquet": second, str(here / "rows.parquet"): second,
        first.run_id: first, first.run_id[:-2]: first,
    }.items():  # fmt: skip
        assert find_run(store, name, "magi-ray-store", verb="status") == meant.run_id, name
    write_manifest([{"job_id": "row-0", "prompt": "sea", "num_chunks": 1}], here / "rows.parquet")
    assert find_run(store, "rows.parquet", "magi-ray-store", verb="status") == first.run_id, "the rows it has now"
    (here / "rows.mp4").write_bytes(b"of the run of that name")
    for name in ("rows", str(here / "rows")):
        assert find_run(store, name, "magi-ray-store", verb="status") == first.run_id, "without the suffix"
    assert told("status")["run_id"] == third.run_id
    assert f"Run {second.run_id}:" in type_in("status", "rows@-1").stderr


def test_a_damaged_run_is_meant_by_the_beginning_of_its_id_too(here: Path, submit: Submit) -> None:
    run = submit("sea")
    submit("hills", name="other.parquet")
    store = LocalStore(here / "magi-ray-store")
    (here / "magi-ray-store" / keys.run_record(run.run_id)).write_bytes(b"{")
    for name in ("rows", run.run_id[:-2], run.run_id):
        assert find_run(store, name, "magi-ray-store", verb="status") == run.run_id, name
    assert "is damaged: of its run.json, its 1 bytes are not a whole record." in type_in("status", "rows").stderr


def test_an_empty_store_is_told_once(here: Path, submit: Submit) -> None:
    (here / "empty").mkdir()
    said = type_in("status", "--store", "empty").stderr
    assert (said.count("holds no runs"), said.count("No run there can be read")) == (1, 1)


def test_a_name_that_may_mean_many_lists_them_with_times_and_states(here: Path, submit: Submit) -> None:
    runs = [submit("sea"), submit("hills")]
    requests.request(LocalStore(here / "magi-ray-store"), runs[0].run_id, "cancel")
    write_manifest([{"job_id": "a", "prompt": "of neither"}], here / "rows.parquet")
    for name in ("rows", "rows.parquet"):
        result = type_in("retry", name, "--job", "row-0")
        lines = result.stderr.splitlines()
        assert (result.exit_code, lines[-1]) == (2, f"next: magi-ray retry {runs[1].run_id} --job row-0")
        for line, run, state in zip(lines[1:3], runs, ("cancelled", "new"), strict=True):
            assert re.fullmatch(rf"  {run.run_id}  submitted 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\S*, {state}", line)
    store = LocalStore(here / "magi-ray-store")
    for name in ("rows@-2", "@-2", "films@latest", "rows.csv", "@last"):
        with pytest.raises(RunNotFound):
            find_run(store, name, "magi-ray-store", verb="status")


def test_nothing_is_stopped_on_a_guess(here: Path, submit: Submit) -> None:
    store = LocalStore(here / "magi-ray-store")
    runs = [submit("sea"), submit("hills")]
    for verb in ("cancel", "pause"):
        none = type_in(verb)
        assert (none.exit_code, none.stderr.splitlines()[-1]) == (2, "next: magi-ray list")
        assert "No run" in none.stderr
    become_driver(store, runs[0].run_id, ELSEWHERE)
    assert find_run(store, None, "magi-ray-store", verb="cancel") == runs[0].run_id, "the only one"
    become_driver(store, runs[1].run_id, ELSEWHERE)
    for verb in ("cancel", "pause"):
        many = type_in(verb)
        assert (many.exit_code, many.stderr.splitlines()[-1]) == (2, "next: magi-ray list")
        assert all(f"{run.run_id}  submitted" in many.stderr for run in runs)
    assert not any(requests.requested(store, run.run_id) for run in runs)


def test_a_store_in_the_environment_is_the_default_and_next_commands_know(
    here: Path, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = submit("sea", store=LocalStore(here / "my films"))
    submit("hills")
    monkeypatch.setenv("MAGI_RAY_STORE", str(here / "my films"))
    assert type_in("watch").stderr.splitlines()[-1] == f"next: magi-ray resume {elsewhere.run_id}"
    named = type_in("watch", "--store", "magi-ray-store").stderr.splitlines()[-1]
    assert named.endswith(" --store magi-ray-store")
    for command in ("status", "doctor"):
        assert "MAGI_RAY_STORE" in type_in(command, "--help").stdout
    monkeypatch.setenv("MAGI_RAY_STORE", __file__)
    assert "is a file, not a folder" in type_in("doctor").stderr
    monkeypatch.setenv("MAGI_RAY_STORE", "")
    assert (store_flag("magi-ray-store"), told("list")["runs"][0]["videos"]) == ("", 1)


def test_a_run_is_submitted_again_from_any_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(here / "magi-ray-store")
    note_submission(store, "rows-1", ["submit", "my rows.parquet"])
    assert submission(store, "rows-1") == "magi-ray submit 'my rows.parquet'"
    monkeypatch.chdir("/")
    assert submission(store, "rows-1") == f"cd {shlex.quote(str(here))} && magi-ray submit 'my rows.parquet'"
    assert submission(store, "rows-2") == "", "it was not submitted here"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_runs_of_the_store_that_was_typed(
    shell: str, here: Path, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = submit("sea"), submit("sea", name="films.parquet", store=LocalStore(here / "my films"))

    def completed(*words: str) -> str:
        monkeypatch.setenv("COMP_WORDS", " ".join(["magi-ray", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)) if shell != "fish" else words[-1])
        return CliRunner(env={"_MAGI_RAY_COMPLETE": f"{shell}_complete"}).invoke(cli, []).stdout

    assert run.run_id in completed("status", "ro")
    assert other.run_id not in completed("status", "ro")
    typed = ("verify", "--store", "'my films'", "fi")
    assert other.run_id in completed(*typed)
    assert "--forget" in completed("gc", "--f")
    assert run.run_id not in completed("status", "--store", "nowhere", "ro")
    script = CliRunner(env={"_MAGI_RAY_COMPLETE": f"{shell}_source"}).invoke(cli, [])
    assert "_MAGI_RAY_COMPLETE" in script.stdout
    line = {"bash": 'eval "$(_MAGI_RAY_COMPLETE=bash_source magi-ray)"',
            "zsh": 'eval "$(_MAGI_RAY_COMPLETE=zsh_source magi-ray)"',
            "fish": "_MAGI_RAY_COMPLETE=fish_source magi-ray | source"}[shell]  # fmt: skip
    assert line in (Path(__file__).parents[1] / "README.md").read_text()


def test_the_version_and_the_commands_of_manifest_are_found_at_the_top(here: Path) -> None:
    write_manifest([{"job_id": "one", "prompt": "sea"}], here / "my rows.parquet")
    assert type_in("--version").stdout == type_in("version").stdout != ""
    tiny = ("--preset", "magi-tiny")
    for words in (("validate", "my rows.parquet"), ("manifest", "validate", "my rows.parquet", *tiny)):
        checked = type_in(*words)
        rest = words[words.index("validate") + 2 :]
        following = " ".join(["next: magi-ray submit 'my rows.parquet'", *rest])
        assert (checked.exit_code, checked.stderr.splitlines()[-1]) == (0, following)
    assert "sea" in type_in("show", "my rows.parquet").stdout


# States -------------------------------------------------------------------------------------------------------------


def failed(job_id: str) -> RowFailed:
    return RowFailed(
        job_id=job_id, kind=TaskKind.EMBED, index=0, stage=None, failure=FailureClass.INPUT, message="no", attempts=1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("done", "broke", "ended", "wanted", "state", "code"),
    [
        (2, 0, RunState.DONE, None, "done", 0),
        (2, 0, RunState.DONE, "cancel", "done", 0),
        (1, 1, RunState.FAILED, None, "failed", 4),
        (1, 1, RunState.FAILED, "pause", "failed", 4),
        (0, 2, RunState.FAILED, None, "failed", 4),
        (0, 1, RunState.CANCELLED, "cancel", "cancelled", 5),
        (1, 0, RunState.PAUSED, "pause", "paused", 6),
        (0, 1, RunState.BROKEN, None, "broken", 4),
    ],
)
def test_states_tell_the_truth_and_agree(
    here: Path, submit: Submit, done: int, broke: int, ended: RunState, wanted: Any, state: str, code: int
) -> None:
    run, store = submit("sea", "hills"), LocalStore(here / "magi-ray-store")
    jobs = list(run.plans)
    if done:
        render_locally(store, run)
        for job_id in jobs[done:]:
            store.delete(keys.video(run.run_id, job_id))
    encoder = encoder_identity(find_ffmpeg())
    failures = {job_id: failed(job_id) for job_id in jobs[2 - broke :]} if broke else {}
    rows = take_inventory_of_run(store, run, encoder)
    reports = RunReports(store, run, rows, earlier={})
    for failure in failures.values():
        reports.note(failure)
    reports.close(ended)
    if wanted is not None:
        requests.request(store, run.run_id, wanted)
    [line] = told("list")["runs"]
    looked = told("status")
    assert (line["state"], line["done"], line["failed"]) == (state, done, broke)
    assert looked["state"] == state
    watched = type_in("watch", "--json")
    assert (watched.exit_code, json.loads(watched.stdout)["state"]) == (code, state)
    if broke:
        shown = type_in("status").stderr
        assert f"{broke} of 2 videos" in shown or f"{broke} of them failed" in shown
    written = json.loads(store.get(keys.run_progress(run.run_id)))["state"]
    assert written == ended


def test_only_failed_rows_left_start_nothing_and_lead_to_retry(
    here: Path, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = submit("sea"), LocalStore(here / "magi-ray-store")
    reports = RunReports(store, run, take_inventory_of_run(store, run, None), earlier={})
    reports.note(failed("row-0"))
    reports.close(RunState.FAILED)
    monkeypatch.setattr(background, "DriverProcess", None)
    result = type_in("resume", "--json")
    assert (result.exit_code, json.loads(result.stdout)["state"]) == (4, "failed")
    assert "row-0 failed (input, embed): no" in result.stderr
    assert "Ray" not in result.stderr
    assert result.stderr.splitlines()[-1] == f"next: magi-ray retry {run.run_id} --failed"


# A second submit ----------------------------------------------------------------------------------------------------

OTHER = """
import sys, time
from magi_ray.cli import cli
from magi_ray.commands import foreground
from contextlib import contextmanager
from pathlib import Path
@contextmanager
def follow(_console):
    def show(progress):
        while not Path("go").exists():
            time.sleep(0.05)
    yield show
foreground.follow = follow
cli.main(["drive", sys.argv[1], "--local"])
"""


@pytest.fixture
def rendering(here: Path, tiny_weights: Path) -> Any:
    """The words that submit a run that a process renders, as far as it may before there is a file ``go``; its pid."""
    (here / "cache").mkdir(exist_ok=True)
    (here / "cache" / "magi-tiny").symlink_to(tiny_weights)
    (here / "small.toml").write_text(
        'preset = "magi-tiny"\n[runtime]\nvideo_size_h = 32\nvideo_size_w = 32\nnum_steps = 8\n'
    )
    write_manifest([{"job_id": "one", "prompt": "sea", "num_chunks": 1}], here / "m.parquet")
    words = ("submit", "m.parquet", "--job", "small.toml", "--local")
    run, files = prepared(here / "m.parquet", job(here / "small.toml"))
    create(LocalStore(here / "magi-ray-store"), run, files)
    process = subprocess.Popen([sys.executable, "-c", OTHER, run.run_id], stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while told("status")["state"] != "rendering" or (told("status")["driver"] or {}).get("beat") is None:
        assert process.poll() is None
        assert time.monotonic() - begun < 120
        time.sleep(0.2)
    yield words, process
    process.kill()
    process.wait()


def once_followed(patch: pytest.MonkeyPatch, then: Callable[[], Any]) -> None:
    @contextmanager
    def follow(_console: object) -> Iterator[Callable[[object], None]]:
        yield lambda _progress: then()

    patch.setattr(background, "follow", follow)


def test_a_second_submit_follows_the_first_and_ends_as_it_does(
    rendering: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, process = rendering
    left = type_in(*words, "--no-wait")
    assert left.exit_code == 0
    assert f"is being rendered already, by process {process.pid}." in left.stderr
    assert left.stderr.splitlines()[-1].startswith("next: magi-ray watch m-")
    once_followed(monkeypatch, (here / "go").touch)
    followed = type_in(*words)
    assert followed.exit_code == 0, followed.stderr
    assert f"by process {process.pid}; following it" in followed.stderr
    assert followed.stdout.endswith("/videos/one.mp4\n")
    assert "1 of 1 video published" in followed.stderr


def test_a_second_submit_of_a_run_that_dies_says_so(rendering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words, process = rendering
    once_followed(monkeypatch, process.kill)
    followed = type_in(*words, "--json")
    assert followed.exit_code == 1
    assert json.loads(followed.stdout)["state"] == "stopped"
    assert followed.stderr.splitlines()[-1].startswith("next: magi-ray resume m-")
