"""Relational distillation between two networks in a training loop of pytorch-metric-learning.

    python relational_loss_in_pml.py                 # both networks also learn from each other
    python relational_loss_in_pml.py --weight 0      # they learn from the labels only

Loss, miner, sampler and evaluation are those of pytorch-metric-learning; one function is ours. The embeddings have
different sizes, because only the distances and angles between images are compared. It prints Recall@1 of both networks
on classes that they have never seen, and of their concatenated embeddings.
"""

import argparse

import numpy as np
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ray_dmml import Config, load_splits, relational_losses


def network(embedding_size, width):
    """Images (B, 1, 24, 24) -> embeddings (B, embedding_size)"""
    layers, channels = [], 1
    for wider in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
        channels = wider
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 3 * 3, embedding_size))


def tensors(images, num_classes):
    """The images of the first classes and their labels. The built-in characters are gray: one channel is enough."""
    chosen = np.flatnonzero(images.labels < num_classes)
    pixels = torch.stack([images.source.read(index)[:1] for index in chosen])
    return pixels / 255 - 0.5, torch.from_numpy(images.labels[chosen])


def recall_at_1(embeddings, labels):
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1)
    return calculator.get_accuracy(embeddings, labels)["precision_at_1"]


def main(weight, num_batches, num_classes):
    torch.manual_seed(0)
    splits = load_splits(Config.load(overrides={"data.decode_size": 24}).data)
    images, labels = tensors(splits.train, num_classes)
    sampler = MPerClassSampler(labels, m=4, batch_size=64, length_before_new_iter=64 * num_batches)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, sampler=sampler)
    nets = [network(embedding_size=64, width=16), network(embedding_size=32, width=8)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in nets]
    metric_loss, miner = MultiSimilarityLoss(), MultiSimilarityMiner()

    for batch, batch_labels in loader:
        embeddings = [net(batch) for net in nets]
        for own, other, optimizer in zip(embeddings, reversed(embeddings), optimizers, strict=True):
            loss = metric_loss(own, batch_labels, miner(own, batch_labels))
            mutual = relational_losses(own, [other])  # no gradient flows into the other network
            loss = loss + weight * (1.0 * mutual.distance + 2.0 * mutual.angle)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    images, labels = tensors(splits.test, num_classes)
    with torch.no_grad():
        embeddings = [F.normalize(net.eval()(images)) for net in nets]
    for name, found in {"64-d": embeddings[0], "32-d": embeddings[1], "both": torch.cat(embeddings, dim=1)}.items():
        print(f"{name}: Recall@1 of unseen characters {recall_at_1(found, labels):.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weight", type=float, default=1.0, help="of the relational losses")
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--classes", type=int, default=100, help="so many for training, and so many others for testing")
    arguments = parser.parse_args()
    main(arguments.weight, arguments.batches, arguments.classes)
