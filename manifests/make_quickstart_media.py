"""Makes quickstart-image.png (96 × 64) and quickstart-clip.mp4 (64 × 64, 2 s at 24 frames a second).

Painted here with numpy, so nobody's rights are touched: a sun over hills, and a boat on waves.
Run it from the repository root:  python manifests/make_quickstart_media.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from magi_ray.media.encoder import encode_segment, find_ffmpeg
from magi_ray.media.joiner import join, verify
from magi_ray.media.preview import write_png
from magi_ray.settings import EncoderSettings

FOLDER = Path(__file__).parent
FINE = 4  # everything is painted this much larger, then averaged: smooth edges
SEED = 11


def canvas(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates y, x of every fine pixel: 0…1 from top to bottom, 0…width/height from left to right."""
    y, x = np.mgrid[: height * FINE, : width * FINE]
    return (y + 0.5) / (height * FINE), (x + 0.5) / (height * FINE)


def colour(red: int, green: int, blue: int) -> np.ndarray:
    return np.array([red, green, blue], float)


def fade(amount: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[H, W, 3]: ``start`` where ``amount`` is 0, ``end`` where it is 1."""
    return start + np.clip(amount, 0, 1)[..., None] * (end - start)


def averaged(picture: np.ndarray) -> np.ndarray:
    """The fine picture at its true size: uint8 [H, W, 3]."""
    height, width = picture.shape[0] // FINE, picture.shape[1] // FINE
    blocks = picture.reshape(height, FINE, width, FINE, 3)
    return np.rint(blocks.mean(axis=(1, 3)).clip(0, 255)).astype(np.uint8)


def landscape(height: int, width: int) -> np.ndarray:
    """Evening sky, a low sun, three ranges of hills; the nearest is the darkest."""
    random = np.random.default_rng(SEED)
    y, x = canvas(height, width)
    picture = fade(y / 0.75, colour(58, 92, 160), colour(252, 190, 120))
    distance = np.hypot(y - 0.46, x - 1.02)
    picture = fade(0.7 * np.exp(-((distance / 0.22) ** 2)), picture, colour(255, 222, 150))
    picture[distance < 0.1] = colour(255, 246, 214)
    for line, roughness, top, bottom in (
        (0.58, 0.05, colour(128, 112, 150), colour(176, 140, 150)),
        (0.70, 0.06, colour(74, 84, 112), colour(108, 104, 120)),
        (0.84, 0.05, colour(28, 58, 52), colour(52, 86, 58)),
    ):
        ridge = np.full_like(x, line)
        for octave in range(1, 5):
            ridge += roughness / octave * np.sin(x * 3.1 * octave + random.uniform(0, 2 * np.pi))
        hill = fade((y - ridge) / 0.3, top, bottom)
        picture = np.where((y > ridge)[..., None], hill, picture)
    return averaged(picture)


def boat(height: int, width: int, frames: int) -> np.ndarray:
    """A sailing boat that crosses from left to right over two rows of waves: uint8 [frames, height, width, 3]."""
    y, x = canvas(height, width)
    clip = []
    for t in np.linspace(0, 1, frames):
        picture = fade(y / 0.6, colour(92, 160, 216), colour(222, 236, 242))
        picture[np.hypot(y - 0.2, x - 0.8) < 0.09] = colour(255, 236, 150)
        far = 0.62 + 0.02 * np.sin(14 * x - 6 * t)
        picture = np.where(
            (y > far)[..., None], fade((y - far) / 0.4, colour(60, 132, 170), colour(20, 76, 120)), picture
        )
        middle = 0.2 + 0.55 * t
        across, up = x - middle, 0.66 + 0.025 * np.sin(2 * np.pi * 2 * t) - y
        picture[(up > 0.1) & (up < 0.44) & (across > 0.012) & (across < 0.55 * (0.44 - up))] = colour(250, 248, 240)
        picture[(up > 0.1) & (up < 0.36) & (across < -0.012) & (across > -0.4 * (0.36 - up))] = colour(226, 88, 62)
        picture[(up > 0) & (up < 0.46) & (abs(across) < 0.008)] = colour(84, 58, 44)
        picture[(up > -0.03) & (up < 0.07) & (abs(across) < 0.13 + 0.7 * up)] = colour(124, 66, 40)
        near = 0.7 + 0.025 * np.sin(11 * x - 12 * t)
        picture = np.where(
            (y > near)[..., None], fade((y - near) / 0.3, colour(44, 112, 156), colour(12, 52, 92)), picture
        )
        crest = (y > near) & (y < near + 0.015)
        picture[crest] = 0.5 * picture[crest] + 0.5 * colour(240, 248, 250)
        clip.append(averaged(picture))
    return np.stack(clip)


def main() -> None:
    write_png(FOLDER / "quickstart-image.png", landscape(64, 96))
    ffmpeg, frames = find_ffmpeg(), boat(64, 64, 48)
    with tempfile.TemporaryDirectory() as folder:
        segment = Path(folder) / "segment.mp4"
        encode_segment(frames, ffmpeg=ffmpeg, fps=24, frame_offset=0, settings=EncoderSettings(), out=segment)
        join([segment], out=FOLDER / "quickstart-clip.mp4", ffmpeg=ffmpeg)
    verify(FOLDER / "quickstart-clip.mp4", frames=48, width=64, height=64, fps=24)


if __name__ == "__main__":
    main()
