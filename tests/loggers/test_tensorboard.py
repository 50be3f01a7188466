"""TensorBoard events, read back from their files."""

from __future__ import annotations

import io
import logging
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ray_dmml.loggers.embeddings import THUMBNAIL, EmbeddingSample
from ray_dmml.loggers.tensorboard import TensorBoardLogger


def read(folder: Path) -> list[Event]:
    """Every event of every file, the oldest file first; a record is its length, a checksum of that, the
    event, and a checksum of it."""
    found = []
    for path in sorted(folder.glob("*.tfevents.*"), key=lambda path: int(path.suffix[1:])):
        content = path.read_bytes()
        while len(content) > 16:
            (size,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + size:
                break  # cut short
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [(event.step, value.tag, value.simple_value) for event in read(folder) for value in event.summary.value]


def log(logger: TensorBoardLogger, step: int, loss: float) -> None:
    logger.log({"peers": {"peer0": {"loss": loss}}}, step)
    logger.log({"images_per_second": 7.0}, step)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(step, value) for step, tag, value in scalars(folder) if tag == "loss/peer0"]


def test_scalars_are_in_the_file_at_once(tmp_path: Path) -> None:
    """For a person who watches the run. After a rewind, what earlier files have from there on is void."""
    logger = TensorBoardLogger(tmp_path / "tensorboard")
    logger.rewind(4)
    log(logger, 5, 0.5)
    assert scalars(tmp_path / "tensorboard") == [
        (5, "loss/peer0", 0.5),
        (5, "images_per_second", 7.0),
    ]
    figures = {"peers": {"peer0": {"recall@1": 0.25}}, "ensemble": {"recall@1": 0.5}}
    logger.log({"validation": figures}, 5)
    assert scalars(tmp_path / "tensorboard")[2:] == [
        (5, "validation_recall_at_1/peer0", 0.25),
        (5, "validation_recall_at_1/ensemble", 0.5),
    ]
    logger.rewind(2)
    log(logger, 3, 0.25)
    logger.close()
    assert losses(tmp_path / "tensorboard") == [(5, 0.5), (3, 0.25)]
    starts = [e for e in read(tmp_path / "tensorboard") if e.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [5, 3]


def test_a_peer_that_skips_a_step_shows_its_latest_terms(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "tensorboard")
    log(logger, 1, 0.5)
    logger.log({"peers": {"peer0": {}}}, 2)
    logger.log({"images_per_second": 7.0}, 2)
    logger.close()
    assert losses(tmp_path / "tensorboard") == [(1, 0.5), (2, 0.5)]


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, and so do the events once they can."""
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    logger = TensorBoardLogger(tmp_path / "tensorboard")
    with caplog.at_level(logging.WARNING, "ray_dmml"):
        log(logger, 1, 1.0)
        log(logger, 2, 2.0)
    [record] = caplog.records
    assert "tensorboard cannot be written" in record.getMessage()
    assert "training goes on" in record.getMessage()
    (tmp_path / "tensorboard").unlink()
    log(logger, 3, 3.0)
    logger.close()
    assert losses(tmp_path / "tensorboard") == [(3, 3.0)]


def test_a_file_cut_short_hides_nothing_that_comes_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk that was full for some time, here a limit on the size of files."""
    logger = TensorBoardLogger(tmp_path / "tensorboard")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        for step in range(1, 20):
            log(logger, step, float(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log(logger, 20, 20.0)
    logger.close()
    assert len(caplog.records) == 1
    steps = [step for step, _ in losses(tmp_path / "tensorboard")]
    assert steps[0] == 1 and steps[-1] == 20 and steps == sorted(steps)


def test_a_full_disk_at_a_resumed_run_costs_no_earlier_events(tmp_path: Path) -> None:
    """The files of both starts end with the same number."""
    first = TensorBoardLogger(tmp_path / "tensorboard")
    log(first, 1, 0.5)
    first.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    file = file.rename(file.with_name("events.out.tfevents.1000000000.host.1"))
    resumed = TensorBoardLogger(tmp_path / "tensorboard")
    resumed.rewind(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        log(resumed, 2, 0.25)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "tensorboard").iterdir()) == [file]
    log(resumed, 3, 0.125)
    resumed.close()
    assert sorted(losses(tmp_path / "tensorboard")) == [(1, 0.5), (3, 0.125)]


def test_a_peer_that_learns_no_more_has_no_further_points(tmp_path: Path) -> None:
    """Such as a dropped one. Values of steps that a rewind has voided are not written again."""
    logger = TensorBoardLogger(tmp_path / "tensorboard")
    logger.log({"peers": {"peer0": {"loss": 0.5}, "peer1": {"loss": 0.25}}}, 1)
    logger.log({"images_per_second": 7.0}, 1)
    log(logger, 2, 0.125)
    logger.log({"peers": {"peer1": {"loss": 9.0}}}, 3)
    logger.rewind(2)
    log(logger, 3, 0.0625)
    logger.close()
    losses = [row for row in scalars(tmp_path / "tensorboard") if row[1].startswith("loss/")]
    assert losses == [
        (1, "loss/peer0", 0.5),
        (1, "loss/peer1", 0.25),
        (2, "loss/peer0", 0.125),
        (3, "loss/peer0", 0.0625),
    ]


def test_pictures_and_the_projector(tmp_path: Path) -> None:
    """Pictures keep their pixels. The projector's files have a row or a square for each image, in their order."""
    folder = tmp_path / "tensorboard"
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
    thumbnails = rng.integers(0, 256, (5, THUMBNAIL, THUMBNAIL, 3)).astype(np.uint8)
    embeddings = {"peer0": rng.random((5, 3), dtype=np.float32), "ensemble": rng.random((5, 6), dtype=np.float32)}
    sample = EmbeddingSample(embeddings, ["a", "a", "b", "b", "c\t"], ["1\n.png", "2.png", "3", "4", "5"], thumbnails)
    logger = TensorBoardLogger(folder)
    logger.log({"pictures": {"views": picture}}, 0)
    logger.log({"embeddings": sample}, 6)
    logger.log({"final": {"peers": {"peer0": {"recall@1": 0.5}}, "ensemble": {"recall@1": 0.75}}}, 6)
    logger.close()
    projector = (folder / "projector_config.pbtxt").read_text()
    for name, vectors in embeddings.items():
        assert f'tensor_path: "projector/{name}.tsv"' in projector
        assert np.allclose(np.loadtxt(folder / "projector" / f"{name}.tsv"), vectors, atol=1e-4)
    rows = (folder / "projector/images.tsv").read_text().splitlines()
    assert rows == ["class\timage", "a\t1 .png", "a\t2.png", "b\t3", "b\t4", "c\t5"]
    square = np.asarray(Image.open(folder / "projector/images.png"))
    assert square.shape == (3 * THUMBNAIL, 3 * THUMBNAIL, 3)  # as TensorBoard needs it
    assert np.array_equal(square[THUMBNAIL : 2 * THUMBNAIL, :THUMBNAIL], thumbnails[3])
    (folder / "projector_config.pbtxt").unlink()
    for file in (folder / "projector").iterdir():
        file.unlink()
    (folder / "projector").rmdir()
    [image, *final] = [value for event in read(folder) for value in event.summary.value]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.image.encoded_image_string))), picture)
    assert [(value.tag, value.simple_value) for value in final] == [
        ("final_recall_at_1/peer0", 0.5),
        ("final_recall_at_1/ensemble", 0.75),
    ]
