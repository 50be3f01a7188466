"""Runs and evaluations for the tests of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ray_dmml import Config, train
from ray_dmml.data.dataset import ImageSet
from ray_dmml.evaluation.evaluation import ENSEMBLE, Evaluation
from ray_dmml.report.gallery import Retrievals

HOSTILE = """</script><script>alert('1')</script>"x&amp;" {{ 7 * 7 }} <img src=x onerror=alert(2)>"""
"""The name of a class: nothing of it may become markup or run."""


class Squares:
    """Images in memory, each of one colour."""

    def __init__(self, numbers: Sequence[int], broken: Sequence[int] = ()) -> None:
        self.numbers, self.broken = tuple(numbers), set(broken)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"square {self.numbers[index]}"

    def read(self, index: int) -> Tensor:
        if self.numbers[index] in self.broken:
            raise OSError("gone")
        return torch.full((3, 40, 40), self.numbers[index] % 256, dtype=torch.uint8)

    def subset(self, indices: Sequence[int]) -> Squares:
        return Squares([self.numbers[index] for index in indices], tuple(self.broken))


def evaluation_of(labels: Sequence[int], *peers: np.ndarray, **changes: Any) -> Evaluation:
    """The evaluation of peers by their embeddings, of any length."""
    names = tuple(f"class {n}" for n in range(max(labels) + 1))
    images = ImageSet(Squares(range(len(labels))), np.array(labels), names, **changes)
    vectors = {f"peer{n}": _unit(peer) for n, peer in enumerate(peers)}
    return Evaluation.of(vectors, images, recall_at=(1, 2))


def judged_of(evaluation: Evaluation) -> Retrievals:
    return Retrievals(evaluation.images, evaluation.systems, ENSEMBLE, num_tiles=8)


def random_evaluation(num_classes: int = 9, per_class: int = 6, noise: float = 1.0, seed: int = 0) -> Evaluation:
    """Two peers that find some queries, and not the same ones."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    peers = [rng.normal(size=(num_classes, 8))[labels] + noise * rng.normal(size=(len(labels), 8)) for _ in range(2)]
    return evaluation_of(labels.tolist(), *peers)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_run(folder: Path, out: Path, **changes: Any) -> Path:
    """A run on noisy images of a manifest, one class of which has a hostile name, and so has a file."""
    rng = np.random.default_rng(0)
    rows = ["path,label,split"]
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(16):
        pattern = rng.integers(0, 256, (24, 32, 3))
        name = HOSTILE if number == 15 else f"class {number}"
        for n in range(5):
            file = f"<b>'{n}'.png" if number == 15 else f"{number}-{n}.png"
            pixels = 0.3 * pattern + 0.7 * rng.integers(0, 256, pattern.shape)
            Image.fromarray(pixels.astype(np.uint8)).save(images / file)
            quoted = name.replace('"', '""')
            rows.append(f'"{file}","{quoted}",{"train" if number < 8 else "validation"}')
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    raw: dict[str, Any] = {
        "data": {
            **{"name": "manifest", "root": str(images), "manifest": str(folder / "list.csv"), "decode_size": 36},
            **{"classes_per_batch": 4, "images_per_class": 3, "validation_fraction": 0.25},
        },
        "cohort": {
            "threads_per_peer": 1,
            "base": {"backbone": "test_resnet", "embedding_size": 16, "input_size": 32, "batch_norm": "train"},
            "peers": [{}, {"view": "weak"}],
        },
        "train": {"steps": 4, "evaluate_every": 2, "tensorboard": False},
        "evaluation": {"recall_at": [1, 2]},
        **changes,
    }
    train(Config.parse(raw), out, local=True)
    return out


@dataclass
class Page(HTMLParser):
    """What a page has: its text, ids, links, pictures and scripts."""

    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    pictures: list[dict[str, str]] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    content: dict[str, list[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += found.items()
        self._inside = tag
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        if tag == "img":
            self.pictures.append(found)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.content.setdefault(self._inside, []).append(data)
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def read_page(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8").replace("<wbr>", ""))  # which nobody sees
    return page
