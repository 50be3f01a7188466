"""Parts that are not of the package. Tests copy this file to `outside_parts.py` where nothing but `code` finds it."""

import numpy as np
import torch
from pytorch_metric_learning import losses
from torch import nn

from ray_dmml import FileImages, ImageSet


class Blocks(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.3), "crop_pct": 0.9}
        self.layers = nn.ModuleList([nn.Conv2d(3, width, 3, stride=2), nn.Conv2d(width, 2 * width, 3, stride=2)])
        self.norm = nn.BatchNorm1d(2 * width)

    def forward(self, images):
        for layer in self.layers:
            images = layer(images).relu()
        return self.norm(images.mean(dim=(2, 3)))


class Noise:
    """Draws from numpy, and changes its input, which the peers of one process share."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        image //= 2
        image += torch.from_numpy(np.random.randint(0, 100, image.shape, dtype=np.uint8))
        return image[:, : self.size[0], : self.size[1]]


def invert(image, share=0.1):
    return 255 - image if torch.rand(()) < share else image


class Pairs(losses.ContrastiveLoss):
    pass


def similarities(student, teachers):
    return torch.stack([(student @ student.T - t @ t.T).square().mean() for t in teachers]).sum()


class Scaled(nn.Module):
    """Has a parameter and a buffer, and draws."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, student, teachers):
        self.count += 1
        kept = torch.rand(len(student)) < 0.8
        return similarities(self.scale * student[kept], [teacher[kept] for teacher in teachers])


def reversed_folder(config, root, num_test):
    """The images of a folder, with its first classes for testing."""
    classes = sorted(path.name for path in root.iterdir())

    def images_of(names):
        paths = [f"{name}/{path.name}" for name in names for path in sorted((root / name).iterdir())]
        labels = np.array([names.index(path.partition("/")[0]) for path in paths])
        return ImageSet(FileImages(root, paths, config.decode_size), labels, tuple(names))

    return images_of(classes[num_test:]), images_of(classes[:num_test])
