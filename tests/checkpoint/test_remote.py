"""A run's copy in a folder and in a real S3 server: it is always a whole run, and comes back as one."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import S3Server, tiny
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.config.schema import Config
from ray_dmml.errors import Interrupted
from ray_dmml.training.run_dir import RunDir
from ray_dmml.training.trainer import Silent, train

pytest.importorskip("pyarrow.fs", reason="ray[tune] brings pyarrow, which is not installed")

from pyarrow import fs

from ray_dmml import filesystem as uri_module
from ray_dmml.checkpoint.remote import RunStorage
from ray_dmml.checkpoint.store import CheckpointStore, dump_with_checksum
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.filesystem import open_uri, without_secrets

META = {"best": 0.5}


def content(seed: int, size: int = 1000) -> dict[str, dict[str, bytes]]:
    """Two peers' files."""
    weights = {"weights.safetensors": bytes([seed]) * size, "training.pt": bytes(range(256))}
    return {"peer0": weights, "peer1": {"weights.safetensors": bytes([seed]) * 10}}


def make_run(path: Path, *steps: int, best: int | None = None) -> CheckpointStore:
    """A run's folder with checkpoints."""
    store = CheckpointStore(path / "checkpoints")
    for step in steps:
        store.save(step, content(step), META, best=step == best)
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    (path / "run.json").write_text("{}")
    return store


def files_of(path: Path) -> dict[str, bytes]:
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


@pytest.fixture(params=["folder", "file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind, empty."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return server.uri(f"bucket/{tmp_path.name}/run")
    place = tmp_path / "mount point" / "run"
    return str(place) if request.param == "folder" else place.as_uri()


def stored(storage: RunStorage) -> dict[str, bytes]:
    """Every file there."""
    infos = storage._files.get_file_info(fs.FileSelector("", recursive=True, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File)
    return {path: storage._files.open_input_stream(path).read() for path in paths}


class Counted:
    """Lets through so many files that are written, then the storage fails."""

    def __init__(self, storage: RunStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.put: list[str] = []
        self.limit = 10**9
        real = storage._put

        def instead(source: Any, name: str) -> None:
            if len(self.put) >= self.limit:
                raise OSError("the network is gone\nand a page of details")
            self.put.append(name)
            real(source, name)

        monkeypatch.setattr(storage, "_put", instead)


def test_a_run_comes_back_as_it_was(uri: str, tmp_path: Path) -> None:
    """Every file that resuming needs, to the byte, and nothing else; a file larger than a part of an
    upload among them."""
    run = tmp_path / "run"
    store = make_run(run, 2, 4, 6, best=2)
    store.save(8, content(8, 30_000_000), META, best=False)
    (run / "results.json").write_text("{}")
    storage = RunStorage(uri)
    storage.ensure_empty()
    storage.push(RunDir(run))
    assert stored(storage) == files_of(run)
    with pytest.raises(UserError, match="has a run already"):
        RunStorage(uri).ensure_empty()
    back = tmp_path / "back"
    back.mkdir()
    RunStorage(uri).fetch(back, pytest.fail)
    assert files_of(back) == files_of(run)
    fetched = CheckpointStore(back / "checkpoints")
    assert fetched.load("last", pytest.fail).step == 8 and fetched.load("best").step == 2
    with pytest.raises(UserError, match="already exists"):
        RunStorage(uri).fetch(back)


def test_only_what_is_new_is_copied(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is there is not copied again, and goes when the run keeps it no more."""
    run = tmp_path / "run"
    store = make_run(run, 2, 4, best=2)
    storage = RunStorage(uri)
    storage.push(RunDir(run))
    counted = Counted(storage, monkeypatch)
    for step in (6, 8):
        store.save(step, content(step), META, best=False)
        counted.put.clear()
        storage.push(RunDir(run))
        steps = {name.split("/")[1] for name in counted.put if "step-" in name}
        assert steps == {f"step-{step:08d}"} and counted.put[-1] == "checkpoints/index.json"
        assert stored(storage) == files_of(run)
    counted.put.clear()
    storage.push(RunDir(run))
    assert not any("step-" in name for name in counted.put)


def test_wherever_a_copy_breaks_off_there_is_a_whole_run(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of files: what the storage has is fetched without a warning and is the run of
    before or the one of after; the run's own folder is as it was, and the next copy succeeds."""
    run, storage = tmp_path / "run", RunStorage(uri)
    store = make_run(run, 2, best=2)
    storage.push(RunDir(run))
    counted = Counted(storage, monkeypatch)
    step = 4
    for limit in range(8):
        store.save(step, content(step), META, best=True)
        before = files_of(run)
        counted.put.clear()
        counted.limit = limit
        with pytest.raises(CheckpointError) as caught:
            storage.push(RunDir(run))
        told = f"the storage {storage.name} cannot be written: the network is gone"
        assert str(caught.value) == told and "secret" not in told
        assert files_of(run) == before
        back = tmp_path / f"back{limit}"
        RunStorage(uri).fetch(back, pytest.fail)
        found = CheckpointStore(back / "checkpoints").load("best")
        assert found.step == step - 2 and found.peers == content(step - 2)
        counted.limit = 10**9
        storage.push(RunDir(run))
        assert stored(storage) == files_of(run)
        step += 2


def test_a_step_saved_again_takes_no_other_ones_place(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run went back and saved the step with other bytes: the storage has the old checkpoint whole
    until it has the new one."""
    run, storage = tmp_path / "run", RunStorage(uri)
    make_run(run, 2, 4)
    storage.push(RunDir(run))
    shutil.rmtree(run)
    store = make_run(run, 2)
    store.save(4, content(99), META, best=True)
    counted = Counted(storage, monkeypatch)
    counted.limit = 5
    with pytest.raises(CheckpointError):
        storage.push(RunDir(run))
    storage.fetch(tmp_path / "old", pytest.fail)
    assert CheckpointStore(tmp_path / "old" / "checkpoints").load("last").peers == content(4)
    counted.limit = 10**9
    storage.push(RunDir(run))
    storage.fetch(tmp_path / "new", pytest.fail)
    new = CheckpointStore(tmp_path / "new" / "checkpoints")
    for which in ("last", "best"):
        assert new.load(which).peers == content(99)
    assert len(new.kept()) == 2


def test_a_damaged_copy_falls_back(uri: str, tmp_path: Path) -> None:
    """The checkpoint before the damaged one is used, and the warning names the file in the storage;
    with none left the fetch fails and leaves no folder."""
    run, storage = tmp_path / "run", RunStorage(uri)
    make_run(run, 2, 4)
    storage.push(RunDir(run))
    with storage._files.open_output_stream("checkpoints/step-00000004/peer0/training.pt") as file:
        file.write(b"x")
    told: list[str] = []
    storage.fetch(tmp_path / "back", told.append)
    victim = f"{storage.name}/checkpoints/step-00000004/peer0/training.pt is damaged"
    assert len(told) == 1 and victim in told[0] and "step 2 is used instead" in told[0]
    assert CheckpointStore(tmp_path / "back" / "checkpoints").load("last").peers == content(2)
    storage._files.delete_file("checkpoints/step-00000002/peer1/weights.safetensors")
    with pytest.raises(UserError, match="no checkpoint in") as caught:
        storage.fetch(tmp_path / "none")
    assert "step-00000002" in str(caught.value) and str(tmp_path / ".none") not in str(caught.value)
    assert not (tmp_path / "none").exists() and not (tmp_path / ".none.tmp").exists()


def test_a_strangers_storage_writes_nothing_elsewhere(uri: str, tmp_path: Path) -> None:
    """A dump_with_checksum manifest that names files outside of the checkpoint."""
    run, storage = tmp_path / "run", RunStorage(uri)
    make_run(run, 2)
    storage.push(RunDir(run))
    name = "checkpoints/step-00000002/manifest.json"
    with storage._files.open_input_stream(name) as stream:
        manifest = json.loads(stream.read())
    del manifest["checksum"]
    manifest["files"]["../../../../../evil"] = {"size": 1, "sha256": "0" * 64}
    with storage._files.open_output_stream(name) as target:
        target.write(dump_with_checksum(manifest))
    with pytest.raises(UserError, match="not the name of a peer's file"):
        storage.fetch(tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_what_is_no_run_is_told(uri: str, tmp_path: Path) -> None:
    storage = RunStorage(uri)
    with pytest.raises(UserError, match="has no run"):
        storage.fetch(tmp_path / "into")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    storage.push(RunDir(tmp_path / "run"))  # before the first checkpoint
    with pytest.raises(UserError, match="has no last checkpoint"):
        storage.fetch(tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A file where a folder must be; the storage being the run's own folder."""
    run = tmp_path / "run"
    make_run(run, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/below cannot be reached"):
        RunStorage(str(tmp_path / "file" / "below"))
    storage = RunStorage(str(tmp_path / "place"))
    (tmp_path / "place" / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="place cannot be written"):
        storage.push(RunDir(run))
    (tmp_path / "link").symlink_to(run)
    before = files_of(run)
    assert RunStorage(str(tmp_path / "link")).is_at(run) and not storage.is_at(run)
    with pytest.raises(CheckpointError, match="the run's own folder"):
        RunStorage(str(tmp_path / "link")).push(RunDir(run))
    assert files_of(run) == before


@pytest.mark.parametrize(
    "wrong",
    [
        "s3:///folder",
        "nothing://key:secret@bucket/run?password=secret",
        "s3://key:secret@bucket/run?region=eu-west-1&colour=red",
        "s3://AKIA:abc/secret@bucket/run",
        "s3://AKIA:abc?secret@bucket/run",
        "s3://AKIA:abc#secret@bucket/run",
    ],
)
def test_uris_that_mean_nothing_are_refused(wrong: str) -> None:
    """Without telling the secrets in them."""
    with pytest.raises(UserError, match="is not understood") as caught:
        RunStorage(wrong)
    assert not any(told in str(caught.value) for told in ("secret", "AKIA", "abc"))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://AKIA:abc/defSECRET@bucket/path", "s3://bucket/path"),
        ("s3://AKIA:a@b//c#d@bucket/path?region=x", "s3://bucket/path"),
        ("s3://AKIA:a?SECRET@bucket/path", "s3://..."),
        ("s3://bucket/path?endpoint_override=http://user:SECRET@host", "s3://..."),
        ("gs://anonymous@bucket/path", "gs://bucket/path"),
        ("s3://bucket/path", "s3://bucket/path"),
        ("file:///mnt/me@work/run", "file:///mnt/me@work/run"),
        ("/mnt/me@work/run", "/mnt/me@work/run"),
    ],
)
def test_uris_are_told_without_secrets(uri: str, shown: str) -> None:
    """Also where a secret was not escaped, as AWS's with a slash in them."""
    assert without_secrets(uri) == shown
    assert without_secrets(f"cannot read '{uri} at all") == f"cannot read '{shown} at all"


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_server_and_keys_from_the_environment(
    name: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other S3 clients take them; a URI in a config need not say them."""
    monkeypatch.setenv(name, f"http://127.0.0.1:{s3.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    files, folder = open_uri("s3://bucket/environment")
    with files.open_output_stream(folder) as stream:
        stream.write(name.encode())
    same, folder = open_uri(s3.uri("bucket/environment"))
    with same.open_input_stream(folder) as stream:
        assert stream.read() == name.encode()


def test_a_bucket_that_is_not_there_is_told(s3: S3Server, tmp_path: Path) -> None:
    """By name, with the service's reason, and without the secret."""
    make_run(tmp_path / "run", 2)
    storage = RunStorage(s3.uri("no-such-bucket/run"))
    with pytest.raises(
        CheckpointError, match=r"s3://no-such-bucket/run cannot be written"
    ) as caught:
        storage.push(RunDir(tmp_path / "run"))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_dies_costs_the_copy_alone(tmp_path: Path) -> None:
    """In the midst of a run: the push fails soon, the run is whole, and when the server is back (with
    nothing, as it keeps all in memory) the next push brings everything."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed: no S3 server to test")
    server = S3Server(tmp_path / "log")
    try:
        address = server.uri("bucket/run") + "&allow_bucket_creation=true"
        run = tmp_path / "run"
        store = make_run(run, 2)
        storage = RunStorage(address)
        storage._files.base_fs.create_dir("bucket")
        storage.push(RunDir(run))
        server.stop()
        store.save(4, content(4), META, best=False)
        before = files_of(run)
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=r"s3://bucket/run cannot be written: .*connect"):
            storage.push(RunDir(run))
        assert time.monotonic() - began < 30
        assert files_of(run) == before
        server.start()
        storage._files.base_fs.create_dir("bucket")
        storage.push(RunDir(run))
        assert stored(storage) == files_of(run)
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_does_not_answer_is_given_up(
    scheme: str, silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is there, or it takes the connection and falls silent: no run hangs for it."""
    if scheme == "gs" and silent:
        pytest.skip("it takes two minutes: pyarrow does not hand on its client's timeout")
    monkeypatch.setattr(uri_module, "REQUEST_TIMEOUT_S", 2)
    make_run(tmp_path / "run", 2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        endpoint = f"endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http"
        storage = RunStorage(
            f"s3://key:secret@bucket/run?region=us-east-1&{endpoint}"
            if scheme == "s3"
            else f"gs://anonymous@bucket/run?{endpoint}"
        )
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"{scheme}://bucket/run cannot be written"):
            storage.push(RunDir(tmp_path / "run"))
        assert time.monotonic() - began < 60


def test_a_run_goes_on_from_its_copy(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training copies each checkpoint; on another machine the command line fetches the copy and goes
    on to the bits of an undisturbed run."""
    uri = f"file://{tmp_path}/copy"
    raw = tiny(image_folder, checkpoint={"every_steps": 2, "storage_path": uri})
    monkeypatch.chdir(tmp_path)
    config = Config.parse(raw)
    reached = [0]

    class Steps(Silent):
        def step(self, finished: int) -> None:
            reached[0] = finished

    with pytest.raises(Interrupted):
        train(
            config,
            "first",
            local=True,
            reporter=Steps(),
            should_stop=lambda: reached[0] >= 3,
        )
    shutil.rmtree("first")
    result = CliRunner().invoke(
        app, ["train", "--local", "--resume", uri, "--out", "second"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    train(Config.parse(tiny(image_folder)), "undisturbed", local=True)
    peers = [RunDir(Path(run)).checkpoints.load("last").peers for run in ("second", "undisturbed")]
    assert peers[0] == peers[1]
    assert (tmp_path / "copy" / "results.json").exists()
    with pytest.raises(UserError, match="already"):
        train(config, "third", local=True)
