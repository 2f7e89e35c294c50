"""Embed, decode and finish with fake networks: what is stored, in which order, and when nothing is done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from runs import MakeRun

from magi_ray import __version__
from magi_ray.errors import MediaError, NumericError, ObjectMissing
from magi_ray.events import TaskKind
from magi_ray.render.artifacts.commits import commit, segment_pre_image
from magi_ray.render.artifacts.videos import published
from magi_ray.render.plans.row_plan import RowPlan
from magi_ray.render.plans.takes import add_take
from magi_ray.render.runs.record import Run, open_run
from magi_ray.render.tasks.decode import Decoder
from magi_ray.render.tasks.embed import Embedder
from magi_ray.render.tasks.finish import Finisher
from magi_ray.render.tasks.loading import load_task
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore
from magi_ray.storage.records import digest, read_commit, read_payload
from magi_ray.storage.store import Store
from magi_ray.system import System

IMAGE = Path(__file__).parents[3] / "manifests" / "quickstart-image.png"
SCHEDULE = [{"start_chunk": 0, "prompt": "sea"}, {"start_chunk": 1, "prompt": "storm"}]
ROW: dict[str, Any] = {"job_id": "a", "schedule": SCHEDULE, "num_chunks": 2, "image": str(IMAGE)}
ENCODER = "ffmpeg 1, x264 2"


class Instead(System):
    """A machine on which time passes only in ``work``."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def unix_time(self) -> float:
        return 1e9 + self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


class Puts(MemoryStore):
    """Remembers the names of what is written, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self.written.append(key)
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.written.append(key)
        return super().put_if_absent(key, data)


@dataclass
class Networks:
    """Every kind of network: says what it was asked for, and takes 2 s for everything."""

    system: Instead
    asked: list[str] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None

    def _work(self, what: str) -> bytes:
        self.asked.append(what)
        self.system.work(2.0)
        self.meanwhile()
        return what.encode()

    def embed_caption(self, plan: RowPlan, caption: str) -> bytes:
        return self._work(caption)

    def encode_prefix(self, plan: RowPlan) -> bytes:
        return self._work("prefix")

    def make_segment(self, plan: RowPlan, chunk: int, out: Path) -> None:
        out.write_bytes(self._work(f"chunk {chunk}"))

    def join(self, plan: RowPlan, segments: Sequence[Path], out: Path) -> None:
        out.write_bytes(self._work(" + ".join(path.read_text() for path in segments)))


@pytest.fixture
def system() -> Instead:
    return Instead()


@pytest.fixture
def networks(system: Instead) -> Networks:
    return Networks(system)


def carried_out(events: Iterator[object]) -> None:
    """These tasks have nothing to say before they end."""
    assert list(events) == []


def stored_chunks(store: Store, plan: RowPlan) -> None:
    """Clean chunks as denoising commits them."""
    for chunk in range(plan.timeline.num_chunks):
        payloads = {"state": b"", "chunk": f"clean chunk {chunk} of {len(plan.takes)} takes".encode()}
        commit(store, "stage", plan.pre_image(plan.timeline.finishing_stage(chunk)), payloads, seconds=1.0)


def stored_segments(store: Store, plan: RowPlan) -> None:
    stored_chunks(store, plan)
    for chunk in range(plan.timeline.num_chunks):
        pre_image = segment_pre_image(store, plan, chunk, ENCODER)
        commit(store, "segment", pre_image, {"segment": f"chunk {chunk}".encode()}, seconds=1.0)


def videos(store: Store, run: Run) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list(keys.videos(run.run_id))}


def test_what_is_missing_is_embedded_and_what_is_there_is_not_computed(
    make_run: MakeRun, system: Instead, networks: Networks
) -> None:
    store = MemoryStore()
    plan = make_run(store, [ROW]).plans["a"]
    embedder = Embedder(store, networks, system=system)
    carried_out(embedder.carry_out(plan))
    assert sorted(networks.asked) == ["prefix", "sea", "storm"]
    for caption, key in zip(plan.captions, plan.caption_digests, strict=True):
        found = read_commit(store, "text", key)
        assert found is not None
        assert read_payload(store, found, "text") == caption.encode()
        assert found.pre_image["caption"] == caption
        assert found.provenance["seconds"] == 2.0
        assert found.provenance["finished_unix"] in (1e9 + 102, 1e9 + 104)
    assert plan.prefix_digest is not None
    prefix = read_commit(store, "prefix", plan.prefix_digest)
    assert prefix is not None
    assert read_payload(store, prefix, "prefix") == b"prefix"

    carried_out(embedder.carry_out(plan))
    assert len(networks.asked) == 3
    store.delete(keys.commit("text", plan.caption_digests[1]))
    carried_out(embedder.carry_out(plan))
    assert networks.asked[3:] == ["storm"]


def test_a_chunk_is_decoded_once_and_its_file_does_not_stay(
    make_run: MakeRun, system: Instead, networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Puts()
    plan = make_run(store, [ROW]).plans["a"]
    decoder = Decoder(store, networks.make_segment, encoder=ENCODER, system=system)
    with pytest.raises(ObjectMissing):
        carried_out(decoder.carry_out(plan, 1))
    assert networks.asked == []
    stored_chunks(store, plan)
    store.written.clear()
    for _ in range(2):
        carried_out(decoder.carry_out(plan, 1))
    assert networks.asked == ["chunk 1"]
    key = digest(segment_pre_image(store, plan, 1, ENCODER))
    found = read_commit(store, "segment", key)
    assert found is not None
    assert read_payload(store, found, "segment") == b"chunk 1"
    assert found.provenance["seconds"] == 2.0
    assert [name.rpartition("/")[2][:7] for name in store.written] == ["segment", "commit."]
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_fails_leaves_nothing_behind(make_run: MakeRun, system: Instead, networks: Networks) -> None:
    def fail() -> None:
        raise NumericError("NaN")

    store = Puts()
    run = make_run(store, [ROW])
    plan = run.plans["a"]
    stored_segments(store, plan)
    store.delete(keys.commit("segment", digest(segment_pre_image(store, plan, 0, ENCODER))))
    networks.meanwhile = fail
    store.written.clear()
    for events in (
        Embedder(store, networks, system=system).carry_out(plan),
        Decoder(store, networks.make_segment, encoder=ENCODER, system=system).carry_out(plan, 0),
    ):
        with pytest.raises(NumericError):
            next(events)
    assert store.written == []
    stored_segments(store, plan)
    store.written.clear()
    with pytest.raises(NumericError):
        next(Finisher(store, run.run_id, encoder=ENCODER, joiner=networks.join, system=system).carry_out(plan))
    assert store.written == []


def test_a_video_is_published_before_the_record_that_makes_it_count(
    make_run: MakeRun, system: Instead, networks: Networks
) -> None:
    store = Puts()
    run = make_run(store, [ROW])
    plan = run.plans["a"]
    stored_segments(store, plan)
    store.written.clear()
    carried_out(Finisher(store, run.run_id, encoder=ENCODER, joiner=networks.join, system=system).carry_out(plan))
    assert networks.asked == ["chunk 0 + chunk 1"]
    assert store.get(keys.video(run.run_id, "a")) == b"chunk 0 + chunk 1"
    assert store.written == [keys.video(run.run_id, "a"), keys.video_record(run.run_id, "a")]
    record = published(store, run.run_id, plan, reread=True)
    assert record is not None
    assert (record["bytes"], record["encoder"]) == (17, ENCODER)
    assert record["provenance"] | {"host": ""} == {
        "magi_ray": __version__, "torch": record["provenance"]["torch"], "host": "", "finished_unix": 1e9 + 102,
        "seconds": 2.0,
    }  # fmt: skip


def test_a_missing_segment_is_told_before_anything_is_joined(
    make_run: MakeRun, system: Instead, networks: Networks
) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    stored_chunks(store, run.plans["a"])
    finisher = Finisher(store, run.run_id, encoder=ENCODER, joiner=networks.join, system=system)
    with pytest.raises(ObjectMissing, match="no segment"):
        carried_out(finisher.carry_out(run.plans["a"]))
    assert (networks.asked, videos(store, run)) == ([], {})


def test_a_late_finisher_joins_nothing_and_one_that_becomes_late_publishes_nothing(
    make_run: MakeRun, system: Instead, networks: Networks
) -> None:
    store = Puts()
    run = make_run(store, [ROW])
    add_take(store, run.run_id, "a", 1, num_chunks=2)
    take = open_run(store, run.run_id)
    older, newer = run.plans["a"], take.plans["a"]
    stored_segments(store, older)
    stored_segments(store, newer)
    other = Networks(system)
    prompt = Finisher(store, run.run_id, encoder=ENCODER, joiner=other.join, system=system)
    for mine, theirs in ((older, older), (newer, newer), (older, newer)):
        for key in store.list(keys.videos(run.run_id)):
            store.delete(key)
        networks.asked.clear()

        def overtake(theirs: RowPlan = theirs) -> None:
            carried_out(prompt.carry_out(theirs))
            store.written.clear()

        networks.meanwhile = overtake
        late = Finisher(store, run.run_id, encoder=ENCODER, joiner=networks.join, system=system)
        carried_out(late.carry_out(mine))
        carried_out(late.carry_out(mine))
        assert len(networks.asked) == 1
        assert store.written == []
        assert published(store, run.run_id, theirs, reread=True)


def test_the_bodies_are_imported_without_torch() -> None:
    code = (
        "import json, sys\n"
        "from magi_ray.render.tasks import decode, embed, finish, loading\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'ray'} & sys.modules.keys())))"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", code])) == []


@pytest.mark.parametrize("kind", [TaskKind.DECODE, TaskKind.FINISH])
def test_another_ffmpeg_than_the_runs_is_refused(kind: TaskKind, make_run: MakeRun) -> None:
    store = MemoryStore()
    run = make_run(store, [ROW])
    with pytest.raises(MediaError, match=f"ffmpeg here is 'ffmpeg .*', but this run encodes with '{ENCODER}'"):
        load_task(kind, settings=run.settings, store=store, run_id=run.run_id, encoder=ENCODER)
