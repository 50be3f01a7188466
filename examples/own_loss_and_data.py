"""A metric loss and a data set of your own, trained with ``train()``.

    python own_loss_and_data.py runs/digits
    python own_loss_and_data.py runs/short train.steps=20      # with another setting

The data set is scikit-learn's 1,797 handwritten digits: two peers learn some digits, and are evaluated on digits that
they have never seen. It prints Recall@1 of each peer and of the ensemble, before and after training.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from ray_dmml import Config, ImageSet, train


class NeighborLoss(nn.Module):
    """Cross-entropy of picking an image of the same class among all other images of the batch, by similarity."""

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings, labels):
        """(B, D) embeddings of length 1 and (B,) classes -> a scalar"""
        is_self = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        is_positive = (labels[:, None] == labels[None, :]) & ~is_self
        similarities = (embeddings @ embeddings.T / self.temperature).masked_fill(is_self, -1e9)
        log_probabilities = similarities.log_softmax(dim=1)
        return -(log_probabilities * is_positive).sum() / is_positive.sum()


class DigitImages:
    """Arrays as a source of images. For image files, ``ray_dmml.FileImages`` has these four methods."""

    def __init__(self, pixels, names, size):
        self.pixels, self.names, self.size = pixels, names, size

    def __len__(self):
        return len(self.pixels)

    def name(self, index):
        return self.names[index]

    def read(self, index):
        """uint8 (3, size, size)"""
        small = torch.from_numpy(self.pixels[index] / 16 * 255).to(torch.uint8)
        return nn.functional.interpolate(small.expand(1, 3, 8, 8), size=self.size)[0]

    def subset(self, indices):
        return DigitImages(self.pixels[indices], [self.names[index] for index in indices], self.size)


def digits(config, root, train_on):
    """The training images, of the digits below ``train_on``, and the test images, of the other digits."""
    data = load_digits()
    source = DigitImages(data.images, [f"digit {n}" for n in range(len(data.images))], config.decode_size)
    images = ImageSet(source, data.target.astype(np.int64), tuple("0123456789"))
    return images.subset(np.flatnonzero(data.target < train_on)), images.subset(np.flatnonzero(data.target >= train_on))


CONFIG = {
    "code": [str(Path(__file__).resolve())],  # this file goes to the process of every peer
    "data": {
        "name": "own_loss_and_data:digits",
        "args": {"train_on": 6},
        "decode_size": 32,
        "classes_per_batch": 6,
        "images_per_class": 8,
        "validation_fraction": 0,  # there are no classes to spare
    },
    "loss": {"metric": {"name": "own_loss_and_data:NeighborLoss", "args": {"temperature": 0.1}}},
    "cohort": {
        "base": {
            "backbone": "resnet10t",
            "embedding_size": 32,
            "input_size": 32,
            "eval_crop": 1,
            "batch_norm": "train",
        },
        "peers": [
            {"view": [{"name": "RandomAffine", "args": {"degrees": 10, "translate": [0.1, 0.1]}}]},
            {"view": [{"name": "RandomAffine", "args": {"degrees": 10, "shear": 15}}], "update_interval": 2},
        ],
    },
    "train": {"steps": 100},
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", help="folder of the new run")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE")
    parser.add_argument("--local", action="store_true", help="all peers in this process, without Ray")
    arguments = parser.parse_args()
    config = Config.parse(CONFIG).with_overrides(arguments.settings)
    results = train(config, arguments.out, local=arguments.local)
    before = {**results["untrained"], "ensemble": results["untrained_ensemble"]}
    for name, figures in {**results["peers"], "ensemble": results["ensemble"]}.items():
        print(f"{name}: Recall@1 of unseen digits {before[name]['recall@1']:.1%} -> {figures['recall@1']:.1%}")
