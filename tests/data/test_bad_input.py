"""Bad input: each case of docs/reliability.md has its outcome here, on real files."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_dmml.config.schema import Config, DataConfig
from ray_dmml.data import dataset as images_module
from ray_dmml.data.dataset import BadImageError, FileImages, hold_out_classes
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.sampler import ClassBalancedSampler
from ray_dmml.errors import UserError

HEAD = "path,label,split\n"
WRITERS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def photo(side: int = 64) -> Image.Image:
    """Noise on a gradient: no format can make little of it."""
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


# --- images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WRITERS)
def test_a_truncated_image_is_refused(tmp_path: Path, form: str) -> None:
    """Half of a file of any format."""
    content = encoded(photo(), form)
    refusal(tmp_path, content[: len(content) // 2])


@pytest.mark.parametrize("form", WRITERS)
def test_an_image_cut_within_its_header_is_refused(tmp_path: Path, form: str) -> None:
    """Whatever number of its first bytes is left."""
    content = encoded(photo(), form)
    for length in range(1, 40):
        refusal(tmp_path, content[:length])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """Of zero bytes."""
    assert "the file is empty" in refusal(tmp_path, b"")


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_a_cmyk_image_is_used(tmp_path: Path, form: str) -> None:
    """As RGB."""
    colour = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    found = read(tmp_path, encoded(colour, form))[:, 8, 8].int()
    assert (found - torch.tensor([200, 40, 90])).abs().max() <= 8


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_a_16_bit_image_is_used(tmp_path: Path, form: str) -> None:
    """Its upper 8 bits: grey stays grey."""
    grey = Image.fromarray(np.full((16, 16), 0x8000, dtype=np.uint16))
    assert read(tmp_path, encoded(grey, form)).unique().tolist() == [0x80]


def test_a_32_bit_image_is_refused(tmp_path: Path) -> None:
    """Nothing says which of its values is white."""
    grey = Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32))
    assert "32 bits" in refusal(tmp_path, encoded(grey, "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_image_is_used(tmp_path: Path, form: str) -> None:
    """By its colours, not by their numbers."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 90])
    assert read(tmp_path, encoded(image, form))[:, 8, 8].tolist() == [10, 200, 90]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_used(tmp_path: Path, form: str) -> None:
    """The others are not even decoded."""
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
    """1 x 1, whatever becomes of it."""
    (tmp_path / "x").write_bytes(encoded(Image.new("RGB", (1, 1), "white"), form))
    image = FileImages(tmp_path, ["x"], 16, resize).read(0)
    assert image.shape == (3, 16, 16) and image.min() >= 250


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_thread_of_pixels_is_used(tmp_path: Path, shape: tuple[int, int]) -> None:
    """`crop` enlarges the middle only: all of it at this width would be gigabytes."""
    (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", shape, "white"), "PNG"))
    began = time.monotonic()
    image = FileImages(tmp_path, ["x.png"], 256, "crop").read(0)
    assert image.shape == (3, 256, 256) and image.min() == 255
    assert time.monotonic() - began < 5


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
    """Of every format, from the header, in a process that could not hold what it claims."""
    for form in WRITERS:
        (tmp_path / form).write_bytes(bomb(form))
    code = (
        "import resource, sys, torchvision.io; from pathlib import Path\n"
        "from ray_dmml.data.dataset import BadImageError, FileImages\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "for form in sys.argv[2:]:\n"
        "    try: FileImages(Path(sys.argv[1]), [form], 16).read(0)\n"
        "    except BadImageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *WRITERS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    for form, told in zip(WRITERS, ended.stdout.splitlines(), strict=True):
        assert told.startswith(f"image {form} cannot be read: it claims ")
        assert told.endswith("at most 178956970 are decoded")


def test_a_gigantic_file_is_refused(tmp_path: Path) -> None:
    """It is not even read (a sparse file of 1 TiB)."""
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadImageError, match="the file is larger than 1024 MiB"):
        FileImages(tmp_path, ["x.png"], 16).read(0)


@pytest.mark.parametrize("form", WRITERS)
def test_a_misnamed_image_is_used(tmp_path: Path, form: str) -> None:
    """By what it is, not by its suffix."""
    name = "x.png" if form == "JPEG" else "x.jpg"
    assert read(tmp_path, encoded(Image.new("RGB", (16, 16), "white"), form), name).min() > 250


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    """Text; and PostScript, for which Pillow would run a program."""
    told = "it is not an image in a known format"
    assert told in refusal(tmp_path, b"no image at all")
    eps = encoded(photo(), "EPS")
    assert eps.startswith(b"%!PS") and told in refusal(tmp_path, eps)


# --- files ----------------------------------------------------------------------------------


def folder_of(root: Path, classes: int = 4, each: int = 2) -> DataConfig:
    """ROOT/cN/M.png, all different."""
    for number in range(classes * each):
        path = root / f"c{number // each}" / f"{number % each}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9 * number, 5, 250 - 9 * number)).save(path)
    return DataConfig(name="imagefolder", root=root, decode_size=8, validation_fraction=0)


def names_of(config: DataConfig) -> list[str]:
    splits = load_splits(config)
    return [s.source.name(i) for s in (splits.train, splits.test) for i in range(len(s))]


def test_an_unreadable_file_is_refused_or_skipped(tmp_path: Path) -> None:
    """Without permission (as another user, where the test runs as root)."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        config = folder_of(root, each=3)
        (root / "c0" / "0.png").chmod(0)
        (root / "c3").chmod(0o755)
        is_root = os.geteuid() == 0
        uncached = config.model_copy(update={"cache_gib": 0.0})
        skipping = uncached.model_copy(update={"on_bad_image": "skip"})
        said: list[str] = []
        FileImages(root, ["c1/0.png"], 8).read(0)  # imports what the other user may not read
        if is_root:
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"c0/0\.png cannot be read: Permission denied"):
                load_splits(uncached)
            splits = load_splits(skipping, said.append)
        finally:
            if is_root:
                os.seteuid(0)
        assert splits.skipped == ("c0/0.png",)
        assert any("left out 1" in line and "c0/0.png" in line for line in said)


def test_an_unreadable_folder_is_refused() -> None:
    """Its images would otherwise be missing without a word."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        config = folder_of(root)
        (root / "c0" / "deep").mkdir(mode=0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            with pytest.raises(UserError, match=r"c0/deep cannot be read: Permission denied"):
                load_splits(config)
        finally:
            if is_root:
                os.seteuid(0)


def test_a_pipe_among_the_images_is_refused(tmp_path: Path) -> None:
    """To read it would wait for ever."""
    config = folder_of(tmp_path)
    os.mkfifo(tmp_path / "c0" / "pipe.png")
    with pytest.raises(UserError, match=r"c0/pipe\.png cannot be read: it is not a regular file"):
        load_splits(config)


ODD_NAMES = [
    "two words.png", "it's.png", 'a "quote".png', "comma, semicolon;.png", "naïve 画像 é.png",
    "#hash%20&?.png", "-dash.png", "[bold]x.png", "new\nline.png",
]  # fmt: skip


def test_odd_names_in_a_folder_are_used(tmp_path: Path) -> None:
    """Spaces, quotes, non-ASCII and even a line's end, in the names of files and classes."""
    config = folder_of(tmp_path)
    (tmp_path / "c0").rename(tmp_path / "ça, 'c' \"0\"")
    for name in ODD_NAMES:
        photo().save(tmp_path / "c1" / name)
    found = names_of(config)
    assert all(f"c1/{name}" in found for name in ODD_NAMES) and len(found) == 8 + len(ODD_NAMES)


def test_odd_names_in_a_manifest_are_used(tmp_path: Path) -> None:
    """Quoted as CSV has it."""
    import csv

    with (tmp_path / "m.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for number, name in enumerate(ODD_NAMES[:8]):
            photo().save(tmp_path / name)
            split = "train" if number < 4 else "validation"
            table.writerow([name, f'é "{number // 2}", x', split])
    config = manifest_config(tmp_path, None)
    assert names_of(config) == ODD_NAMES[:8]


def test_a_bad_name_cannot_garble_a_message(tmp_path: Path) -> None:
    """What is no text, or moves the cursor, is escaped; the image is named and can be skipped."""
    config = folder_of(tmp_path, each=3)
    bad = os.fsencode(tmp_path) + b"/c0/\xff\x1b[2J\n.png"
    with open(bad, "wb") as file:
        file.write(b"broken")
    with pytest.raises(UserError) as caught:
        load_splits(config)
    assert r"c0/\udcff\x1b[2J\n.png cannot be read" in str(caught.value)
    str(caught.value).encode()
    splits = load_splits(config.model_copy(update={"on_bad_image": "skip"}))
    assert len(splits.skipped) == 1 and len(splits.train) == 6


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    """A file's is unreadable, a folder's within a class is not followed, a class's is no class."""
    config = folder_of(tmp_path)
    (tmp_path / "c9").symlink_to("c9")
    (tmp_path / "c0" / "up").symlink_to("..")
    assert len(names_of(config)) == 8
    (tmp_path / "c0" / "self.png").symlink_to("self.png")
    with pytest.raises(UserError, match=r"c0/self\.png cannot be read: Too many levels"):
        load_splits(config)


@pytest.mark.parametrize("target", [".", ".."])
def test_a_class_that_links_to_all_classes_is_refused(tmp_path: Path, target: str) -> None:
    """Its images would be those of the others under another label."""
    config = folder_of(tmp_path / "root")
    (tmp_path / "root" / "c4").symlink_to(target)
    with pytest.raises(UserError, match=r"c4 is a link to .* which holds the other classes too"):
        load_splits(config)


def test_links_to_files_and_classes_elsewhere_are_used(tmp_path: Path) -> None:
    """Whoever made the folder put them there."""
    config = folder_of(tmp_path / "root")
    photo().save(tmp_path / "far.png")
    (tmp_path / "root" / "c0" / "far.png").symlink_to(tmp_path / "far.png")
    (tmp_path / "root" / "c1").rename(tmp_path / "class")
    (tmp_path / "root" / "c1").symlink_to(tmp_path / "class")
    assert len(names_of(config)) == 9


# --- manifests ------------------------------------------------------------------------------


def manifest_config(folder: Path, content: str | bytes | None) -> DataConfig:
    """A manifest; the images 0.png to 7.png lie beside it."""
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "m.csv").write_bytes(data)
    for number in range(8):
        Image.new("RGB", (8, 8), (9 * number, 5, 9)).save(folder / f"{number}.png")
    return DataConfig(
        name="manifest", root=folder, manifest=folder / "m.csv", decode_size=8,
        validation_fraction=0,
    )  # fmt: skip


def rows(labels: str = "aabbccdd") -> str:
    return "".join(
        f"{n}.png,{label},{'train' if n < 4 else 'validation'}\n" for n, label in enumerate(labels)
    )


def manifest_refusal(folder: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as caught:
        load_splits(manifest_config(folder, content))
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/etc/passwd"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, path: str) -> None:
    """With its line."""
    told = manifest_refusal(tmp_path, HEAD + rows() + f"{path},a,train\n")
    assert f"line 10: {path} is outside data.root" in told


def test_a_link_that_leaves_the_root_is_used(tmp_path: Path) -> None:
    """The manifest's text may not lead out of the root; a link in it is its owner's own doing."""
    root = tmp_path / "root"
    root.mkdir()
    config = manifest_config(root, HEAD + rows())
    (root / "0.png").rename(tmp_path / "far.png")
    (root / "0.png").symlink_to(tmp_path / "far.png")
    assert len(names_of(config)) == 8


@pytest.mark.parametrize("again", ["0.png", "./0.png", "x/../0.png"])
def test_a_duplicate_row_is_refused(tmp_path: Path, again: str) -> None:
    """However its path is written."""
    told = manifest_refusal(tmp_path, HEAD + rows() + f"{again},a,train\n")
    assert "line 10: 0.png is listed a second time" in told


@pytest.mark.parametrize("column", ["path", "label", "split"])
def test_a_missing_or_double_column_is_refused(tmp_path: Path, column: str) -> None:
    """By its name."""
    told = manifest_refusal(tmp_path, HEAD.replace(column, "other") + rows())
    assert f"has no column '{column}'" in told
    told = manifest_refusal(tmp_path, f"{column}," + HEAD + rows())
    assert f"has two columns '{column}'" in told


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_and_other_line_ends_are_used(
    tmp_path: Path, mark: str, end: str
) -> None:
    """As spreadsheets write them."""
    config = manifest_config(tmp_path, mark + (HEAD + rows()).replace("\n", end))
    assert names_of(config) == [f"{n}.png" for n in range(8)]


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    """UTF-16, as old spreadsheets write it, and bytes that are no text."""
    assert "not a CSV file in UTF-8" in manifest_refusal(tmp_path, (HEAD + rows()).encode("utf-16"))
    told = manifest_refusal(tmp_path, HEAD + rows() + "a\0b.png,a,train\n")
    assert "line 10: path has a character 0" in told


def test_lines_without_end_are_refused(tmp_path: Path) -> None:
    """Of a file that is no table; a cell that is too long; a path that no file can have."""
    assert "a line has more than" in manifest_refusal(tmp_path, HEAD + "x," * 2**20)
    assert "field larger than" in manifest_refusal(tmp_path, HEAD + "x" * 200_000)
    assert "files are missing" in manifest_refusal(
        tmp_path, HEAD + rows() + "y" * 5000 + ",a,train"
    )


def test_a_manifest_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder; a pipe."""
    (tmp_path / "m.csv").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        load_splits(manifest_config(tmp_path, None))
    (tmp_path / "m.csv").rmdir()
    os.mkfifo(tmp_path / "m.csv")
    with pytest.raises(UserError, match="is not a file"):
        load_splits(manifest_config(tmp_path, None))


@pytest.mark.parametrize("labels", ["99AA77bb", "99::77;;"])
def test_labels_are_text(tmp_path: Path, labels: str) -> None:
    """Numbers too: 07 and 7 are two labels."""
    splits = load_splits(manifest_config(tmp_path, HEAD + rows(labels)))
    assert set(splits.train.class_names) == set(labels[:4])
    numbers = HEAD + rows().replace(",a,", ",7,").replace(",b,", ",07,")
    assert set(load_splits(manifest_config(tmp_path, numbers)).train.class_names) == {"7", "07"}


# --- classes --------------------------------------------------------------------------------


def test_one_class_is_refused(tmp_path: Path) -> None:
    """In training or test: there is nothing to tell it from."""
    told = manifest_refusal(tmp_path, HEAD + rows("aaaaccdd"))
    assert "training images are of 1 classes; at least 2" in told
    assert "test images are of 1 classes" in manifest_refusal(tmp_path, HEAD + rows("aabbcccc"))


def test_one_image_a_class_is_refused(tmp_path: Path) -> None:
    """Test queries have nothing to find; training has no positive pair."""
    assert "no test image has another" in manifest_refusal(tmp_path, HEAD + rows("aabbcdef"))
    with pytest.raises(UserError, match="the largest training class has 1"):
        ClassBalancedSampler(np.arange(100), 4, 2, seed=0)


@pytest.mark.parametrize("sizes", [[2] * 100_000, [1] * 99_000 + [2] * 1000])
def test_100_000_classes_are_used(sizes: list[int]) -> None:
    """Sampler and held-out classes take seconds."""
    began = time.monotonic()
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert len(set(ClassBalancedSampler(labels, 16, 4, seed=0).batch(0).tolist())) == 64
    names = tuple(map(str, range(len(sizes))))
    files = FileImages(Path(), ["x.png"] * len(labels), 8)
    rest, held = hold_out_classes(images_module.ImageSet(files, labels, names), 0.2, 0)
    assert held is not None and held.num_classes == 20_000 and rest.num_classes == 80_000
    assert time.monotonic() - began < 30


def test_a_manifest_of_100_000_classes_is_used(tmp_path: Path) -> None:
    """200,000 rows, in seconds."""
    photo(8).save(tmp_path / "x.png")
    (tmp_path / "all").mkdir()
    for number in range(200_000):
        os.symlink("../x.png", tmp_path / "all" / f"{number}.png")
    text = "".join(
        f"all/{n}.png,{n // 2},{'train' if n < 100_000 else 'validation'}\n" for n in range(200_000)
    )
    config = manifest_config(tmp_path, HEAD + text)
    config = config.model_copy(update={"check_images": False, "cache_gib": 0.0})
    began = time.monotonic()
    assert load_splits(config).train.num_classes == 50_000
    assert time.monotonic() - began < 30


# --- configs --------------------------------------------------------------------------------


def config_refusal(folder: Path, content: str | bytes) -> str:
    """The message, which must come soon and be of a length that a person reads."""
    path = folder / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        Config.load(path)
    assert time.monotonic() - began < 10 and len(str(caught.value)) < 5000
    return str(caught.value)


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    """Tags of Python objects are refused."""
    mark = tmp_path / "mark"
    told = config_refusal(tmp_path, f'seed: !!python/object/apply:os.system ["touch {mark}"]')
    assert "could not determine a constructor" in told and not mark.exists()


@pytest.mark.parametrize("where", ["", "train:\n"])
def test_10_000_unknown_keys_are_refused(tmp_path: Path, where: str) -> None:
    """The first ones by name, the others by number."""
    text = where + "".join(f"{'  ' if where else ''}key{n}: 1\n" for n in range(10_000))
    told = config_refusal(tmp_path, text)
    assert "key19: unknown setting" in told and "key20:" not in told
    assert told.endswith("... and 9980 more")


def test_unknown_keys_of_the_base_and_of_a_peer_are_refused(tmp_path: Path) -> None:
    """Each is looked for where it was written, which takes no longer in a long list than in a short one."""
    base, peer = ("".join(f", {of}{n}: 1" for n in range(14_000)) for of in ("seed", "name"))
    told = config_refusal(
        tmp_path, f"cohort: {{base: {{view: weak{base}}}, peers: [{{view: weak{peer}}}]}}"
    )
    assert "cohort.base.seed0: unknown setting" in told
    assert told.endswith("... and 27980 more")


def test_the_whole_base_can_be_set_beside_peers(tmp_path: Path) -> None:
    """Only a setting that every peer states itself would do nothing."""
    path = tmp_path / "c.yaml"
    path.write_text("cohort: {base: {embedding_size: 8}, peers: [{}, {view: weak}]}")
    sizes = [
        peer.embedding_size
        for peer in Config.load(path, ["cohort.base={embedding_size: 16}"]).cohort.peers
    ]
    assert sizes == [16, 16]


@pytest.mark.parametrize("raw", [[1], "x", 5])
def test_a_config_that_is_no_mapping_is_refused(raw: Any) -> None:
    """Where it comes from a program."""
    with pytest.raises(UserError, match=r"config: .*dictionary"):
        Config.parse(raw)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{a: " * 10_000, "a: " + "[" * 10_000 + "]" * 10_000, "- " * 10_000],
)
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    """Before Python's stack ends."""
    assert "more than 50 levels in each other" in config_refusal(tmp_path, text)


def test_a_deep_key_is_refused() -> None:
    """Of --set, too."""
    with pytest.raises(UserError, match="a key has at most 50 parts"):
        Config.load(None, [".".join("a" * 10_000) + "=1"])


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}"])
def test_a_bomb_of_aliases_is_refused(tmp_path: Path, link: str) -> None:
    """A few lines that stand for 9 ** 9 values; as lists, and as merged mappings."""
    text = "a0: &a0 {k: 1}\n"
    for level in range(1, 10):
        text += f"a{level}: &a{level} {link.format(', '.join([f'*a{level - 1}'] * 9))}\n"
    assert "aliases that stand for more than 1000000 values" in config_refusal(tmp_path, text)


def test_a_chain_of_aliases_is_refused(tmp_path: Path) -> None:
    """Deep nesting that no line shows."""
    text = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))
    assert "more than 50 levels in each other" in config_refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {<<: *a}", "&a {cohort: {base: *a}}"])
def test_an_alias_of_itself_is_refused(tmp_path: Path, text: str) -> None:
    """It has no end."""
    assert "an alias to what it is itself a part of" in config_refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: !!timestamp 2001-01-01", "could not determine a constructor"),
        ("seed: 2001-99-99", "unable to parse string as an integer (got '2001-99-99')"),
        ("seed: !!int x", "found what is no int"),
        ("seed: !!bool x", "found what is no bool"),
        ("seed: " + "9" * 5000, "found what is no int"),
        ("seed: 0x" + "f" * 5000, "a number of more than 4096 bits"),
        ('data: {root: "a\\0b"}', "found the character"),
        ('data: {root: "\\ud800"}', "found the character"),
        ("seed: 1\nseed: 2", "found the key 'seed' a second time"),
        ("data: {root: ~nobody-of-this-name/x}", "a path in it cannot be resolved"),
        ("seed: " + "x" * 100_000, "(100002 characters)"),
    ],
)
def test_yaml_that_means_nothing_is_refused(tmp_path: Path, text: str, told: str) -> None:
    """One sentence each."""
    assert told in config_refusal(tmp_path, text)


def test_a_config_without_end_is_refused(tmp_path: Path) -> None:
    """Only so much is read of it."""
    with pytest.raises(UserError, match="larger than 8 MiB"):
        Config.load(Path("/dev/zero"))
    assert "larger than 8 MiB" in config_refusal(tmp_path, "# " + "x" * 2**23)


def test_a_config_with_a_byte_order_mark_is_used(tmp_path: Path) -> None:
    """And with CRLF."""
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfseed: 5\r\ntrain:\r\n  steps: 7\r\n")
    config = Config.load(tmp_path / "c.yaml")
    assert (config.seed, config.train.steps) == (5, 7)
