"""Pictures, read with Pillow: as a viewer shows them, in sRGB with 8 bits a channel."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from magi_ray.errors import MediaError
from magi_ray.media.bounds import MAX_PICTURE_PIXELS, check_pixels, unreadable

Pixels = npt.NDArray[np.uint8]

# Named, because Pillow would also hand a file to Ghostscript. JPEG includes MPO, the JPEG of many phones.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
_BACKGROUND = "white"


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image | None]:
    """The picture, not decoded yet; None if Pillow knows no such picture. Raises MediaError, also for what Pillow
    stumbles over in the block inside."""
    try:
        # Pillow's own bound is a warning, and global; ours is checked below.
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.filterwarnings("ignore", module="PIL")
            try:
                opened = Image.open(file, formats=_FORMATS)
            except UnidentifiedImageError:
                yield None
                return
            except Image.DecompressionBombError as exc:
                found = re.search(r"\d+", str(exc))
                pixels = f"{int(found[0]):,}" if found else "too many"
                reason = f"has {pixels} pixels, but at most {MAX_PICTURE_PIXELS:,} are read"
                raise MediaError.about(path, reason, remedy="make it smaller; 1920 pixels wide is plenty") from exc
            with opened as picture:
                check_pixels(path, *picture.size, limit=MAX_PICTURE_PIXELS)
                yield picture
    except MediaError:
        raise
    except OSError as exc:
        raise unreadable(path, exc.strerror or str(exc)) from exc
    except Exception as exc:
        raise unreadable(path, f"it is damaged ({exc})") from exc


def shown_picture_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height once it is turned upright."""
    turned = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (picture.height, picture.width) if turned else picture.size


def shown_picture(path: Path, opened: Image.Image) -> tuple[Pixels, tuple[str, ...]]:
    """Its pixels as a viewer shows them, uint8 sRGB [H, W, 3], and notes on what was done to it.

    path: names it in errors.  opened: is turned and closed on the way.  Raises MediaError.
    """
    if _is_hdr(path, opened):
        remedy = (
            "convert it: ffmpeg -i IN -vf zscale=t=linear:npl=203,format=gbrpf32le,tonemap=mobius:peak=5,"
            "zscale=p=709:t=iec61966-2-1:m=gbr:r=full,format=rgb24 OUT.png"
        )
        raise unreadable(path, "it is an HDR picture", remedy=remedy)
    notes = []
    if getattr(opened, "is_animated", False):
        if opened.format in _ANIMATED:
            notes.append("is animated; its first frame is taken")
        elif opened.format == "TIFF":
            notes.append("has several pages; the first is taken")
    ImageOps.exif_transpose(opened, in_place=True)
    profile = opened.info.get("icc_profile")
    picture = _plain_mode(path, opened)
    if picture.mode in ("LA", "RGBA"):
        if picture.getchannel("A").getextrema()[0] != 255:
            over = Image.new(picture.mode[:-1], picture.size, _BACKGROUND)
            over.paste(picture if picture.mode == "RGBA" else picture.getchannel("L"), mask=picture.getchannel("A"))
            picture = over
            notes.append(f"is transparent in places; they are shown over {_BACKGROUND}")
        else:
            picture = picture.convert(picture.mode[:-1])
    if profile:
        try:
            picture = _to_srgb(picture, profile)
        except (ImageCms.PyCMSError, OSError) as exc:
            notes.append(f"has a colour profile that cannot be used ({exc}); its colours are taken as sRGB")
    elif picture.mode == "CMYK":
        notes.append("is CMYK without a colour profile; its colours are a guess")
    shown = _as(picture, "RGB")
    if shown is not opened:
        opened.close()  # its memory is needed for the copy
    return np.asarray(shown), tuple(notes)


def _is_hdr(path: Path, picture: Image.Image) -> bool:
    """Whether it says that its brightness is coded as PQ or HLG, which Pillow passes over."""
    mark, width = {"AVIF": (b"colrnclx", 2), "PNG": (b"cICP", 1)}.get(picture.format or "", (b"", 0))
    if not mark:
        return False
    with path.open("rb") as file:
        _, _, after = file.read(1 << 16).partition(mark)
    # Two numbers: primaries, transfer; 16 and 18 are PQ and HLG in ITU-T H.273.
    return int.from_bytes(after[width : 2 * width], "big") in (16, 18)


def _plain_mode(path: Path, picture: Image.Image) -> Image.Image:
    """The same picture as L, LA, RGB, RGBA or CMYK. Raises MediaError."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PPM"):
        # The upper byte, as Pillow itself does it for colours.
        return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if mode in ("I", "F"):
        remedy = "save it with 8 or 16 bits a channel"
        raise unreadable(path, "its values are 32-bit numbers without a known white", remedy=remedy)
    if "transparency" in picture.info or mode in ("PA", "RGBa"):
        return picture.convert("RGBA")
    wanted = {"1": "L", "La": "LA"}.get(mode, mode)
    return _as(picture, wanted if wanted in ("L", "LA", "RGB", "RGBA", "CMYK") else "RGB")


def _as(picture: Image.Image, mode: str) -> Image.Image:
    """``picture`` in another mode; unlike Pillow's convert, no copy when it is in that mode already."""
    return picture if picture.mode == mode else picture.convert(mode)


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """``picture``, whose colours are those of the ICC ``profile``, in sRGB. Raises OSError, PyCMSError."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    # What says that it is sRGB is left alone: through two roundings, one pixel in some would come out otherwise.
    if "sRGB" in ImageCms.getProfileDescription(source):
        return picture
    converted = ImageCms.profileToProfile(
        picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )  # fmt: skip
    assert converted is not None  # which it is when it works in place
    return converted
