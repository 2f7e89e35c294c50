"""Real faults on this machine: what people see, what is lost, how long until work goes on.

    python bench/faults.py [--only NAME …] [--out FILE.json] [--json]

With --out, FILE.json keeps the measurements, and FILE.md is their table; a fault that is measured again replaces its
old measurement.

Every fault hits a run of its own: one row of magi-tiny, so large that a stage takes seconds, submitted as people do,
rendered on a Ray of its own. It strikes when two or three of the four forwards of a stage are done, so that there is
something to lose. How far the run is comes from its progress.json, which is written once a second: so times are known
to about a second, and forwards to one. How long a stage takes comes from the commits of the same run.
"""

# ruff: noqa: E402 - helpers shared with the tests are in their folders

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "storage")]

import psutil
from rgw import Rgw, why_not
from typed import Command, processes_with, wait_until

from magi_ray.drivers.status_file import log_path
from magi_ray.manifest import write_manifest
from magi_ray.models.tiny import ensure_tiny
from magi_ray.render.driving.reports import read_progress
from magi_ray.render.runs.record import Run, open_run
from magi_ray.settings import cache_folder, preset
from magi_ray.storage import keys
from magi_ray.storage.opening import open_store
from magi_ray.storage.records import canonical_json, read_commit
from magi_ray.storage.store import Store

SIZE, NUM_STEPS, CHUNKS = 224, 16, 40
OUTAGES_S = (10.0, 40.0)
SILENCE_S = 15.0
_COLOURS = re.compile(r"\x1b\[\d*m")
# Lines of ``submit`` that say how far it is, or what it says in any case.
_USUAL = re.compile(
    r"\d+ of \d+ videos? done|Run \S+: |Process \d+ renders|Starting Ray|Ray dashboard|note: these weights"
)


@dataclass
class Result:
    """What one fault did. ``commit_s``: from the fault to the next committed stage (or what ``waits_for`` says);
    ``load``: of the machine, afterwards."""

    fault: str
    seen: list[str] = field(default_factory=list)
    lost_forwards: int | None = None
    forward_s: float | None = None
    commit_s: float | None = None
    waits_for: str = "next stage"
    stage_s: float | None = None
    note: str = ""
    load: float = 0.0

    @property
    def stages(self) -> float | None:
        """``commit_s`` as a multiple of a stage."""
        return self.commit_s / self.stage_s if self.commit_s is not None and self.stage_s else None


class Bench:
    """One run in a folder of its own, and its processes."""

    def __init__(self, folder: Path, *, chunks: int = CHUNKS, store: str = "store") -> None:
        self.folder, self.store_uri = folder, store if "://" in store else str(folder / store)
        self.store: Store = open_store(self.store_uri)
        self.commands: list[Command] = []
        row = {"job_id": "film", "prompt": "a boat on calm water", "num_chunks": chunks, "num_steps": NUM_STEPS}
        write_manifest([row | {"width": SIZE, "height": SIZE}], folder / "m.parquet")
        self._run: Run | None = None

    def type(self, *words: str) -> Command:
        """``magi-ray`` with these words and our store."""
        options = ["--no-dashboard"] if words[0] in ("submit", "resume", "retry", "drive") else []
        self.commands.append(Command(self.folder, *words, "--store", self.store_uri, *options))
        return self.commands[-1]

    def submit(self, *options: str) -> Command:
        return self.type("submit", "m.parquet", *options)

    @property
    def run(self) -> Run:
        if self._run is None:
            [run_id] = {key.split("/")[1] for key in self.store.list("runs/")}
            self._run = open_run(self.store, run_id)
        return self._run

    def at(self) -> tuple[int, int]:
        """(stages done, forwards of the next one), as progress.json has it."""
        reported = read_progress(self.store, self.run.run_id)
        if reported is None:
            return 0, 0
        video = reported.progress.videos["film"]
        return video.stages_done, video.step

    def commits(self, kind: str = "stages") -> int:
        return sum(key.endswith("/commit.json") for key in self.store.list(f"{kind}/"))

    def await_commits(self, count: int) -> None:
        wait_until(lambda: self.commits() >= count, f"{count} stages are committed", within_s=240)

    def stage_s(self) -> float:
        """Median of the stages computed so far, without the first one, which begins cold."""
        found = [read_commit(self.store, "stage", key) for key in self.run.plans["film"].stage_keys]
        return statistics.median(commit.provenance["seconds"] for commit in found[1:] if commit is not None)

    def await_mid_stage(self) -> None:
        """Wait until two forwards of a stage are reported. A third may be done: after three, the stage may be."""
        self.await_commits(2)
        wait_until(lambda: self.at()[1] == 2, "a stage is half done", within_s=240)

    def forwards(self) -> int:
        """How many are done in all, as far as is reported."""
        stage, step = self.at()
        return stage * 4 + step

    def measure(self, result: Result, begun: float, old: set[int]) -> Result:
        """Just after a fault, at ``begun``: wait for a denoise worker that is not in ``old``, its first forward and its
        first stage; count how many of the forwards done before were lost."""
        before = self.forwards()

        def denoisers() -> set[int]:
            return {one.pid for command in self.commands for one in command.processes("ray::DenoiseWorker")} - old

        wait_until(denoisers, "there is another denoise worker", within_s=240)
        at, committed = self.at(), self.commits()
        wait_until(lambda: self.at() != at and self.at()[1] >= 1, "the next forward", within_s=240)
        result.forward_s = time.monotonic() - begun
        self.await_commits(committed + 1)
        result.commit_s, result.stage_s = time.monotonic() - begun, self.stage_s()
        result.lost_forwards = max(0, before - 4 * committed)
        return result

    def said(self, command: Command, name: str = "") -> list[str]:
        """What ``command`` printed, without its progress."""
        lines = [line.strip() for line in command.stderr.splitlines() if line.strip() and not _USUAL.match(line)]
        return [f"{name}: {line}" if name else line for line in lines]

    def logged(self) -> list[str]:
        """What the rendering process logged, likewise; the beginning of each line."""
        log = log_path(self.store, self.run.run_id)
        lines = _COLOURS.sub("", log.read_text()).splitlines() if log.exists() else []
        return [f"log: {line[:150]}" for line in lines if line.strip() and not _USUAL.match(line)]

    def clean_up(self) -> None:
        for command in self.commands:
            command.clean_up()


@contextmanager
def bench(**arguments: Any) -> Iterator[Bench]:
    folder = Path(tempfile.mkdtemp(prefix="magi-ray-faults-"))
    made = Bench(folder, **arguments)
    try:
        yield made
    finally:
        made.clean_up()
        shutil.rmtree(folder, ignore_errors=True)


def worker(command: Command, kind: str) -> psutil.Process:
    wait_until(lambda: command.processes(f"ray::{kind}"), f"there is a {kind}", within_s=120)
    return command.processes(f"ray::{kind}")[0]


# The faults -----------------------------------------------------------------------------------------------------


def start() -> Iterator[Result]:
    """No fault: what starting costs, which several faults below include."""
    with bench() as run:
        begun = time.monotonic()
        command = run.submit()
        wait_until(lambda: command.processes("ray::EmbedWorker"), "Ray is there", within_s=120)
        ray_s = time.monotonic() - begun
        wait_until(lambda: list(run.store.list("runs/")) and run.at()[1] >= 1, "the first forward", within_s=240)
        result = Result("none: submit", forward_s=time.monotonic() - begun, lost_forwards=0)
        wait_until(lambda: run.commits() >= 1, "the first stage", within_s=240)
        result.commit_s = time.monotonic() - begun
        wait_until(lambda: run.commits() >= 4, "some stages", within_s=240)
        result.stage_s, result.note = run.stage_s(), f"Ray's first worker process was there after {ray_s:.1f} s"
        yield result


def denoiser() -> Iterator[Result]:
    with bench() as run:
        command = run.submit()
        victim = worker(command, "DenoiseWorker")
        run.await_mid_stage()
        begun = time.monotonic()
        victim.kill()
        result = run.measure(Result("denoise worker, kill -9"), begun, {victim.pid})
        result.seen = run.said(command) + run.logged()
        yield result


def decoder() -> Iterator[Result]:
    with bench() as run:
        command = run.submit()
        wait_until(lambda: command.processes("ray::DecodeWorker"), "there is a decoder", within_s=240)
        wait_until(lambda: run.commits("segments") >= 1, "a chunk is decoded", within_s=240)
        stages = 3 + run.commits("segments")  # with stage 3 chunk 0 becomes clean
        wait_until(lambda: run.commits() > stages, "it decodes again", within_s=240)
        done, begun = run.commits("segments"), time.monotonic()
        worker(command, "DecodeWorker").kill()
        before, denoised_s, decoded_s = run.commits(), 0.0, 0.0

        def both() -> bool:
            nonlocal denoised_s, decoded_s
            if not denoised_s and run.commits() > before:
                denoised_s = time.monotonic() - begun
            if not decoded_s and run.commits("segments") > done:
                decoded_s = time.monotonic() - begun
            return bool(denoised_s and decoded_s)

        wait_until(both, "a stage and a segment are committed", within_s=240)
        seen = run.said(command) + run.logged()
        yield Result("decoder, kill -9", seen=seen, lost_forwards=0, commit_s=decoded_s, waits_for="next segment",
                  stage_s=run.stage_s(), note=f"denoising went on: next stage after {denoised_s:.1f} s")  # fmt: skip


def finisher() -> Iterator[Result]:
    with bench(chunks=2) as run:
        command = run.submit()
        wait_until(lambda: command.processes("ray::FinishWorker"), "there is a finisher", within_s=240)
        wait_until(lambda: run.commits("segments") == 2, "all chunks are decoded", within_s=240)
        begun = time.monotonic()
        worker(command, "FinishWorker").kill()
        published = keys.video_record(run.run.run_id, "film")
        assert not run.store.exists(published), "too late"
        wait_until(lambda: run.store.exists(published), "the video is published", within_s=240)
        took, seen = time.monotonic() - begun, run.said(command) + run.logged()
        yield Result("finisher, kill -9", seen=seen, lost_forwards=0, commit_s=took, waits_for="video",
                  stage_s=run.stage_s())  # fmt: skip


def raylet() -> Iterator[Result]:
    with bench() as run, driving(run, "two-nodes") as command:
        victim = worker(command, "DenoiseWorker")
        node = next(parent for parent in victim.parents() if "raylet" in parent.name())
        run.await_mid_stage()
        begun = time.monotonic()
        node.kill()
        victim.kill()  # as a machine would take its processes along
        result = run.measure(Result("node lost (raylet and worker, kill -9)"), begun, {victim.pid})
        result.seen = run.said(command)
        yield result


def hung() -> Iterator[Result]:
    with bench() as run, driving(run, "one-node") as command:
        victim = worker(command, "DenoiseWorker")
        run.await_mid_stage()
        begun = time.monotonic()
        victim.suspend()
        result = run.measure(Result("denoise worker hangs (SIGSTOP)"), begun, {victim.pid})
        result.seen = run.said(command)
        result.note = f"{SILENCE_S:.0f} s of it until it was taken for hung; an hour by default"
        yield result


def driver() -> Iterator[Result]:
    with bench() as run:
        command = run.submit()
        worker(command, "DenoiseWorker")
        process = command.driver()
        assert process is not None
        run.await_mid_stage()
        begun = time.monotonic()
        process.kill()
        command.end(within_s=60)
        wait_until(lambda: not command.processes("ray::"), "Ray is gone", within_s=60)
        resumed = run.type("resume", run.run.run_id)
        result = run.measure(Result("driver, kill -9, then resume"), begun, set())
        result.seen = run.said(command, "submit") + run.said(resumed, "resume")
        yield result


def driver_elsewhere() -> Iterator[Result]:
    """As if the machine with the driver, Ray and all had been lost, and the run were resumed on another one."""
    with bench() as run:
        command = run.submit()
        worker(command, "DenoiseWorker")
        processes = command.processes()
        run.await_mid_stage()
        begun = time.monotonic()
        for process in [*processes, *command.processes()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        command.end(within_s=60)
        key = keys.run_lease(run.run.run_id)
        lease = json.loads(run.store.get(key))
        lease["holder"] |= {"host": "another-machine", "boot": "another-boot"}
        run.store.put(key, canonical_json(lease))
        resumed = run.type("resume", run.run.run_id)
        result = run.measure(Result("machine lost with the driver, resumed on another"), begun, set())
        result.seen = run.said(resumed, "resume")
        yield result


def outage() -> Iterator[Result]:
    if reason := why_not():
        print(f"store outage: not measured, {reason}", file=sys.stderr)
        return
    folder = Path(tempfile.mkdtemp(prefix="magi-ray-rgw-"))
    server = Rgw(folder / "ceph")
    try:
        os.environ.update(server.environment)
        for seconds in OUTAGES_S:
            with bench(store=f"s3://{server.new_bucket()}/films") as run:
                command = run.submit()
                run.await_mid_stage()
                before, begun = run.forwards(), time.monotonic()
                server.kill_gateway()
                time.sleep(seconds)
                server.start()
                back = time.monotonic()
                result = Result(f"store (S3) out of reach for {back - begun:.0f} s")
                run.await_commits(before // 4 + 1)
                result.commit_s = time.monotonic() - begun
                run.await_commits(before // 4 + 2)
                result.stage_s, result.seen = run.stage_s(), run.said(command) + run.logged()
                result.note = f"the stage after that one {time.monotonic() - back:.1f} s after the store's return"
                epochs = len(list(run.store.list(keys.epochs(run.run.run_id))))
                result.note += f"; drivers so far: {epochs}"
                yield result
    finally:
        server.close()
        shutil.rmtree(folder, ignore_errors=True)


def pause() -> Iterator[Result]:
    with bench() as run:
        command = run.submit()
        run.await_mid_stage()
        begun = time.monotonic()
        paused = run.type("pause", run.run.run_id)
        paused.end(within_s=240)
        result = Result("pause", seen=run.said(paused), commit_s=time.monotonic() - begun, waits_for="paused")
        command.end(within_s=60)
        result.seen += run.said(command, "submit")
        stage, step = run.at()
        result.lost_forwards, result.stage_s = stage * 4 + step - run.commits() * 4, run.stage_s()
        yield result
        begun = time.monotonic()
        resumed = run.type("resume", run.run.run_id)
        result = run.measure(Result("… and resume"), begun, set())
        result.seen = run.said(resumed, "resume")
        yield result


def cancel() -> Iterator[Result]:
    for stopped in (False, True):
        with bench() as run:
            command = run.submit()
            worker(command, "DenoiseWorker")
            process = command.driver()
            assert process is not None
            run.await_mid_stage()
            if stopped:
                process.suspend()
            before, begun = run.forwards(), time.monotonic()
            cancelled = run.type("cancel", run.run.run_id)
            wait_until(lambda command=command: not command.processes("ray::"), "its workers are gone", within_s=60)
            workers_s = time.monotonic() - begun
            cancelled.end(within_s=60)
            command.end(within_s=60)
            wait_until(command.has_left_nothing, "all its processes are gone", within_s=60)
            result = Result("cancel" + (", the driver hangs" if stopped else ""), seen=run.said(cancelled))
            result.commit_s, result.waits_for = time.monotonic() - begun, "no process left"
            result.lost_forwards, result.stage_s = max(0, before - 4 * run.commits()), run.stage_s()
            result.note = f"workers are gone, and accelerators with them, after {workers_s:.1f} s"
            yield result


def detach() -> Iterator[Result]:
    with bench() as run:
        command = run.submit()
        run.await_mid_stage()
        begun, committed = time.monotonic(), run.commits()
        command.press_ctrl_c()
        command.end(within_s=60)
        left_s = time.monotonic() - begun
        wait_until(lambda: run.commits() > committed, "it goes on", within_s=240)
        yield Result("Ctrl-C while submit follows", seen=run.said(command), lost_forwards=0, stage_s=run.stage_s(),
                  commit_s=time.monotonic() - begun, note=f"the shell is back after {left_s:.1f} s")  # fmt: skip


FAULTS: dict[str, Callable[[], Iterator[Result]]] = {
    fault.__name__: fault
    for fault in (
        start,
        denoiser,
        decoder,
        finisher,
        raylet,
        hung,
        driver,
        driver_elsewhere,
        outage,
        pause,
        cancel,
        detach,
    )
}


# A driver with a Ray or deadlines that the command line does not offer ------------------------------------------------


@contextmanager
def driving(run: Bench, how: str) -> Iterator[Command]:
    """This file as the run's driver, in a process of its own."""
    submit = run.submit("--no-wait", "--local")
    submit.end(within_s=240)
    submit.clean_up()
    command = Command.__new__(Command)
    command.mark, command._stderr = f"faults-{os.getpid()}-{how}", run.folder / "driver.stderr"
    with command._stderr.open("wb") as stderr:
        command.process = subprocess.Popen(
            [sys.executable, __file__, "--drive", how, run.store_uri, run.run.run_id],
            env={**os.environ, "MAGI_RAY_TEST_MARK": command.mark},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
        )  # fmt: skip
    run.commands.append(command)
    yield command
    for process in processes_with("MAGI_RAY_TEST_MARK", command.mark):
        process.kill()


def drive(how: str, store_uri: str, run_id: str) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from magi_ray.cluster.local_ray import local_ray, prepare_ray_environment
    from magi_ray.cluster.workers import render_on_ray
    from magi_ray.events import TaskKind
    from magi_ray.render.driving.timings import Timings

    store = open_store(store_uri)
    run = open_run(store, run_id)
    if how == "one-node":
        silence = {**Timings().silence_s, TaskKind.DENOISE: SILENCE_S}
        with local_ray(namespace="faults", dashboard=False):
            render_on_ray(store, run, timings=Timings(silence_s=silence))
        return
    prepare_ray_environment()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    render_on_ray(store, run)


# ----------------------------------------------------------------------------------------------------------------


def machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores (shared), {psutil.virtual_memory().total / 2**30:.0f} GiB, no accelerator used"


def table(results: list[Result]) -> str:
    def number(value: float | None, unit: str = "") -> str:
        return "–" if value is None else f"{value:.1f}{unit}" if isinstance(value, float) else f"{value}{unit}"

    lines = [
        "| fault | forwards lost | next forward | next commit | = stages of | load | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        waits = "" if result.waits_for == "next stage" else f" ({result.waits_for})"
        stages = "–" if result.stages is None else f"{result.stages:.1f} × {result.stage_s:.1f} s"
        lines.append(
            f"| {result.fault} | {number(result.lost_forwards)} | {number(result.forward_s, ' s')} |"
            f" {number(result.commit_s, ' s')}{waits} | {stages} | {result.load} | {result.note} |"
        )
    lines += ["", "What people saw, without progress:", ""]
    for result in results:
        lines += [f"**{result.fault}**", "", *(f"    {line}" for line in result.seen or ["(nothing)"]), ""]
    return "\n".join(lines)


def report(results: list[Result]) -> str:
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "job": f"magi-tiny, {SIZE}×{SIZE}, {NUM_STEPS} steps, 4 forwards a stage, one row, Ray on this machine",
        "command": "python bench/faults.py",
    }
    return "\n".join(["# Faults", "", *(f"{name}: {value}  " for name, value in about.items()), "", table(results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drive", nargs=3)
    given = parser.parse_args()
    if given.drive:
        drive(*given.drive)
        return
    ensure_tiny(cache_folder() / "magi-tiny", preset("magi-tiny"))
    kept = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    for name in given.only:
        try:
            kept[name] = [asdict(result) | {"load": round(os.getloadavg()[0], 1)} for result in FAULTS[name]()]
        except Exception:  # noqa: BLE001 - the others are still measured
            traceback.print_exc()
            continue
        print(f"{name}: {kept[name]}", file=sys.stderr)
        if given.out:
            given.out.write_text(json.dumps(kept, indent=1) + "\n")
            given.out.with_suffix(".md").write_text(report(_results(kept)))
    print(json.dumps(kept, indent=1) if given.json else report(_results(kept)))


def _results(kept: dict[str, list[dict[str, Any]]]) -> list[Result]:
    """In the order of FAULTS."""
    return [Result(**result) for name in FAULTS for result in kept.get(name, [])]


if __name__ == "__main__":
    main()
