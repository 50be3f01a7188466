"""The state of a peer as files: what is encoded is decoded, and untrusted files run no code."""

from __future__ import annotations

import io
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from checkpoint_samples import Malicious, peer_state
from conftest import assert_same

from ray_dmml.checkpoint.manifest import DamagedError
from ray_dmml.checkpoint.peer_state import decode_peer, encode_peer, write_peer
from ray_dmml.errors import UserError


@pytest.mark.parametrize("ema", [True, False])
def test_encoded_states_are_decoded(ema: bool) -> None:
    """The decoded state is equal to the bit. Averaged weights are a file of their own."""
    state = peer_state()
    if not ema:
        del state["ema"]
    files = encode_peer(state)
    assert ("ema.safetensors" in files) is ema
    assert_same(decode_peer(files), state)


def test_written_files_are_the_encoded_ones(tmp_path: Path) -> None:
    """Byte for byte, and readable for those who may read other new files. A second reading notices damage."""
    folder, state = tmp_path / "peer", peer_state()
    folder.mkdir()
    files = write_peer(state, folder)
    assert files == encode_peer(state)
    assert_same(decode_peer(files), state)
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "other").stat().st_mode}
    with (folder / "ema.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(DamagedError, match=r"ema\.safetensors is damaged: its content"):
        decode_peer(files)


@pytest.mark.parametrize("limit", [100, 1000])
def test_a_full_disk_is_an_os_error(tmp_path: Path, limit: int) -> None:
    """Of the libraries that write the files, none has it as an OSError. A limit on the size of files stands for the
    disk; training.pt is the larger file."""
    state = peer_state()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_peer(state, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "training.pt").exists() is (limit == 1000)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    """decode_peer refuses an untrusted training.pt and does not execute it."""
    target = tmp_path / "created"
    pickle.loads(pickle.dumps(Malicious(target)))  # it would work
    target.unlink()
    buffer = io.BytesIO()
    torch.save({"optimizer": Malicious(target)}, buffer)
    files = {**encode_peer(peer_state()), "training.pt": buffer.getvalue()}
    with pytest.raises(UserError, match=r"training\.pt holds more than tensors"):
        decode_peer(files)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("name", ["training.pt", "weights.safetensors", "ema.safetensors"])
def test_garbage_is_a_user_error(name: str) -> None:
    """A stranger can give garbage a right checksum. The error names the file."""
    files = encode_peer(peer_state())
    for garbage in (b"", b"x" * 100, files[name][: len(files[name]) // 2], pickle.dumps([1])):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            decode_peer({**files, name: garbage})
    buffer = io.BytesIO()
    torch.save([1], buffer)
    with pytest.raises(UserError, match=r"training\.pt holds a list"):
        decode_peer({**files, "training.pt": buffer.getvalue()})
    with pytest.raises(UserError, match=r"has no weights\.safetensors"):
        decode_peer({"training.pt": files["training.pt"]})


def test_weights_alone_are_decoded() -> None:
    """They are all that is left after a run with checkpoint.final: weights."""
    state = peer_state()
    files = encode_peer(state)
    del files["training.pt"]
    assert_same(decode_peer(files), {name: state[name] for name in ("net", "ema")})
