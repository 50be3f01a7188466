"""Decodes damaged files of every format. No file may end the process that decodes it, or take it long.

    python experiments/reliability/damaged.py --count 2000

Each format has a process of its own, which is started again after a file that ended it. A file is a good one with
flipped bits, a cut, changed or repeated bytes, the head of another file, or a PNG chunk whose checksum was made to fit.
"""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from ray_dmml.data.dataset import BadImageError, FileImages
from ray_dmml.data.formats import formats

SIDE = 48


def photo(seed: int) -> Image.Image:
    """Noise on a gradient: files of a few kilobytes."""
    pixels = np.random.default_rng(seed).integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels + np.linspace(0, 180, SIDE).astype(np.uint8)[:, None, None])


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return exif


KINDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "JPEG": [("RGB", {"exif": _exif()}), ("L", {}), ("RGB", {"progressive": True}), ("CMYK", {"quality": 95})],
    "PNG": [("RGB", {}), ("P", {}), ("RGBA", {}), ("1", {}), ("RGB", {"exif": _exif()})],
    "WEBP": [("RGB", {"exif": _exif()}), ("RGBA", {"lossless": True}), ("RGB", {"save_all": True})],
    "GIF": [("P", {}), ("L", {}), ("P", {"save_all": True})],
    "BMP": [("RGB", {}), ("P", {}), ("1", {})],
    "TIFF": [
        ("RGB", {"compression": kind, "exif": _exif()})
        for kind in (None, "tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    ],
    "AVIF": [("RGB", {"exif": _exif()}), ("RGBA", {"speed": 10})],
    "JPEG2000": [("RGB", {}), ("L", {"quality_layers": [20], "irreversible": True}), ("RGBA", {"no_jp2": True})],
    "PPM": [("RGB", {}), ("L", {}), ("1", {})],
    "TGA": [("RGB", {}), ("P", {}), ("RGB", {"compression": "tga_rle"})],
    "ICO": [("RGBA", {}), ("RGB", {"bitmap_format": "bmp"})],
    "MPO": [("RGB", {"save_all": True})],
    "PCX": [("RGB", {}), ("P", {}), ("1", {})],
    "SGI": [("RGB", {}), ("L", {})],
    "DDS": [("RGB", {}), ("RGBA", {"pixel_format": "DXT5"})],
    "QOI": [("RGB", {}), ("RGBA", {})],
    "HEIF": [("RGB", {"exif": _exif().tobytes()}), ("L", {}), ("RGBA", {"quality": 95})],
    "JXL": [("RGB", {"exif": _exif().tobytes()}), ("L", {}), ("RGBA", {"lossless": True})],
}
"""Modes and options of the files of each format."""

for _form in set(KINDS) - {*formats(), "MPO"}:  # plug-ins that are not installed
    del KINDS[_form]


def good_files(form: str) -> list[bytes]:
    """One file of each kind."""
    files = []
    for number, (mode, options) in enumerate(KINDS[form]):
        if options.get("save_all"):
            options = {**options, "append_images": [photo(100 + number).convert(mode)]}
        buffer = io.BytesIO()
        photo(number).convert(mode).save(buffer, form, **options)
        files.append(buffer.getvalue())
    return files


def _flip(content: bytearray, rng: np.random.Generator) -> bytearray:
    for place in rng.integers(0, len(content), rng.integers(1, 9)):
        content[place] ^= 1 << int(rng.integers(8))
    return content


def _flip_header(content: bytearray, rng: np.random.Generator) -> bytearray:
    content[rng.integers(0, min(64, len(content)))] ^= 1 << int(rng.integers(8))
    return content


def _truncate(content: bytearray, rng: np.random.Generator) -> bytearray:
    return content[: rng.integers(1, len(content))]


def _part(content: bytearray, rng: np.random.Generator) -> slice:
    start = int(rng.integers(0, len(content)))
    return slice(start, min(len(content), start + int(rng.integers(1, 200))))


def _overwrite(content: bytearray, rng: np.random.Generator) -> bytearray:
    part = _part(content, rng)
    length = part.stop - part.start
    content[part] = rng.bytes(length) if rng.random() < 0.5 else bytes([rng.choice([0, 255])]) * length
    return content


def _remove(content: bytearray, rng: np.random.Generator) -> bytearray:
    del content[_part(content, rng)]
    return content or bytearray(b"\0")


def _repeat(content: bytearray, rng: np.random.Generator) -> bytearray:
    part = _part(content, rng)
    content[part.stop : part.stop] = content[part]
    return content


def _fix_checksums(content: bytearray) -> bytearray:
    """Makes the checksums of a PNG's chunks fit their damaged content, so that the decoder sees it."""
    place = 8
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        if place + 12 + length > len(content):
            break
        checksum = zlib.crc32(content[place + 4 : place + 8 + length])
        struct.pack_into(">I", content, place + 8 + length, checksum)
        place += 12 + length
    return content


DAMAGES: tuple[Callable[[bytearray, np.random.Generator], bytearray], ...] = (
    *(_flip, _flip_header, _truncate, _overwrite, _remove, _repeat),
)


def damaged(form: str, seed: int, files: list[bytes]) -> bytes:
    """The damaged file of a seed.

    Args:
        form: Pillow's name of the format.
        seed: which damage.
        files: :func:`good_files` of the format.
    """
    rng = np.random.default_rng(seed)
    content = bytearray(files[seed % len(files)])
    if rng.random() < 0.1:  # the head of one file and the tail of another
        other = files[rng.integers(len(files))]
        content = content[: rng.integers(1, len(content))] + other[rng.integers(0, len(other)) :]
    for _ in range(int(rng.integers(1, 3))):
        content = DAMAGES[rng.integers(len(DAMAGES))](content, rng)
    if form == "PNG" and rng.random() < 0.6:
        content = _fix_checksums(content)
    return bytes(content)


def decode_all(form: str, seeds: range) -> Iterator[tuple[str, float]]:
    """Decodes the damaged files of a format in this process.

    Yields ``used`` or ``refused`` and the processor seconds of each file. Errors other than BadImageError are raised.
    """
    files = good_files(form)
    with tempfile.TemporaryDirectory() as folder:
        images = FileImages(Path(folder), ["x"], 32)
        for seed in seeds:
            (Path(folder) / "x").write_bytes(damaged(form, seed, files))
            began = time.process_time()  # another program may keep the cores busy
            try:
                images.read(0)
                outcome = "used"
            except BadImageError:
                outcome = "refused"
            yield outcome, time.process_time() - began


def worker(form: str, start: int, stop: int) -> None:
    """Prints a line for each file, and at the end the most memory that the process had."""
    for seed, (outcome, seconds) in zip(range(start, stop), decode_all(form, range(start, stop)), strict=True):
        print(json.dumps([seed, outcome, seconds]), flush=True)
    print(json.dumps(["MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0]), flush=True)


def run(form: str, count: int, limit_s: float) -> tuple[Counter[str], float, float]:
    """Decodes ``count`` damaged files of a format in other processes.

    Returns:
        The number of files by outcome, the processor seconds of the slowest, and the most memory of a process in MiB.
    """
    outcomes: Counter[str] = Counter()
    slowest = memory = 0.0
    start = 0
    while start < count:
        command = [sys.executable, __file__, "--worker", form, "--start", str(start), "--count", str(count)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            key, value, seconds = json.loads(line)
            if key == "MiB":
                memory = max(memory, value)
                continue
            outcomes[value if seconds < limit_s else f"took longer than {limit_s:g} s"] += 1
            slowest, start = max(slowest, seconds), key + 1
        if process.wait() != 0:
            outcomes[f"ended the process (exit code {process.returncode}, seed {start})"] += 1
            start += 1
    return outcomes, slowest, memory


def main(
    count: Annotated[int, typer.Option(min=1, help="Damaged files of each format.")] = 2000,
    limit_s: Annotated[float, typer.Option(help="Processor seconds that one file may take.")] = 5.0,
    form: Annotated[list[str] | None, typer.Option(help="Formats; all if none is given.")] = None,
    start: Annotated[int, typer.Option(hidden=True)] = 0,
    worker_of: Annotated[str | None, typer.Option("--worker", hidden=True)] = None,
) -> None:
    """Decode damaged files of every format. The exit code is 1 if one of them ended a process or took too long."""
    if worker_of is not None:
        worker(worker_of, start, count)
        return
    table = Table("format", "used", "refused", "slowest, ms", "most memory, MiB", "else", box=None)
    is_good = True
    for name in form or KINDS:
        outcomes, slowest, memory = run(name, count, limit_s)
        faults = "; ".join(f"{n} {what}" for what, n in outcomes.items() if what not in ("used", "refused"))
        is_good = is_good and not faults
        table.add_row(
            name, str(outcomes["used"]), str(outcomes["refused"]), f"{1000 * slowest:.0f}", f"{memory:.0f}", faults
        )
    Console().print(table)
    raise typer.Exit(0 if is_good else 1)


if __name__ == "__main__":
    typer.run(main)
