"""A pushed cohort: the folder, its card, and the way through the hub's client and cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import tiny
from hub_server import HubServer
from typer.testing import CliRunner

from ray_dmml import Config, UserError, evaluate, load_cohort, push, train
from ray_dmml.cli.main import app
from ray_dmml.config.code import use_code
from ray_dmml.hub.card import base_models, changed_settings
from ray_dmml.hub.published_config import published_config
from ray_dmml.training.image_list import ImageList

SECRET = "hidden-name"
PARTS = """
from torch import nn

class Mean(nn.Module):
    pretrained_cfg = {"input_size": (3, 32, 32)}
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Conv2d(3, width, 4, stride=4)
    def forward(self, images):
        return self.layer(images).mean(dim=(2, 3))
"""


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two peers in a folder whose name must not be published, on images in another such folder."""
    folder = tmp_path_factory.mktemp(SECRET)
    shutil.copytree(image_folder, folder / "images")
    raw = tiny(
        folder / "images", train={"steps": 2, "evaluate_every": 1}, checkpoint={"storage_path": str(folder / "copy")}
    )
    raw["data"]["cache_dir"] = str(folder / "cache")
    raw["cohort"]["peers"] = [{}, {"backbone": "test_vit", "embedding_size": 8, "view": "weak", "ema": {"decay": 0.9}}]
    train(Config.parse(raw), folder / "run", local=True)
    return folder / "run"


@pytest.fixture(scope="module")
def pushed(run: Path) -> Path:
    """The folder that it is pushed to."""
    out = run.parent / "pushed"
    options = ("--out", str(out), "--license", "CC-BY-4.0", "--dataset", "Blocks")
    ended = CliRunner().invoke(app, ["push", str(run), "somebody/blocks", *options])
    assert ended.exit_code == 0 and f"written: {out}" in ended.stdout, ended.output
    return out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads, without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, folder: Path, commit: str, branch: str = "main") -> None:
    """Copies a folder into the cache as its client would, with links to the contents."""
    root = cache / "models--somebody--blocks"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = root / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)


def images_of(run: Path) -> list[Path]:
    return sorted((run.parent / "images").glob("class1*/0.png"))


def test_a_pushed_folder_embeds_as_the_run_does(run: Path, pushed: Path, tmp_path: Path) -> None:
    """To the bit, wherever it lies; and it has the evaluated weights only."""
    moved = shutil.copytree(pushed, tmp_path / "moved")
    files = images_of(run)
    expected, loaded = load_cohort(run), load_cohort(moved)
    assert np.array_equal(loaded.embed_files(files), expected.embed_files(files))
    facts = json.loads((pushed / "pushed.json").read_text())
    assert loaded.fingerprint == expected.fingerprint == facts["fingerprint"]
    assert list(loaded.peers) == ["peer0", "peer1"]
    assert np.array_equal(load_cohort(moved, "best").embed_files(files), expected.embed_files(files))
    with pytest.raises(UserError, match="has no weights 'last'; it has the evaluated ones only, 'best'"):
        load_cohort(moved, "last")


def test_nothing_of_the_machine_is_published(run: Path, pushed: Path) -> None:
    """No path, no image name, no class name, no optimiser state."""
    names = {str(path.relative_to(pushed)) for path in pushed.rglob("*") if path.is_file()}
    weights = {"peer0/weights.safetensors", "peer1/weights.safetensors"}
    assert names == {"README.md", "config.yaml", "pushed.json", "results.json", *weights}
    rows = ImageList.read(run / "images.csv.gz")
    assert rows is not None
    hidden = {SECRET, str(run.parent), *(word for row in rows.rows for word in (row.name, row.label))}
    for name in names - weights:
        text = (pushed / name).read_text()
        assert not [word for word in hidden if word in text], name


def test_paths_in_any_setting_are_left_out(image_folder: Path) -> None:
    """Also those that only own parts have. What remains is a valid config."""
    raw = tiny(image_folder, train={"init_from": "/secret/run", "loggers": [{"name": "a:B", "args": {"f": "/secret"}}]})
    raw["data"] |= {"source": "s3://key:secret@bucket/secret"}
    raw["loss"] = {
        "metric": {"name": "a:Loss", "args": {"file": "/secret", "rates": ["~/secret", 0.5], "c": "C:\\secret"}}
    }
    raw["code"] = ["/secret/a.py"]
    raw["cohort"]["peers"] = [{"weights": "/secret.pth", "labels": {"host": "secret"}}, {"view": "weak"}]
    published = published_config(Config.parse(raw), "best", [])
    text = published.to_yaml()
    assert "secret" not in text and "a:Loss" in text
    assert Config.parse(yaml.safe_load(text)) == published
    assert published.loss.metric.args == {"file": None, "rates": [None, 0.5], "c": None}


def test_the_card(run: Path, pushed: Path) -> None:
    """Its header is what the hub reads; its table has the figures of results.json."""
    card = (pushed / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "cc-by-4.0",
        "library_name": "ray-dmml",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["ray-dmml", "timm", "image-retrieval", "metric-learning", "mutual-learning"],
    }
    results = json.loads((run / "results.json").read_text())
    assert "40 images of 8 unseen classes. Weights: best (step" in text
    intervals = {**results["intervals"]["peers"], "ensemble": results["intervals"]["ensemble"]}
    for name, figures in {**results["peers"], "ensemble": results["ensemble"]}.items():
        low, high = (f"{100 * end:.1f}" for end in intervals[name]["recall@1"])
        metrics = ("recall@1", "recall@2", "map@r", "r_precision")
        cells = " | ".join(f"{100 * figures[metric]:.1f}" for metric in metrics)
        assert f"| {name} | {cells} | {low} to {high} |" in text
    assert "The peers were trained together" in text and "Blocks (`imagefolder`)" in text and "CC-BY-4.0" in text
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert yaml.safe_load(settings)["cohort"]["peers"][1]["embedding_size"] == 8
    facts = json.loads((pushed / "pushed.json").read_text())
    assert facts["images"]["test"]["num_images"] == 40
    assert all(of["sha256"] in text for of in facts["images"].values())


def test_a_pushed_cohort_is_evaluated_on_images_that_are_given(run: Path, pushed: Path) -> None:
    """Its figures are those of the run on the same images; it has no images of its own."""
    of_run, of_pushed = (evaluate(each, data=run.parent / "images") for each in (run, pushed))
    for key in ("peers", "ensemble", "intervals", "verification", "step", "weights", "data"):
        assert of_pushed[key] == of_run[key]
    with pytest.raises(UserError, match="is a pushed cohort, which has no images: give images"):
        evaluate(pushed)


def test_the_lines_of_the_card(
    run: Path, pushed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with ray-dmml and those without give the embeddings of the run."""
    put(cache, pushed, "a" * 40)
    monkeypatch.chdir(tmp_path)
    for name, file in zip(("a.jpg", "b.jpg"), images_of(run), strict=False):
        shutil.copy(file, tmp_path / name)
    own, plain = re.findall(r"```python\n(.*?)```", (pushed / "README.md").read_text(), re.S)
    expected = load_cohort(run)
    scope: dict[str, np.ndarray] = {}
    exec(own, scope)
    assert np.array_equal(scope["embeddings"], expected.embed_files(["a.jpg", "b.jpg"]))
    exec(plain, scope)
    assert np.allclose(scope["embeddings"], expected.peers["peer0"].embed_files(["a.jpg", "b.jpg"]), atol=1e-5)


def test_a_repository_in_the_cache(run: Path, pushed: Path, cache: Path, tmp_path: Path) -> None:
    """Without network; by branch, tag or commit. Another repository, or none, is a mistake of the user."""
    put(cache, pushed, "a" * 40)
    other = shutil.copytree(pushed, tmp_path / "other")
    (other / "pushed.json").unlink()
    put(cache, other, "b" * 40, "broken")
    files = images_of(run)
    expected = load_cohort(run).embed_files(files)
    assert np.array_equal(load_cohort("hf-hub:somebody/blocks").embed_files(files), expected)
    assert np.array_equal(load_cohort("hf-hub:somebody/blocks", revision="a" * 40).embed_files(files), expected)
    with pytest.raises(UserError, match="hf-hub:somebody/blocks is not a cohort that ray-dmml push wrote"):
        load_cohort("hf-hub:somebody/blocks", revision="broken")
    with pytest.raises(UserError, match=r"^hf-hub:somebody/other could not be read from the Hugging Face hub \(Local"):
        load_cohort("hf-hub:somebody/other")
    with pytest.raises(
        UserError, match="'hf-hub:blocks' is not a repository of the Hugging Face hub: write OWNER/NAME"
    ):
        load_cohort("hf-hub:blocks")
    with pytest.raises(UserError, match="a revision is that of a repository"):
        load_cohort(pushed, revision="main")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("peer0/weights.safetensors", b"", r"peer0/weights.safetensors cannot be used: it has 0 bytes"),
        ("peer0/weights.safetensors", None, "cannot be used: No such file"),
        ("pushed.json", b"[]", r"pushed.json cannot be read: TypeError"),
        ("pushed.json", b"{}", r"pushed.json cannot be read: KeyError"),
        ("pushed.json", b'{"weights": "best", "peers": {}}', "has no size and SHA-256 of it"),
        ("config.yaml", b"peers: 1", "unknown setting"),
    ],
)
def test_a_damaged_folder(pushed: Path, tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    """It is somebody else's, so whatever is in it ends with a sentence."""
    copy = shutil.copytree(pushed, tmp_path / "copy")
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_cohort(copy)


def test_weights_with_a_valid_checksum_that_are_no_weights(pushed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pushed, tmp_path / "copy")
    content = b"\xff" * 40
    facts = json.loads((copy / "pushed.json").read_text())
    facts["peers"]["peer0"] = {"size": 40, "sha256": hashlib.sha256(content).hexdigest()}
    (copy / "pushed.json").write_text(json.dumps(facts))
    (copy / "peer0/weights.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"weights.safetensors cannot be read"):
        load_cohort(copy)


def test_mistakes(run: Path, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence and exit code 2, and nothing is written."""
    out = tmp_path / "out"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def complaint(*arguments: Path | str) -> str:
        ended = CliRunner().invoke(app, ["push", *map(str, arguments)])
        assert ended.exit_code == 2 and not ended.stdout, ended.output
        (line,) = ended.stderr.splitlines()
        return line

    assert "there is no token for the Hugging Face hub: run `hf auth login`" in complaint(run, "a/b")
    assert "'b' is not a repository" in complaint(run, "b", "--out", out)
    assert "already exists; give another folder" in complaint(run, "a/b", "--out", pushed)
    assert "so private has no effect" in complaint(run, "a/b", "--out", out, "--private")
    assert "`hf upload a/b" in complaint(pushed, "a/b", "--out", out)
    assert "is not the folder of a run" in complaint(tmp_path, "a/b", "--out", out)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    results = json.loads((run / "results.json").read_text())
    (unfinished / "results.json").write_text(json.dumps({**results, "step": 99}))
    assert "results.json is of the best weights at step 99, and the checkpoint" in complaint(
        unfinished, "a/b", "--out", out
    )
    (unfinished / "results.json").unlink()
    assert "has no results yet" in complaint(unfinished, "a/b", "--out", out)
    assert {path.name for path in tmp_path.iterdir()} == {"unfinished"}


def test_an_own_backbone_needs_its_code(image_folder: Path, tmp_path: Path) -> None:
    """Its file is pushed on request, and runs on request. Other own parts stay at home."""
    (tmp_path / "own_mean.py").write_text(PARTS)
    raw = tiny(image_folder, train={"steps": 1, "tensorboard": False}, evaluation={"untrained": False})
    raw["data"]["validation_fraction"] = 0
    raw["code"] = [str(tmp_path / "own_mean.py")]
    own = {"backbone": "own_mean:Mean", "backbone_args": {"width": 4}}
    raw["cohort"]["peers"] = [own, {**own, "name": "teacher", "frozen": True}]
    try:
        train(Config.parse(raw), tmp_path / "run", local=True)
        use_code({})
        names = r"own_mean:Mean \(cohort.peers.0.backbone\), own_mean:Mean \(cohort.peers.1.backbone\)"
        with pytest.raises(UserError, match=f"nobody can load {names} without its"):
            push(tmp_path / "run", "a/b", out=tmp_path / "out")
        push(tmp_path / "run", "a/b", out=tmp_path / "out", with_code=True)
        use_code({})
        (tmp_path / "own_mean.py").unlink()
        assert (tmp_path / "out/code/own_mean.py").read_text() == PARTS
        with pytest.raises(UserError, match="runs code that is not of this package: own_mean:Mean"):
            load_cohort(tmp_path / "out")
        embeddings = load_cohort(tmp_path / "out", trust_code=True).embed_files(image_folder / "class00")
        assert embeddings.shape == (5, 16 + 4)
        card = (tmp_path / "out/README.md").read_text()
        assert 'load_cohort("hf-hub:a/b", trust_code=True)' in card
        assert "the weights of teacher were frozen" in card and "trained together" not in card
    finally:
        use_code({})


def test_base_models_and_changed_settings() -> None:
    """Pretrained weights by their repository, once; none if the run began with another run."""
    peers = [{"backbone": "resnet18"}, {"backbone": "hf-hub:a/own"}, {"backbone": "resnet18", "seed": 9}]
    raw = {"cohort": {"base": {"weights": "pretrained"}, "peers": peers}}
    assert base_models(Config.parse(raw)) == ["timm/resnet18.a1_in1k", "a/own"]
    assert base_models(Config.parse({**raw, "train": {"init_from": "run"}})) == []
    assert base_models(Config()) == []
    assert changed_settings(Config()) == {"cohort": {"peers": [{}, {}]}}
    changed = changed_settings(Config.parse({"loss": {"metric": {"name": "ProxyAnchorLoss"}}}))
    assert changed["loss"] == {"metric": {"name": "ProxyAnchorLoss"}}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine, a token, and an empty cache."""
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield server


def test_up_and_down_again(run: Path, server: HubServer) -> None:
    """By the hub's own client, to a server with the endpoints that it uses: one commit, then a download of nothing but
    what is needed, then the cache without the server."""
    url = push(run, "somebody/blocks", license="mit", private=True)
    assert url == f"{server.url}/somebody/blocks/commit/{server.commit}" and server.is_private
    assert len(server.commits) == 1 and "peer1/weights.safetensors" in server.files
    server.files |= {
        "peer0/pickle.bin": b"no",
        "code/evil.py": b"raise SystemExit",
        "peer9/weights.safetensors": b"old",
    }
    files = images_of(run)
    expected = load_cohort(run).embed_files(files)
    assert np.array_equal(load_cohort("hf-hub:somebody/blocks").embed_files(files), expected)
    assert not {"peer0/pickle.bin", "code/evil.py"} & server.downloaded
    load_cohort("hf-hub:somebody/blocks", trust_code=True)  # the config names no code, so none runs
    assert "code/evil.py" in server.downloaded and "peer0/pickle.bin" not in server.downloaded
    server.files["mine.txt"] = b"stays"
    push(run, "somebody/blocks")
    assert len(server.commits) == 2
    assert "peer9/weights.safetensors" not in server.files and "code/evil.py" not in server.files
    assert "mine.txt" in server.files and b"license" not in server.files["README.md"]
    server.is_private = False
    with pytest.raises(UserError, match="somebody/blocks already exists and is public"):
        push(run, "somebody/blocks", private=True)
    del server.files["pushed.json"]
    with pytest.raises(UserError, match=r"is not a cohort that ray-dmml push wrote \(it has config.yaml\)"):
        push(run, "somebody/blocks")
    server.files["pushed.json"] = b"{}"
    server.refusal = "You are not in the group of a/b"
    with pytest.raises(UserError, match=r"somebody/blocks could not be pushed .*You are not in the group of a/b\)$"):
        push(run, "somebody/blocks")
    server.stop()
    assert np.array_equal(load_cohort("hf-hub:somebody/blocks").embed_files(files), expected)
