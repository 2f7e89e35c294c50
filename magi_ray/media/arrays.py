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
from PIL import Image, ImageOps

from magi_ray.errors import MediaError
from magi_ray.media.reader import Pixels

Array = npt.NDArray[Any]
_CHANNELS = (1, 3, 4)
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA")  # modes of PIL
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
    """Writes one picture as PNG and returns its path: ``path`` with a suffix. Loses nothing beyond 8 bits.

    image: a PIL image of any mode, turned as its EXIF data say; or an array or tensor, [H, W], [H, W, 1, 3 or 4] or
    [1, 3 or 4, H, W], alone or as a batch of one, of bytes or of floats in 0…1.  Raises MediaError.
    """
    if isinstance(image, Image.Image):
        picture = _upright(image)
    else:
        [pixels] = _channels_last(image, "image", dimensions=3)
        picture = _picture(pixels)
    path = path.with_suffix(".png")
    picture.save(path, compress_level=1)
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
    if isinstance(video, list | tuple) and any(isinstance(frame, Image.Image) for frame in video):
        video = [np.asarray(_upright(frame).convert("RGB")) for frame in video]
    frames = _channels_last(video, "video", dimensions=4)
    if frames.shape[-1] == 1:
        frames = frames.repeat(3, axis=-1)
    if frames.shape[-1] == 4:
        raise _unusable("video", frames, "has an alpha channel", "Give its three colours: video[..., :3].")
    return np.ascontiguousarray(frames)


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF data turn it, in a mode that PNG holds with 8 bits. Raises MediaError."""
    try:
        image.load()  # Pillow turns a TIFF as it loads
        picture = ImageOps.exif_transpose(image)
        if picture.mode in _IN_PNG:
            return picture
        if picture.mode[0] in "IF":  # 16 bits or more, or floats: Pillow would cut off what is above 255
            values = np.asarray(picture)
            values = values.astype(np.uint16) if picture.mode == "I" and values.max() > 255 else values
            [pixels] = _channels_last(values, "image", dimensions=3)
            return _picture(pixels)
        return picture.convert("RGBA" if "a" in picture.mode else "RGB")
    except (OSError, ValueError) as exc:
        raise MediaError(f"image: this PIL image of mode {image.mode} cannot be read: {exc}.") from exc


def _picture(pixels: Pixels) -> Image.Image:
    """Of uint8 [H, W, 1, 3 or 4]."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


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
    raise _unusable(name, given, f"must be {layouts}", "A fourth channel of a picture is its alpha.")


def _bytes(values: Array, name: str) -> Pixels:
    """0…255, of bytes, booleans, 16-bit values or floats. Raises MediaError."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return np.round(values / 257).astype(np.uint8)
    if kind not in "iuf":
        raise _unusable(name, values, "must be numbers", "Give bytes, or floats from 0 to 1.")
    low, high = values.min(), values.max()
    if kind in "iu":
        if low < 0 or high > 255:
            raise _unusable(name, values, f"has values from {low} to {high}", "Scale whole numbers to 0 … 255.")
        return values.astype(np.uint8)
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # nor NaN
        remedy = "(x + 1) / 2 brings −1 … 1 there." if -1.01 <= low < 0 and high <= 1.01 else "Divide 0 … 255 by 255."
        raise _unusable(name, values, f"has values from {low:g} to {high:g}, but floats must be 0 … 1", remedy)
    return np.round(values.clip(0, 1) * 255).astype(np.uint8)


def _unusable(name: str, values: Array, reason: str, remedy: str) -> MediaError:
    return MediaError(f"{name}: {values.dtype} {list(values.shape)} {reason}.", reason=reason, remedy=remedy)
