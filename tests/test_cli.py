"""The command line as a stranger meets it. In this process where nothing has to be killed, in others where it has."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import click
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from rgw import Rgw
from runs import MakeRun, prepared

from magi_ray.cli import cli
from magi_ray.commands import stop
from magi_ray.commands.manifests import manifest
from magi_ray.commands.stores import find_run
from magi_ray.drivers import driver_monitor
from magi_ray.errors import MediaError
from magi_ray.manifest import write_manifest
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.runs.submission import create
from magi_ray.settings import job
from magi_ray.storage import keys
from magi_ray.storage.leases import LeaseRecord, Owner
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore

ROOT = Path(__file__).parents[1]
CLIP, IMAGE = ROOT / "manifests" / "quickstart-clip.mp4", ROOT / "manifests" / "quickstart-image.png"
SMALL = """
preset = "magi-tiny"
[runtime]
num_frames = 48
video_size_h = 32
video_size_w = 32
num_steps = 8
[encoder]
preset = "ultrafast"
"""
ROWS: list[dict[str, Any]] = [{"job_id": "one", "prompt": "sea"}, {"job_id": "two", "prompt": "hills", "num_chunks": 1}]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """A cache folder with the weights that all tests share."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "magi-tiny").symlink_to(tiny_weights)
    return folder


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, but for small.toml and m.parquet, two rows."""
    monkeypatch.setenv("MAGI_RAY_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    write_manifest(ROWS, tmp_path / "m.parquet")
    return tmp_path


def run(*words: str) -> Result:
    """`magi-ray` with these words, in this process."""
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def spawn(*words: str) -> subprocess.CompletedProcess[str]:
    """`magi-ray` with these words, in another process."""
    command = [sys.executable, "-m", "magi_ray.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def next_command(result: Result) -> list[str]:
    """The words after `next: magi-ray` in the last line."""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("next: magi-ray "), result.stderr
    return shlex.split(last.removeprefix("next: magi-ray "))


def run_id_of(store: str = "magi-ray-store") -> str:
    [found] = (Path(store) / "runs").iterdir()
    return found.name


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@contextmanager
def interrupted_at(stage: int) -> Iterator[None]:
    """Ctrl-C when a video has come to ``stage``, so that all but one of those before are committed; 0: at once."""
    from magi_ray.commands import foreground

    def show(progress: RunProgress) -> None:
        if any(video.stages_done >= stage for video in progress.videos.values()):
            raise KeyboardInterrupt

    @contextmanager
    def follow(_console: object) -> Iterator[Callable[[RunProgress], None]]:
        yield show

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreground, "follow", follow)
        yield


def begun(stage: int, store: str = "magi-ray-store") -> str:
    """A run of m.parquet, submitted and interrupted at ``stage``; its id."""
    made, files = prepared(Path("m.parquet"), job(Path("small.toml")))
    create(LocalStore(Path(store).absolute()), made, files)
    with interrupted_at(stage):
        stopped = run("drive", made.run_id, "--local", "--store", store)
    assert stopped.exit_code == 130, stopped.stderr
    return made.run_id


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands; `manifest validate`, which is also `validate`, once."""
    for name, command in group.commands.items():
        if group is cli and command in manifest.commands.values():
            continue
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def example(path: Sequence[str]) -> list[str]:
    words = shlex.split(run(*path, "--help").stdout.rstrip().splitlines()[-1])
    assert words[0] == "magi-ray"
    return words[1:]


# Help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=[" ".join(path) for path, _ in commands()])
def test_every_command_has_help_an_example_that_parses_and_a_place_in_the_readme(
    path: tuple[str, ...], command: click.Command
) -> None:
    shown = run(*path, "-h")
    assert shown.exit_code == 0
    assert shown.stdout == run(*path, "--help").stdout
    assert "Example:" in shown.stdout
    for parameter in command.params:
        hidden = isinstance(parameter, click.Option) and parameter.hidden
        assert hidden or not isinstance(parameter, click.Option) or parameter.help, f"{parameter.name} has no help"
    words = example(path)
    assert words[: len(path)] == list(path)
    if not isinstance(command, click.Group):
        command.make_context(path[-1], words[len(path) :])
        readme = (ROOT / "README.md").read_text()
        assert re.search(rf"`(magi-ray )?({' '.join(path)}|{path[-1]})[ `]", readme), f"README: no `{path[-1]}`"


def test_the_examples_of_the_help_work_as_they_stand(here: Path) -> None:
    """Where quickstart was submitted and rendered, so that `submit` finds nothing to start Ray for."""
    (here / "manifests").mkdir()
    row = {"job_id": "one", "prompt": "sea", "num_chunks": 1, "width": 32, "height": 32, "num_steps": 8}
    (here / "manifests" / "quickstart.jsonl").write_text(json.dumps(row))
    write_manifest([row], here / "manifests" / "quickstart.parquet")
    assert run("submit", "manifests/quickstart.parquet", "--local").exit_code == 0
    for path in ((), *(path for path, _ in commands())):
        result = run(*example(path))
        assert result.exit_code == 0, (path, result.stderr)
    assert (here / "boat.mp4").is_file()


def test_nothing_typed_shows_the_help() -> None:
    result = run()
    assert not re.search(r"\w\.\.\.$", result.stderr, re.MULTILINE), "a command's line is cut off"
    assert result.exit_code == 2
    assert "Render:" in result.stderr
    assert result.stdout == ""


# What users get wrong -------------------------------------------------------------------------------------------

RENDER = ("render", "--job", "small.toml", "--prompt", "sea", "-o", "a.mp4")
WRONG: list[tuple[tuple[str, ...], int, str, tuple[str, ...]]] = [
    (("submitt",), 2, "No such command 'submitt'", ("--help",)),
    (("submit",), 2, "Missing argument 'MANIFEST'", ("submit", "--help")),
    (("submit", "none.parquet", "--local"), 2, "There is no file none.parquet", ("submit", "m.parquet", "--local")),
    (("submit", "."), 3, ". holds tables of several kinds: json, jsonl, parquet; name one file", ("submit", "--help")),
    (("submit", "small.toml"), 3, "is of a kind that is not recognised", ("submit", "--help")),
    (("submit", "m.parquet", "--preset", "magi-tny"), 2, "Did you mean magi-tiny?", ("submit", "--help")),
    (("submit", "m.parquet", "--job", "no.toml"), 2, "no job file no.toml", ("submit", "--help")),
    (("submit", "m.parquet", "--job", "."), 2, "Is a directory", ("submit", "--help")),
    (("submit", "m.parquet", "--job", "a", "--config", "b"), 2, "--job and --config cannot be combined",
     ("submit", "--help")),
    (("submit", "m.parquet", "--config", "a", "--weights", "b"), 2, "--weights and --config cannot be combined",
     ("submit", "--help")),
    (("submit", "m.parquet", "--config", "field.json"), 2, "unknown field model.colour", ("submit", "--help")),
    (("submit", "m.parquet", "--config", "cfg.json"), 2, "cfg_number is 1, but a base model needs 3",
     ("submit", "--help")),
    (("submit", "m.parquet", "--weights", "nowhere"), 2, "nowhere/magi", ("submit", "--help")),
    (("submit", "m.parquet", "--store", "m.parquet"), 2, "m.parquet is a file, not a folder", ("submit", "--help")),
    (("submit", "m.parquet", "--store", "m.parquet/s", "--dry-run"), 2, "is a file", ("submit", "--help")),
    (("submit", "m.parquet", "--store", "s3://b/p"), 2, "'b' is not the name of a bucket", ("submit", "--help")),
    (("submit", "m.parquet", "--max-failed-rows", "-1"), 2, "--max-failed-rows", ("submit", "--help")),
    (("submit", "m.parquet", "--store", ""), 2, "is empty", ("submit", "--help")),
    (("submit", "bad rows.parquet", "--job", "small.toml"), 3, 'row 1 (job "one"), column width: 100',
     ("submit", "bad rows.parquet", "--job", "small.toml")),
    (("list",), 2, "There is no store", ("list", "--help")),
    (("status", "x"), 2, "There is no store", ("status", "--help")),
    (("watch", "x", "--store", "none"), 2, "There is no store", ("watch", "--help")),
    (("resume", "x", "--store", "small.toml"), 2, "small.toml is a file", ("resume", "--help")),
    (("drive", "x"), 2, "There is no store", ("drive", "--help")),
    (("pause", "x"), 2, "There is no store", ("pause", "--help")),
    (("cancel", "x"), 2, "There is no store", ("cancel", "--help")),
    (("retry", "x"), 2, "There is no store", ("retry", "--help")),
    (("retry", "x", "--failed", "--job", "y"), 2, "--failed and --job cannot be combined", ("retry", "--help")),
    (("retry", "x", "--from-chunk", "1"), 2, "0 are named", ("retry", "--help")),
    (("doctor", "--store", "small.toml"), 2, "small.toml is a file", ("doctor", "--help")),
    (("manifest", "build", "rows.jsonl", "-o", "rows.csv"), 2, "does not end in .parquet",
     ("manifest", "build", "--help")),
    (("manifest", "build", "rows.jsnl", "-o", "b.parquet"), 2, "Did you mean rows.jsonl?",
     ("manifest", "build", "rows.jsonl", "-o", "b.parquet")),
    (("manifest", "build", "rows.jsonl", "-o", "no/b.parquet"), 2, "cannot be written",
     ("manifest", "build", "--help")),
    (("manifest", "show", "bad rows.parquet", "--job", "small.toml"), 3, "use 96 or 112",
     ("manifest", "show", "bad rows.parquet", "--job", "small.toml")),
    ((*RENDER[:-1], "a"), 2, "a does not end in .mp4", (*RENDER[:-1], "a.mp4")),
    ((*RENDER[:-2], "--out=./a"), 2, "a does not end in .mp4", (*RENDER[:-2], "--out=a.mp4")),
    ((*RENDER[:-1], "."), 2, ". is a folder", (*RENDER[:-1], "video.mp4")),
    ((*RENDER[:-1], "small.toml/b/a.mp4"), 2, "small.toml/b is not a folder", RENDER),
    ((*RENDER, "--seconds", "0"), 2, "--seconds: 0.0 is not a length", ("render", "--help")),
    ((*RENDER, "--num-chunks", "0"), 2, "--num-chunks: 0 is below 1", ("render", "--help")),
    ((*RENDER, "--num-steps", "9"), 2, "--num-steps: 9 must be divisible by window_size 4; use 12",
     ("render", "--help")),
    ((*RENDER, "--width", "33"), 2, "--width: 33 is not a multiple of 16; use 32 or 48", ("render", "--help")),
    ((*RENDER, "--image", str(IMAGE), "--video", str(CLIP)), 2, "--image:", ("render", "--help")),
    ((*RENDER, "--image", "small.toml"), 2, "--image: ", ("render", "--help")),
    ((*RENDER, "--image", "none.png"), 2, '--image: "none.png" does not exist', ("render", "--help")),
    ((*RENDER, "--prompt", " "), 2, "--prompt: ", ("render", "--help")),
    (("render", "-o", "a.mp4"), 2, "--prompt: is missing, and there is no schedule either", ("render", "--help")),
    ((*RENDER, "--schedule", "rows.jsonl"), 2, "--schedule: ", ("render", "--help")),
    ((*RENDER, "--schedule", "small.toml"), 2, "--schedule: small.toml ends in none of .json", ("render", "--help")),
    ((*RENDER, "--schedule", "rows.jsnl"), 2, "Did you mean rows.jsonl?", (*RENDER, "--schedule", "rows.jsonl")),
    ((*RENDER, "--prefix-from", "middle"), 2, '--prefix-from: "middle" is none of start, end', ("render", "--help")),
    ((*RENDER, "--seed", "9223372036854775807", "--num-variations", "2"), 2, "--seed: 9223372036854775808",
     ("render", "--help")),
    ((*RENDER, "--num-variations", "0"), 2, "--num-variations", ("render", "--help")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "says", "following"), WRONG, ids=[shlex.join(words)[:60] for words, *_ in WRONG]
)
def test_a_mistake_is_told_with_a_command_that_works_and_leaves_nothing_behind(
    here: Path, words: tuple[str, ...], code: int, says: str, following: tuple[str, ...]
) -> None:
    (here / "rows.jsonl").write_text('{"job_id": "one", "prompt": "sea"}')
    write_manifest([{"job_id": "one", "prompt": "sea", "width": 100}], here / "bad rows.parquet")
    model = {"num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8,
             "num_query_groups": 4, "kv_channels": 16}  # fmt: skip
    config = {"model_config": model, "runtime_config": {"cfg_number": 1}, "engine_config": {}}
    (here / "cfg.json").write_text(json.dumps(config))
    (here / "field.json").write_text(json.dumps(config | {"model_config": model | {"colour": 1}}))
    before = tree(here)
    result = run(*words)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert tuple(next_command(result)) == following
    assert tree(here) == before

    as_json = run(*words, "--json")
    assert as_json.exit_code == code
    told = json.loads(as_json.stdout)["error"]
    assert says in told["message"] + told["remedy"]
    assert as_json.stdout.count("\n") == 1


def test_a_command_that_is_proposed_instead_works(here: Path) -> None:
    (here / "my rows.jsonl").write_text('{"job_id": "one", "prompt": "sea"}')
    wrong = run("manifest", "build", "my row.jsonl", "-o", "my rows.parquet")
    built = run(*next_command(wrong))
    assert built.exit_code == 0
    assert built.stdout == "my rows.parquet\n"
    assert next_command(built) == ["submit", "my rows.parquet"]
    assert run("manifest", "validate", "my rows.parquet").exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("version",),
        ("submit", "bad.parquet"),
        ("manifest", "show", "m.parquet"),
        ("manifest", "validate", "media.parquet"),
    ],
)
def test_what_needs_no_network_loads_neither_torch_nor_ray(here: Path, words: tuple[str, ...]) -> None:
    write_manifest([{"job_id": "one", "prompt": " "}], here / "bad.parquet")
    begun_from = {"clip": {"video": str(CLIP)}, "still": {"image": str(IMAGE)}}
    write_manifest(
        [{"job_id": j, "prompt": "sea " * 999} | row for j, row in begun_from.items()], here / "media.parquet"
    )
    watch = "import sys; from magi_ray import cli\ntry: cli.main()\nfinally: print({'torch', 'ray'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", watch, *words], capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines()[-1] == "set()"


def test_looking_at_a_run_loads_neither_torch_nor_ray(here: Path) -> None:
    run_id = begun(3)
    for words in (("status", run_id), ("list",), ("watch", run_id), ("pause", run_id), ("cancel", run_id)):
        test_what_needs_no_network_loads_neither_torch_nor_ray(here, words)


# Runs -----------------------------------------------------------------------------------------------------------


def submit(*more: str) -> Result:
    return run("submit", "m.parquet", "--job", "small.toml", "--local", *more)


def test_paths_of_videos_are_all_that_goes_to_stdout_and_they_open(here: Path) -> None:
    result = submit("--store", "my store")
    assert result.exit_code == 0
    paths = result.stdout.splitlines()
    assert paths == [f"{here}/my store/runs/{run_id_of('my store')}/videos/{job}.mp4" for job in ("one", "two")]
    with av.open(paths[0]) as video:
        assert video.streams.video[0].frames == 48
    assert "made, not trained" in result.stderr
    assert "2 of 2 videos published" in result.stderr


def test_a_run_is_gone_on_with_and_a_finished_one_renders_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(0)
    with interrupted_at(3):
        stopped = run("drive", run_id_of(), "--local", "--json")
    assert stopped.exit_code == 130
    assert json.loads(stopped.stdout)["interrupted"] is True
    assert next_command(stopped) == ["resume", run_id_of(), "--local"]
    again = submit()
    assert "was submitted before; going on with it" in again.stderr
    assert re.search(r"[1-9]\d* reused", again.stderr)
    # Without --local, and yet no Ray; with --no-wait, and yet nothing in the background.
    monkeypatch.setitem(sys.modules, "magi_ray.cluster.workers", None)
    for words in (("submit", "m.parquet", "--job", "small.toml"), ("resume", run_id_of())):
        for more in ((), ("--no-wait",)) if words[0] == "submit" else ((),):
            result = run(*words, *more, "--json")
            assert result.exit_code == 0, result.stderr
            assert "Nothing to render: 2 videos" in result.stderr
            told = json.loads(result.stdout)
            assert (told["stages_rendered"], set(told["videos"])) == (0, {"one", "two"})


def test_status_and_list_tell_how_far_a_run_is(here: Path) -> None:
    begun(3)
    half = json.loads(run("status", run_id_of(), "--json").stdout)
    assert (half["state"], half["driver"]) == ("stopped", None)
    assert 2 <= half["videos"][0]["stages_done"] < 5
    [line] = json.loads(run("list", "--json").stdout)["runs"]
    assert (line["run_id"], line["videos"], line["done"], line["state"]) == (run_id_of(), 2, 0, "stopped")
    shown = run("status", run_id_of())
    assert next_command(shown) == ["resume", run_id_of(), "--local"]
    watched = run("watch", run_id_of())
    assert watched.exit_code == 1
    assert run("drive", run_id_of(), "--local").exit_code == 0
    shown = run("status", run_id_of())
    assert [line.split()[1] for line in shown.stdout.splitlines()[1:]] == ["done", "done"]
    assert f"{here}/magi-ray-store/runs/{run_id_of()}/videos" in shown.stderr
    [line] = json.loads(run("list", "--json").stdout)["runs"]
    assert (line["done"], line["failed"], line["state"]) == (2, 0, "done")
    assert run("watch", run_id_of()).exit_code == 0
    assert json.loads(run("watch", run_id_of(), "--json").stdout)["state"] == "done"


def test_looking_at_a_run_at_rest_needs_no_ffmpeg(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = begun(5)
    whole = json.loads(run("status", run_id, "--json").stdout)

    def none() -> Path:
        raise MediaError("No ffmpeg with libx264 was found.", remedy="Install one.")

    with monkeypatch.context() as patch:
        patch.setattr("magi_ray.media.encoder.find_ffmpeg", none)
        assert json.loads(run("status", run_id, "--json").stdout) == whole
        assert run("watch", run_id).exit_code == 1
        assert json.loads(run("list", "--json").stdout)["runs"][0]["state"] == "stopped"
    assert (whole["state"], whole["videos"][0]["chunks_done"]) == ("stopped", 1)
    assert run("drive", run_id, "--local").exit_code == 0
    monkeypatch.setattr("magi_ray.media.encoder.find_ffmpeg", none)
    done = json.loads(run("status", run_id, "--json").stdout)
    assert done["state"] == "done"
    assert [video["chunks_done"] for video in done["videos"]] == [2, 1]
    assert run("watch", run_id).exit_code == 0
    assert run("resume", run_id).exit_code == 0, "nothing is left to render"


def test_a_run_that_another_machine_renders_is_told_as_such_until_nothing_is_heard_of_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, store = begun(0), LocalStore(here / "magi-ray-store")
    elsewhere = Owner(name="driver", host="farm-7", boot="another", pid=4711, started=1)
    lease = LeaseRecord(holder=elsewhere, epoch=9, beat=3, write_id="w")
    store.put(keys.run_lease(run_id), lease.model_dump_json().encode())
    shown = run("status", run_id)
    assert "Rendering, by process 4711 on farm-7 (beat 3)." in shown.stderr
    assert next_command(shown) == ["watch", run_id]
    told = json.loads(run("status", run_id, "--json").stdout)
    assert (told["state"], told["driver"]) == ("rendering", {"host": "farm-7", "pid": 4711, "beat": 3})
    monkeypatch.setattr(stop, "ASKED_S", 0.5)
    cancelled = run("cancel", run_id)
    assert cancelled.exit_code == 1
    assert "Asked process 4711 on farm-7 to cancel" in cancelled.stderr
    assert next_command(cancelled) == ["watch", run_id]
    assert json.loads(run("list", "--json").stdout)["runs"][0]["state"] == "cancelling"
    paused = run("pause", run_id, "--timeout", "0.1")
    assert (paused.exit_code, next_command(paused)) == (1, ["watch", run_id])
    monkeypatch.setattr(driver_monitor, "TTL_S", 0.5)
    watched = run("watch", run_id)
    assert watched.exit_code == 6
    assert "Nothing has been heard from process 4711 on farm-7 for too long" in watched.stderr


def test_a_run_is_found_by_the_beginning_of_its_id_and_a_near_one_is_proposed(here: Path) -> None:
    assert run("list", "--store", str(here)).stderr.splitlines()[-1] == "next: magi-ray submit --help"
    run_id = begun(0)
    for short in ("m", run_id[:-1], f"magi-ray-store/runs/{run_id}", f"magi-ray-store/runs/{run_id}/"):
        assert run_id in run("status", short).stderr
    wrong = run("status", f"m-{run_id[2:-2]}zz")
    assert wrong.exit_code == 2
    assert next_command(wrong) == ["status", run_id]
    for nonsense in ("zzzzzzzzzzzz", "", "../zz", "a b", "ü"):
        result = run("resume", nonsense)
        assert (result.exit_code, next_command(result)) == (2, ["list"])
    with interrupted_at(0):
        run("render", "--job", "small.toml", "--prompt", "sea", "-o", "m.mp4")
    (here / "m.parquet").unlink()  # or it would tell which of them is meant
    two = run("status", "m")
    assert re.search(r"2 runs in \S+ are called 'm':(\n  m-\w{10}  submitted \S+, stopped){2}", two.stderr)
    assert run(*next_command(two)).exit_code == 0


def test_a_bucket_is_a_store_like_any_other(here: Path, s3_address: str) -> None:
    store = ("--store", s3_address)
    sent = submit(*store)
    assert sent.exit_code == 0, sent.stderr
    [line] = json.loads(run("list", *store, "--json").stdout)["runs"]
    run_id = line["run_id"]
    assert sent.stdout.splitlines() == [f"{s3_address}/{keys.video(run_id, job_id)}" for job_id in ("one", "two")]
    assert (line["done"], line["state"]) == (2, "done")
    watched = run("watch", run_id, *store)
    assert watched.exit_code == 0
    assert f"All videos are done: {s3_address}/{keys.videos(run_id)}" in watched.stderr
    again = run("resume", run_id, *store)
    assert (again.exit_code, again.stdout) == (0, sent.stdout)
    assert run("verify", *store).exit_code == 0
    forgotten = run("gc", "--forget", run_id, "--min-age", "0s", *store)
    assert "Nothing was deleted" in forgotten.stderr
    assert next_command(forgotten) == ["gc", "--forget", run_id, "--min-age", "0s", *store, "--yes"]
    wrong = run("status", "nonsense", *store)
    assert (wrong.exit_code, next_command(wrong)) == (2, ["list", *store])
    out = run("render", "--job", "small.toml", "--prompt", "sea", "-o", "a.mp4", "--num-chunks", "1", *store)
    assert (out.exit_code, out.stdout) == (0, "a.mp4\n"), out.stderr
    with av.open("a.mp4") as video:
        assert video.streams.video[0].frames == 24


def test_a_bucket_that_may_not_be_used_is_told_before_anything_starts(here: Path, rgw: Rgw, s3_address: str) -> None:
    theirs = f"s3://{rgw.new_bucket(owner='theirs')}"
    for words in (("submit", "m.parquet", "--job", "small.toml"), ("list",), ("status", "x"), ("doctor",)):
        denied = run(*words, "--store", theirs)
        assert denied.exit_code == 7, (words, denied.stderr)
        assert next_command(denied)
    for words in (("list",), ("doctor",)):
        missing = run(*words, "--store", "s3://no-such-bucket-here")
        assert missing.exit_code == 1, (words, missing.stderr)
        assert "no-such-bucket-here" in missing.stderr


# One video ------------------------------------------------------------------------------------------------------


def test_render_goes_on_when_typed_again_and_replaces_the_file_only_when_done(here: Path) -> None:
    (here / "a.mp4").write_bytes(b"mine")
    words = ("render", "--job", "small.toml", "--prompt", "[red]ünï[/x] 'q'", "-o", "a.mp4", "--seconds", "1.5")
    with interrupted_at(3):
        stopped = run(*words)
    assert stopped.exit_code == 130
    assert tuple(next_command(stopped)) == words
    assert (here / "a.mp4").read_bytes() == b"mine"
    done = run(*words)
    assert (done.exit_code, done.stdout) == (0, "a.mp4\n"), done.stderr
    assert re.search(r"[1-9]\d* reused", done.stderr)
    with av.open("a.mp4") as video:
        assert video.streams.video[0].frames == 48
    (here / "a.mp4").unlink()
    again = run(*words, "--json")
    told = json.loads(again.stdout)
    assert (told["out"], told["stages_rendered"], told["run_id"]) == (str(here / "a.mp4"), 0, run_id_of())
    store = LocalStore(here / "magi-ray-store")
    assert (here / "a.mp4").read_bytes() == store.get(keys.video(run_id_of(), "video"))
    assert not list(here.glob(".a.mp4*"))


def test_a_render_that_was_killed_writes_its_file_when_it_is_resumed(here: Path) -> None:
    (here / "a.mp4").write_bytes(b"mine")
    with interrupted_at(2):
        run(*RENDER, "--seconds", "1.5")
    resumed = run("resume", run_id_of(), "--local", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["out"] == str(here / "a.mp4")
    video = LocalStore(here / "magi-ray-store").get(keys.video(run_id_of(), "video"))
    assert (here / "a.mp4").read_bytes() == video
    (here / "a.mp4").write_bytes(b"mine again")
    assert run("resume", run_id_of()).stdout == "a.mp4\n"
    assert (here / "a.mp4").read_bytes() == b"mine again", "it was written, and is the user's since"
    assert run(*RENDER, "--seconds", "1.5").exit_code == 0
    assert (here / "a.mp4").read_bytes() == video, "who types render wants it"


def test_render_does_all_that_a_row_can(here: Path) -> None:
    entries = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 1, "prompt": "hills", "kv_range": [1, 1, 3, 2]}]
    (here / "s.json").write_text(json.dumps(entries))
    (here / "s.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (here / "s.yaml").write_text(yaml.safe_dump(entries))
    clip = ("--video", str(CLIP), "--prefix-from", "start", "--prefix-frames", "8", "--include-prefix", "--fit", "pad")
    size = ("--width", "32", "--height", "32")
    words = ("render", "--job", "small.toml", "-o", "a.mp4", *clip, *size, "--num-chunks", "2", "--negative-prompt")
    for schedule in ("s.json", "s.jsonl", "s.yaml"):
        made = run(*words, "--schedule", schedule)
        assert (made.exit_code, made.stdout) == (0, "a.mp4\n"), made.stderr
    store = LocalStore(here / "magi-ray-store")
    record = json.loads(store.get(keys.video_record(run_id_of(), "video")))
    assert record["frames"] == 8 + 2 * 24, "so many new frames reach into a third chunk"
    assert record["captions"] == ["sea", "hills", "hills"]
    assert record["controls"] == {chunk: {"kv_range": [1, 1, 3, 2]} for chunk in "12"}
    assert record["prefix_frames"] == 8
    assert record["settings"]["negative_prompt"] is True
    chosen = {"max_frames": 8, "take": "start", "fit": "pad", "include": True}
    assert record["settings"]["prefix"].items() >= chosen.items()
    with av.open("a.mp4") as video:
        assert video.streams.video[0].frames == record["frames"]


def test_variations_differ_in_their_seed_and_share_the_rest(here: Path) -> None:
    words = (*RENDER, "--image", str(IMAGE), "--num-chunks", "1", "--num-variations", "2", "--seed", "7")
    made = run(*words)
    assert (made.exit_code, made.stdout) == (0, "a-7.mp4\na-8.mp4\n"), made.stderr
    assert not (here / "a.mp4").exists()
    assert Path("a-7.mp4").read_bytes() != Path("a-8.mp4").read_bytes()
    store = LocalStore(here / "magi-ray-store")
    assert [sum(key.endswith("/commit.json") for key in store.list(kind)) for kind in ("texts/", "prefixes/")] == [1, 1]
    alone = run(*RENDER, "--image", str(IMAGE), "--num-chunks", "1", "--seed", "8", "--json")
    assert json.loads(alone.stdout)["stages_rendered"] == 0
    assert Path("a.mp4").read_bytes() == Path("a-8.mp4").read_bytes()
    assert json.loads(run(*words, "--json").stdout)["out"] == [str(here / "a-7.mp4"), str(here / "a-8.mp4")]


def test_a_video_of_render_has_the_shape_of_its_image(here: Path) -> None:
    Image.new("RGB", (360, 640), "teal").save("tall.png")
    made = run(*RENDER, "--image", "tall.png", "--num-chunks", "1")
    assert "note: 32×48, after the image's shape." in made.stderr
    with av.open("a.mp4") as video:
        assert (video.streams.video[0].width, video.streams.video[0].height) == (32, 48)


def test_a_render_that_fails_leaves_the_file_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.mp4").write_bytes(b"mine")
    words = ("render", "--job", "small.toml", "--prompt", "x", "--image", str(IMAGE), "-o", "a.mp4")

    def join(*args: object, **options: object) -> None:
        raise MediaError("not today")

    monkeypatch.setattr("magi_ray.render.tasks.finish.join", join)
    result = run(*words)
    assert result.exit_code == 4
    assert result.stdout == ""
    assert tuple(next_command(result)) == words
    assert (here / "a.mp4").read_bytes() == b"mine"


# Processes ------------------------------------------------------------------------------------------------------


def wait_until(true: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_wait_renders_on_ray_in_the_background_while_others_watch(here: Path) -> None:
    sent = spawn("submit", "m.parquet", "--job", "small.toml", "--no-dashboard", "--no-wait", "--json")
    assert sent.returncode == 0, sent.stderr
    told = json.loads(sent.stdout)
    status = json.loads(run("status", told["run_id"], "--json").stdout)
    assert status["state"] == "rendering", Path(told["log"]).read_text()
    assert status["driver"]["pid"] == told["pid"]
    second = run("resume", told["run_id"])
    assert second.exit_code == 8
    assert f"is already being rendered by process {told['pid']}." in second.stderr
    watched = spawn(*next_command(second), "--json")
    assert watched.returncode == 0, Path(told["log"]).read_text()
    assert [video["phase"] for video in json.loads(watched.stdout)["videos"]] == ["done", "done"]
    assert (here / "magi-ray-store" / keys.video(told["run_id"], "one")).is_file()
    log = Path(told["log"]).read_text()
    assert "2 of 2 videos published" in log
    assert "Traceback" not in log


def test_a_killed_background_process_is_noticed_at_once_and_its_log_is_named(here: Path) -> None:
    write_manifest([{"job_id": "long", "prompt": "sea", "num_chunks": 200}], here / "m.parquet")
    told = json.loads(submit("--no-wait", "--json").stdout)
    wait_until(lambda: any((here / "magi-ray-store").glob("stages/*/*/commit.json")))
    assert json.loads(run("list", "--json").stdout)["runs"][0]["state"] == "rendering"
    os.kill(told["pid"], signal.SIGKILL)
    wait_until(lambda: json.loads(run("status", "m", "--json").stdout)["state"] == "stopped", seconds=20)
    watched = run("watch", "m")
    assert watched.exit_code == 1
    assert told["log"] in watched.stderr
    assert Path(told["log"]).exists()
    assert next_command(watched) == ["resume", told["run_id"], "--local"]
    with interrupted_at(0):
        assert run("drive", "m", "--local").exit_code == 130, "nobody holds the run any more"


def test_a_reader_that_leaves_early_is_no_error_of_ours(here: Path) -> None:
    rows = [{"job_id": f"row-{number}", "prompt": "sea " * 200} for number in range(300)]
    write_manifest(rows, here / "big.parquet")
    command = f"{shlex.quote(sys.executable)} -m magi_ray.cli manifest show big.parquet | head -n 2"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    header, first = ended.stdout.splitlines()
    assert header.startswith("row")
    assert "sea " * 200 in first + " ", "a pipe gets whole lines"


def test_a_bug_is_told_as_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magi_ray.commands.manifests.counted", None)
    result = CliRunner().invoke(cli, ["manifest", "validate", "m.parquet"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "This is a bug in magi-ray" in result.stderr


def test_a_whole_run_id_is_found_without_listing_every_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    run = make_run(store, [{"job_id": "a", "prompt": "sea", "num_chunks": 1}])
    assert find_run(store, run.run_id[:6], "memory:", verb="cancel") == run.run_id
    monkeypatch.setattr(store, "list", None)
    assert find_run(store, f"runs/{run.run_id}", "memory:", verb="cancel") == run.run_id
