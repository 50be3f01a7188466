"""The trained peers of a run, without its images and without Ray."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny, unlike_peers

from ray_dmml import Config, UserError, list_images, load_cohort, train
from ray_dmml.checkpoint.store import CheckpointStore
from ray_dmml.cohort.local import LocalCohort
from ray_dmml.data.dataset import BadImageError
from ray_dmml.data.datasets import load_splits
from ray_dmml.data.loader import in_chunks
from ray_dmml.evaluation.ensemble import ensemble_embedding


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 different peers."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(unlike_peers(image_folder), out, local=True)
    return out


@pytest.mark.parametrize("weights", [None, "last", "best", "ema"])
def test_embeddings_are_those_of_the_run(run: Path, image_folder: Path, weights: str | None) -> None:
    """Embeddings of files and of decoded images equal those of the training cohort."""
    config = Config.load(run / "config.yaml")
    splits = load_splits(config.data)
    which = "best" if weights in (None, "best") else "last"
    with closing(LocalCohort(config, splits)) as cohort:
        cohort.load(CheckpointStore(run / "checkpoints").load(which).peers)
        expected = cohort.embeddings("test", ema=weights == "ema")
    trained = load_cohort(run, weights)
    assert tuple(trained.peers) == cohort.names
    files = [image_folder / splits.test.source.name(i) for i in range(len(splits.test))]
    embeddings = trained.embed_files(files, batch_size=7)
    assert embeddings.dtype == np.float32 and embeddings.shape == (40, 16 + 23 + 8)
    ensemble = ensemble_embedding(list(expected.values()))
    assert np.allclose(embeddings, ensemble, atol=1e-5)
    [images] = in_chunks(splits.test, 1000)
    assert np.allclose(trained.embed(images), ensemble, atol=1e-5)
    for name, peer in trained.peers.items():
        assert np.allclose(peer.embed(images).numpy(), expected[name], atol=1e-5)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_last_and_averaged_weights_are_different_nets(run: Path, image_folder: Path) -> None:
    """They differ for the one peer with averaged weights. The other two are the same."""
    files = sorted(image_folder.glob("class15/*.png"))
    last, averaged = (load_cohort(run, w).embed_files(files) for w in ("last", "ema"))
    assert not np.allclose(last[:, :16], averaged[:, :16], atol=1e-4)
    assert np.array_equal(last[:, 16:], averaged[:, 16:])


def test_neither_the_images_nor_the_order_of_calls_matter(run: Path, tmp_path: Path) -> None:
    """A run's folder on a machine without its data gives the same embeddings."""
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    text = (moved / "config.yaml").read_text()
    root = str(Config.load(run / "config.yaml").data.root)
    (moved / "config.yaml").write_text(text.replace(root, "/nowhere"))
    files = sorted(Path(root).glob("class1*/0.png"))
    assert len(files) == 6
    cohort = load_cohort(moved)
    assert np.array_equal(cohort.embed_files(files), load_cohort(run).embed_files(files))
    assert np.array_equal(cohort.embed_files(files), cohort.embed_files(files))
    assert cohort.embed_files([]).shape == (0, 47)


def test_a_folder_a_file_and_a_list(run: Path, image_folder: Path, tmp_path: Path) -> None:
    """A folder means its images at any depth, in the order of their paths; other and hidden files are left out. The
    peers embed the same files as the cohort."""
    folder = tmp_path / "photos"
    names = ["b.PNG", "a/z.png", "a/1/y.png", "a-b/x.png"]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"class{number:02d}" / "0.png", folder / name)
    for other in (".hidden.png", "notes.txt", ".thumbs/t.png"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(b"no image")
    files = list_images(folder)
    assert files == [folder / name for name in sorted(names)]
    cohort = load_cohort(run)
    embeddings = cohort.embed_files(folder)
    assert np.array_equal(embeddings, cohort.embed_files(files))
    assert np.array_equal(embeddings, cohort.embed_files(str(folder), batch_size=4))
    assert np.allclose(embeddings[2:3], cohort.embed_files(files[2]), atol=1e-6)
    assert np.allclose(embeddings[2:3], cohort.embed_files(str(files[2])), atol=1e-6)
    parts = [peer.embed_files(folder) for peer in cohort.peers.values()]
    assert [part.shape for part in parts] == [(4, 16), (4, 23), (4, 8)]
    assert np.array_equal(ensemble_embedding(parts), embeddings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no images"):
        cohort.embed_files(tmp_path / "empty")
    with pytest.raises(UserError, match=r"photos is a folder: give it alone, or list_images\(folder\)"):
        cohort.embed_files([folder])


def test_nets_have_the_layout_of_training(image_folder: Path, tmp_path: Path) -> None:
    """Another layout computes the same, several times slower."""
    raw = tiny(image_folder, train={"steps": 1})
    raw["cohort"]["peers"] = [{}, {"view": "weak", "channels_last": False}]
    train(Config.parse(raw), tmp_path / "run", local=True)
    peers = load_cohort(tmp_path / "run").peers.values()
    kernels = [[w for w in peer.net.parameters() if w.ndim == 4 and min(w.shape[1:]) > 1] for peer in peers]
    layouts = [{w.is_contiguous(memory_format=torch.channels_last) for w in of} for of in kernels]
    assert layouts == [{True}, {False}]


def test_fingerprints(run: Path, tmp_path: Path) -> None:
    """The same for a copy of the run. Another for other weights, another peer, preprocessing or number of peers."""
    shutil.copytree(run, tmp_path / "copy")
    cohort, copy = load_cohort(run), load_cohort(tmp_path / "copy")
    prints = {"ensemble": cohort.fingerprint, **{name: peer.fingerprint for name, peer in cohort.peers.items()}}
    assert all(len(found) == 64 for found in prints.values()) and len(set(prints.values())) == 4
    assert copy.fingerprint == cohort.fingerprint
    averaged = load_cohort(run, "ema").peers
    last = load_cohort(run, "last").peers
    assert [averaged[name].fingerprint == last[name].fingerprint for name in last] == [False, True, True]
    text = (run / "config.yaml").read_text()
    (tmp_path / "copy/config.yaml").write_text(text.replace("decode_size: 36", "decode_size: 40"))
    assert load_cohort(tmp_path / "copy").peers["peer0"].fingerprint != prints["peer0"]
    (tmp_path / "copy/config.yaml").write_text(text.replace("channels_last: true", "channels_last: false"))
    assert load_cohort(tmp_path / "copy").fingerprint == cohort.fingerprint


def test_mistakes_are_user_errors(run: Path, tmp_path: Path) -> None:
    """Unknown weights, no run, a missing image, a run without a checkpoint."""
    with pytest.raises(UserError, match="no weights 'bset'; there are last and best"):
        load_cohort(run, "bset")
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no config\.yaml"):
        load_cohort(tmp_path)
    with pytest.raises(BadImageError, match=r"gone\.png cannot be read: No such file"):
        load_cohort(run).embed_files([tmp_path / "gone.png"])
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="has no best checkpoint"):
        load_cohort(tmp_path)
