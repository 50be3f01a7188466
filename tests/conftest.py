"""Small real data and a private Ray, shared by the tests."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# Two torch threads on two cores are as many as there are; more make everything far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from ray_dmml.cohort.cohort import Cohort
from ray_dmml.config.schema import Config

torch.set_num_threads(1)

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

NUM_CLASSES, IMAGES_PER_CLASS = 16, 5


PROCESS_FIXTURES = {"ray_start_4_cpus", "private_ray", "s3"}
"""Fixtures that start processes: tests that use one have the marker `ray`."""

_PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}
_allows_processes = True
_shared_ray_runs = False


def _refuse_processes(event: str, arguments: tuple[Any, ...]) -> None:
    is_lookup = bool(arguments) and arguments[0] in ("/sbin/ldconfig", "lscpu")  # of ctypes, and of old PyTorch
    if not _allows_processes and event in _PROCESS_EVENTS and not is_lookup:
        raise RuntimeError(f"a test without the marker `ray` starts a process: {arguments!r:.200}")


sys.addaudithook(_refuse_processes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests whose fixtures start processes; leaves out `slow` and `cluster` unless `-m` names them. Tests on
    the shared Ray come first: they are long, and those of a worker follow one another."""
    left_out = {name for name in ("slow", "cluster") if name not in config.option.markexpr}
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
    deselected = [item for item in items if left_out & {marker.name for marker in item.iter_markers()}]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    on_ray = [item for item in items if _uses_shared_ray(item)]
    others = [item for item in items if not _uses_shared_ray(item)]
    # The workers of pytest-xdist begin with equal parts.
    num_workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [item for n in range(num_workers) for of in (on_ray, others) for item in _part(of, n, num_workers)]


def _part(items: list[pytest.Item], number: int, of: int) -> list[pytest.Item]:
    return items[len(items) * number // of : len(items) * (number + 1) // of]


def _uses_shared_ray(item: pytest.Item) -> bool:
    return "ray_start_4_cpus" in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """`pytest -m "not ray"` starts no process: what does is marked, and this is the guard."""
    global _allows_processes
    if not _uses_shared_ray(item):
        _end_shared_ray()
    _allows_processes = item.get_closest_marker("ray") is not None
    try:
        return (yield)
    finally:
        _allows_processes = True


def pytest_configure(config: pytest.Config) -> None:
    """Decoded images are kept for the length of the test run, and out of the user's own cache. Not on
    import: actors import this file, too, and nobody would remove theirs."""
    folder = tempfile.TemporaryDirectory(prefix="ray-dmml-tests-", ignore_cleanup_errors=True)
    os.environ["XDG_CACHE_HOME"] = folder.name
    config.add_cleanup(folder.cleanup)


def write_image(path: Path, rng: np.random.Generator, hue: int) -> None:
    """A 24 px image that looks like its class: a block at a class-dependent place and colour."""
    pixels = rng.integers(0, 90, (24, 24, 3), dtype=np.uint8)
    row, column = 4 * (hue % 4), 4 * (hue // 4)
    pixels[row : row + 8, column : column + 8] = [
        40 + 12 * hue,
        230 - 11 * hue,
        60 + 50 * (hue % 4),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 classes of 5 PNG images."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM_CLASSES):
        for image in range(IMAGES_PER_CLASS):
            write_image(root / f"class{number:02d}" / f"{image}.png", rng, number)
    return root


@pytest.fixture(scope="session")
def noisy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 classes that are hard to tell apart, so that recall goes up and down."""
    root = tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    for number in range(16):
        pattern = rng.integers(0, 256, (24, 24, 3))
        (root / f"class{number:02d}").mkdir()
        for image in range(5):
            pixels = 0.3 * pattern + 0.7 * rng.integers(0, 256, (24, 24, 3))
            path = root / f"class{number:02d}" / f"{image}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def tiny(root: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a cohort that trains in milliseconds a step; ``changes`` replace whole sections'
    entries, such as ``train={"steps": 5}``."""
    raw: dict[str, Any] = {
        "data": {
            "name": "imagefolder",
            "root": str(root),
            "decode_size": 36,
            "classes_per_batch": 4,
            "images_per_class": 3,
            "validation_fraction": 0.25,
        },
        "cohort": {
            "threads_per_peer": 1,
            "base": {
                "backbone": "test_resnet",
                "embedding_size": 16,
                "input_size": 32,
                "batch_norm": "train",
                "optimizer": {"lr": 1e-3},
            },
            "peers": [{}, {"view": "weak"}],
        },
        "train": {"steps": 6, "evaluate_every": 3, "log_every": 2, "report": False, "pictures": 0},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"recall_at": [1, 2]},
    }
    for section, entries in changes.items():
        if isinstance(entries, dict):
            raw[section] = {**raw.get(section, {}), **entries}
        else:
            raw[section] = entries
    return raw


@pytest.fixture(scope="session")
def small_run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 2 peers, for tests that only use trained nets. They must not change it."""
    from ray_dmml import train

    out = tmp_path_factory.mktemp("runs") / "small"
    raw = tiny(image_folder, train={"steps": 1, "evaluate_every": 0}, data={"validation_fraction": 0})
    raw["cohort"]["peers"][1]["embedding_size"] = 7
    train(Config.parse(raw), out, local=True)
    return out


def with_workers(config: Config, *numbers: int) -> Config:
    """The same peers with so many view workers each."""
    peers = [peer.model_copy(update={"num_workers": n}) for peer, n in zip(config.cohort.peers, numbers, strict=True)]
    return config.model_copy(update={"cohort": config.cohort.model_copy(update={"peers": tuple(peers)})})


def unlike_peers(root: Path, **changes: Any) -> Config:
    """3 peers that differ in backbone, size, view, interval, mode, ema, optimiser."""
    raw = tiny(root, **changes)
    raw["data"]["classes_per_batch"] = 3  # 9 images of at most 23 numbers: nothing is even
    raw["cohort"]["peers"] = [
        {"ema": {"decay": 0.9, "as_teacher": True}, "schedule": {"name": "cosine", "steps": 20}},
        {
            "backbone": "test_efficientnet",
            "embedding_size": 23,
            "update_interval": 2,
            "update_mode": "skip",
            "view": "strong",
            "optimizer": {"name": "adamw", "clip_norm": 1.0, "layer_decay": 0.8},
        },
        {
            "backbone": "test_convnext",
            "embedding_size": 8,
            "update_interval": 3,
            "view": "weak",
            "pooling": "avgmax",
            "freeze_blocks": 1,
            "optimizer": {"name": "sgd", "lr": 0.01},
        },
    ]
    return Config.parse(raw)


def state_of(cohort: Cohort) -> dict[str, dict[str, bytes]]:
    """The contents of the files that the peers of a cohort save."""
    with tempfile.TemporaryDirectory(prefix="ray-dmml-tests-") as folder:
        return {name: dict(files) for name, files in cohort.save(Path(folder)).items()}


@pytest.fixture
def ray_start_4_cpus() -> Iterator[None]:
    """A private Ray of 4 CPUs; more than the machine may have, so that peers get one each. The next test has it too, if
    it asks for it and this one leaves nothing running."""
    import ray

    global _shared_ray_runs
    if not _shared_ray_runs:
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        _shared_ray_runs = True
    yield
    until = time.monotonic() + 10
    while _shared_ray_runs and ray.available_resources().get("CPU") != 4:
        if time.monotonic() > until:
            _end_shared_ray()
        time.sleep(0.05)


def _end_shared_ray() -> None:
    global _shared_ray_runs
    if _shared_ray_runs:
        import ray

        ray.shutdown()
        _shared_ray_runs = False


def pytest_sessionfinish() -> None:
    _end_shared_ray()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Nested states are equal to the bit; names the first place where they are not."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        assert torch.equal(found, expected), f"{where}: differs by {(found - expected).abs().max()}"
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected), where
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert found == expected, f"{where}: {found!r} is not {expected!r}"


def as_in_training(figures: dict[str, Any]) -> dict[str, Any]:
    """Of the figures of a whole evaluation, those that are also measured during training, at any depth."""
    return {
        key: as_in_training(value) if isinstance(value, dict) else value
        for key, value in figures.items()
        if isinstance(value, dict) or key.startswith(("recall@", "map@r", "r_precision"))
    }


class S3Server:
    """moto's S3 server in a process of its own."""

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = log
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", "from moto.server import main; main()"]
        self.process = subprocess.Popen(
            [*command, "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise AssertionError(f"moto's server did not start: {self.log.read_text()}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def uri(self, path: str) -> str:
        endpoint = f"endpoint_override=http://127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://key:secret@{path}?{endpoint}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    pytest.importorskip("moto.server", reason="moto[server] is not installed: no S3 server to test")
    server = S3Server(tmp_path_factory.mktemp("moto") / "log")
    from ray_dmml.filesystem import open_uri

    files, _ = open_uri(server.uri("bucket") + "&allow_bucket_creation=true")
    files.create_dir("bucket")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    """A Ray whose workers find the modules of experiments/."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXPERIMENTS), prepend=os.pathsep)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the ablation; others of the experiments can be imported, too, also by a private Ray's
    workers."""
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENTS), prepend=os.pathsep)
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import ablations.arms
        import ablations.measure
        import ablations.plan
        import ablations.report

        yield ablations
    finally:
        sys.path.remove(str(EXPERIMENTS))


Refused = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Of a command's main: a user's mistake ends it with a sentence and exit code 2."""

    @contextmanager
    def expect(sentence: str) -> Iterator[None]:
        with pytest.raises(typer.Exit) as ended:
            yield
        assert ended.value.exit_code == 2
        message = capsys.readouterr().err
        assert re.search(f"^error: .*{sentence}", message, re.M), message

    return expect
