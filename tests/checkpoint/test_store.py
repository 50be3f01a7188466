"""Checkpoints: what is saved is loaded, damage is noticed, and a failed save leaves the old ones."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import FILES, META, Malicious, load_without_warnings, writing
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_dmml.checkpoint.manifest import DamagedError, dump_with_checksum
from ray_dmml.checkpoint.store import CheckpointStore, read_checkpoint
from ray_dmml.errors import CheckpointError, UserError

OTHER = {peer: {name: content[::-1] for name, content in of.items()} for peer, of in FILES.items()}


def folders(store: CheckpointStore) -> list[str]:
    """Everything in the store but its index."""
    return sorted(path.name for path in store.folder.iterdir() if path.name != "index.json")


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder for hundreds of checkpoints. It is in memory if possible, because each one is synced."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="ray-dmml-tests-", dir=place) as folder:
        yield Path(folder)


def new_folder(memory: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.mark.parametrize("best", [1, 3])
def test_weights_alone_are_kept(tmp_path: Path, best: int) -> None:
    """The last and the best checkpoint lose the state for resuming and nothing else. A second time changes nothing."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(step, writing(FILES), META, best=step == best)
    store.keep_weights()
    names = folders(store)
    assert len(names) == len({best, 3})
    weights = {peer: {"weights.safetensors": files["weights.safetensors"]} for peer, files in FILES.items()}
    for which, step in (("last", 3), ("best", best)):
        kept = load_without_warnings(store, which)
        assert (kept.step, kept.meta, kept.peers) == (step, META, weights)
        assert not kept.can_be_resumed()
    store.keep_weights()
    assert folders(store) == names
    (tmp_path / "index.json").unlink()  # the manifests know, too
    assert {which: read_checkpoint(store.path(which)).step for which in ("last", "best")} == {"last": 3, "best": best}


@pytest.mark.parametrize("number", range(12))
def test_weights_alone_at_any_interruption(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """If the disk refuses the n-th sync or rename, the last and the best checkpoint are whole, with or without the
    state, and nothing half-written is left after the next attempt."""
    store = CheckpointStore(new_folder(memory))
    for step in (1, 2, 3):
        store.save(step, writing(FILES), META, best=step == 2)
    left = [number]

    def failing(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "rename", failing(os.rename))
        patch.setattr(os, "replace", failing(os.replace))
        with pytest.raises(CheckpointError, match="No space left"):
            store.keep_weights()
    assert {which: load_without_warnings(store, which).step for which in ("last", "best")} == {"last": 3, "best": 2}
    store.keep_weights()
    assert len(folders(store)) == 2 and not any(name.startswith(".") for name in folders(store))
    assert not any(load_without_warnings(store, which).can_be_resumed() for which in ("last", "best"))


def test_saved_is_loaded(tmp_path: Path) -> None:
    """Step, meta and every peer's files come back. Nothing but the checkpoint and the index is left."""
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.index() == {} and store.names() == []
    path = store.save(12, writing(FILES), META, best=True)
    for which in ("last", "best"):
        loaded = store.load(which)
        assert (loaded.path, loaded.step, loaded.meta, loaded.peers) == (path, 12, META, FILES)
        assert store.path(which) == path
    assert sorted(file.name for file in store.folder.iterdir()) == ["index.json", path.name]


@pytest.mark.parametrize("num_to_keep", [1, 2, 3])
def test_the_last_few_and_the_best_are_kept(tmp_path: Path, num_to_keep: int) -> None:
    """Older ones are removed. The best one stays however many follow, until there is a better one."""
    store = CheckpointStore(tmp_path, num_to_keep)
    steps = list(range(0, 20, 2))
    for i, step in enumerate(steps):
        store.save(step, writing(FILES), META, best=step in (4, 14))
        best = [4] if 4 <= step < 14 else [14] if step >= 14 else []
        expected = sorted({*steps[: i + 1][-num_to_keep:], *best})
        assert folders(store) == store.names() == [f"step-{each:08d}" for each in expected]
        assert store.load("last").step == step
        assert not best or store.load("best").step == best[0]


def test_a_missing_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    """No checkpoint at all, and no best one."""
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has no last checkpoint"):
        store.load("last")
    store.save(1, writing(FILES), META, best=False)
    with pytest.raises(UserError, match=r"has no best checkpoint \(no validation classes"):
        store.load("best")


# --- saving that fails ----------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    """A folder in the place of the index: the save fails, the earlier checkpoint is the last and undamaged, and a later
    save works."""
    store = CheckpointStore(tmp_path)
    store.save(1, writing(FILES), META, best=True)
    in_the_way = tmp_path / "index.json.tmp"
    in_the_way.mkdir()
    with pytest.raises(CheckpointError, match="checkpoint of step 2 cannot be written"):
        store.save(2, writing(FILES), META, best=True)
    assert folders(store) == ["index.json.tmp", "step-00000001"]
    assert store.load("last").step == store.load("best").step == 1
    assert store.load("last").peers == FILES
    in_the_way.rmdir()
    store.save(2, writing(FILES), META, best=True)
    assert store.load("last").step == 2


def test_a_save_that_fails_half_way_leaves_no_half(tmp_path: Path) -> None:
    """One peer's file cannot be written after others were: the folder never appears."""
    store = CheckpointStore(tmp_path)
    store.save(1, writing(FILES), META, best=False)
    with pytest.raises(CheckpointError, match="checkpoint of step 2 cannot be written"):
        store.save(2, writing({**FILES, "c": {"no/such/folder": b""}}), META, best=False)
    assert folders(store) == ["step-00000001"]
    assert store.load("last").peers == FILES


@pytest.mark.ray
def test_a_save_can_be_killed_at_any_point(memory: Path) -> None:
    """Before each sync, rename and removal: last and best are complete, of the old step or the new one,
    there is no warning, and the next save removes what the killed one left."""
    old, new = "step-00000002", "step-00000003"
    seen = []
    for calls in range(100):
        store = CheckpointStore(new_folder(memory))
        store.save(1, writing(FILES), META, best=False)
        store.save(2, writing(FILES), META, best=True)
        child = os.fork()
        if child == 0:
            _save_and_die(store, calls)
        status = os.waitpid(child, 0)[1]
        for which in ("last", "best"):
            loaded = load_without_warnings(store, which)
            assert loaded.peers == (FILES if loaded.path.name == old else OTHER)
        assert store.index() in ({"last": old, "best": old}, {"last": new, "best": new})
        seen.append(store.index()["last"])
        store.save(3, writing(FILES), META, best=False)
        assert load_without_warnings(store).peers == FILES and len(folders(store)) <= 3
        shutil.rmtree(store.folder)
        if status == 0:
            break
    assert seen == sorted(seen) and {*seen} == {old, new}
    assert len(seen) > 8, "too few points to die at"


def _save_and_die(store: CheckpointStore, calls: int) -> None:
    """In a process of its own, which ends before the given number of writes to the disk."""

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
    store.save(3, writing(OTHER), META, best=True)
    os._exit(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a disk for a test")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.ray
def test_a_full_disk_costs_only_the_new_checkpoint(small_disk: Path) -> None:
    """Wherever in the checkpoint the disk is full: the error gives the reason, nothing of the attempt is
    left, the earlier checkpoints are undamaged, and the next one that fits is saved."""
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, writing(FILES), META, best=True)
    store.save(2, writing(FILES), META, best=False)
    for size in (3_000_000, 2_080_000, 2_060_000):
        large = {"a": {"weights.safetensors": b"w" * size, "training.pt": b"t" * 10}}
        with pytest.raises(CheckpointError, match=r"step 3 cannot be written: .*No space left"):
            store.save(3, writing(large), META, best=True)
        assert folders(store) == ["step-00000001", "step-00000002"]
    assert store.load("last").peers == store.load("best").peers == FILES
    rest = {"a": {"weights.safetensors": b"w" * 1_000_000}}
    store.save(4, writing(rest), META, best=True)
    assert store.load("last").peers == store.load("best").peers == rest


@pytest.mark.ray
def test_a_disk_too_full_for_the_index(small_disk: Path) -> None:
    """The checkpoint takes the last byte of the disk: it is removed again."""
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, writing(FILES), META, best=True)
    filler = small_disk / "filler"
    failed = 0
    for room in range(0, 12 * 4096, 4096):  # one of these leaves none for the index
        filler.write_bytes(b"")
        free = os.statvfs(small_disk)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
        try:
            store.save(2, writing(FILES), META, best=True)
        except CheckpointError:
            failed += 1
            assert folders(store) == ["step-00000001"]
            assert store.load("last").step == store.load("best").step == 1
        else:
            break
    assert failed > 3, "the disk was never full at the right moment"
    assert store.load("best").step == 2


@pytest.mark.ray
def test_a_read_only_disk_is_an_error(small_disk: Path) -> None:
    """Loading still works, and saving works again once the disk is writable."""
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, writing(FILES), META, best=True)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written: .*Read-only"):
        store.save(2, writing(FILES), META, best=True)
    assert store.load("last").peers == store.load("best").peers == FILES
    subprocess.run([*remount[:2], "remount,rw", remount[3]], check=True)
    store.save(2, writing(FILES), META, best=True)
    assert store.load("best").step == 2


# --- saving again ---------------------------------------------------------------------------


def test_a_checkpoint_outside_of_the_index_is_written_again(tmp_path: Path) -> None:
    """A run that is killed between a checkpoint and its index leaves a checkpoint. A resumed run, whose
    settings may have changed, does not take it for its own."""
    store = CheckpointStore(tmp_path)
    store.save(1, writing(FILES), META, best=False)
    index = (tmp_path / "index.json").read_bytes()
    store.save(2, writing(FILES), META, best=True)
    (tmp_path / "index.json").write_bytes(index)
    assert store.load("last").step == 1 and store.names() == ["step-00000001"]
    (tmp_path / ".step-00000003.0123456789abcdef.tmp").mkdir()
    changed = {**META, "best": 0.75}
    store.save(2, writing(FILES), changed, best=True)
    assert store.load("best").meta == changed
    assert folders(store) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_can_be_saved_again(tmp_path: Path, fails: bool) -> None:
    """The new content is the last. If it cannot be written, the old content still is."""
    store = CheckpointStore(tmp_path, num_to_keep=1)
    store.save(1, writing(FILES), META, best=True)
    if fails:
        with pytest.raises(CheckpointError):
            store.save(1, writing({**OTHER, "c": {"no/such/folder": b""}}), META, best=True)
        assert store.load("last").peers == store.load("best").peers == FILES
    for content in (OTHER, FILES, OTHER):
        store.save(1, writing(content), META, best=True)
        assert store.load("last").peers == store.load("best").peers == content
        assert len(folders(store)) == 1


# --- damage ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_whatever_is_damaged_the_one_before_is_used(memory: Path, data: st.DataObject) -> None:
    """Any byte of any file of the last checkpoint, any truncation, any missing file: the one before is
    loaded to the bit, the warning names the file, and the damaged step can be saved again."""
    store = CheckpointStore(new_folder(memory))
    store.save(2, writing(OTHER), META, best=True)
    store.save(4, writing(FILES), META, best=False)
    path = store.save(6, writing(OTHER), {**META, "name": "\u00e9"}, best=False)
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
    loaded, [warning] = store.load_with_warnings("last")
    assert (loaded.step, loaded.peers, loaded.meta) == (4, FILES, META)
    assert str(victim) in warning and "step-00000004 of step 4" in warning
    store.save(6, writing(FILES), META, best=False)
    assert load_without_warnings(store).peers == FILES
    assert store.load("best").step == 2
    good = [read_checkpoint(store.folder / name).step for name in folders(store)]
    assert good == [2, 4, 6], "the damaged one is removed and replaces no good one"


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_damaged_index_loses_nothing(memory: Path, data: st.DataObject) -> None:
    """Whatever the damage, last and best are the right ones, and the best outlives later saves."""
    store = CheckpointStore(new_folder(memory), num_to_keep=3)
    for step in range(1, 6):
        store.save(step, writing(FILES), META, best=step in (1, 3))
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
    loaded, [warning] = store.load_with_warnings("last")
    assert loaded.step == 5 and store.load("best").step == 3
    assert str(file) in warning
    for step in range(6, 10):
        store.save(step, writing(FILES), META, best=False)
    assert load_without_warnings(store).step == 9 and store.load("best").step == 3


def test_warnings_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged checkpoint and a missing index are two warnings of `load`."""
    caplog.set_level(logging.WARNING, "ray_dmml")
    store = CheckpointStore(tmp_path)
    store.save(2, writing(FILES), META, best=False)
    (store.save(4, writing(FILES), META, best=False) / "a" / "training.pt").write_bytes(b"")
    (tmp_path / "index.json").unlink()
    assert store.load("last").step == 2
    index, damage = [record.getMessage() for record in caplog.records]
    assert index == f"{tmp_path}/index.json is missing; the newest checkpoint beside it is the last"
    assert "step-00000004/a/training.pt is damaged" in damage
    assert damage.endswith(f"; {tmp_path}/step-00000002 of step 2 is used instead")


def test_a_run_that_goes_back_forgets_what_came_after(tmp_path: Path) -> None:
    """The last two are damaged, the one before is used, and an earlier step than theirs is saved next:
    all checkpoints that are kept belong to one course of training."""
    store = CheckpointStore(tmp_path, num_to_keep=3)
    for step in (2, 4, 6):
        path = store.save(step, writing(FILES), META, best=step == 2)
        if step > 2:
            (path / "manifest.json").write_text("")
    loaded, [warning] = store.load_with_warnings("last")
    assert loaded.step == 2
    assert "step-00000004" in warning and "step-00000006" in warning
    store.save(3, writing(OTHER), META, best=False)
    assert folders(store) == ["step-00000002", "step-00000003"]
    assert load_without_warnings(store).peers == OTHER


def test_a_damaged_best_is_not_replaced_by_another(tmp_path: Path) -> None:
    """To evaluate other weights without a word would be worse than an error."""
    store = CheckpointStore(tmp_path)
    path = store.save(2, writing(FILES), META, best=True)
    store.save(4, writing(FILES), META, best=False)
    (path / "a" / "training.pt").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"step-00000002/a/training\.pt is damaged"):
        store.load("best")
    assert load_without_warnings(store).step == 4


def test_damage_that_a_reader_finds(tmp_path: Path) -> None:
    """Unverified, a checkpoint is loaded with a changed byte, but not with a missing file. Once it is set aside, the
    one before is used; saved again, it is the last one."""
    store = CheckpointStore(tmp_path)
    store.save(2, writing(OTHER), META, best=False)
    file = store.save(4, writing(FILES), META, best=False) / "b" / "weights.safetensors"
    file.write_bytes(b"y" * 1000)
    checkpoint = store.load("last", verify=False)
    assert checkpoint.step == 4 and checkpoint.peers["a"] == FILES["a"]
    with pytest.raises(DamagedError, match=r"b/weights\.safetensors is damaged: its content") as damage:
        checkpoint.peers["b"]["weights.safetensors"]
    store.set_aside(checkpoint, damage.value)
    found, [warning] = store.load_with_warnings("last", verify=False)
    assert found.peers == OTHER and f"{file} is damaged" in warning and "step 2 is used instead" in warning
    file = store.save(4, writing(OTHER), META, best=False) / "b" / "weights.safetensors"
    assert load_without_warnings(store).step == 4
    file.unlink()
    with pytest.raises(DamagedError, match=r"b/weights\.safetensors cannot be read"):
        read_checkpoint(file.parents[1], verify=False)


def test_a_process_that_outlives_its_run(tmp_path: Path) -> None:
    """It goes on in the folder of a checkpoint that was given up, which the next save removes, and does no harm to a
    new one of the same step."""
    store = CheckpointStore(tmp_path)
    left: list[Path] = []

    def killed(folder: Path) -> Any:
        left.append(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(2, killed, META, best=False)
    left[0].mkdir()
    writing(OTHER)(left[0])
    store.save(2, writing(FILES), META, best=False)
    assert load_without_warnings(store).peers == FILES and folders(store) == ["step-00000002"]


def test_where_all_are_damaged_all_are_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (2, 4):
        (store.save(step, writing(FILES), META, best=False) / "b" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used") as caught:
        store.load("last")
    assert "step-00000002" in str(caught.value) and "step-00000004" in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_flipped_byte_is_noticed_and_named(memory: Path, data: st.DataObject) -> None:
    """Whichever byte of whichever file of a peer is damaged."""
    folder = new_folder(memory)
    path = CheckpointStore(folder).save(3, writing(FILES), META, best=False)
    peer = data.draw(st.sampled_from(sorted(FILES)))
    name = data.draw(st.sampled_from(sorted(FILES[peer])))
    content = bytearray(FILES[peer][name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (path / peer / name).write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        read_checkpoint(path)
    assert str(path / peer / name) in str(caught.value)


def test_other_damage_is_named(tmp_path: Path) -> None:
    """A truncated file, a missing one, a truncated manifest, a missing folder."""
    store = CheckpointStore(tmp_path)
    path = store.save(3, writing(FILES), META, best=False)
    victim = path / "b" / "weights.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"b/weights.safetensors is damaged: 999 bytes .*1000 bytes"):
        store.load("last")
    victim.unlink()
    with pytest.raises(UserError, match=r"b/weights\.safetensors"):
        store.load("last")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        store.load("last")
    (tmp_path / "index.json").write_bytes(dump_with_checksum({"last": "step-00000099"}))
    with pytest.raises(UserError, match="step-00000099 cannot be read"):
        store.load("last")


# --- strangers ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a/training.pt", "a", "manifest.json"])
def test_links_and_pipes_are_refused(tmp_path: Path, what: str) -> None:
    """A link may lead to another user's file, and a pipe would block the reader for ever."""
    path = CheckpointStore(tmp_path / "run").save(3, writing(FILES), META, best=False)
    elsewhere = tmp_path / "elsewhere"
    (path / what).rename(elsewhere)
    (path / what).symlink_to(elsewhere)
    with pytest.raises(DamagedError, match="not a plain file"):
        read_checkpoint(path)
    (path / what).unlink()
    os.mkfifo(path / what)
    with pytest.raises(DamagedError, match="not a plain file"):
        read_checkpoint(path)


def test_pickles_for_manifest_and_index_run_no_code(tmp_path: Path) -> None:
    """Both are read as JSON."""
    target = tmp_path / "created"
    store = CheckpointStore(tmp_path / "run")
    path = store.save(3, writing(FILES), META, best=False)
    for file in (path / "manifest.json", store.folder / "index.json"):
        file.write_bytes(pickle.dumps(Malicious(target), protocol=0))
    with pytest.raises(UserError, match="no checkpoint in"):
        store.load("last")
    assert not target.exists()
