"""Pictures, read with Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

# Named, because Pillow would also hand a file to Ghostscript and to other programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image | None]:
    """The picture, not decoded yet; None if Pillow knows no such picture. Raises OSError."""
    with path.open("rb") as file:
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            yield None
            return
        with picture:
            yield picture


def shown_picture_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height once it is turned upright."""
    turned = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (picture.height, picture.width) if turned else picture.size
