"""Tests on a GPU: mixed precision with a scaler, state that moves between devices, runs on Ray."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, tiny
from torch.overrides import TorchFunctionMode

from ray_dmml.checkpoint.peer_state import decode_peer, encode_peer
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.config.schema import Config
from ray_dmml.data.augmentations import training_view
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import DecodedBatches, build_sampler
from ray_dmml.peer.build import build_peer
from ray_dmml.peer.peer import Peer
from ray_dmml.randomness import seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


def train(peer: Peer, config: Config, start: int, stop: int) -> list[dict[str, float]]:
    """Trains a single peer and returns the terms of its loss at each step."""
    splits = load_splits(config.data)
    rows = []
    with closing(DecodedBatches(splits.train, build_sampler(config, splits))) as loader:
        for step in range(start, stop):
            out = peer.forward(loader.batch(step))
            rows.append(peer.step(out, peer.metric_loss(out), []))
    return rows


def config_of(image_folder: Path, **base: Any) -> Config:
    raw = tiny(image_folder)
    raw["cohort"]["base"] |= base
    return Config.parse(raw)


@pytest.mark.parametrize("preset", ["weak", "standard", "strong"])
def test_views_are_the_same_on_a_gpu(preset: str) -> None:
    """The same random numbers give the same pixels up to rounding."""
    view = training_view(preset, 32, 40, "a peer")
    on_gpu = training_view(preset, 32, 40, "a peer", torch.device("cuda"))
    images = (torch.rand(16, 3, 5, 5) * 255).to(torch.uint8).repeat_interleave(8, 2)
    images = images.repeat_interleave(8, 3)
    with seeded(1):
        expected = view(images)
    with seeded(1):
        views = on_gpu(images)
    assert views.is_cuda and views.dtype == torch.uint8 and views.shape == expected.shape
    assert (views.cpu().float() - expected.float()).abs().mean() < 2


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
def test_a_peer_trains_on_a_gpu(image_folder: Path, amp: str) -> None:
    """In every precision the loss falls and the embeddings are float32 of length 1. With float16 the
    scaler is active."""
    config = config_of(image_folder, amp=amp)
    splits = load_splits(config.data)
    peer = build_peer(config, 0, splits.train.num_classes, torch.device("cuda"), True)
    rows = train(peer, config, 0, 60)
    losses = [row["metric"] for row in rows]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    embeddings = torch.from_numpy(peer.embed_images(splits.test, 16))
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)), atol=1e-5)
    assert bool(peer.state_dict()["scaler"]) is (amp == "float16")


class OneRead(TorchFunctionMode):
    """Waiting for the GPU is an error inside of this block, except in ``Tensor.tolist``, whose calls are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __enter__(self) -> OneRead:
        torch.cuda.set_sync_debug_mode("error")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.cuda.set_sync_debug_mode("default")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.tolist:
            return func(*args, **(kwargs or {}))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.count += 1
            torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("amp", ["off", "bfloat16", "float16"])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_step_waits_once_for_the_gpu(image_folder: Path, amp: str, micro_batch: int | None) -> None:
    """The optimizer, the average and the scaler included, with the default loss and its miner."""
    config = config_of(image_folder, amp=amp, ema={"decay": 0.5}, optimizer={"lr": 1e-3, "clip_norm": 1.0})
    config = config.model_copy(update={"data": config.data.model_copy(update={"micro_batch": micro_batch})})
    splits = load_splits(config.data)
    peer = build_peer(config, 0, splits.train.num_classes, torch.device("cuda"), True)
    train(peer, config, 0, 3)
    with closing(DecodedBatches(splits.train, build_sampler(config, splits))) as loader:
        for step in (3, 4):
            batch = loader.batch(step)
            teacher = torch.nn.functional.normalize(torch.randn(len(batch.labels), 16, device="cuda"))
            torch.cuda.synchronize()
            with OneRead() as reads:
                out = peer.forward(batch)
                peer.step(out, peer.metric_loss(out), [teacher])
            assert reads.count == 1


def test_the_state_moves_between_devices(image_folder: Path) -> None:
    """Accumulated gradients, averages and scaler are the same after GPU -> files -> GPU. On a CPU the net
    gives the same embeddings."""
    settings: dict[str, Any] = {"amp": "float16", "update_interval": 2, "ema": {"decay": 0.9}}
    config = config_of(image_folder, **settings)
    splits = load_splits(config.data)
    first = build_peer(config, 0, splits.train.num_classes, torch.device("cuda"), True)
    train(first, config, 0, 5)
    files = encode_peer(first.state_dict())
    second = build_peer(config, 0, splits.train.num_classes, torch.device("cuda"), True)
    second.load_state_dict(decode_peer(files))
    assert encode_peer(second.state_dict()).keys() == files.keys()
    assert_same(decode_peer(encode_peer(second.state_dict())), decode_peer(files))
    assert all(parameter.is_cuda for parameter in second.net.parameters())
    assert all(p.grad is None or p.grad.is_cuda for p in second.net.parameters())
    for one, other in zip(train(first, config, 5, 8), train(second, config, 5, 8), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
    on_cpu = build_peer(config_of(image_folder), 0, splits.train.num_classes, torch.device("cpu"), True)
    on_cpu.load_weights(decode_peer(files))
    expected = on_cpu.embed_images(splits.test, 16)
    peer = build_peer(config_of(image_folder), 0, splits.train.num_classes, torch.device("cuda"), True)
    peer.load_weights(decode_peer(files))
    assert peer.embed_images(splits.test, 16) == pytest.approx(expected, abs=5e-3)


def test_a_gpu_agrees_with_the_cpu(image_folder: Path) -> None:
    """The mutual terms of the first step equal those of a CPU up to rounding."""
    config = config_of(image_folder)
    splits = load_splits(config.data)
    rows = {}
    for device in ("cpu", "cuda"):
        with closing(LocalCohort(config, splits, torch.device(device))) as cohort:
            rows[device] = cohort.run(0, 1, lambda finished: None)
    for one, other in zip(rows["cpu"], rows["cuda"], strict=True):
        for name in one:
            # The miner samples with the generator of the device: the metric losses differ.
            for term in ("distance", "angle"):
                assert other[name][term] == pytest.approx(one[name][term], rel=0.1)


@pytest.mark.ray
def test_peers_share_a_gpu_on_ray(image_folder: Path) -> None:
    """2 peers on one GPU: each has its share, and they exchange embeddings directly."""
    import ray

    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = config_of(image_folder)
    ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with closing(RayCohort(config, load_splits(config.data))) as cohort:
            assert cohort.devices == ("cuda:0", "cuda:0") and cohort.transport == "direct"
            rows = cohort.run(0, 10, lambda finished: None)
            embeddings = cohort.embeddings("test")
    finally:
        ray.shutdown()
    assert all(math.isfinite(value) for row in rows for terms in row.values() for value in terms.values())
    assert [each.shape for each in embeddings.values()] == [(40, 16), (40, 16)]


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
def test_a_peer_over_two_gpus(image_folder: Path) -> None:
    """Its replicas share each batch by NCCL. Distance and angle of the first step equal those of one GPU."""
    import ray

    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = config_of(image_folder, batch_norm="frozen")
    shared = config.cohort.peers[0].model_copy(update={"num_gpus": 2.0})
    peers = (shared, config.cohort.peers[1].model_copy(update={"num_gpus": 0.0}))
    spread = config.model_copy(update={"cohort": config.cohort.model_copy(update={"peers": peers})})
    splits = load_splits(config.data)
    with closing(LocalCohort(config, splits, torch.device("cuda", 0))) as cohort:
        (expected,) = cohort.run(0, 1, lambda finished: None)
    ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with closing(RayCohort(spread, splits)) as cohort:
            assert cohort.devices[0] == "cuda:0 x 2"
            rows = cohort.run(0, 10, lambda finished: None)
    finally:
        ray.shutdown()
    for term in ("distance", "angle"):
        assert rows[0]["peer0"][term] == pytest.approx(expected["peer0"][term], rel=0.1)
    assert all(math.isfinite(value) for row in rows for value in row["peer0"].values())
