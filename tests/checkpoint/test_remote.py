"""The copy of a run in a folder and in an S3 server: it is always a complete run, and can be fetched."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import writing
from conftest import S3Server, tiny
from typer.testing import CliRunner

from ray_dmml.cli.main import app
from ray_dmml.config.schema import Config
from ray_dmml.errors import Interrupted
from ray_dmml.training.run import train
from ray_dmml.training.run_dir import RunDir

pytest.importorskip("pyarrow.fs", reason="ray[tune] brings pyarrow, which is not installed")

from pyarrow import fs

from ray_dmml import filesystem
from ray_dmml.checkpoint.manifest import dump_with_checksum
from ray_dmml.checkpoint.remote import RemoteRun
from ray_dmml.checkpoint.store import CheckpointStore
from ray_dmml.errors import CheckpointError, UserError
from ray_dmml.filesystem import open_uri, without_secrets

META = {"best": 0.5}


def content(seed: int, size: int = 1000) -> dict[str, dict[str, bytes]]:
    """Two peers' files."""
    weights = {"weights.safetensors": bytes([seed]) * size, "training.pt": bytes(range(256))}
    return {"peer0": weights, "peer1": {"weights.safetensors": bytes([seed]) * 10}}


def make_run(path: Path, *steps: int, best: int | None = None) -> CheckpointStore:
    """The folder of a run with checkpoints."""
    store = CheckpointStore(path / "checkpoints")
    for step in steps:
        store.save(step, writing(content(step)), META, best=step == best)
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    (path / "run.json").write_text("{}")
    return store


def files_of(path: Path) -> dict[str, bytes]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.fixture(params=["folder", "file", pytest.param("s3", marks=pytest.mark.ray)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return server.uri(f"bucket/{tmp_path.name}/run")
    place = tmp_path / "mount point" / "run"
    return str(place) if request.param == "folder" else place.as_uri()


def stored(remote: RemoteRun) -> dict[str, bytes]:
    """All files of the copy."""
    infos = remote.files.get_file_info(fs.FileSelector("", recursive=True, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File)
    return {path: remote.files.open_input_stream(path).read() for path in paths}


def fetch_without_warnings(remote: RemoteRun, into: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    remote.fetch(into)
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


class FailingFiles:
    """A file system that writes a limited number of files and then fails."""

    def __init__(self, files: fs.FileSystem) -> None:
        self._files = files
        self.written: list[str] = []
        self.limit = 10**9

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open_output_stream(self, name: str) -> Any:
        if len(self.written) >= self.limit:
            raise OSError("the network is gone\nand a page of details")
        self.written.append(name.removesuffix(".tmp"))
        return self._files.open_output_stream(name)


def test_a_pushed_run_is_fetched(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every file for resuming comes back to the byte, and nothing else. One file is larger than a part of
    an upload."""
    run = tmp_path / "run"
    store = make_run(run, 2, 4, 6, best=2)
    store.save(8, writing(content(8, 12_000_000)), META, best=False)
    (run / "results.json").write_text("{}")
    remote = RemoteRun(uri)
    remote.ensure_empty()
    remote.push(run)
    assert stored(remote) == files_of(run)
    with pytest.raises(UserError, match="has a run already"):
        RemoteRun(uri).ensure_empty()
    back = tmp_path / "back"
    back.mkdir()
    fetch_without_warnings(RemoteRun(uri), back, caplog)
    assert files_of(back) == files_of(run)
    fetched = CheckpointStore(back / "checkpoints")
    assert fetched.load("last").step == 8 and fetched.load("best").step == 2
    assert not caplog.records
    with pytest.raises(UserError, match="already exists"):
        RemoteRun(uri).fetch(back)


def test_only_what_is_new_is_copied(uri: str, tmp_path: Path) -> None:
    """A checkpoint is copied once. It is removed from the copy when the run removes it."""
    run = tmp_path / "run"
    store = make_run(run, 2, 4, best=2)
    remote = RemoteRun(uri)
    remote.push(run)
    remote.files = files = FailingFiles(remote.files)
    for step in (6, 8):
        store.save(step, writing(content(step)), META, best=False)
        files.written.clear()
        remote.push(run)
        steps = {name.split("/")[1] for name in files.written if "step-" in name}
        assert steps == {f"step-{step:08d}"} and files.written[-1] == "checkpoints/index.json"
        assert stored(remote) == files_of(run)
    files.written.clear()
    remote.push(run)
    assert files.written and not any("step-" in name for name in files.written)


def test_all_kept_checkpoints_are_copied(tmp_path: Path) -> None:
    """Also if the run keeps more than the default, which the remote run does not know."""
    run, remote = tmp_path / "run", RemoteRun(str(tmp_path / "copy"))
    store = make_run(run, 2, 4, best=2)
    store.num_to_keep = 4
    for step in (6, 8, 10):
        store.save(step, writing(content(step)), META, best=False)
    remote.push(run)
    assert len(CheckpointStore(tmp_path / "copy" / "checkpoints").names()) == 5
    assert stored(remote) == files_of(run)


def test_an_interrupted_push_leaves_a_complete_run(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After any number of files: the copy is fetched without a warning and is the run of before or of
    after. The run's own folder is unchanged, and the next push succeeds."""
    run, remote = tmp_path / "run", RemoteRun(uri)
    store = make_run(run, 2, best=2)
    remote.push(run)
    remote.files = files = FailingFiles(remote.files)
    step = 4
    for limit in (0, 3, 7) if uri.startswith("s3") else range(8):  # S3 takes long
        store.save(step, writing(content(step)), META, best=True)
        before = files_of(run)
        files.written.clear()
        files.limit = limit
        with pytest.raises(CheckpointError) as caught:
            remote.push(run)
        message = f"the storage {remote.name} cannot be written: the network is gone"
        assert str(caught.value) == message and "secret" not in message
        assert files_of(run) == before
        back = tmp_path / f"back{limit}"
        fetch_without_warnings(remote, back, caplog)
        best = CheckpointStore(back / "checkpoints").load("best")
        assert best.step == step - 2 and best.peers == content(step - 2)
        files.limit = 10**9
        remote.push(run)
        assert stored(remote) == files_of(run)
        step += 2


def test_a_step_saved_again_overwrites_no_checkpoint(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run went back and saved the step with other content: the copy has the old checkpoint until it
    has the complete new one."""
    run, remote = tmp_path / "run", RemoteRun(uri)
    make_run(run, 2, 4)
    remote.push(run)
    shutil.rmtree(run)
    store = make_run(run, 2)
    store.save(4, writing(content(99)), META, best=True)
    remote.files = files = FailingFiles(remote.files)
    files.limit = 5
    with pytest.raises(CheckpointError):
        remote.push(run)
    fetch_without_warnings(remote, tmp_path / "old", caplog)
    assert CheckpointStore(tmp_path / "old" / "checkpoints").load("last").peers == content(4)
    files.limit = 10**9
    remote.push(run)
    fetch_without_warnings(remote, tmp_path / "new", caplog)
    new = CheckpointStore(tmp_path / "new" / "checkpoints")
    for which in ("last", "best"):
        assert new.load(which).peers == content(99)
    assert len(new.names()) == 2


def test_a_damaged_copy_falls_back(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint before the damaged one is used, and the warning names the file in the storage. With
    no checkpoint left the fetch fails and leaves no folder."""
    run, remote = tmp_path / "run", RemoteRun(uri)
    make_run(run, 2, 4)
    remote.push(run)
    with remote.files.open_output_stream("checkpoints/step-00000004/peer0/training.pt") as file:
        file.write(b"x")
    remote.fetch(tmp_path / "back")
    victim = f"{remote.name}/checkpoints/step-00000004/peer0/training.pt is damaged"
    [warning] = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert victim in warning and "step 2 is used instead" in warning
    assert CheckpointStore(tmp_path / "back" / "checkpoints").load("last").peers == content(2)
    remote.files.delete_file("checkpoints/step-00000002/peer1/weights.safetensors")
    with pytest.raises(UserError, match="no checkpoint in") as caught:
        remote.fetch(tmp_path / "none")
    assert "step-00000002" in str(caught.value) and str(tmp_path / ".none") not in str(caught.value)
    assert not (tmp_path / "none").exists() and not (tmp_path / ".none.tmp").exists()


def change_manifest(remote: RemoteRun, name: str, **changes: Any) -> None:
    """Changes fields of a manifest in the copy and renews its checksum."""
    with remote.files.open_input_stream(name) as stream:
        manifest = json.loads(stream.read())
    del manifest["checksum"]
    with remote.files.open_output_stream(name) as target:
        target.write(dump_with_checksum({**manifest, **changes}))


def test_a_strangers_storage_writes_nothing_elsewhere(uri: str, tmp_path: Path) -> None:
    """A manifest with a right checksum names a file outside of the checkpoint."""
    run, remote = tmp_path / "run", RemoteRun(uri)
    make_run(run, 2)
    remote.push(run)
    evil = {"../../../../../evil": {"size": 1, "sha256": "0" * 64}}
    change_manifest(remote, "checkpoints/step-00000002/manifest.json", files=evil)
    with pytest.raises(UserError, match="not the name of a peer's file"):
        remote.fetch(tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_a_copy_of_an_older_version_is_refused(tmp_path: Path) -> None:
    run, remote = tmp_path / "run", RemoteRun(str(tmp_path / "copy"))
    make_run(run, 2)
    remote.push(run)
    change_manifest(remote, "checkpoints/step-00000002/manifest.json", format=1)
    with pytest.raises(UserError, match=r"in format 1; .*train it again"):
        remote.fetch(tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_what_is_no_run_is_refused(uri: str, tmp_path: Path) -> None:
    """An empty storage, and a run without a checkpoint."""
    remote = RemoteRun(uri)
    with pytest.raises(UserError, match="has no run"):
        remote.fetch(tmp_path / "into")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    remote.push(tmp_path / "run")  # before the first checkpoint
    with pytest.raises(UserError, match="has no last checkpoint"):
        remote.fetch(tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_folders_that_cannot_be_written_are_errors(tmp_path: Path) -> None:
    """A file in the place of a folder, and a storage that is the run's own folder."""
    run = tmp_path / "run"
    make_run(run, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/below cannot be reached"):
        RemoteRun(str(tmp_path / "file" / "below"))
    remote = RemoteRun(str(tmp_path / "place"))
    (tmp_path / "place" / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="place cannot be written"):
        remote.push(run)
    (tmp_path / "link").symlink_to(run)
    before = files_of(run)
    assert RemoteRun(str(tmp_path / "link")).is_at(run) and not remote.is_at(run)
    with pytest.raises(CheckpointError, match="the run's own folder"):
        RemoteRun(str(tmp_path / "link")).push(run)
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
    """The message does not contain their secrets."""
    with pytest.raises(UserError, match="is not understood") as caught:
        RemoteRun(wrong)
    assert not any(word in str(caught.value) for word in ("secret", "AKIA", "abc"))


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
def test_messages_show_uris_without_secrets(uri: str, shown: str) -> None:
    """Even if a secret is not escaped, such as those of AWS with a slash."""
    assert without_secrets(uri) == shown
    assert without_secrets(f"cannot read '{uri} at all") == f"cannot read '{shown} at all"


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_server_and_keys_from_the_environment(name: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like other S3 clients: a URI in a config does not need to contain them."""
    monkeypatch.setenv(name, f"http://127.0.0.1:{s3.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    files, folder = open_uri("s3://bucket/environment")
    with files.open_output_stream(folder) as stream:
        stream.write(name.encode())
    same, folder = open_uri(s3.uri("bucket/environment"))
    with same.open_input_stream(folder) as stream:
        assert stream.read() == name.encode()


def test_a_missing_bucket_is_an_error(s3: S3Server, tmp_path: Path) -> None:
    """The message has its name and the service's reason, and no secret."""
    make_run(tmp_path / "run", 2)
    remote = RemoteRun(s3.uri("no-such-bucket/run"))
    with pytest.raises(CheckpointError, match=r"s3://no-such-bucket/run cannot be written") as caught:
        remote.push(tmp_path / "run")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.ray
def test_a_server_that_dies_costs_only_the_copy(tmp_path: Path) -> None:
    """In the middle of a run: the push fails soon, and the run is unchanged. When the server is back,
    without its files, which were in memory, the next push copies everything."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed: no S3 server to test")
    server = S3Server(tmp_path / "log")
    try:
        address = server.uri("bucket/run") + "&allow_bucket_creation=true"
        run = tmp_path / "run"
        store = make_run(run, 2)
        remote = RemoteRun(address)
        remote.files.base_fs.create_dir("bucket")
        remote.push(run)
        server.stop()
        store.save(4, writing(content(4)), META, best=False)
        before = files_of(run)
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=r"s3://bucket/run cannot be written: .*connect"):
            remote.push(run)
        assert time.monotonic() - began < 30
        assert files_of(run) == before
        server.start()
        remote.files.base_fs.create_dir("bucket")
        remote.push(run)
        assert stored(remote) == files_of(run)
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_server_without_an_answer_ends_the_push(
    scheme: str, silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server listens, or it accepts the connection and stays silent: no run hangs."""
    if scheme == "gs" and silent:
        pytest.skip("it takes two minutes: pyarrow does not pass a timeout to Google's client")
    monkeypatch.setattr(filesystem, "REQUEST_TIMEOUT_S", 0.2)
    make_run(tmp_path / "run", 2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        endpoint = f"endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http"
        remote = RemoteRun(
            f"s3://key:secret@bucket/run?region=us-east-1&{endpoint}"
            if scheme == "s3"
            else f"gs://anonymous@bucket/run?{endpoint}"
        )
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"{scheme}://bucket/run cannot be written"):
            remote.push(tmp_path / "run")
        assert time.monotonic() - began < 60


def test_a_run_goes_on_from_its_copy(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training copies each checkpoint. On another machine the command line fetches the copy, and the run
    ends with the bits of an uninterrupted one."""
    uri = f"file://{tmp_path}/copy"
    raw = tiny(image_folder, checkpoint={"every_steps": 2, "storage_path": uri})
    monkeypatch.chdir(tmp_path)
    config = Config.parse(raw)
    copied = tmp_path / "copy" / "checkpoints" / "step-00000002" / "manifest.json"
    with pytest.raises(Interrupted):
        train(config, "first", local=True, should_stop=copied.exists)
    shutil.rmtree("first")
    result = CliRunner().invoke(app, ["train", "--local", "--resume", uri, "--out", "second"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    train(Config.parse(tiny(image_folder)), "uninterrupted", local=True)
    peers = [RunDir(Path(run)).checkpoints.load("last").peers for run in ("second", "uninterrupted")]
    assert peers[0] == peers[1]
    assert (tmp_path / "copy" / "results.json").exists()
    with pytest.raises(UserError, match="already"):
        train(config, "third", local=True)
