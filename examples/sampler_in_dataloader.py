"""Our ClassBalancedSampler in a DataLoader of PyTorch.

    python sampler_in_dataloader.py

A class-balanced batch has P classes with K images each. It prints, for a set in which some classes have many images and
others few, how many of the images are in an epoch: of our sampler, and of as many batches of pytorch-metric-learning's.
Then it goes on from the middle of an epoch, as a resumed run does, and prints whether the batches are the same.
"""

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from ray_dmml import ClassBalancedSampler

P, K = 4, 5
SIZES = [170, 80, 40, 20, 10, 5, 3, 2]  # images of the digits 0 to 7


def imbalanced_digits():
    """Images (N, 8, 8), their classes (N,), and their positions (N,) in the set."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:size] for digit, size in enumerate(SIZES)])
    pixels = torch.from_numpy(images[chosen]).float().reshape(-1, 8, 8)
    return TensorDataset(pixels, torch.from_numpy(labels[chosen]), torch.arange(len(chosen)))


def main():
    data = imbalanced_digits()
    labels = data.tensors[1].numpy()
    sampler = ClassBalancedSampler(labels, classes_per_batch=P, images_per_class=K, seed=0)
    epoch = range(sampler.steps_per_epoch)

    # A batch is a function of its step, so a list of batches is all that the DataLoader needs.
    loader = DataLoader(data, batch_sampler=[sampler.batch(step) for step in epoch])
    ours = list(loader)
    same_length = P * K * len(epoch)
    theirs = list(DataLoader(data, P * K, sampler=MPerClassSampler(labels, K, P * K, same_length)))
    for name, batches in {"ClassBalancedSampler": ours, "MPerClassSampler": theirs}.items():
        seen = len(torch.cat([places for _, _, places in batches]).unique())
        smallest = min(len(places.unique()) for _, _, places in batches)
        print(f"{name}: {len(batches)} batches of {P * K} have {seen} of {len(data)} images")
        print(f"    fewest different images in a batch: {smallest}")

    middle = len(epoch) // 2
    resumed = DataLoader(data, batch_sampler=[sampler.batch(step) for step in epoch[middle:]])
    pairs = zip(ours[middle:], resumed, strict=True)
    print(f"from step {middle} on, equal batches: {all(torch.equal(a[2], b[2]) for a, b in pairs)}")


if __name__ == "__main__":
    main()
