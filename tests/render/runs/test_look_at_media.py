"""What rows begin from is looked at before anything starts; what is gone since does not matter where it is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from magi_ray.errors import ManifestError
from magi_ray.manifest import Defaults, Manifest, manifest_of
from magi_ray.render.driving.local import render_locally
from magi_ray.render.runs.record import Run
from magi_ray.render.runs.submission import create, look_at_media, prepare
from magi_ray.settings import Settings, override
from magi_ray.storage import keys
from magi_ray.storage.memory import MemoryStore

MANIFESTS = Path(__file__).parents[3] / "manifests"
ROWS: list[dict[str, Any]] = [
    {"job_id": "still", "prompt": "sea", "image": "pic.png", "num_chunks": 1},
    {"job_id": "clip", "prompt": "sea", "video": "clip.mp4", "num_chunks": 1},
]
Submit = Callable[..., Run]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(MANIFESTS / "quickstart-image.png", tmp_path / "pic.png")
    shutil.copy(MANIFESTS / "quickstart-clip.mp4", tmp_path / "clip.mp4")
    return tmp_path


def manifest(folder: Path, settings: Settings, rows: list[dict[str, Any]] = ROWS) -> Manifest:
    return manifest_of(rows, Defaults.of(settings), base=folder, strict=False)


def submit(store: MemoryStore, folder: Path, settings: Settings, rows: list[dict[str, Any]] = ROWS, **more: Any) -> Run:
    run, files = prepare(manifest(folder, settings, rows), name="m.parquet", settings=settings, store=store, **more)
    create(store, run, files)
    return run


def test_problems_of_rows_and_of_media_are_told_together_also_of_one_row(folder: Path, settings: Settings) -> None:
    (folder / "bad.png").write_text("no picture")
    rows = [
        *ROWS,
        {"job_id": "flat", "prompt": "sea", "height": 8, "image": "bad.png"},
        {"job_id": "both", "image": "bad.png", "video": "gone.mp4"},
        {"job_id": "late", "video": "clip.mp4", "seconds": 1.6,
         "schedule": [{"start_chunk": 0, "prompt": "a"}, {"start_chunk": 2, "prompt": "b"}]},
        {"job_id": "folder", "prompt": "sea", "image": "."},
    ]  # fmt: skip
    looked = look_at_media(manifest(folder, settings, rows))
    assert [(p.row, p.column, p.rule.split(":")[0]) for p in looked.manifest.problems] == [
        (3, "height", "is not a multiple of 16"),
        (3, "image", "cannot be read"),
        (4, "prompt", "is missing, and there is no schedule either"),
        (4, "image", 'stands beside video "gone.mp4", but a row begins from one or the other'),
        (4, "video", "does not exist"),
        (5, "schedule", "is beyond the video's last chunk, 1"),
        (6, "image", "is not a file"),
    ]
    assert [row.job_id for row in looked.manifest.rows] == ["still", "clip"]
    assert set(looked.media) == {"still", "clip"}
    assert set(looked.files) == {medium.sha256 for medium in looked.media.values()}
    with pytest.raises(ManifestError) as caught:
        prepare(manifest(folder, settings, rows), name="m.parquet", settings=settings)
    assert caught.value.problems == looked.manifest.problems
    assert "render the other 2 now: submit --skip-invalid" in caught.value.remedy


def test_a_medium_that_is_gone_does_not_matter_while_the_store_keeps_it(folder: Path, settings: Settings) -> None:
    store = MemoryStore()
    run = submit(store, folder, settings)
    (folder / "clip.mp4").unlink()
    again = submit(store, folder, settings)
    assert again.record.media == run.record.media
    assert again.run_id == run.run_id
    assert again.manifest.notes == (f'Row 2: its video "clip.mp4" is gone; run {run.run_id} has it as submitted.',)
    # Another picture makes another run, which begins the clip's row from the very same clip.
    Image.effect_noise((64, 64), 50).save(folder / "pic.png")
    other = submit(store, folder, settings)
    assert other.run_id != run.run_id
    assert other.record.media["clip"] == run.record.media["clip"]
    assert render_locally(store, other).published == ("still", "clip")


def test_a_medium_that_is_gone_from_the_store_too_matters_unless_the_row_is_published(
    folder: Path, settings: Settings
) -> None:
    store = MemoryStore()
    run = submit(store, folder, settings)
    render_locally(store, run)
    for medium in run.record.media.values():
        store.delete(keys.media(medium.sha256))
    (folder / "clip.mp4").unlink()
    assert submit(store, folder, settings).run_id == run.run_id
    store.delete(keys.video_record(run.run_id, "clip"))
    with pytest.raises(ManifestError, match=r'column video: "clip\.mp4" does not exist; put the file at'):
        submit(store, folder, settings)


def test_only_the_same_rows_and_settings_say_what_a_gone_medium_was(folder: Path, settings: Settings) -> None:
    store = MemoryStore()
    submit(store, folder, settings)
    (folder / "clip.mp4").unlink()
    slower = override(settings, {"runtime": {"fps": 12}})
    with pytest.raises(ManifestError, match="does not exist"):
        submit(store, folder, slower)
    with pytest.raises(ManifestError, match="does not exist"):
        submit(store, folder, settings, [ROWS[0], ROWS[1] | {"prompt": "hills"}])
    assert submit(store, folder, settings).run_id
