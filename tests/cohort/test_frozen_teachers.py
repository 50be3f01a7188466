"""Frozen backbones that teach with their pooled features, of other sizes than the embeddings of their students."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import as_in_training, assert_same, state_of, tiny
from test_equality import outcome

from ray_dmml import Config, evaluate, load_cohort, train
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import in_chunks

STEPS = 5


@pytest.fixture
def settings(image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A student, a ViT that embeds its own views, and a ConvNeXt that embeds the evaluation view once."""
    teachers = {"vit": "own", "convnext": "evaluation"}
    peers: list[dict[str, Any]] = [{"name": "student"}]
    for name, view in teachers.items():
        weights = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(timm.create_model(f"test_{name}").state_dict(), weights)
        teacher = {"name": name, "backbone": f"test_{name}", "weights": str(weights)}
        peers.append({**teacher, "frozen": True, "teacher_view": view})
    raw = tiny(
        image_folder,
        train={"steps": STEPS, "evaluate_every": 0, "tensorboard": False},
        evaluation={"weights": "last"},
    )
    raw["cohort"]["peers"] = peers
    return raw


def run_locally(config: Config) -> dict[str, Any]:
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        return outcome(cohort, stop=STEPS)


def test_ray_equals_in_process(ray_start_4_cpus: None, settings: dict[str, Any]) -> None:
    """To the bit."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    config = Config.parse(settings)
    with closing(RayCohort(config, load_splits(config.data))) as cohort:
        assert_same(outcome(cohort, stop=STEPS), run_locally(config))


@pytest.mark.slow
def test_ray_goes_on_without_the_files(ray_start_4_cpus: None, settings: dict[str, Any], tmp_path: Path) -> None:
    """A fresh cohort that has a stored state and not the files of the weights: the same bits, over the coordinator."""
    from ray_dmml.ray_backend.ray_cohort import RayCohort

    settings["cohort"]["transport"] = "coordinator"
    config = Config.parse(settings)
    splits = load_splits(config.data)
    expected = run_locally(config)
    with closing(RayCohort(config, splits)) as first:
        assert first.transport == "coordinator"
        rows = first.run(0, 2, lambda finished: None)
        stored = first.save(tmp_path)
    for peer in config.cohort.peers[1:]:
        Path(peer.weights).unlink()
    with closing(RayCohort(config, splits, initial_weights=False)) as second:
        second.load(stored)
        found = outcome(second, 2, STEPS)
    assert_same({**found, "rows": rows + found["rows"]}, expected)


def test_what_they_publish_and_that_they_never_change(settings: dict[str, Any]) -> None:
    """Pooled features: of the peer's own view of each batch, or of the evaluation view of each image."""
    config = Config.parse(settings)
    splits = load_splits(config.data)
    with closing(LocalCohort(config, splits)) as cohort:
        before = state_of(cohort)
        cohort.run(0, 3, lambda finished: None)
        _, vit, convnext = cohort.peers
        assert (vit.net.embedding_size, convnext.net.embedding_size) == (64, 64)
        batch = cohort._decoded.batch(3)
        [images] = in_chunks(splits.train, 1000)
        assert torch.equal(images[batch.indices], batch.images)
        published = torch.nn.functional.normalize(convnext.forward(batch).published)
        expected = cohort.embeddings("train")["convnext"][batch.indices]
        np.testing.assert_allclose(published.numpy(), expected, atol=1e-5)
        after = state_of(cohort)
    assert before["vit"] == after["vit"] and before["convnext"] == after["convnext"]
    assert before["student"] != after["student"]
    assert not any(key.startswith("head") for key in vit.net.state_dict())


def test_kept_embeddings_take_no_forward_pass(settings: dict[str, Any]) -> None:
    """The net computes before the first step only."""
    config = Config.parse(settings)
    with closing(LocalCohort(config, load_splits(config.data))) as cohort:
        teacher = cohort.peers[2]
        cohort.run(0, 1, lambda finished: None)
        calls: list[object] = []
        teacher.net.backbone.register_forward_hook(lambda *_: calls.append(_))
        cohort.run(1, 4, lambda finished: None)
        assert not calls
        cohort.embeddings("validation")
        assert calls


def test_a_run_resumes_and_is_used_without_the_files(settings: dict[str, Any], tmp_path: Path) -> None:
    """Results have a row for each teacher; the checkpoint has all that is needed."""
    config = Config.parse(settings)
    splits = load_splits(config.data)
    whole = train(config, tmp_path / "whole", local=True)
    assert list(whole["peers"]) == ["student", "vit", "convnext"]
    for row in ("vit", "convnext"):
        assert as_in_training(whole["peers"][row]) == whole["untrained"][row]
    short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
    train(short, tmp_path / "short", local=True)
    for peer in config.cohort.peers[1:]:
        Path(peer.weights).unlink()
    resumed = train(config, resume=tmp_path / "short", local=True)
    for key in ("peers", "ensemble", "untrained"):
        assert resumed[key] == whole[key]
    assert evaluate(tmp_path / "whole")["peers"] == whole["peers"]
    cohort = load_cohort(tmp_path / "whole")
    [images] = in_chunks(splits.test, 1000)
    assert cohort.embed(images).shape == (len(splits.test), 16 + 64 + 64)
    assert cohort.embed_files([]).shape == (0, 16 + 64 + 64)


def test_a_peer_of_another_run_teaches_with_its_head(settings: dict[str, Any], tmp_path: Path) -> None:
    """The size of its embeddings is that of its weights, and a teacher without a head can be handed on."""
    first = Config.parse(settings)
    splits = load_splits(first.data)
    with closing(LocalCohort(first, splits)) as cohort:
        for name, files in state_of(cohort).items():
            (tmp_path / f"{name}.safetensors").write_bytes(files["weights.safetensors"])
    raw = {**settings, "cohort": {**settings["cohort"]}}
    base = {"frozen": True, "embedding_size": 99}
    raw["cohort"]["peers"] = [
        {"name": "new", "embedding_size": 8},
        {**base, "name": "old", "weights": str(tmp_path / "student.safetensors")},
        {**base, "name": "vit", "weights": str(tmp_path / "vit.safetensors"), "backbone": "test_vit"},
    ]
    with closing(LocalCohort(Config.parse(raw), splits)) as cohort:
        rows = cohort.run(0, 2, lambda finished: None)
        sizes = {name: rows.shape[1] for name, rows in cohort.embeddings("test").items()}
    assert sizes == {"new": 8, "old": 16, "vit": 64}
    assert rows[0]["new"]["distance"] > 0 and rows[0]["old"] == {}
