"""TensorBoard events, read back from their files."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog

from ray_dmml.loggers.tensorboard import Events


def read(folder: Path) -> list[Event]:
    """Every event of every file, the oldest file first; a record is its length, a checksum of that, the
    event, and a checksum of it."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:])):
        content = path.read_bytes()
        while len(content) > 16:
            (size,) = struct.unpack("<Q", content[:8])
            if len(content) < 16 + size:
                break  # cut short
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in read(folder)
        for value in event.summary.value
    ]


def test_what_is_added_is_there(tmp_path: Path) -> None:
    """At once, for someone who watches the run; and what an earlier file has from here on is void."""
    notes: list[str] = []
    events = Events(tmp_path / "tensorboard", 5, notes.append)
    events.add(5, {"loss/peer0": 0.5, "images_per_s": 7.0})
    assert scalars(tmp_path / "tensorboard") == [(5, "loss/peer0", 0.5), (5, "images_per_s", 7.0)]
    events.add(6, {"loss/peer0": 0.25})
    events.close()
    assert scalars(tmp_path / "tensorboard")[-1] == (6, "loss/peer0", 0.25)
    starts = [e for e in read(tmp_path / "tensorboard") if e.session_log.status == SessionLog.START]
    assert [event.step for event in starts] == [5]
    assert notes == []


def test_what_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    """The run goes on, and so do the events once they can."""
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    notes: list[str] = []
    events = Events(tmp_path / "tensorboard", 1, notes.append)
    events.add(1, {"loss/peer0": 1.0})
    events.add(2, {"loss/peer0": 2.0})
    [told] = notes
    assert "tensorboard cannot be written" in told and "training goes on" in told
    (tmp_path / "tensorboard").unlink()
    events.add(3, {"loss/peer0": 3.0})
    events.close()
    assert scalars(tmp_path / "tensorboard") == [(3, "loss/peer0", 3.0)]


def test_a_file_cut_short_hides_nothing_that_comes_later(tmp_path: Path) -> None:
    """A disk that was full for some time, here a limit on the size of files."""
    notes: list[str] = []
    events = Events(tmp_path / "tensorboard", 1, notes.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        for step in range(1, 20):
            events.add(step, {"loss/peer0": float(step)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    events.add(20, {"loss/peer0": 20.0})
    events.close()
    assert len(notes) == 1
    found = [step for step, _, _ in scalars(tmp_path / "tensorboard")]
    assert found[0] == 1 and found[-1] == 20 and found == sorted(found)
