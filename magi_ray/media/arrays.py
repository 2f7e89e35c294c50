"""Pictures and clips as values: what callers give (PIL images, arrays, tensors), and the frames they get."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from PIL import Image

from magi_ray.errors import MediaError
from magi_ray.media.pictures import Pixels, shown_picture
from magi_ray.media.preview import write_png

Array = npt.NDArray[Any]
_CHANNELS = (1, 3, 4)
_ROUNDING = 0.002  # of tensors in half precision


class Frames(Sequence[Image.Image]):
    """The frames of a video: each is a PIL image, all together are an array.

    ``frames[3]`` is a picture and ``frames[3:9]`` are Frames; ``np.asarray(frames)`` is uint8 RGB [T, H, W, 3] and
    copies nothing.
    """

    def __init__(self, pixels: Pixels) -> None:
        """pixels: uint8 RGB [T, H, W, 3]."""
        self._pixels = pixels

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, H, W, 3)."""
        return self._pixels.shape

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        return self._pixels.dtype

    def __len__(self) -> int:
        return len(self._pixels)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Frames: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Image.Image | Frames:
        if isinstance(index, slice):
            return Frames(self._pixels[index])
        if not hasattr(index, "__index__"):
            raise TypeError("Frames are indexed by a number or a slice; their pixels are np.asarray(frames).")
        return Image.fromarray(self._pixels[operator.index(index)])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self._pixels, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"Frames{list(self.shape)}"


def write_picture(image: object, path: Path) -> Path:
    """Writes one picture as PNG and returns its path: ``path`` with a suffix.

    image: a PIL image of any mode, as a viewer shows it; or an array or tensor, [H, W], [H, W, 1, 3 or 4] or
    [1, 3 or 4, H, W], alone or as a batch of one, of bytes or of floats in 0…1.  Raises MediaError.
    """
    pixels = _shown(image) if isinstance(image, Image.Image) else _rgb(_channels_last(image, "image", dimensions=3))[0]
    path = path.with_suffix(".png")
    write_png(path, pixels)
    return path


def write_clip(video: object, path: Path, *, fps: int) -> Path:
    """Writes a clip of ``fps`` frames per second without loss, and returns its path: ``path`` with a suffix.

    video: a list of what an image may be, all of one size; or an array or tensor like an image's with a first dimension
    more.  Raises MediaError.
    """
    frames = clip_pixels(video)
    path = path.with_suffix(".mov")
    with av.open(str(path), "w", format="mov", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("png", rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "rgb24"
        for frame in frames:
            container.mux(stream.encode(VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def clip_pixels(video: object) -> Pixels:
    """uint8 RGB [T, H, W, 3] of what ``write_clip`` takes. Raises MediaError."""
    if isinstance(video, list | tuple):
        video = [_shown(frame) if isinstance(frame, Image.Image) else frame for frame in video]
    return _rgb(_channels_last(video, "video", dimensions=4))


def _shown(image: Image.Image) -> Pixels:
    """uint8 RGB [H, W, 3], as a viewer shows it. Raises MediaError."""
    try:
        image.load()  # Pillow turns a TIFF as it loads
    except (OSError, ValueError) as exc:
        raise MediaError(f"image: this PIL image cannot be read: {exc}.") from exc
    if image.mode in ("I", "F"):  # numbers: as those of an array
        values = np.asarray(image)
        if values.dtype.kind == "i" and values.max() > 255:
            values = values.astype(np.uint16)
        pixels: Pixels = _rgb(_channels_last(values, "image", dimensions=3))[0]
        return pixels
    return shown_picture(Path("image"), image.copy())[0]


def _rgb(pixels: Pixels) -> Pixels:
    """[T, H, W, 1, 3 or 4] as [T, H, W, 3]."""
    if pixels.shape[-1] == 1:
        return np.concatenate([pixels] * 3, axis=-1)
    if pixels.shape[-1] == 4:
        return np.stack([_shown(Image.fromarray(frame)) for frame in pixels])
    return np.ascontiguousarray(pixels)


def _channels_last(value: object, name: str, *, dimensions: int) -> Pixels:
    """uint8 [T, H, W, channels] of a picture (T = 1; dimensions: 3) or of a clip (4). Raises MediaError."""
    tensor: Any = value if hasattr(value, "detach") else None
    if tensor is not None:
        tensor = tensor.detach().cpu()
        value = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
    try:
        values = np.asarray(value)
    except ValueError as exc:
        raise MediaError(f"{name}: its frames or lines have different sizes.", remedy="Make them equal.") from exc
    given = values
    if values.ndim == dimensions + 1 and len(values) == 1:
        values = values[0]  # a batch of one
    if values.ndim == dimensions - 1 and (dimensions == 3 or values.shape[-1] not in _CHANNELS):
        values = values[..., None]
    if values.ndim == dimensions:
        values = values[None] if dimensions == 3 else values
        first, last = values.shape[1] in _CHANNELS, values.shape[3] in _CHANNELS
        if first and (tensor is not None or not last):
            return _bytes(np.moveaxis(values, 1, 3), name)
        if last and values.size:
            return _bytes(values, name)
    layouts = "[H, W], [H, W, 3] or [3, H, W]" if dimensions == 3 else "[T, H, W], [T, H, W, 3] or [T, 3, H, W]"
    several = dimensions == 3 and given.ndim == 4
    remedy = "All videos of a call begin from one picture: call once for each." if several else ""
    raise _unusable(name, given, f"must be {layouts}", remedy or "A fourth channel is alpha.")


def _bytes(values: Array, name: str) -> Pixels:
    """0…255, of bytes, booleans, 16-bit values or floats. Raises MediaError."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if kind not in "iuf":
        raise _unusable(name, values, "must be numbers", "Give bytes, or floats from 0 to 1.")
    low, high = values.min(), values.max()
    if kind in "iu":
        if low < 0 or high > 255:
            raise _unusable(name, values, f"has values from {low} to {high}", "Scale whole numbers to 0 … 255.")
        return values.astype(np.uint8)
    if not np.isfinite([low, high]).all():
        raise _unusable(name, values, "has values that are not finite", "Give floats from 0 to 1.")
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        remedy = "(x + 1) / 2 brings −1 … 1 there." if -1.01 <= low < 0 and high <= 1.01 else "Divide 0 … 255 by 255."
        raise _unusable(name, values, f"has values from {low:g} to {high:g}, but floats must be 0 … 1", remedy)
    return np.round(values.clip(0, 1) * 255).astype(np.uint8)


def _unusable(name: str, values: Array, reason: str, remedy: str) -> MediaError:
    return MediaError(f"{name}: {values.dtype} {list(values.shape)} {reason}.", reason=reason, remedy=remedy)
