"""One test or a few for each promise of the README that holds already; their names are the promises."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from runs import MakeRun, by_progress, contents, flip, stage_commits
from safetensors.torch import load_file, save_file
from typed import Command, wait_until
from wrapping import StoreWrapper, T

from magi_ray.cli import cli
from magi_ray.errors import (
    ManifestError,
    MediaError,
    ObjectMissing,
    SettingsError,
    StoreError,
    Superseded,
    WeightsError,
)
from magi_ray.manifest import write_manifest
from magi_ray.media.encoder import encoder_identity, find_ffmpeg
from magi_ray.render.driving.leadership import row_lease
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.progress import RunProgress
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.runs.record import Run
from magi_ray.render.tasks.decode_network import load_decoder
from magi_ray.render.tasks.denoise_network import load_denoiser
from magi_ray.render.tasks.embed_network import load_embedder
from magi_ray.render.tasks.finish import load_finisher
from magi_ray.render.upkeep.gc import collect, garbage
from magi_ray.render.upkeep.verify import verify
from magi_ray.settings import Settings, override, preset
from magi_ray.storage import keys
from magi_ray.storage.local import LocalStore
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.probe import check_store
from magi_ray.storage.store import Store

MANIFESTS = Path(__file__).parents[1] / "manifests"
ROWS: list[dict[str, Any]] = [
    {"job_id": "text", "schedule": [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 2, "prompt": "storm"}],
     "num_chunks": 4},
    {"job_id": "image", "prompt": "hills at dusk", "image": str(MANIFESTS / "quickstart-image.png"), "num_chunks": 2},
    {"job_id": "video", "prompt": "it sails on", "video": str(MANIFESTS / "quickstart-clip.mp4"), "num_chunks": 3},
]  # fmt: skip


class Death(BaseException):
    """Not an Exception: nothing may catch it and go on, as nothing catches SIGKILL."""


class Reaper:
    """Watches a run and dies at every ``every``-th forward; 0: never. Counts the forwards of all its lives."""

    def __init__(self, every: int) -> None:
        self.every, self.forwards, self.deaths = every, 0, 0
        self._last: dict[str, tuple[int, int]] = {}

    def __call__(self, progress: RunProgress) -> None:
        for video in progress.videos.values():
            now = (video.stages_done, video.step)
            before = self._last.get(video.job_id)
            self._last[video.job_id] = now
            if video.step and now != before:
                self.forwards += 1
                if self.every and self.forwards % self.every == 0:
                    self.deaths += 1
                    self._last.clear()
                    raise Death


def render_through_deaths(store: Store, run: Run, reaper: Reaper) -> None:
    """Resume until the run is done. What is committed at a death must be the same object ever after."""
    kept: dict[str, bytes] = {}
    while True:
        try:
            assert not render_locally(store, run, observers=by_progress(reaper)).failed
            return
        except Death:
            assert {key: store.get(key) for key in kept} == kept
            kept = stage_commits(store)


# 1 Same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [4, 7])
def test_1_a_render_killed_and_resumed_any_number_of_times_gives_the_same_bytes(every: int, make_run: MakeRun) -> None:
    undisturbed, disturbed = MemoryStore(), MemoryStore()
    run = make_run(undisturbed, ROWS)
    render_locally(undisturbed, run)
    assert make_run(disturbed, ROWS).run_id == run.run_id
    reaper = Reaper(every)
    render_through_deaths(disturbed, run, reaper)
    assert reaper.deaths > 1
    assert contents(disturbed, run) == contents(undisturbed, run)


# 2 At most one stage lost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [4, 11])
def test_2_at_most_one_stage_is_lost_for_each_interruption(every: int, make_run: MakeRun) -> None:
    store, reaper = MemoryStore(), Reaper(every)
    run = make_run(store, ROWS)
    render_through_deaths(store, run, reaper)
    needed = sum(plan.timeline.num_stages * plan.forwards_per_stage for plan in run.plans.values())
    [per_stage] = {plan.forwards_per_stage for plan in run.plans.values()}
    assert reaper.deaths > 1
    # One forward more than a stage: a commit may be under way during the first forward of the next stage.
    assert needed < reaper.forwards <= needed + reaper.deaths * (per_stage + 1)


def test_2_an_undisturbed_render_computes_nothing_twice(make_run: MakeRun) -> None:
    store, reaper = MemoryStore(), Reaper(0)
    run = make_run(store, ROWS)
    render_locally(store, run, observers=by_progress(reaper))
    assert reaper.forwards == sum(plan.timeline.num_stages * plan.forwards_per_stage for plan in run.plans.values())


def test_2_nothing_committed_is_computed_again(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    render_locally(store, run)
    before = {key: store.get(key) for key in store.list("") if not key.startswith("runs/")}
    outcome = render_locally(store, run)
    assert (outcome.stages_rendered, outcome.already_published) == (0, 3)
    # Another run whose first row is the same video: its stages and segments are there already.
    other = make_run(store, [ROWS[0] | {"tags": {"take": "2"}}])
    outcome = render_locally(store, other)
    assert other.run_id != run.run_id
    assert outcome.stages_rendered == 0
    assert {key: store.get(key) for key in store.list("") if not key.startswith("runs/")} == before


# 3 Constant memory ----------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.driving.local import render_locally
from magi_ray.render.driving.session import DriveOptions
from magi_ray.render.runs.submission import create, prepare
from magi_ray.settings import override, preset
from magi_ray.storage.local import LocalStore

chunks, weights, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
settings = override(preset("magi-tiny", weights=weights), {
    "runtime": {"num_steps": 4, "video_size_h": 128, "video_size_w": 128}, "encoder": {"preset": "ultrafast"}})
rows = [{"job_id": "long", "num_chunks": chunks,
         "schedule": [{"start_chunk": i, "prompt": f"shot {i}"} for i in range(chunks)]}]
store = LocalStore(folder)
manifest = manifest_of(rows, Defaults.of(settings), base=Path("/"))
run, files = prepare(manifest, name="long.parquet", settings=settings)
create(store, run, files)
outcome = render_locally(store, run)
assert len(outcome.published) == 1, outcome
# Not ru_maxrss: that begins with what the parent had when it forked.
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(line.split()[1])
"""


def test_3_memory_does_not_grow_with_a_videos_length(tiny_weights: Path, tmp_path: Path) -> None:
    # 128×128: 56 more chunks would be 44 MB of keys and values or 66 MB of frames, were they kept; 3% is some 17 MB.
    # malloc gives back at once what is freed: how it shares and keeps its heap is noise of the same size.
    def peak_kib(chunks: int) -> int:
        arguments = [sys.executable, "-c", _MEASURE, str(chunks), str(tiny_weights), str(tmp_path / str(chunks))]
        malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
        environment = os.environ | malloc | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True, timeout=500)
        return int(ended.stdout)

    short, long = peak_kib(8), peak_kib(64)
    assert long <= short * 1.03, f"8 chunks: {short} KiB, 64 chunks: {long} KiB"


# 4 A bad row harms nobody else ----------------------------------------------------------------------------------


def test_4_a_bad_row_harms_nobody_else_and_is_recorded_with_its_reason(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    [image] = [medium.sha256 for medium in run.record.media.values() if medium.kind == "image"]
    store.put(keys.media(image), b"rotten")
    outcome = render_locally(store, run)
    assert set(outcome.published) == {"text", "video"}
    [failed] = outcome.failed
    assert (failed.job_id, failed.failure) == ("image", "input")
    [line] = pq.read_table(io.BytesIO(store.get(keys.run_errors(run.run_id)))).to_pylist()
    assert (line["job_id"], line["class"], line["task"], line["attempts"]) == ("image", "input", "embed", 1)
    assert "sha256" in line["message"]
    results = pq.read_table(io.BytesIO(store.get(keys.run_results(run.run_id)))).to_pylist()
    assert [(row["job_id"], row["status"]) for row in results] == [
        ("text", "done"), ("image", "failed"), ("video", "done"),
    ]  # fmt: skip


def test_4_a_bad_row_is_named_before_any_weights_are_loaded(tmp_path: Path) -> None:
    write_manifest([{"job_id": "good", "prompt": "sea"}, {"job_id": "bad", "prompt": "sea", "width": 100}],
                   tmp_path / "m.parquet")  # fmt: skip
    watch = (
        "import sys; from magi_ray import cli\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    command = [sys.executable, "-c", watch, "submit", "m.parquet", "--weights", "nowhere"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3
    assert 'row 2 (job "bad"), column width: 100 is not a multiple of 16; use 96 or 112' in ended.stderr
    assert ended.stdout.split() == ["False", "False"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


# 5 What is committed stays --------------------------------------------------------------------------------------


class LateView(StoreWrapper):
    """A store as somebody sees it who looked and then slept: the first ``looks`` at each record below ``prefix`` find
    none, though it is there by now."""

    def __init__(self, store: Store, prefix: str, looks: int) -> None:
        super().__init__(store)
        self._prefix, self._looks = prefix, looks
        self._looked: Counter[str] = Counter()

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        early = key.startswith(self._prefix) and key.endswith(".json") and self._looked[key] < self._looks
        if verb == "get" and early:
            self._looked[key] += 1
            raise ObjectMissing(f"There was no {key} when we looked.")
        return call()


@pytest.mark.parametrize("looks", [1, 2])
def test_5_a_late_worker_that_commits_repairs_and_finishes_changes_nothing_that_is_committed(
    looks: int, make_run: MakeRun
) -> None:
    store = MemoryStore()
    run = make_run(store, ROWS)
    plan, ffmpeg = run.plans["video"], find_ffmpeg()
    encoder = encoder_identity(ffmpeg)
    list(load_embedder(run.settings, store).carry_out(plan))
    with row_lease(store, run.run_id, "video", epoch=0, name="late") as lease:
        late = load_denoiser(run.settings, store).carry_out(plan, 0)
        assert next(happened.step for happened in late if happened.stage == 1) == 1
        # It sleeps. A driver gives its row to another group, which repairs and finishes; garbage is collected.
        [state] = [key for key in store.list("stages/") if "/state-" in key]
        flip(store, state)
        assert set(render_locally(store, run).published) == set(run.plans)
        collect(store, list(garbage(store, min_age_s=0.0)))
        media = ("stages/", "segments/", "texts/", "prefixes/", "media/", keys.videos(run.run_id))
        kept = {key: store.get(key) for prefix in media for key in store.list(prefix)}
        # It wakes, ends its stage, and computes everything once more that it had looked for before.
        assert [happened.stage for happened in late][-1] == plan.timeline.num_stages - 1
        list(load_denoiser(run.settings, LateView(store, "stages/", looks)).carry_out(plan, 0))
        list(load_embedder(run.settings, LateView(store, "texts/", looks)).carry_out(plan))
        list(load_embedder(run.settings, LateView(store, "prefixes/", looks)).carry_out(plan))
        late_view = LateView(store, "segments/", looks)
        decoder = load_decoder(run.settings, late_view, ffmpeg=ffmpeg, encoder=encoder)
        for chunk in range(plan.timeline.num_chunks):
            list(decoder.carry_out(plan, chunk))
        late_view = LateView(store, keys.videos(run.run_id), looks)
        list(load_finisher(late_view, run.run_id, ffmpeg=ffmpeg, encoder=encoder).carry_out(plan))
        assert {key: store.get(key) for prefix in media for key in store.list(prefix)} == kept
        with pytest.raises(Superseded):
            lease.beat()
        with pytest.raises(Superseded):
            lease.check()


def test_5_what_a_late_worker_writes_after_its_run_was_collected_is_whole(make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [{"job_id": "text", "prompt": "sea", "num_chunks": 4}])
    plan = run.plans["text"]
    list(load_embedder(run.settings, store).carry_out(plan))
    late = load_denoiser(run.settings, store).carry_out(plan, 0)
    # Every chunk has entered by then, so no caption is missing later.
    assert next(happened.step for happened in late if happened.stage == 3) == 1
    render_locally(store, run)
    before, videos = contents(store, run), {key: store.get(key) for key in store.list(keys.videos(run.run_id))}
    collect(store, list(garbage(store, min_age_s=0.0, forget=[run.run_id])))
    assert not stage_commits(store)
    list(late)
    assert 2 <= len(stage_commits(store)) < plan.timeline.num_stages
    assert not verify(store).damages
    assert {key: store.get(key) for key in store.list(keys.videos(run.run_id))} == videos
    render_locally(store, run, DriveOptions(retry=frozenset(run.plans)))
    assert contents(store, run) == before


# 6 Checked before the first forward -----------------------------------------------------------------------------


def _shrink_a_weight(folder: Path) -> None:
    path = folder / "magi" / "inference_weight" / "model.safetensors"
    tensors = load_file(path)
    tensors["final_linear.linear.weight"] = tensors["final_linear.linear.weight"][:-1].clone()
    save_file(tensors, path)


def _narrow_the_special_tokens(folder: Path) -> None:
    np.savez(folder / "special_tokens.npz", caption_token=np.zeros((1, 8)), logo_token=np.zeros((1, 8)),
             other_tokens=np.zeros((100, 8)))  # fmt: skip


def _cut_the_vae(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_shrink_a_weight, r"final_linear.linear.weight found \[127, 128\], expected \[128, 128\]"),
        (_narrow_the_special_tokens, "are 8 wide, but caption_channels is 64"),
        (_cut_the_vae, r"diffusion_pytorch_model.safetensors has \d+ bytes, but needs \d+"),
        (lambda folder: shutil.rmtree(folder / "t5"), "There is no text encoder"),
        (lambda folder: (folder / "special_tokens.npz").unlink(), "special_tokens.npz"),
    ],
)
def test_6_weights_that_do_not_fit_are_found_before_the_first_forward(
    damage: Callable[[Path], None], message: str, tiny_weights: Path, tmp_path: Path, make_run: MakeRun
) -> None:
    folder = shutil.copytree(tiny_weights, tmp_path / "weights")
    damage(folder)
    store = MemoryStore()
    with pytest.raises(WeightsError, match=message):
        make_run(store, ROWS, settings=preset("magi-tiny", weights=folder))
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": {"num_steps": 18}}, "num_steps is 18, but must be divisible by window_size 4; use 20"),
        ({"runtime": {"num_steps": 9, "window_size": 3}}, "num_steps is 9, .* 4 values of noise2clean_kvrange; use 12"),
        ({"runtime": {"video_size_w": 100}}, "video_size_w is 100, but must be a multiple of 16; use 96 or 112"),
        ({"runtime": {"cfg_number": 1}}, "cfg_number is 1, but a base model needs 3"),
        ({"engine": {"cp_size": 4, "pp_size": 2}}, "asks for 8 ranks, but a group has 1"),
        ({"numeric": {"device": "cuda"}}, "torch finds no CUDA device"),
    ],
)
def test_6_settings_that_cannot_work_are_found_before_the_first_forward(
    change: dict[str, Any], message: str, settings: Settings, make_run: MakeRun
) -> None:
    if "numeric" in change and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    store = MemoryStore()
    with pytest.raises(SettingsError, match=message):
        make_run(store, ROWS, settings=override(settings, change))
    assert list(store.list("")) == []


def test_6_a_missing_ffmpeg_is_found_before_the_first_forward(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", none)
    store = MemoryStore()
    with pytest.raises(MediaError, match="ffmpeg"):
        make_run(store, ROWS)
    assert list(store.list("")) == []


def test_6_a_store_that_cannot_be_written_is_found_before_the_first_forward(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="file"):
        check_store(LocalStore(tmp_path / "file" / "store"))


def test_6_unreadable_media_are_found_before_the_first_forward(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    store = MemoryStore()
    rows = [ROWS[0], {"job_id": "broken", "prompt": "x", "image": "broken.png"}]
    with pytest.raises(ManifestError, match=r'row 2 \(job "broken"\).*broken\.png'):
        make_run(store, rows, base=tmp_path)
    assert list(store.list("")) == []


# 7 Cancel means stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listens", [True, False], ids=["a driver that listens", "a driver that is stopped"])
def test_7_within_15_seconds_of_cancel_nothing_is_left_running(
    listens: bool, tiny_weights: Path, tmp_path: Path
) -> None:
    write_manifest([ROWS[0] | {"num_chunks": 2000, "width": 32, "height": 32}], tmp_path / "m.parquet")
    store = LocalStore(tmp_path / "store")
    options = ["--weights", str(tiny_weights), "--store", store.uri, "--no-dashboard"]
    submit = Command(tmp_path, "submit", "m.parquet", *options)
    try:
        wait_until(lambda: len(stage_commits(store)) >= 4, "it renders on Ray", within_s=120)
        titles = {"ray::DenoiseWorker", "ray::DecodeWorker"}
        wait_until(lambda: all(submit.processes(title) for title in titles), "its workers are there")
        driver = submit.driver()
        assert driver is not None
        if not listens:
            driver.send_signal(signal.SIGSTOP)
        [run_id] = {key.split("/")[1] for key in store.list("runs/")}
        begun = time.monotonic()
        cancelled = CliRunner().invoke(cli, ["cancel", run_id, "--store", store.uri])
        took = time.monotonic() - begun
        left = [process.cmdline() for process in submit.processes() if process.pid != submit.process.pid]
        assert cancelled.exit_code == 0, cancelled.stderr
        assert not left
        assert took < 15
        assert submit.end(within_s=30)[0] == (5 if listens else 1)
    finally:
        submit.clean_up()
