"""Checkpoints: what is written is read, what is damaged is noticed, what fails leaves the old one."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dmml.checkpoint.peer_state import decode_peer, encode_peer
from ray_dmml.checkpoint.store import (
    FORMAT,
    CheckpointStore,
    DamagedError,
    dump_with_checksum,
    read_checkpoint,
)
from ray_dmml.errors import CheckpointError, UserError

FILES = {
    "a": {"weights.safetensors": b"0123456789", "training.pt": bytes(range(256))},
    "b": {"weights.safetensors": b"x" * 1000},
}
META = {"best": 0.5, "config": {"seed": 0}}
OTHER = {peer: {name: content[::-1] for name, content in of.items()} for peer, of in FILES.items()}


def folders(store: CheckpointStore) -> list[str]:
    """Everything in the store but its index."""
    return sorted(path.name for path in store.folder.iterdir() if path.name != "index.json")


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder for hundreds of checkpoints, in memory where that can be: each is synced."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ray-dmml-tests-", dir=place) as folder:
        yield Path(folder)


def new_folder(memory: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=memory))


def rewritten(path: Path, **changes: Any) -> None:
    """Changes entries of a manifest, as one who knows how to seal it can."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    (path / "manifest.json").write_bytes(dump_with_checksum({**manifest, **changes}))


def state() -> dict[str, Any]:
    """A state of every kind of thing a peer's has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    return {
        "net": {"weight": weight, "count": torch.tensor(7)},
        "ema": {"weight": weight * 2, "count": torch.tensor(7)},
        "num_ema_updates": torch.tensor(3),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "m": weight}}, "groups": [{"lr": 0.1}]},
        "gradients": {"net.weight": weight.to(torch.bfloat16)},
        "scaler": {},
    }  # fmt: skip


@pytest.mark.parametrize("ema", [True, False])
def test_a_peers_state_survives(ema: bool) -> None:
    """Encoded and decoded it is the same, to the bit; averaged weights are a file of their own."""
    before = state()
    if not ema:
        del before["ema"]
    files = encode_peer(before)
    assert ("ema.safetensors" in files) is ema
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


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    """Older ones go; the best stays however many come after it, until a better one."""
    store = CheckpointStore(tmp_path, keep)
    steps = list(range(0, 20, 2))
    for i, step in enumerate(steps):
        store.save(step, FILES, META, best=step in (4, 14))
        best = [4] if 4 <= step < 14 else [14] if step >= 14 else []
        expected = sorted({*steps[: i + 1][-keep:], *best})
        assert folders(store) == store.kept() == [f"step-{each:08d}" for each in expected]
        assert store.load("last").step == step
        assert not best or store.load("best").step == best[0]


def test_missing_ones_are_told(tmp_path: Path) -> None:
    """No checkpoint, no best one."""
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has no last checkpoint"):
        store.load("last")
    store.save(1, FILES, META, best=False)
    with pytest.raises(UserError, match=r"has no best checkpoint \(no validation classes"):
        store.load("best")


# --- saving that fails ----------------------------------------------------------------------


@pytest.mark.parametrize("obstacle", [".step-00000002.tmp", "index.json.tmp"])
def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, obstacle: str) -> None:
    """Something in the way of the folder's place beside, or of the index: the failure is told, the
    earlier checkpoint is the last and whole, and a later save works."""
    store = CheckpointStore(tmp_path)
    store.save(1, FILES, META, best=True)
    in_the_way = tmp_path / obstacle
    if obstacle == "index.json.tmp":
        in_the_way.mkdir()
    else:
        in_the_way.write_text("in the way")
    with pytest.raises(CheckpointError, match="checkpoint of step 2 cannot be written"):
        store.save(2, FILES, META, best=True)
    assert folders(store) == sorted([obstacle, "step-00000001"])
    assert store.load("last").step == store.load("best").step == 1
    assert store.load("last").peers == FILES
    in_the_way.rmdir() if in_the_way.is_dir() else in_the_way.unlink()
    store.save(2, FILES, META, best=True)
    assert store.load("last").step == 2


def test_a_save_that_fails_half_way_leaves_no_half(tmp_path: Path) -> None:
    """A peer whose file cannot be written after others were: the folder never appears."""
    store = CheckpointStore(tmp_path)
    store.save(1, FILES, META, best=False)
    with pytest.raises(CheckpointError, match="checkpoint of step 2 cannot be written"):
        store.save(2, {**FILES, "c": {"no/such/folder": b""}}, META, best=False)
    assert folders(store) == ["step-00000001"]
    assert store.load("last").peers == FILES


def test_a_save_can_be_killed_at_any_point(memory: Path) -> None:
    """Before each sync, rename and removal: last and best are complete, of the old step or the new
    one, nobody is warned, and the next save leaves nothing of the killed one."""
    old, new = "step-00000002", "step-00000003"
    seen = []
    for calls in range(100):
        store = CheckpointStore(new_folder(memory))
        store.save(1, FILES, META, best=False)
        store.save(2, FILES, META, best=True)
        child = os.fork()
        if child == 0:
            _save_and_die(store, calls)
        status = os.waitpid(child, 0)[1]
        for which in ("last", "best"):
            found = store.load(which, pytest.fail)
            assert found.peers == (FILES if found.path.name == old else OTHER)
        assert store.index() in ({"last": old, "best": old}, {"last": new, "best": new})
        seen.append(store.index()["last"])
        store.save(3, FILES, META, best=False)
        assert store.load("last", pytest.fail).peers == FILES and len(folders(store)) <= 3
        shutil.rmtree(store.folder)
        if status == 0:
            break
    assert seen == sorted(seen) and {*seen} == {old, new}
    assert len(seen) > 8, "the case has lost its point"


def _save_and_die(store: CheckpointStore, calls: int) -> None:
    """In a process of its own: it ends before it touches the disk for the so-manieth time."""

    def counted(call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls < 0:
                os._exit(1)
            return call(*args, **kwargs)

        return instead

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))
    store.save(3, OTHER, META, best=True)
    os._exit(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("a disk of its own can be mounted by root on Linux alone")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_costs_only_the_new_checkpoint(small_disk: Path) -> None:
    """Wherever in the checkpoint the disk is full: the reason is told, nothing of the attempt is
    left, what was there is whole, and the next one that fits is saved."""
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, FILES, META, best=True)
    store.save(2, FILES, META, best=False)
    for size in (3_000_000, 2_080_000, 2_060_000):
        large = {"a": {"weights.safetensors": b"w" * size, "training.pt": b"t" * 10}}
        with pytest.raises(CheckpointError, match=r"step 3 cannot be written: .*No space left"):
            store.save(3, large, META, best=True)
        assert folders(store) == ["step-00000001", "step-00000002"]
    assert store.load("last").peers == store.load("best").peers == FILES
    rest = {"a": {"weights.safetensors": b"w" * 1_000_000}}
    store.save(4, rest, META, best=True)
    assert store.load("last").peers == store.load("best").peers == rest


def test_a_disk_too_full_for_the_index(small_disk: Path) -> None:
    """The last byte of the disk goes to the checkpoint itself: it is taken back."""
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, FILES, META, best=True)
    filler = small_disk / "filler"
    failed = 0
    for room in range(0, 12 * 4096, 4096):  # one of these leaves none for the index
        filler.write_bytes(b"")
        free = os.statvfs(small_disk)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
        try:
            store.save(2, FILES, META, best=True)
        except CheckpointError:
            failed += 1
            assert folders(store) == ["step-00000001"]
            assert store.load("last").step == store.load("best").step == 1
        else:
            break
    assert failed > 3, "the case has lost its point"
    assert store.load("best").step == 2


def test_a_read_only_disk_is_told(small_disk: Path) -> None:
    """Reading goes on, and so does saving once it can be written again."""
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, FILES, META, best=True)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written: .*Read-only"):
        store.save(2, FILES, META, best=True)
    assert store.load("last").peers == store.load("best").peers == FILES
    subprocess.run([*remount[:2], "remount,rw", remount[3]], check=True)
    store.save(2, FILES, META, best=True)
    assert store.load("best").step == 2


# --- saving again ---------------------------------------------------------------------------


def test_a_checkpoint_nobody_names_is_written_again(tmp_path: Path) -> None:
    """A run killed between a checkpoint and its index leaves one that a resumed run, whose settings
    may have changed since, does not take for its own."""
    store = CheckpointStore(tmp_path)
    store.save(1, FILES, META, best=False)
    index = (tmp_path / "index.json").read_bytes()
    store.save(2, FILES, META, best=True)
    (tmp_path / "index.json").write_bytes(index)
    assert store.load("last").step == 1
    (tmp_path / ".step-00000003.tmp").mkdir()
    changed = {**META, "best": 0.75}
    store.save(2, FILES, changed, best=True)
    assert store.load("best").meta == changed
    assert folders(store) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_can_be_saved_again(tmp_path: Path, fails: bool) -> None:
    """The new content is the last; where it cannot be written, the old one still is."""
    store = CheckpointStore(tmp_path, num_to_keep=1)
    store.save(1, FILES, META, best=True)
    if fails:
        with pytest.raises(CheckpointError):
            store.save(1, {**OTHER, "c": {"no/such/folder": b""}}, META, best=True)
        assert store.load("last").peers == store.load("best").peers == FILES
    for content in (OTHER, FILES, OTHER):
        store.save(1, content, META, best=True)
        assert store.load("last").peers == store.load("best").peers == content
        assert len(folders(store)) == 1


# --- damage ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_whatever_is_damaged_the_one_before_is_used(memory: Path, data: st.DataObject) -> None:
    """Any byte of any file of the last checkpoint, any truncation, any missing file: the one before
    comes back to the bit, the warning names the file, and the damaged step can be saved again."""
    store = CheckpointStore(new_folder(memory))
    store.save(2, OTHER, META, best=True)
    store.save(4, FILES, META, best=False)
    path = store.save(6, OTHER, {**META, "name": "\u00e9"}, best=False)
    assert folders(store) == ["step-00000002", "step-00000004", "step-00000006"]
    victim = data.draw(st.sampled_from(sorted(f for f in path.rglob("*") if f.is_file())))
    content = bytearray(victim.read_bytes())
    damage = data.draw(st.sampled_from(["flip", "set", "cut", "grow", "remove"]))
    position = data.draw(st.integers(0, len(content) - 1))
    if damage == "flip":
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "set":
        content[position] = data.draw(st.integers(0, 255).filter(lambda x: x != content[position]))
    elif damage == "cut":
        del content[position:]
    elif damage == "grow":
        content += b" "
    victim.write_bytes(content)
    if damage == "remove":
        victim.unlink()
    told: list[str] = []
    found = store.load("last", told.append)
    assert (found.step, found.peers, found.meta) == (4, FILES, META)
    assert len(told) == 1 and str(victim) in told[0] and "step-00000004 of step 4" in told[0]
    store.save(6, FILES, META, best=False)
    assert store.load("last", pytest.fail).peers == FILES
    assert store.load("best").step == 2
    good = [read_checkpoint(store.folder / name).step for name in folders(store)]
    assert good == [2, 4, 6], "the damaged one is gone and takes no good one's place"


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_damaged_index_loses_nothing(memory: Path, data: st.DataObject) -> None:
    """Whatever is wrong with it, last and best are the right ones, and the best outlives later
    saves."""
    store = CheckpointStore(new_folder(memory), num_to_keep=3)
    for step in range(1, 6):
        store.save(step, FILES, META, best=step in (1, 3))
    file = store.folder / "index.json"
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    damage = data.draw(st.sampled_from(["set", "cut", "remove"]))
    if damage == "set":
        content[position] = data.draw(st.integers(0, 255).filter(lambda x: x != content[position]))
    else:
        del content[position:]
    file.write_bytes(content)
    if damage == "remove":
        file.unlink()
    told: list[str] = []
    assert store.load("last", told.append).step == 5 and store.load("best").step == 3
    assert len(told) == 1 and str(file) in told[0]
    for step in range(6, 12):
        store.save(step, FILES, META, best=False)
    assert store.load("last", pytest.fail).step == 11 and store.load("best").step == 3


def test_a_run_that_goes_back_forgets_what_came_after(tmp_path: Path) -> None:
    """The last two are damaged, the one before is used, and a step before theirs is saved next: what
    is kept is of one course of events."""
    store = CheckpointStore(tmp_path, num_to_keep=3)
    for step in (2, 4, 6):
        path = store.save(step, FILES, META, best=step == 2)
        if step > 2:
            (path / "manifest.json").write_text("")
    told: list[str] = []
    assert store.load("last", told.append).step == 2
    assert "step-00000004" in told[0] and "step-00000006" in told[0]
    store.save(3, OTHER, META, best=False)
    assert folders(store) == ["step-00000002", "step-00000003"]
    assert store.load("last", pytest.fail).peers == OTHER


def test_a_damaged_best_is_not_replaced_by_another(tmp_path: Path) -> None:
    """Silently judging other weights would be worse than none."""
    store = CheckpointStore(tmp_path)
    path = store.save(2, FILES, META, best=True)
    store.save(4, FILES, META, best=False)
    (path / "a" / "training.pt").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"step-00000002/a/training\.pt is damaged"):
        store.load("best")
    assert store.load("last", pytest.fail).step == 4


def test_where_all_are_damaged_all_are_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (2, 4):
        (store.save(step, FILES, META, best=False) / "b" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used") as caught:
        store.load("last")
    assert "step-00000002" in str(caught.value) and "step-00000004" in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_flipped_byte_is_noticed_and_named(memory: Path, data: st.DataObject) -> None:
    """Whichever byte of whichever file of a peer is damaged."""
    folder = new_folder(memory)
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


# --- of other versions and of strangers -----------------------------------------------------


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """A checkpoint of a later version says so instead of failing somewhere; it is not damaged, so no
    older one takes its place."""
    store = CheckpointStore(tmp_path)
    store.save(2, FILES, META, best=False)
    path = store.save(3, FILES, META, best=False)
    rewritten(path, format=FORMAT + 1, version="9.8.7", files="somewhere else by then")
    expected = rf"written by ray-dmml 9\.8\.7 in format {FORMAT + 1}.*reads up to {FORMAT}: update"
    for read in (lambda: read_checkpoint(path), lambda: store.load("last", pytest.fail)):
        with pytest.raises(UserError, match=expected):
            read()


def test_checkpoints_of_before_there_were_checksums_load(tmp_path: Path) -> None:
    """The first format had none of its manifest, no version, and an index without a checksum."""
    store = CheckpointStore(tmp_path)
    store.save(2, OTHER, META, best=True)
    path = store.save(4, FILES, META, best=False)
    for folder in tmp_path.glob("step-*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        old = {key: manifest[key] for key in ("format", "step", "files", "meta")}
        (folder / "manifest.json").write_text(json.dumps(old, indent=1))
    names = {"last": path.name, "best": "step-00000002"}
    (tmp_path / "index.json").write_text(json.dumps(names))
    found = store.load("last", pytest.fail)
    assert (found.peers, found.meta, found.version) == (FILES, META, None)
    assert store.load("best").peers == OTHER
    store.save(6, FILES, META, best=False)
    assert folders(store) == ["step-00000002", "step-00000004", "step-00000006"]


NOT_A_FILE = [
    "../b/x",
    "a/../../x",
    "/etc/passwd",
    "a/b/c",
    "a",
    "a/..",
    "./x",
    "a\\\\..\\x",
    "a/",
    "a/\0",
]


@pytest.mark.parametrize("name", NOT_A_FILE)
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    """Whatever their size and checksum are said to be, they are not touched."""
    path = CheckpointStore(tmp_path).save(3, FILES, META, best=False)
    rewritten(path, files={name: {"size": 10**30, "sha256": "0" * 64}})
    with pytest.raises(DamagedError, match="is not the name of a peer's file"):
        read_checkpoint(path)


@pytest.mark.parametrize("what", ["a/training.pt", "a", "manifest.json"])
def test_links_and_pipes_are_refused(tmp_path: Path, what: str) -> None:
    """A link may lead to another's file; a pipe would keep the reader waiting for ever."""
    path = CheckpointStore(tmp_path / "run").save(3, FILES, META, best=False)
    elsewhere = tmp_path / "elsewhere"
    (path / what).rename(elsewhere)
    (path / what).symlink_to(elsewhere)
    with pytest.raises(DamagedError, match="not a plain file"):
        read_checkpoint(path)
    (path / what).unlink()
    os.mkfifo(path / what)
    with pytest.raises(DamagedError, match="not a plain file"):
        read_checkpoint(path)


def test_only_what_the_manifest_names_is_adopted(tmp_path: Path) -> None:
    """The store has the other run's checkpoint and no more, whatever else lies in its folder."""
    path = CheckpointStore(tmp_path / "donor").save(3, FILES, META, best=True)
    (path / "link").symlink_to("/")
    store = CheckpointStore(tmp_path / "heir")
    store.save(9, OTHER, META, best=True)
    store.adopt(path)
    assert store.load("last").peers == FILES and store.load("last").meta == META
    assert set(store.index()) == {"last"} and folders(store) == ["step-00000003"]
    assert sorted(each.name for each in store.path("last").iterdir()) == ["a", "b", "manifest.json"]


def test_pickles_for_manifest_and_index_run_no_code(tmp_path: Path) -> None:
    """Both are read as JSON."""
    made = tmp_path / "made"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (made,))

    store = CheckpointStore(tmp_path / "run")
    path = store.save(3, FILES, META, best=False)
    for file in (path / "manifest.json", store.folder / "index.json"):
        file.write_bytes(pickle.dumps(Malicious(), protocol=0))
    with pytest.raises(UserError, match="no checkpoint in"):
        store.load("last")
    assert not made.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
FIELDS = st.sampled_from(["format", "version", "step", "best", "files", "meta", "checksum"])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(FIELDS, JSON), st.booleans())
def test_strange_manifests_are_user_errors(
    memory: Path, changes: dict[str, Any], seal: bool
) -> None:
    """Any JSON in any field, dump_with_checksum or not, is read or refused with a sentence."""
    store = CheckpointStore(new_folder(memory))
    path = store.save(3, FILES, META, best=False)
    changes.pop("checksum", None) if seal else None
    if seal:
        rewritten(path, **changes)
    else:
        found = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**found, **changes}))
    with suppress(UserError):
        assert isinstance(store.load("last").meta, dict)
    assert store.index()["last"] == path.name


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, "[]", "null", '"x"', ""])
def test_manifests_that_strain_the_reader_are_refused(tmp_path: Path, content: str) -> None:
    path = CheckpointStore(tmp_path).save(3, FILES, META, best=False)
    (path / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["training.pt", "weights.safetensors", "ema.safetensors"])
def test_garbage_in_a_peers_files_is_a_user_error(name: str) -> None:
    """With a right checksum, as a stranger can give it; the file is named."""
    files = encode_peer(state())
    for garbage in (b"", b"x" * 100, files[name][: len(files[name]) // 2], pickle.dumps([1])):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            decode_peer({**files, name: garbage})
    buffer = io.BytesIO()
    torch.save([1], buffer)
    with pytest.raises(UserError, match=r"training\.pt holds a list"):
        decode_peer({**files, "training.pt": buffer.getvalue()})
    with pytest.raises(UserError, match=r"has no training\.pt"):
        decode_peer({"weights.safetensors": files["weights.safetensors"]})
