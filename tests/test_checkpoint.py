"""Checkpoints: what is written is read, what is damaged is noticed, what fails leaves the old one."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dmml.checkpoint import (
    FORMAT,
    CheckpointStore,
    read_checkpoint,
)
from ray_dmml.errors import UserError
from ray_dmml.peerfiles import decode_peer, encode_peer

FILES = {
    "a": {"weights.safetensors": b"0123456789", "training.pt": bytes(range(256))},
    "b": {"weights.safetensors": b"x" * 1000},
}
META = {"best": 0.5, "config": {"seed": 0}}


def state() -> dict[str, Any]:
    """A state of every kind of thing a peer's has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    return {
        "net": {"weight": weight, "count": torch.tensor(7)},
        "averaged": {"weight": weight * 2, "count": torch.tensor(7)},
        "num_averaged": torch.tensor(3),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "m": weight}}, "groups": [{"lr": 0.1}]},
        "gradients": {"net.weight": weight.to(torch.bfloat16)},
        "scaler": {},
    }  # fmt: skip


@pytest.mark.parametrize("averaged", [True, False])
def test_a_peers_state_survives(averaged: bool) -> None:
    """Encoded and decoded it is the same, to the bit; averaged weights are a file of their own."""
    before = state()
    if not averaged:
        del before["averaged"]
    files = encode_peer(before)
    assert ("averaged.safetensors" in files) is averaged
    assert_same(decode_peer(files), before)


def test_a_pickle_in_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """training.pt from a stranger is refused, not executed."""
    made = tmp_path / "made"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (made,))

    pickle.loads(pickle.dumps(Malicious()))  # it would work
    made.unlink()
    buffer = io.BytesIO()
    torch.save({"optimizer": Malicious()}, buffer)
    files = {**encode_peer(state()), "training.pt": buffer.getvalue()}
    with pytest.raises(UserError, match=r"training\.pt holds more than tensors"):
        decode_peer(files)
    assert not made.exists()


def test_saved_is_loaded(tmp_path: Path) -> None:
    """Step, meta and every peer's files come back; nothing but the checkpoint and its index is left."""
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.index() == {}
    path = store.save(12, FILES, META, best=True)
    for which in ("last", "best"):
        found = store.load(which)
        assert (found.path, found.step, found.meta, found.peers) == (path, 12, META, FILES)
    assert sorted(file.name for file in store.folder.iterdir()) == ["index.json", path.name]


def test_only_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    """Older ones go; the best stays however many come after it, until a better one."""
    store = CheckpointStore(tmp_path)

    def save(step: int, best: bool) -> list[str]:
        store.save(step, FILES, META, best=best)
        return sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir())

    assert save(0, False) == ["step-00000000"]
    assert save(2, True) == ["step-00000002"]
    assert save(4, False) == ["step-00000002", "step-00000004"]
    assert save(6, False) == ["step-00000002", "step-00000006"]
    assert store.load("best").step == 2 and store.load("last").step == 6
    assert save(8, True) == ["step-00000008"]


def test_missing_ones_are_told(tmp_path: Path) -> None:
    """No checkpoint, no best one, a damaged index."""
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has no last checkpoint"):
        store.load("last")
    store.save(1, FILES, META, best=False)
    with pytest.raises(UserError, match=r"has no best checkpoint \(no validation classes"):
        store.load("best")
    (store.folder / "index.json").write_text('{"last": ')
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        store.load("last")


@pytest.mark.parametrize("obstacle", ["step-00000002", ".step-00000002.tmp", "index.json.tmp"])
def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, obstacle: str) -> None:
    """Something in the way of the folder, of its place beside, or of the index: the failure is
    told, the earlier checkpoint is the last and whole, and a later save works."""
    store = CheckpointStore(tmp_path)
    store.save(1, FILES, META, best=True)
    in_the_way = tmp_path / obstacle
    if obstacle == "index.json.tmp":
        in_the_way.mkdir()
    else:
        in_the_way.write_text("in the way")
    with pytest.raises(UserError, match="checkpoint of step 2 cannot be written"):
        store.save(2, FILES, META, best=True)
    assert store.load("last").step == store.load("best").step == 1
    assert store.load("last").peers == FILES
    in_the_way.rmdir() if in_the_way.is_dir() else in_the_way.unlink()
    store.save(2, FILES, META, best=True)
    assert store.load("last").step == 2


def test_a_save_that_fails_half_way_leaves_no_half(tmp_path: Path) -> None:
    """A peer whose file cannot be written after others were: the folder never appears."""
    store = CheckpointStore(tmp_path)
    store.save(1, FILES, META, best=False)
    with pytest.raises(UserError, match="checkpoint of step 2 cannot be written"):
        store.save(2, {**FILES, "c": {"no/such/folder": b""}}, META, best=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["index.json", "step-00000001"]
    assert store.load("last").peers == FILES


def test_a_checkpoint_nobody_names_is_written_again(tmp_path: Path) -> None:
    """A run killed between a checkpoint and its index leaves one that a resumed run, whose settings
    may have changed since, does not take for its own."""
    store = CheckpointStore(tmp_path)
    store.save(1, FILES, META, best=False)
    index = (tmp_path / "index.json").read_bytes()
    store.save(2, FILES, META, best=True)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000001")
    (tmp_path / "index.json").write_bytes(index)
    changed = {**META, "best": 0.75}
    store.save(2, FILES, changed, best=True)
    assert store.load("best").meta == changed


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_flipped_byte_is_noticed_and_named(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Whichever byte of whichever file of a peer is damaged."""
    folder = tmp_path_factory.mktemp("flipped")
    path = CheckpointStore(folder).save(3, FILES, META, best=False)
    peer = data.draw(st.sampled_from(sorted(FILES)))
    name = data.draw(st.sampled_from(sorted(FILES[peer])))
    content = bytearray(FILES[peer][name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (path / peer / name).write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        read_checkpoint(path)
    assert str(path / peer / name) in str(caught.value)


def test_other_damage_is_named(tmp_path: Path) -> None:
    """A truncated file, a missing one, a manifest cut short, a checkpoint folder that is gone."""
    store = CheckpointStore(tmp_path)
    path = store.save(3, FILES, META, best=False)
    victim = path / "b" / "weights.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"b/weights.safetensors is damaged: 999 bytes .*1000 bytes"
    ):
        store.load("last")
    victim.unlink()
    with pytest.raises(UserError, match=r"b/weights\.safetensors"):
        store.load("last")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        store.load("last")
    (tmp_path / "index.json").write_text('{"last": "step-00000099"}')
    with pytest.raises(UserError, match="step-00000099 cannot be read"):
        store.load("last")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """A checkpoint of a later version says so instead of failing somewhere."""
    path = CheckpointStore(tmp_path).save(3, FILES, META, best=False)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"format {FORMAT + 1}.*reads up to {FORMAT}: update"):
        read_checkpoint(path)
