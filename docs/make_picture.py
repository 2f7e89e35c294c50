"""Draws docs/quickstart.png: eight frames of each quickstart video, magnified, one line per video.

.venv/bin/python docs/make_picture.py magi-ray-store/runs/quickstart-*/videos docs/quickstart.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from magi_ray.media.preview import frames_at, write_png
from magi_ray.media.reader import count_frames

VIDEOS = ("lighthouse", "from-image", "from-clip")
FRAMES, MAGNIFY, GAP = 8, 2, 4


def strip(path: Path) -> np.ndarray:
    """[H, W, 3]: frames at equal distances from the first to the last."""
    last = count_frames(path, fps=24, max_frames=1000) - 1
    frames = frames_at(path, [round(i * last / (FRAMES - 1)) for i in range(FRAMES)])
    magnified = frames.repeat(MAGNIFY, axis=1).repeat(MAGNIFY, axis=2)
    padded = np.pad(magnified, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)


if __name__ == "__main__":
    folder, out = map(Path, sys.argv[1:])
    write_png(out, np.concatenate([strip(folder / f"{name}.mp4") for name in VIDEOS]))
