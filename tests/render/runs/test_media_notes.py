from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from magi_ray.manifest import Defaults, manifest_of
from magi_ray.render.runs.submission import look_at_media
from magi_ray.settings import preset

ROW = {"prompt": "on", "num_chunks": 1}


def test_what_is_done_to_an_image_is_noted_and_what_cannot_be_read_is_a_problem_of_its_row(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32)).save(tmp_path / "logo.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile plain.png\n")
    Image.fromarray(np.zeros((8000, 11000), np.uint8)).save(tmp_path / "large.png", compress_level=1)
    rows = [
        ROW | {"job_id": "logo", "image": "logo.png"},
        ROW | {"job_id": "plain", "image": "plain.png"},
        ROW | {"job_id": "list", "video": "list.mp4"},
        ROW | {"job_id": "large", "image": "large.png"},
    ]
    looked = look_at_media(manifest_of(rows, Defaults.of(preset("magi-tiny")), base=tmp_path))
    assert looked.manifest.notes == (
        "Row 1 begins from an image that is transparent in places; they are shown over white.",
    )
    assert set(looked.media) == {"logo", "plain"}
    script, large = looked.manifest.problems
    assert (script.row, script.column, script.value.strip('"')) == (3, "video", "list.mp4")
    assert "neither a picture nor a video" in script.rule
    assert (large.row, large.column) == (4, "image")
    assert large.rule == "has 11000 × 8000 = 88,000,000 pixels, but at most 75,000,000 are read"
