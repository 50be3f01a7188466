"""Publishes the trained peers of a run: to the Hugging Face hub, or as a folder with the same content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray_dmml import pushed
from ray_dmml.config.code import Files, code_in_use
from ray_dmml.config.parts import load_trusted_parts, own_names
from ray_dmml.config.schema import Config
from ray_dmml.errors import UserError
from ray_dmml.hub.card import model_card
from ray_dmml.hub.published_config import NOT_PUBLISHED, published_config
from ray_dmml.hub.upload import require_token, upload
from ray_dmml.inference import SavedPeers, weights_of
from ray_dmml.training.image_list import ImageList
from ray_dmml.training.run_dir import RunDir

_NAMES = {"README.md", "config.yaml", "results.json", pushed.FACTS_FILE, pushed.CODE_FOLDER}


def push(
    run: Path | str,
    repo: str,
    *,
    out: Path | str | None = None,
    private: bool = False,
    license: str | None = None,
    dataset: str | None = None,
    with_code: bool = False,
) -> str:
    """Pushes the evaluated weights of a run to the Hugging Face hub, with a model card made of its results.

    A new repository is created. An existing one gets a new commit. Paths, names of images, optimiser states and loggers
    are not published.

    Args:
        run: its folder.
        repo: ``OWNER/NAME``.
        out: a folder to write the same files to; nothing is uploaded.
        private: create the repository as a private one.
        license: identifier of the weights' licence, such as ``apache-2.0``. None: the card says that it is not stated.
        dataset: name of the images in the card.
        with_code: push the Python files of the config's ``code``, too. They are imported if a backbone is theirs.

    Returns:
        The address of the commit, or the folder.

    Raises:
        UserError: the run has no results, its checkpoint is of another step, it needs code and ``with_code`` is False,
            the folder exists, there is no token, or the hub does not answer or refuses.
    """
    repo = pushed.repository(repo)
    if out is None:
        RunDir.open(run)  # a wrong folder is reported before a missing token
        require_token()
        with TemporaryDirectory(prefix="ray-dmml-push-", ignore_cleanup_errors=True) as aside:
            _write(Path(run), Path(aside), repo, license, dataset, with_code)
            return upload(Path(aside), repo, private)
    if private:
        raise UserError("nothing is uploaded to a folder (out), so private has no effect: leave one out")
    out = Path(out)
    if os.path.lexists(out):
        raise UserError(f"{out} already exists; give another folder (out)")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".push-", dir=out.parent, ignore_cleanup_errors=True) as aside:
            folder = Path(aside) / "cohort"
            folder.mkdir()  # with the usual permissions, which a temporary folder has not
            _write(Path(run), folder, repo, license, dataset, with_code)
            os.rename(folder, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return str(out)


def _write(run: Path, folder: Path, repo: str, license: str | None, dataset: str | None, with_code: bool) -> None:
    """Writes all files into an empty folder, and builds the nets of what it has written."""
    if pushed.is_pushed(run):
        raise UserError(f"{run} was written by ray-dmml push; `hf upload {repo} {run}` uploads it")
    run_dir = RunDir.open(run)
    config, results = run_dir.config(), _results(run_dir)
    own = [f"{name} ({setting})" for setting, name in own_names(config) if "backbone" in setting]
    if own and not with_code:
        raise UserError(
            f"nobody can load {', '.join(dict.fromkeys(own))} without its Python code: --with-code, or with_code=True, "
            "pushes the files of the setting code"
        )
    load_trusted_parts(config, run, with_code, "--with-code", settings="backbone")
    code: Files = code_in_use() if with_code else {}
    which = config.weights_to_evaluate()
    checkpoint = run_dir.checkpoints.load("best" if which == "best" else "last")
    if (which, checkpoint.step) != (results["weights"], results["step"]):
        raise UserError(
            f"{run}: results.json is of the {results['weights']} weights at step {results['step']}, and the checkpoint "
            f"of the {which} weights is of step {checkpoint.step}; finish the run first (ray-dmml train --resume)"
        )
    files = weights_of(checkpoint, config, which)
    if taken := sorted(_NAMES & files.keys()):
        raise UserError(f"a peer cannot be pushed with the name {taken[0]}, which is that of a file beside it")
    entries = sorted({f"{pushed.CODE_FOLDER}/{name.partition('/')[0]}" for name in code})
    published = published_config(config, which, entries)
    (folder / "config.yaml").write_text(published.to_yaml(), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / name).mkdir()
        (folder / name / pushed.WEIGHTS_FILE).write_bytes(content)
    for name, (_, content) in code.items():
        path = folder / pushed.CODE_FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    cohort = SavedPeers(Config.load(folder / "config.yaml"), files, code).build()
    facts = _facts(run_dir, which, results["step"], files, cohort.fingerprint)
    (folder / pushed.FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    card = model_card(repo, published, cohort, results, facts, license=license, dataset=dataset)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _results(run_dir: RunDir) -> dict[str, Any]:
    """results.json without paths."""
    try:
        results = json.loads(run_dir.results_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir.path} has no results yet, and a run is pushed after its end: {error}") from None
    return {**results, "init_from": NOT_PUBLISHED if results["init_from"] else None}


def _facts(run_dir: RunDir, which: str, step: int, files: Mapping[str, bytes], fingerprint: str) -> dict[str, Any]:
    """The content of pushed.json."""
    peers = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    return {
        "weights": which,
        "step": step,
        "fingerprint": fingerprint,
        "peers": peers,
        "images": _images(run_dir.images_file),
        "versions": run_dir.environment().get("versions", {}),
        "pushed_by": f"ray-dmml {metadata.version('ray-dmml')}",
    }


def _images(path: Path) -> dict[str, Any]:
    """Numbers and a digest of each split of images.csv.gz, without the names."""
    images = ImageList.read(path)
    found = {}
    for split in ("training", "validation", "test"):
        rows = images.only(split).rows if images is not None else []
        if rows:
            found[split] = {
                "num_images": len(rows),
                "num_classes": len({row.label for row in rows}),
                "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
            }
    return found
