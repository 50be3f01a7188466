"""The views of a peer: a function of the seeds and the step, wherever they are made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from fragile_images import FragileImages, with_unreadable
from torch import Tensor

from ray_dmml.config.code import use_code
from ray_dmml.config.parts import load_parts
from ray_dmml.config.schema import Config
from ray_dmml.data import view_workers
from ray_dmml.data.dataset import BadImageError, Splits
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import Batch, DecodedBatches, build_sampler
from ray_dmml.data.view_loader import ViewLoader
from ray_dmml.errors import UserError, WorkerLostError
from ray_dmml.peer.build import build_view_loader, build_views
from ray_dmml.randomness import seeded

CPU = torch.device("cpu")
STEPS = (0, 1, 2, 7, 8, 2)


def config_of(root: Path, **changes: Any) -> Config:
    """Two peers of one seed and view, and one of another seed."""
    raw = tiny(root, **changes)
    raw["cohort"]["peers"] = [{"seed": 3, "view": "strong"}, {"seed": 3, "init_seed": 9, "view": "strong"}, {"seed": 4}]
    return Config.parse(raw)


@contextmanager
def loading(
    config: Config, position: int = 0, num_workers: int = 0, splits: Splits | None = None
) -> Iterator[ViewLoader]:
    splits = splits or load_splits(config.data)
    with closing(DecodedBatches(splits.train, build_sampler(config, splits))) as decoded:
        loader = build_view_loader(config, position, splits, decoded, CPU, num_workers=num_workers, threads=1)
        with closing(loader):
            yield loader


def everything(loader: ViewLoader) -> tuple[list[Batch], Tensor]:
    """Batches of steps in any order, before and after an evaluation, and the images of that."""
    before = [loader.batch(step) for step in STEPS[:3]]
    images = torch.cat(list(loader.chunks("test", 7)))
    return before + [loader.batch(step) for step in STEPS[3:]], images


def assert_equal(found: tuple[list[Batch], Tensor], expected: tuple[list[Batch], Tensor]) -> None:
    assert torch.equal(found[1], expected[1])
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.step == other.step
        for key in ("images", "labels", "indices"):
            assert torch.equal(getattr(one, key), getattr(other, key))


def test_views_follow_the_seed_and_the_step(image_folder: Path) -> None:
    """Against a loop over the images. Two peers of one seed see the same; another seed or step is another view."""
    config = config_of(image_folder)
    splits = load_splits(config.data)
    with loading(config) as loader, loading(config, 1) as same, loading(config, 2) as other:
        batches, images = everything(loader)
        assert_equal(everything(same), (batches, images))
        assert not torch.equal(other.batch(0).images, batches[0].images)
    views = build_views(config, 0, splits)
    for batch in batches:
        indices = build_sampler(config, splits).batch(batch.step)
        with seeded(config.seed, 3, batch.step, "view"):
            expected = [views.view.pipeline(splits.train.source.read(index)) for index in indices.tolist()]
        assert torch.equal(batch.images, torch.stack(expected))
        assert (
            batch.labels.tolist() == splits.train.labels[indices].tolist()
            and batch.indices.tolist() == indices.tolist()
        )
    decoded = torch.stack([splits.test.source.read(index) for index in range(len(splits.test))])
    assert torch.equal(images, views.eval_view(decoded)) and images.shape[2:] == (32, 32)


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_make_the_same(image_folder: Path, num_workers: int) -> None:
    """Also after one of them was killed, which is named, and others were started."""
    config = config_of(image_folder)
    with loading(config) as loader:
        expected = everything(loader)
    handler, state = signal.getsignal(signal.SIGCHLD), torch.get_rng_state()
    with loading(config, num_workers=num_workers) as loader:
        assert_equal(everything(loader), expected)
        assert signal.getsignal(signal.SIGCHLD) is handler and torch.equal(torch.get_rng_state(), state)
        assert loader._workers is not None
        lost = loader._workers._results._workers[-1]
        os.kill(lost.pid, signal.SIGKILL)
        name = rf"peer0: view worker {num_workers} of {num_workers} \(process {lost.pid}\) was killed by SIGKILL"
        with pytest.raises(WorkerLostError, match=name):
            for step in range(3, 50):
                loader.batch(step)
        assert not loader.is_complete
        loader.restart()
        assert loader.is_complete
        assert_equal(everything(loader), expected)


@pytest.mark.ray
def test_an_unreadable_image_is_a_fault_of_its_step(image_folder: Path) -> None:
    """The workers meet it earlier, and go on after it. The message has no traceback of theirs."""
    config = config_of(image_folder)
    splits = load_splits(config.data)
    sampler = build_sampler(config, splits)
    broken = sorted(set(sampler.batch(2).tolist()) - set(sampler.batch(0).tolist()) - set(sampler.batch(1).tolist()))[0]
    step = next(n for n in range(3, 99) if broken not in sampler.batch(n))
    fragile = replace(splits, train=with_unreadable(splits.train, broken))
    with loading(config, num_workers=2, splits=fragile) as loader:
        assert [loader.batch(n).step for n in (0, 1)] == [0, 1]
        with pytest.raises(BadImageError) as caught:
            loader.batch(2)
        assert str(caught.value) == f"image {splits.train.source.name(broken)} cannot be read: gone"
        assert loader.batch(step).step == step and loader.is_complete


@pytest.mark.ray
def test_views_and_images_of_ones_own(image_folder: Path, tmp_path: Path) -> None:
    """Workers import the files of `code` as they were read, though they are gone by now."""
    module = tmp_path / "parts_of_workers.py"
    shutil.copy(Path(__file__).parents[1] / "cohort" / "parts_source.py", module)
    raw = tiny(image_folder)
    raw["code"] = [str(module)]
    raw["data"] |= {"name": "parts_of_workers:reversed_folder", "args": {"num_test": 6}}
    raw["cohort"]["peers"] = [{"view": "parts_of_workers:Noise"}, {}]
    config = Config.parse(raw)
    load_parts(config)
    try:
        with loading(config) as loader:
            expected = everything(loader)
            splits = loader.views.splits
        module.unlink()
        with loading(config, num_workers=1, splits=splits) as loader:
            assert_equal(everything(loader), expected)
    finally:
        use_code({})


def test_what_cannot_be_sent_to_workers(image_folder: Path) -> None:
    config = config_of(image_folder)
    splits = load_splits(config.data)
    source = FragileImages(splits.train, 0)
    source.name = lambda index: "local"  # type: ignore[method-assign]
    unusual = replace(splits, train=replace(splits.train, source=source))
    with (
        pytest.raises(UserError, match=r"peer0: its images or its view cannot be sent to worker .*num_workers: 0"),
        loading(config, num_workers=1, splits=unusual),
    ):
        pass


def test_too_little_shared_memory(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for before workers start. A batch is 12 x 3 x 32 x 32 bytes, and an evaluation's larger."""
    usage = type(shutil.disk_usage(image_folder))(2**26, 2**26 - 2**15, 2**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(view_workers, "SHARED_MEMORY", image_folder)
    config = config_of(image_folder, evaluation={"batch_size": 2000})
    wanted = "peer0: 2 view workers need 29 MiB of shared memory, and .* has 64 MiB, of which 0 are free: give the "
    with pytest.raises(UserError, match=wanted + r".*--shm-size=8g.*num_workers"), loading(config, num_workers=2):
        pass


@pytest.mark.ray
def test_a_script_needs_no_guard(image_folder: Path, tmp_path: Path) -> None:
    """Workers do not run the user's script again. They end when it is killed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_view_loader as helpers\n"
        "print('started')\n"
        "with helpers.loading(helpers.config_of(Path(sys.argv[2])), num_workers=2) as loader:\n"
        "    print(loader.batch(5).step, *[p.pid for p in loader._workers._results._workers], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, str(script), str(Path(__file__).parent), str(image_folder)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    first, second = ended.stdout.splitlines()
    step, *pids = map(int, second.split())
    assert first == "started" and step == 5 and len(pids) == 2, ended.stderr
    subprocess.run(["tail", *[f"--pid={pid}" for pid in pids], "-f", "/dev/null"], timeout=60, check=True)
