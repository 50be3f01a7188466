"""Decoding: every format gives its pixels, and a bad file gives a sentence that names it."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
import torchvision.io  # noqa: F401 -- imported before memory is limited
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from ray_dmml.data.dataset import BadImageError, FileImages, ImageSet, check_images
from ray_dmml.data.decoding import TooManyPixelsError, decode, decode_content, to_square

WRITERS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def photo(side: int = 64) -> Image.Image:
    """Noise on a gradient, which no format can compress well."""
    pixels = np.random.default_rng(0).integers(0, 60, (side, side, 3), dtype=np.uint8)
    pixels += np.linspace(0, 180, side).astype(np.uint8)[:, None, None]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(folder: Path, content: bytes, name: str = "x.jpg", size: int = 16) -> torch.Tensor:
    (folder / name).write_bytes(content)
    return FileImages(folder, [name], size).read(0)


def refusal(folder: Path, content: bytes, name: str = "x.jpg") -> str:
    with pytest.raises(BadImageError) as caught:
        read(folder, content, name)
    message = str(caught.value)
    assert message.startswith(f"image {name} cannot be read: ") and "\n" not in message
    return message


def picture(width: int = 12, height: int = 10, seed: int = 0) -> Image.Image:
    """Smooth colours, so that JPEG keeps them."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def save(path: Path, image: Image.Image | None = None, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_is_decoded(tmp_path, suffix, mode):
    """JPEG, PNG, WEBP, GIF, BMP and TIFF, in colour or grey, give about Pillow's pixels."""
    path = tmp_path / f"x.{suffix}"
    save(path, picture().convert(mode))
    image = FileImages(tmp_path, [path.name], 16).read(0)
    with Image.open(path) as opened:
        wanted = opened.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16) and image.is_contiguous()
    difference = image.permute(1, 2, 0).int() - torch.from_numpy(np.array(wanted)).int()
    assert difference.abs().max() <= 8


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_a_cmyk_image_is_used(tmp_path: Path, form: str) -> None:
    """It is converted to RGB."""
    colour = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    pixel = read(tmp_path, encoded(colour, form))[:, 8, 8].int()
    assert (pixel - torch.tensor([200, 40, 90])).abs().max() <= 8


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_transparency_is_dropped(tmp_path: Path, form: str) -> None:
    """A transparent pixel keeps its colour."""
    colour = Image.new("RGBA", (16, 16), (200, 40, 90, 10))
    assert read(tmp_path, encoded(colour, form))[:, 8, 8].tolist() == [200, 40, 90]


def test_a_transparent_palette_image_is_used(tmp_path: Path) -> None:
    """The transparency of its colours does not change them."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 90])
    content = encoded(image, "PNG", transparency=bytes([0, 128]))
    assert read(tmp_path, content)[:, 8, 8].tolist() == [10, 200, 90]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_16_bit_image_is_used(tmp_path: Path, form: str) -> None:
    """Its upper 8 bits count, so that grey stays grey."""
    grey = Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16))
    assert read(tmp_path, encoded(grey, form)).unique().tolist() == [0x80]


def tiff(data: bytes, width: int, num_bits: int, photometric: int) -> bytes:
    """One row of grey pixels, which Pillow itself cannot write with 12 bits."""
    tags = {
        256: width, 257: 1, 258: num_bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_a_12_bit_tiff_is_used(tmp_path: Path) -> None:
    """Of a microscope or a medical camera: 4095 is white."""
    content = tiff(bytes.fromhex("fff000800fff"), 4, 12, photometric=1)
    (tmp_path / "x.tif").write_bytes(content)
    assert decode(tmp_path / "x.tif")[0].tolist() == [[255, 0, 128, 255]]


def test_a_16_bit_tiff_whose_zero_is_white_is_used(tmp_path: Path) -> None:
    """As scanners of film write it."""
    (tmp_path / "x.tif").write_bytes(tiff(struct.pack("<3H", 0, 0x4000, 0xFFFF), 3, 16, photometric=0))
    assert decode(tmp_path / "x.tif")[0].tolist() == [[255, 191, 0]]


def test_a_32_bit_image_is_refused(tmp_path: Path) -> None:
    """Nothing says which value is white."""
    grey = Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32))
    assert "32 bits" in refusal(tmp_path, encoded(grey, "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_image_is_used(tmp_path: Path, form: str) -> None:
    """Its pixels are the colours, not their indices."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 90])
    assert read(tmp_path, encoded(image, form))[:, 8, 8].tolist() == [10, 200, 90]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_used(tmp_path: Path, form: str) -> None:
    """The others are not decoded."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black", "red")]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert read(tmp_path, content).min() >= 250


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_rotated_photo_is_used_upright(tmp_path: Path, orientation: int) -> None:
    """All orientations of EXIF give the same pixels as Pillow's own transposition."""
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "JPEG", exif=exif, quality=95)
    turn = [None, 0, 3, 1, 5, 4, 6, 2][orientation - 1]  # Image.Transpose of each orientation
    wanted = torch.from_numpy(np.array(image.transpose(Image.Transpose(turn)))).permute(2, 0, 1)
    assert (read(tmp_path, content).int() - wanted.int()).abs().max() <= 60


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("resize", ["stretch", "center_crop"])
def test_an_image_of_one_pixel_is_used(tmp_path: Path, form: str, resize: Any) -> None:
    """It becomes a square of one colour."""
    (tmp_path / "x").write_bytes(encoded(Image.new("RGB", (1, 1), "white"), form))
    image = FileImages(tmp_path, ["x"], 16, resize).read(0)
    assert image.shape == (3, 16, 16) and image.min() >= 250


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_thread_of_pixels_is_used(tmp_path: Path, shape: tuple[int, int]) -> None:
    """`center_crop` enlarges the middle only. All of it at this width would take gigabytes."""
    (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", shape, "white"), "PNG"))
    began = time.monotonic()
    image = FileImages(tmp_path, ["x.png"], 256, "center_crop").read(0)
    assert image.shape == (3, 256, 256) and image.min() == 255
    assert time.monotonic() - began < 5


NO_AVIF = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")


@pytest.mark.parametrize("form", ["JPEG", "TIFF", pytest.param("AVIF", marks=NO_AVIF)])
def test_exif_orientation_is_applied(tmp_path, form):
    """A photo stored on its side (orientation 6) is read upright, whatever its suffix says."""
    stored = Image.new("RGB", (16, 16), "black")
    stored.paste("white", (0, 0, 8, 16))  # the left half becomes the top
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "x.jpg", stored, format=form, exif=exif)
    image = FileImages(tmp_path, ["x.jpg"], 16).read(0)
    assert image[:, :6].min() > 200 and image[:, 10:].max() < 50


def test_stretch_and_center_crop(tmp_path):
    """`stretch` keeps the sides of a wide image; `center_crop` cuts them off and keeps the middle."""
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    save(tmp_path / "x.png", wide)
    stretched = FileImages(tmp_path, ["x.png"], 16, "stretch").read(0)
    cropped = FileImages(tmp_path, ["x.png"], 16, "center_crop").read(0)
    assert stretched[0, 8, 0] > 250 and stretched[2, 8, 8] > 250
    assert torch.equal(cropped[:, 8, 8], torch.tensor([0, 0, 255], dtype=torch.uint8))
    assert cropped[0].max() == 0
    tall = FileImages(tmp_path, ["x.png"], 8, "center_crop").read(0)
    assert tall.shape == (3, 8, 8) and tall.is_contiguous()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(8, 24))
def test_any_shape_becomes_a_square(height, width, size):
    """Both ways to resize give (3, S, S) for any height and width."""
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    for resize in ("stretch", "center_crop"):
        square = to_square(image, size, resize)
        assert square.shape == (3, size, size) and square.unique().tolist() == [77]


def test_bad_images_are_named_with_the_reason(tmp_path):
    """Missing, empty, truncated and foreign files raise BadImageError with their path."""
    save(tmp_path / "good.jpg", picture(200, 200))
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    save(tmp_path / "whole.png", picture(100, 100))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    reasons = {
        "cut.jpg": "truncated",
        "cut.png": "truncated|broken",
        "text.jpg": "not an image in a known format",
        "empty.png": "empty",
        "gone.jpg": "No such file",
    }
    images = FileImages(tmp_path, [*reasons, "good.jpg"], 16)
    for index, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(BadImageError, match=rf"image {name} cannot be read: .*({reason})"):
            images.read(index)
    labels = np.zeros(6, dtype=np.int64)
    unreadable = check_images(ImageSet(images, labels, ("all",)), threads=3)
    assert [index for index, _ in unreadable] == [0, 1, 2, 3, 4]
    assert all(name in message for name, (_, message) in zip(reasons, unreadable, strict=True))


@pytest.mark.parametrize("form", WRITERS)
def test_a_truncated_image_is_refused(tmp_path: Path, form: str) -> None:
    """Half of a file is not an image in any format."""
    content = encoded(photo(), form)
    refusal(tmp_path, content[: len(content) // 2])


@pytest.mark.filterwarnings("ignore:.*Corrupt EXIF data")
@pytest.mark.parametrize("form", WRITERS)
def test_an_image_cut_within_its_header_is_refused(tmp_path: Path, form: str) -> None:
    """No matter how many of its first bytes are left."""
    content = encoded(photo(), form)
    for length in range(1, 40):
        refusal(tmp_path, content[:length])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_corrupt_image_ends_no_process(tmp_path: Path, form: str) -> None:
    """Changed bytes give an image or a refusal. torchvision's PNG decoder would end the process."""
    content = encoded(photo(), form)
    refused = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        damaged = bytearray(content)
        damaged[rng.integers(45, len(content))] ^= 1 << rng.integers(8)
        try:
            assert read(tmp_path, bytes(damaged)).shape == (3, 16, 16)
        except BadImageError as error:
            assert str(error).startswith("image x.jpg cannot be read: ")
            refused += 1
    if form == "PNG":  # its checksums notice every changed byte of the pixels
        assert refused >= 35


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """It has zero bytes."""
    assert "the file is empty" in refusal(tmp_path, b"")


def bomb(form: str) -> bytes:
    """A small file whose header claims 50,000 x 50,000 pixels, or WEBP's largest size."""
    side = 50_000
    if form == "PNG":
        content = bytearray(encoded(Image.new("RGB", (16, 16)), "PNG"))
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif form == "JPEG":
        content = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif form == "WEBP":
        content = bytearray(encoded(Image.new("RGB", (16, 16)), "WEBP"))
        content[26:30] = struct.pack("<HH", 16_383, 16_383)
    elif form == "GIF":
        content = bytearray(encoded(Image.new("RGB", (16, 16)), "GIF"))
        content[6:10] = struct.pack("<HH", side, side)
    elif form == "BMP":
        content = bytearray(encoded(Image.new("RGB", (16, 16)), "BMP"))
        content[18:26] = struct.pack("<ii", side, side)
    else:
        content = bytearray(encoded(Image.new("RGB", (16, 16)), "TIFF"))
        (directory,) = struct.unpack_from("<I", content, 4)
        (entries,) = struct.unpack_from("<H", content, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            if struct.unpack_from("<H", content, entry)[0] in (256, 257):  # width and height
                struct.pack_into("<HII", content, entry + 2, 4, 1, side)
    return bytes(content)


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    """The header suffices, so that a process is safe that could not hold the claimed pixels."""
    for form in WRITERS:
        (tmp_path / form).write_bytes(bomb(form))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    messages = []
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        for form in WRITERS:
            with pytest.raises(BadImageError) as caught:
                FileImages(tmp_path, [form], 16).read(0)
            messages.append(str(caught.value))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    for form, message in zip(WRITERS, messages, strict=True):
        if form == "WEBP" and int(PIL.__version__.split(".")[0]) < 13:  # it reserves the memory before we see the size
            assert message.endswith("could not create decoder object")
            continue
        assert message.startswith(f"image {form} cannot be read: it claims ")
        assert message.endswith("at most 178956970 are decoded")


def test_a_smaller_limit_on_pixels() -> None:
    """Of whoever decodes; it is compared with the size in the header."""
    content = np.frombuffer(bytearray(encoded(photo(64), "PNG")), np.uint8)
    assert decode_content(content, max_pixels=64 * 64).shape == (3, 64, 64)
    with pytest.raises(TooManyPixelsError, match="at most 4095 are decoded"):
        decode_content(content, max_pixels=64 * 64 - 1)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_that_is_needed_small(form: str) -> None:
    """A JPEG is decoded at a fraction of its size, upright, with at least so many pixels a side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(256).resize((256, 128))
    content = np.frombuffer(bytearray(encoded(image, form, exif=exif)), np.uint8)
    for at_least, expected in ((130, 1), (128, 1), (64, 2), (40, 2), (5, 8)):
        fraction = expected if form == "JPEG" else 1
        small = decode_content(content, at_least=at_least)
        assert small.shape == (3, 256 // fraction, 128 // fraction)
        whole = to_square(decode_content(content), 8, "stretch").float()
        assert (to_square(small, 8, "stretch").float() - whole).abs().mean() < 12


def test_a_gigantic_file_is_refused(tmp_path: Path) -> None:
    """A sparse file of 1 TiB is not read."""
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadImageError, match="the file is larger than 1024 MiB"):
        FileImages(tmp_path, ["x.png"], 16).read(0)


@pytest.mark.parametrize("form", WRITERS)
def test_a_misnamed_image_is_used(tmp_path: Path, form: str) -> None:
    """The content decides, not the suffix."""
    name = "x.png" if form == "JPEG" else "x.jpg"
    assert read(tmp_path, encoded(Image.new("RGB", (16, 16), "white"), form), name).min() > 250


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    """Text is not an image. For PostScript Pillow would run a program."""
    reason = "it is not an image in a known format"
    assert reason in refusal(tmp_path, b"no image at all")
    eps = encoded(photo(), "EPS")
    assert eps.startswith(b"%!PS") and reason in refusal(tmp_path, eps)
