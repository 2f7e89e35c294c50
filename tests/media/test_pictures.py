"""Pictures of every kind come out as a viewer shows them: upright, in sRGB, with 8 bits a channel."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import skimage
from clips import waves
from PIL import ExifTags, Image, ImageCms

from magi_ray.errors import MediaError
from magi_ray.media.reader import Pixels, inspect_image, read_image, shown_size

UPRIGHT = waves(1)[0]
REAL = Path(skimage.__file__).parent / "data"


def _read(path: Path) -> Pixels:
    width, height = shown_size(path)
    found = inspect_image(path)
    assert (found.width, found.height) == (width, height)
    return read_image(path, width=width, height=height, fit="fit")


def _save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(path, **options)
    return path


def _largest_difference(found: np.ndarray, wanted: np.ndarray) -> int:
    return int(np.abs(found.astype(int) - wanted).max())


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_taken_with_a_turned_camera_comes_out_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    # As a camera held like this stores it: what undoes the turn, in the words of the EXIF standard.
    stored = {
        1: UPRIGHT,
        2: UPRIGHT[:, ::-1],
        3: UPRIGHT[::-1, ::-1],
        4: UPRIGHT[::-1],
        5: UPRIGHT.transpose(1, 0, 2),
        6: UPRIGHT.transpose(1, 0, 2)[::-1],
        7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
        8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = _save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
    assert shown_size(path) == (96, 64)
    assert _largest_difference(_read(path), UPRIGHT) <= (4 if suffix == "jpg" else 0)


GREY = waves(1)[0][..., 0]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "1"), ("a.png", "L"), ("a.bmp", "P"), ("a.gif", "P"), ("a.tiff", "L"), ("a.jpg", "L")]
)
def test_grey_black_and_white_and_palettes_come_as_rgb(tmp_path: Path, name: str, mode: str) -> None:
    path = _save(tmp_path / name, UPRIGHT, mode)
    with Image.open(path) as picture:
        assert (_read(path) == np.asarray(picture.convert("RGB"))).all()
    assert inspect_image(path).notes == ()


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_keeps_its_brightness(tmp_path: Path, name: str) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / name)
    assert (_read(tmp_path / name) == GREY[..., None]).all()


def test_16_bit_colours_keep_their_brightness(tmp_path: Path, ffmpeg: Path) -> None:
    raw = (UPRIGHT.astype("<u2") * 257).tobytes()
    command = [ffmpeg, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "96x64", "-i", "-"]
    for name, form in (("a.png", "rgb48be"), ("a.tiff", "rgb48le"), ("alpha.png", "rgba64be")):
        subprocess.run([*command, "-pix_fmt", form, tmp_path / name], input=raw, check=True)
        assert (_read(tmp_path / name) == UPRIGHT).all()
        assert inspect_image(tmp_path / name).notes == ()


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
def test_transparent_parts_are_shown_over_white_and_it_is_said(tmp_path: Path, name: str) -> None:
    alpha = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8), (64, 96))[..., None]
    path = _save(
        tmp_path / name,
        np.concatenate([UPRIGHT, alpha], -1),
        **({"lossless": True, "exact": True} if name == "a.webp" else {}),
    )
    over_white = UPRIGHT * (alpha / 255) + 255 * (1 - alpha / 255)
    assert _largest_difference(_read(path), over_white) <= 1
    assert inspect_image(path).notes == ("is transparent in places; they are shown over white",)
    opaque = _save(
        path,
        np.concatenate([UPRIGHT, np.full_like(alpha, 255)], -1),
        **({"lossless": True} if name == "a.webp" else {}),
    )
    assert (_read(opaque) == UPRIGHT).all()
    assert inspect_image(opaque).notes == ()


@pytest.mark.parametrize(("mode", "clear"), [("L", 0), ("RGB", (0, 0, 0)), ("P", 0), ("LA", None)])
def test_transparency_of_greys_palettes_and_single_colours_is_seen(tmp_path: Path, mode: str, clear: Any) -> None:
    black = Image.new("RGB", (8, 8)).convert(mode)
    if clear is None:
        black.putalpha(0)
    black.save(tmp_path / "a.png", **({} if clear is None else {"transparency": clear}))
    assert (_read(tmp_path / "a.png") == 255).all()


def _profile(name: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def test_a_real_photograph_in_adobe_rgb_is_converted_to_srgb() -> None:
    with Image.open(REAL / "rocket.jpg") as picture:
        linear = (np.asarray(picture) / 255) ** 2.19921875
        # Adobe RGB (1998) and sRGB have red and blue corners of their own, and one white.
        linear = linear @ np.array([[1.3982832, -0.3982831, 0], [0, 1, 0], [0, -0.0429383, 1.0429383]]).T
        linear = linear.clip(0, 1)
        wanted = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    found = _read(REAL / "rocket.jpg")
    assert np.abs(found - wanted).mean() < 1
    assert np.quantile(np.abs(found - wanted), 0.99) < 4


def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    # A profile in which red and green have changed places.
    icc = bytearray(_profile("sRGB"))
    tags = {bytes(icc[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(int.from_bytes(icc[128:132], "big"))}
    icc[tags[b"rXYZ"] : tags[b"rXYZ"] + 4], icc[tags[b"gXYZ"] : tags[b"gXYZ"] + 4] = b"gXYZ", b"rXYZ"
    swapped = bytes(icc).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    for name in ("a.png", "a.tiff", "a.webp"):
        path = _save(tmp_path / name, UPRIGHT, icc_profile=swapped, **({"lossless": True} if name == "a.webp" else {}))
        assert _largest_difference(_read(path), UPRIGHT[..., [1, 0, 2]]) <= 1
        assert inspect_image(path).notes == ()
    plain = _save(tmp_path / "plain.png", UPRIGHT, icc_profile=_profile("sRGB"))
    assert (_read(plain) == UPRIGHT).all()


def test_a_profile_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    for number, profile in enumerate((b"no profile at all", _profile("LAB"))):
        path = _save(tmp_path / f"{number}.png", UPRIGHT, icc_profile=profile)
        assert (_read(path) == UPRIGHT).all()
        (note,) = inspect_image(path).notes
        assert note.startswith("has a colour profile that cannot be used")


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_cmyk_comes_as_rgb_and_it_is_said(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path / name, UPRIGHT, "CMYK", **({"quality": 100, "subsampling": 0} if name == "a.jpg" else {}))
    assert _largest_difference(_read(path), UPRIGHT) <= 6
    assert inspect_image(path).notes == ("is CMYK without a colour profile; its colours are a guess",)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tiff", "a.avif"])
def test_of_an_animated_picture_the_first_frame_is_taken_and_it_is_said(tmp_path: Path, name: str) -> None:
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ((200, 40, 40), (40, 200, 40)))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    assert _largest_difference(_read(tmp_path / name), np.array([200, 40, 40])) <= 8
    (note,) = inspect_image(tmp_path / name).notes
    assert "first" in note


def test_of_a_phone_picture_with_a_second_one_behind_it_the_first_is_taken(tmp_path: Path) -> None:
    """MPO: many phones put a depth map or a smaller copy behind the JPEG."""
    first, second = Image.fromarray(UPRIGHT), Image.new("RGB", (16, 16))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=100, subsampling=0)
    assert _largest_difference(_read(tmp_path / "a.jpg"), UPRIGHT) <= 4
    assert inspect_image(tmp_path / "a.jpg").notes == ()


def test_values_without_a_known_white_are_refused(tmp_path: Path) -> None:
    for dtype in (np.float32, np.int32):
        Image.fromarray(GREY.astype(dtype)).save(tmp_path / "a.tiff")
        with pytest.raises(
            MediaError, match=r"a.tiff cannot be read: its values are 32-bit numbers(?s:.*)8 or 16 bits"
        ):
            inspect_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("name", ["a.png", "a.avif"])
def test_an_hdr_picture_is_refused_and_the_command_it_names_mends_it(tmp_path: Path, name: str) -> None:
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    raw = [ffmpeg, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x64", "-i", "-", "-vf"]
    known = (
        "format=gbrp,setparams=colorspace=gbr:color_primaries=bt709:color_trc=bt709:range=pc,zscale=p=2020:t=smpte2084"
    )
    form = {
        "a.png": [f"{known}:npl=203,format=rgb48be"],
        "a.avif": [f"{known}:npl=203:m=2020_ncl,format=yuv444p10", "-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "4"],
    }[name]
    subprocess.run([*raw, *form, "-frames:v", "1", tmp_path / name], input=UPRIGHT.tobytes(), check=True)
    with pytest.raises(MediaError, match="it is an HDR picture") as found:
        read_image(tmp_path / name, width=96, height=64, fit="fit")
    command = found.value.remedy.removeprefix("convert it: ffmpeg ").replace("IN", str(tmp_path / name))
    command = command.replace("OUT.png", str(tmp_path / "mended.png"))
    subprocess.run([ffmpeg, "-v", "error", *command.split()], check=True)
    # Tone-mapping presses the bright parts; nothing else may change much.
    assert np.abs(_read(tmp_path / "mended.png").astype(int) - UPRIGHT).mean() < 30


def test_heic_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1MiHEmiafMiHBheic" + bytes(2000))
    for read in (inspect_image, shown_size):
        with pytest.raises(MediaError, match=r"it is a HEIC picture(?s:.*)heif-convert"):
            read(tmp_path / "IMG_0001.HEIC")


@pytest.mark.parametrize("name", ["retina.jpg", "hubble_deep_field.jpg", "no_time_for_that_tiny.gif"])
def test_real_pictures_are_as_pillow_shows_them(name: str) -> None:
    found = read_image(REAL / name, width=96, height=96, fit="fit")
    with Image.open(REAL / name) as picture:
        shown = picture.convert("RGB").resize((96, 96), Image.Resampling.LANCZOS)
    assert np.abs(found.astype(int) - np.asarray(shown)).mean() < 1.5


def test_a_damaged_picture_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, "PNG", icc_profile=_profile("sRGB"))
    data = buffer.getvalue()
    random = np.random.default_rng(5)
    refused = 0
    for number in range(60):
        damaged = bytearray(data)
        for place in random.integers(8, len(data), 3):
            damaged[place] ^= 1 << int(random.integers(8))
        (tmp_path / f"{number}.png").write_bytes(damaged[: random.integers(20, len(data) + 1)])
        try:
            assert read_image(tmp_path / f"{number}.png", width=16, height=16, fit="crop").shape == (16, 16, 3)
        except MediaError:
            refused += 1
    assert refused > 10
