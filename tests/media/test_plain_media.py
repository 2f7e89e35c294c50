"""Plain pictures and clips give the very pixels that the first version of the reader gave: runs begun then are resumed
with them. The digests were recorded before Pillow and the tags of colours came in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from magi_ray.media.reader import ClipPart, Fit, read_image, read_video, shown_size

MANIFESTS = Path(__file__).parents[2] / "manifests"


@pytest.mark.parametrize(
    ("width", "height", "fit", "sha256"),
    [
        (96, 64, "crop", "81bc93ccb883802f20e54a319c36f9cbe78bc76be97d8063a0b0a6b62c8f5752"),
        (32, 32, "crop", "93a9f54b3810d356bfacbcc55cc730768aa8c44646aadadfec071236c3075dca"),
        (48, 48, "pad", "b5747eb1b3cba24f56cbce1815f60788d93538c88ad9f60318a0f8e25d7b19f9"),
        (32, 64, "fit", "36270b886c2ce7d49313038e3115dc71b285e802c7db1c8bfa27b6fd9b19a885"),
    ],
)
def test_a_plain_picture_gives_the_pixels_it_always_gave(width: int, height: int, fit: Fit, sha256: str) -> None:
    pixels = read_image(MANIFESTS / "quickstart-image.png", width=width, height=height, fit=fit)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("width", "height", "fps", "max_frames", "part", "fit", "sha256"),
    [
        (64, 64, 24, 1000, "start", "crop", "b8ec8f798d60a39213e84af4dc6451b7ecec8f29f46cea1c3a3644b44d5c66b4"),
        (32, 32, 24, 30, "end", "crop", "bcec97553d098ce4eb9112d1ea026a677e242c87b7d1985a44ec5777528a1496"),
        (48, 32, 10, 12, "end", "pad", "7026010023665e394129e3117cee3257d5f75974e1638c769f9a43bf1b6da700"),
        (32, 48, 30, 8, "start", "fit", "27925bd5afe716a2ace1012f78a3a28c2e02a1032809f16180cd951d5a84492c"),
    ],
)
def test_a_plain_clip_gives_the_pixels_it_always_gave(
    width: int, height: int, fps: int, max_frames: int, part: ClipPart, fit: Fit, sha256: str
) -> None:
    pixels = read_video(
        MANIFESTS / "quickstart-clip.mp4",
        width=width, height=height, fps=fps, max_frames=max_frames, part=part, fit=fit,
    )  # fmt: skip
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == sha256


def test_the_size_as_shown_is_known(tmp_path: Path) -> None:
    assert shown_size(MANIFESTS / "quickstart-image.png") == (96, 64)
    assert shown_size(MANIFESTS / "quickstart-clip.mp4") == (64, 64)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for suffix in ("jpg", "tiff", "png", "webp"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
        assert shown_size(tmp_path / f"a.{suffix}") == (20, 30)
