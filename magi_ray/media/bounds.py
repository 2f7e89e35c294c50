"""How large and how long an image or a clip may be, and the errors that say what is wrong with one.

The bounds are checked before anything is decoded, so that no file, however it was made, takes more than some seconds
or about 1 GB to be refused.
"""

from __future__ import annotations

from pathlib import Path

from magi_ray.errors import MediaError

MAX_PICTURE_PIXELS = 75_000_000
MAX_FRAME_PIXELS = 8192 * 4352  # 8K; a decoder may hold seventeen of them
MAX_CLIP_S = 12 * 3600
MAX_GAP_S = 600  # between two frames, which a higher rate fills with copies
MAX_FRAMES = 5_000_000

_REMEDY = (
    "Images may be PNG, JPEG, WebP, AVIF, TIFF, GIF or BMP; a video that is not read can be converted: "
    "ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4"
)


def unreadable(path: Path, what: str, *, remedy: str = _REMEDY) -> MediaError:
    return MediaError.about(path, f"cannot be read: {what}", remedy=remedy)


def check_pixels(path: Path, width: int, height: int, *, limit: int) -> None:
    """Raises MediaError."""
    if width * height > limit:
        reason = f"has {width} × {height} = {width * height:,} pixels, but at most {limit:,} are read"
        raise MediaError.about(path, reason, remedy="make it smaller; 1920 pixels wide is plenty")


def check_gap(path: Path, gap_s: float, at_s: float) -> None:
    """Raises MediaError when a frame is shown for too long."""
    if gap_s > MAX_GAP_S:
        reason = f"shows one frame for {gap_s:,.0f} s, from {at_s:,.1f} s on, but at most {MAX_GAP_S} s are read"
        raise MediaError.about(path, reason, remedy="cut the clip there: ffmpeg -i IN -t SECONDS -c copy OUT.mp4")


def check_length(path: Path, length_s: float, frames: int) -> None:
    """Raises MediaError."""
    found = ""
    if length_s > MAX_CLIP_S:
        found = f"lasts {length_s / 3600:,.1f} h, but at most {MAX_CLIP_S / 3600:g} h are read"
    elif frames > MAX_FRAMES:
        found = f"has more than {MAX_FRAMES:,} frames, the most that are read"
    if found:
        remedy = "cut out the part that you want: ffmpeg -ss START -i IN -t SECONDS -c copy OUT.mp4"
        raise MediaError.about(path, found, remedy=remedy)
