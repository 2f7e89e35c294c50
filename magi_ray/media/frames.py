"""Clips, opened and shown with PyAV: the right stream, and its frames as a player shows them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, cast

import av
import numpy as np
from av.codec.context import CodecContext
from av.container import InputContainer
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from magi_ray.errors import MediaError
from magi_ray.media.bounds import MAX_FRAME_PIXELS, check_pixels, unreadable
from magi_ray.media.pictures import Pixels, open_picture

# A file is data: what it holds decides how it is read, whatever its name, and none of these formats can name another
# file or an address.
_FORMATS = (
    "apng,asf,av1,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,webm,"
    "yuv4mpegpipe"
)
_NO_PROTOCOL = "none"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")
_UNTAGGED, _RESERVED = 2, 3  # these and the next as in ITU-T H.273
_READ_MATRICES = (1, _UNTAGGED, _RESERVED, 4, 5, 6, 7, 9)
_MATRICES = {Colorspace.ITU601: "BT.601", Colorspace.ITU709: "BT.709", Colorspace.BT2020: "BT.2020"}
_HDR: Mapping[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_WIDE = (ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432)
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own leave transparency out
_SCALING = (
    Interpolation.LANCZOS
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and the video stream that players choose. Raises MediaError, also for PyAV's errors in the block
    inside."""
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": _NO_PROTOCOL, "max_pixels": f"{MAX_FRAME_PIXELS}"}
    try:
        # Opened by number and so without a name: a name like "a%02d.png" or "x:y.mp4" means something to ffmpeg.
        with open(os.open(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123
            head = file.read(12)
            if not head:
                raise unreadable(path, "it is empty", remedy="copy or download it again")
            if head.lstrip().lower().startswith((b"<html", b"<!doctype ht")):
                raise unreadable(path, "it is a web page", remedy="download the file itself")
            if head[4:8] == b"ftyp" and head[8:] in _HEIC:
                # ffmpeg gives the tiles that such a picture is made of.
                remedy = "convert it: heif-convert IN.heic OUT.png"
                raise unreadable(path, "it is a HEIC picture", remedy=remedy)
            file.seek(0)
            try:
                container = av.open(file, "r", options=options, io_open=_open_nothing)
            except av.ArgumentError as exc:
                raise _not_a_clip(path) from exc
            with container:
                stream = _shown_stream(path, container)
                stream.codec_context.options = {"max_pixels": f"{MAX_FRAME_PIXELS}"}
                # Not by frames: errors in the last few frames would then go unreported.
                stream.thread_type = "SLICE"
                yield container, stream
    except (av.FFmpegError, OSError) as exc:
        raise unreadable(path, exc.strerror or str(exc)) from exc


def decoded_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame as it is coded, with its transparency."""
    decoder = _ALPHA_DECODERS.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
    if decoder is None:
        yield from container.decode(stream)
        return
    coded = stream.codec_context
    context = cast("VideoCodecContext", CodecContext.create(decoder, "r"))
    context.options = dict(coded.options)
    context.thread_type = "SLICE"
    # VP8 does not say these itself; the file may.
    context.color_range, context.colorspace = coded.color_range, coded.colorspace
    context.color_primaries, context.color_trc = coded.color_primaries, coded.color_trc
    for packet in container.demux(stream):
        yield from context.decode(packet)


def shown_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame; from the first interlaced one on, deinterlaced."""
    graph: Graph | None = None
    for frame in decoded_frames(container, stream):
        if graph is None and frame.interlaced_frame:
            graph = _deinterlacer(stream)
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pulled(graph)
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


class FrameConverter:
    """Shows the frames of one clip as a player does."""

    def __init__(self, path: Path, stream: VideoStream) -> None:
        self._path = path
        self._aspect = stream.sample_aspect_ratio or Fraction(1)
        # Kept from frame to frame: the table for HDR takes a second or two to make.
        self._reformatter = VideoReformatter()

    def aspect(self, frame: VideoFrame) -> Fraction:
        """Width by height of a pixel of ``pixels(frame)``."""
        return 1 / self._aspect if _turn(frame)[0] else self._aspect

    def size(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height as shown, with square pixels."""
        width, height = (frame.height, frame.width) if _turn(frame)[0] else (frame.width, frame.height)
        aspect = self.aspect(frame)
        # Players never shrink: the side with the shorter pixels is enlarged.
        return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))

    def pixels(self, frame: VideoFrame) -> Pixels:
        """uint8 RGB [H, W, 3], upright, BT.709 as sRGB. Raises MediaError."""
        self._check(frame)
        if not _has_alpha(frame):
            return _turned(self._converted(frame, "rgb24"), frame)
        rgba = self._converted(frame, "rgba")
        colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
        # Over white, as pictures are.
        return _turned(((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8), frame)

    def notes(self, frame: VideoFrame) -> tuple[str, ...]:
        """What is done to the clip, told by its first frame. Raises MediaError as ``pixels``."""
        self._check(frame)
        notes = []
        if frame.interlaced_frame:
            notes.append("is interlaced; it is deinterlaced")
        if hdr := _HDR.get(frame.color_trc):
            notes.append(f"is HDR ({hdr}); it is tone-mapped to BT.709")
        if (assumed := _assumed_matrix(frame)) is not None:
            notes.append(f"does not say how its colours are meant; they are taken as {_MATRICES[assumed]}")
        if _has_alpha(frame):
            notes.append("may be transparent in places; they are shown over white")
        return tuple(notes)

    def _check(self, frame: VideoFrame) -> None:
        check_pixels(self._path, frame.width, frame.height, limit=MAX_FRAME_PIXELS)
        if not frame.format.is_rgb and frame.colorspace not in _READ_MATRICES:
            what = f"its colours are coded in a rare way (matrix {frame.colorspace} of ITU-T H.273)"
            raise unreadable(self._path, what, remedy="export it again with BT.709 colours")

    def _converted(self, frame: VideoFrame, form: str) -> Pixels:
        tags: dict[str, Any] = {"src_colorspace": _assumed_matrix(frame)}
        if frame.color_trc in _HDR or frame.color_primaries in _WIDE:
            if frame.color_primaries == _UNTAGGED:
                frame.color_primaries = ColorPrimaries.BT2020
            if frame.color_trc == _UNTAGGED:
                frame.color_trc = ColorTrc.BT709
            tags |= {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}
        converted = self._reformatter.reformat(
            frame, frame.width, frame.height, form, interpolation=_SCALING, threads=1, **tags
        )
        return converted.to_ndarray().astype(np.uint8, copy=False)


def scaled(pixels: Pixels, width: int, height: int) -> Pixels:
    """uint8 RGB [H, W, 3] at another size: Lanczos, bit-exact."""
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    resized = frame.reformat(width, height, "rgb24", interpolation=_SCALING, threads=1)
    return resized.to_ndarray().astype(np.uint8, copy=False)


def _assumed_matrix(frame: VideoFrame) -> Colorspace | None:
    """How colours are derived from brightness where the file does not say; None if it says, or holds RGB."""
    if frame.colorspace not in (_UNTAGGED, _RESERVED) or frame.format.is_rgb or frame.format.has_palette:
        return None
    if len(frame.format.components) < 3:
        return None
    if frame.color_trc in _HDR or frame.color_primaries == ColorPrimaries.BT2020:
        return Colorspace.BT2020
    return Colorspace.ITU601 if frame.height < 720 else Colorspace.ITU709


def _has_alpha(frame: VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _turn(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """What makes the frame upright: whether rows become columns, then left becomes right, then top becomes bottom."""
    side_data = cast("Mapping[str, SideData]", frame.side_data)  # PyAV's types know of motion vectors only
    if (matrix := side_data.get("DISPLAYMATRIX")) is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    # Shown at (a·x + c·y, b·x + d·y); players know only quarter turns.
    return (True, c < 0, b < 0) if abs(b) + abs(c) > abs(a) + abs(d) else (False, a < 0, d < 0)


def _turned(pixels: Pixels, frame: VideoFrame) -> Pixels:
    transposed, mirrored, upside_down = _turn(frame)
    pixels = pixels.transpose(1, 0, 2) if transposed else pixels
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _deinterlacer(stream: VideoStream) -> Graph:
    """One frame for each frame: both fields of each, the missing lines from its neighbours."""
    graph = Graph()
    graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(template=stream),
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _pulled(graph: Graph) -> Iterator[VideoFrame]:
    while True:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):  # PyAV's words for "not yet" and "no more"
            return
        assert isinstance(frame, VideoFrame)
        yield frame


def _shown_stream(path: Path, container: InputContainer) -> VideoStream:
    """The stream that players show: the default one, or the first, but no cover picture. Raises MediaError."""
    if container.format.name in ("gif", "apng"):
        with open_picture(path):  # checks the size, which ffmpeg does not know before it decodes
            pass
    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    # PyAV's types do not know that a stream without a decoder has no context.
    coded = [stream for stream in container.streams.video if cast("object", stream.codec_context) is not None]
    streams = [stream for stream in coded if not stream.disposition & covers]
    if not streams:
        kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
        cover = " but a cover" if coded else ""
        raise unreadable(path, f"it holds {kinds}, but no picture{cover}", remedy="give a file that has pictures")
    stream = next((one for one in streams if one.disposition & Disposition.default), streams[0])
    check_pixels(path, stream.codec_context.width, stream.codec_context.height, limit=MAX_FRAME_PIXELS)
    return stream


def _not_a_clip(path: Path) -> MediaError:
    """Why ffmpeg does not open the file, as far as its beginning tells."""
    with open_picture(path) as picture:
        if picture is not None:
            if getattr(picture, "is_animated", False):
                what = f"it is an animated {picture.format}, which is not read as a clip"
                return unreadable(path, what, remedy="convert it to a GIF or an MP4")
            return unreadable(path, f"it is a picture ({picture.format}), not a clip", remedy="name it under image")
    return unreadable(path, "it is neither a picture nor a video of a kind that is read")


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError(f"a file that names another one, {url}")
