"""Runs on a real S3 server: the same bytes as anywhere else, whatever happens to the server meanwhile."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from click.testing import CliRunner
from rgw import Rgw
from runs import MakeRun, by_progress, contents, prepared, stage_commits
from typed import Command, wait_until

from magi_ray.cli import cli
from magi_ray.errors import ManifestError, StoreUnavailable
from magi_ray.manifest import write_manifest
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.runs.media import MediaFiles
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import create
from magi_ray.render.upkeep.verify import verify
from magi_ray.settings import preset
from magi_ray.storage import keys, leases, opening
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.opening import open_store
from magi_ray.storage.retrying import RetryingStore
from magi_ray.storage.s3 import S3Store
from magi_ray.storage.store import Store

MANIFESTS = Path(__file__).parents[1] / "manifests"
IMAGE, CLIP = MANIFESTS / "quickstart-image.png", MANIFESTS / "quickstart-clip.mp4"
SMALL = {"width": 32, "height": 32, "num_steps": 8}
ROWS: list[dict[str, Any]] = [
    {"job_id": "text", "prompt": "sea", "num_chunks": 5},
    {"job_id": "image", "prompt": "dusk", "image": str(IMAGE), "num_chunks": 2},
]


@pytest.fixture
def undisturbed(make_run: MakeRun) -> dict[str, bytes]:
    """What ROWS become in memory."""
    store = MemoryStore()
    run = make_run(store, ROWS)
    assert not render_locally(store, run).failed
    return contents(store, run)


@dataclass
class Fault:
    """Strikes once, in mid-run: when so many stages are committed. An observer of the run."""

    store: Store
    strike: Callable[[], object]
    after: int = 3
    before: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, progress: RunProgress) -> None:
        if not self.before and sum(video.stages_done for video in progress.videos.values()) >= self.after:
            self.before = stage_commits(self.store)
            self.strike()


def later(delay_s: float, act: Callable[[], object]) -> None:
    timer = threading.Timer(delay_s, act)
    timer.daemon = True
    timer.start()


def patient(address: str, *, patience_s: float = 60.0) -> tuple[RetryingStore, list[float]]:
    """The store at ``address`` with a short time-out, and the pauses between its tries."""
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    pauses: list[float] = []

    def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        time.sleep(pause_s)

    inner = S3Store(bucket, prefix, connect_timeout_s=1.0, read_timeout_s=1.0)
    return RetryingStore(inner, patience_s=patience_s, sleep=sleep), pauses


def assert_whole(store: Store, run: Run, undisturbed: dict[str, bytes], before: dict[str, bytes]) -> None:
    """The same bytes, nothing that was committed ``before`` altered, and no object damaged."""
    assert before, "the fault did not strike"
    assert len(before) < sum(plan.timeline.num_stages for plan in run.plans.values())
    assert contents(store, run) == undisturbed
    assert before.items() <= stage_commits(store).items()
    assert not verify(store, [run.run_id]).damages


# The server fails -----------------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_becomes_the_same_bytes_as_in_memory(
    make_run: MakeRun, s3_address: str, undisturbed: dict[str, bytes]
) -> None:
    store = open_store(s3_address)
    run = make_run(store, ROWS)
    assert not render_locally(store, run).failed
    assert contents(store, run) == undisturbed
    assert render_locally(store, run).stages_rendered == 0


def test_a_server_killed_and_restarted_in_mid_run_costs_only_time(
    rgw: Rgw, make_run: MakeRun, s3_address: str, undisturbed: dict[str, bytes]
) -> None:
    store, pauses = patient(s3_address)

    def kill() -> None:
        rgw.kill_gateway()
        later(2, rgw.start)

    run, fault = make_run(store, ROWS), Fault(store, kill)
    outcome = render_locally(store, run, observers=by_progress(fault))
    assert pauses, "nobody noticed; the test shows nothing"
    assert not outcome.failed
    assert_whole(store, run, undisturbed, fault.before)


def test_puts_that_time_out_and_land_later_change_no_byte(
    rgw: Rgw, make_run: MakeRun, s3_address: str, undisturbed: dict[str, bytes]
) -> None:
    store, pauses = patient(s3_address)

    def stop() -> None:
        rgw.stop_disk()
        later(4, rgw.continue_disk)

    run, fault = make_run(store, ROWS), Fault(store, stop)
    try:
        outcome = render_locally(store, run, observers=by_progress(fault))
    finally:
        rgw.continue_disk()
    assert pauses, "nothing timed out; the test shows nothing"
    assert not outcome.failed
    assert_whole(store, run, undisturbed, fault.before)


def test_a_server_that_is_gone_for_longer_than_a_lease_holds_costs_only_time(
    rgw: Rgw, make_run: MakeRun, s3_address: str, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "TTL_S", 6.0)
    store, _ = patient(s3_address)

    def kill() -> None:
        rgw.kill_gateway()
        later(7, rgw.start)

    run, fault = make_run(store, ROWS), Fault(store, kill)
    assert not render_locally(store, run, observers=by_progress(fault)).failed
    assert_whole(store, run, undisturbed, fault.before)


def test_a_server_that_stays_away_ends_the_run_with_a_reason_and_loses_nothing(
    rgw: Rgw, make_run: MakeRun, s3_address: str, undisturbed: dict[str, bytes]
) -> None:
    store, _ = patient(s3_address, patience_s=1.5)
    run, fault = make_run(store, ROWS), Fault(store, rgw.kill_gateway)
    with pytest.raises(StoreUnavailable, match=r"Could not connect.*It was tried \d+ times in 2 s.*patience is 2 s"):
        render_locally(store, run, observers=by_progress(fault))
    rgw.start()
    # Taken over, since this very process, which lives, has not been able to give its lease back.
    outcome = render_locally(store, run, DriveOptions(take_over=True))
    assert not outcome.failed
    assert outcome.stages_reused >= len(fault.before)
    assert_whole(store, run, undisturbed, fault.before)


# The driver fails -----------------------------------------------------------------------------------------------


def test_a_run_whose_driver_was_killed_on_another_machine_is_resumed_when_its_lease_has_run_out(
    s3_address: str, tiny_weights: Path, tmp_path: Path
) -> None:
    write_manifest([{"job_id": "text", "prompt": "sea", "num_chunks": 12, **SMALL}], tmp_path / "m.parquet")
    settings = preset("magi-tiny", weights=tiny_weights)
    run, files = prepared(tmp_path / "m.parquet", settings)
    memory, store = MemoryStore(), open_store(s3_address)
    create(memory, run, files)
    create(store, run, files)
    render_locally(memory, run)

    drive = Command(tmp_path, "drive", run.run_id, "--local", "--store", s3_address)
    try:
        wait_until(lambda: len(stage_commits(store)) >= 3, "the first stages are committed", within_s=120)
        drive.process.kill()
    finally:
        drive.clean_up()
    before = stage_commits(store)
    lease, version = store.get_versioned(keys.run_lease(run.run_id))
    elsewhere = json.loads(lease)
    elsewhere["holder"]["host"] = "elsewhere"
    store.swap(keys.run_lease(run.run_id), json.dumps(elsewhere).encode(), version)

    begun = time.monotonic()
    resume = Command(tmp_path, "resume", run.run_id, "--local", "--store", s3_address)
    try:
        wait_until(lambda: len(stage_commits(store)) > len(before), "it goes on", within_s=120)
        waited_s = time.monotonic() - begun
        code, stdout = resume.end()
    finally:
        resume.clean_up()
    assert (code, stdout) == (0, f"{s3_address}/{keys.video(run.run_id, 'text')}\n"), resume.stderr
    assert waited_s > leases.TTL_S
    assert f"{len(before)} reused" in resume.stderr
    assert resume.stderr.splitlines()[-1] == f"next: magi-ray fetch {run.run_id} --store {s3_address}"
    fetched = CliRunner().invoke(cli, ["fetch", run.run_id, "--store", s3_address, "-o", str(tmp_path / "videos")])
    assert (fetched.exit_code, fetched.stdout) == (0, f"{tmp_path}/videos/text.mp4\n"), fetched.stderr
    assert_whole(store, run, contents(memory, run), before)


# Media that lie in S3 -------------------------------------------------------------------------------------------


@pytest.fixture
def upload(rgw: Rgw, s3_address: str) -> Callable[[str, bytes], str]:
    """``upload(key, data)`` into a bucket that is not the store's; the object's address."""
    bucket = rgw.new_bucket()

    def upload(key: str, data: bytes) -> str:
        client = boto3.session.Session().client("s3")
        client.put_object(Bucket=bucket, Key=key, Body=data)
        client.close()
        return f"s3://{bucket}/{key}"

    return upload


def test_rows_begin_from_objects_as_from_files(
    make_run: MakeRun, upload: Callable[[str, bytes], str], s3_address: str
) -> None:
    image = upload("stills/a dusk (1) – größer?.png", IMAGE.read_bytes())
    clip = upload("/clips//day.mp4", CLIP.read_bytes())

    def rows(image: str, clip: str) -> list[dict[str, Any]]:
        return [
            {"job_id": "image", "prompt": "dusk", "image": image, "num_chunks": 1},
            {"job_id": "again", "prompt": "dusk", "image": image, "num_chunks": 1, "width": 48},
            {"job_id": "clip", "prompt": "on", "video": clip, "num_chunks": 1},
        ]

    store, memory = open_store(s3_address), MemoryStore()
    run, alone = make_run(store, rows(image, clip)), make_run(memory, rows(str(IMAGE), str(CLIP)))
    assert run.record.media == alone.record.media
    assert set(store.list("media/")) == set(memory.list("media/"))
    for media in run.record.media.values():
        assert store.get(keys.media(media.sha256)) == memory.get(keys.media(media.sha256))
    assert [plan.stage_keys for plan in run.plans.values()] == [plan.stage_keys for plan in alone.plans.values()]


def test_an_object_is_fetched_once_and_kept_no_longer_than_the_submission_takes(
    upload: Callable[[str, bytes], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    address = upload("a.png", b"bytes")
    files = MediaFiles()
    path = files.fetch(address)
    assert path.read_bytes() == b"bytes"
    assert path.is_relative_to(tmp_path)
    upload("a.png", b"others")
    assert files.fetch(address) == path
    assert path.read_bytes() == b"bytes"
    del files
    assert list(tmp_path.iterdir()) == []


def test_objects_that_cannot_be_had_are_told_row_by_row_and_all_at_once(
    make_run: MakeRun, upload: Callable[[str, bytes], str], rgw: Rgw
) -> None:
    rotten = upload("rotten.png", b"no picture")
    bucket = rotten.split("/")[2]
    images = {
        rotten: "cannot be read: Invalid data found when processing input; Images may be",
        f"s3://{bucket}/missing.png": "does not exist; upload it, or correct the address",
        "s3://no-such-bucket-here/a.png": "NoSuchBucket from GetObject); correct the address",
        f"s3://{rgw.new_bucket(owner='theirs')}/a.png": "HTTP 403 AccessDenied",
        "s3://No_Bucket/a.png": "'No_Bucket' is not the name of a bucket",
    }
    rows = [{"job_id": f"row-{n}", "prompt": "dusk", "image": image, "num_chunks": 1} for n, image in enumerate(images)]
    store = MemoryStore()
    with pytest.raises(ManifestError) as caught:
        make_run(store, [*rows, {"job_id": "good", "prompt": "sea", "num_chunks": 1}])
    assert [(problem.row, problem.column, problem.value) for problem in caught.value.problems] == [
        (n, "image", image) for n, image in enumerate(images, 1)
    ]
    for problem, (image, what) in zip(caught.value.problems, images.items(), strict=True):
        assert what in f"{problem.rule}; {problem.remedy}", image
        assert problem.remedy
    assert list(store.list("")) == []


def test_validate_opens_objects_too(upload: Callable[[str, bytes], str], tmp_path: Path) -> None:
    good, rotten = upload("dusk.png", IMAGE.read_bytes()), upload("rotten.png", b"no picture")
    write_manifest(
        [{"job_id": name, "prompt": "dusk", "image": address} for name, address in {"a": good, "b": rotten}.items()],
        tmp_path / "m.parquet",
    )
    words = ["manifest", "validate", str(tmp_path / "m.parquet"), "--json"]
    found = json.loads(CliRunner().invoke(cli, words).stdout)
    assert [(problem["row"], problem["value"]) for problem in found["problems"]] == [(2, rotten)]
    assert json.loads(CliRunner().invoke(cli, [*words, "--no-media"]).stdout)["valid"]


def test_a_server_that_cannot_be_reached_is_no_fault_of_the_rows(
    make_run: MakeRun, upload: Callable[[str, bytes], str], rgw: Rgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload("a.png", IMAGE.read_bytes())
    monkeypatch.setattr(opening, "RetryingStore", partial(RetryingStore, patience_s=0.0))
    rgw.kill_gateway()
    with pytest.raises(StoreUnavailable, match="Could not connect"):
        make_run(MemoryStore(), [{"job_id": "one", "prompt": "dusk", "image": address, "num_chunks": 1}])
