"""DM2 in plain PyTorch, and the same weights as those of the package.

    python dm2_in_plain_pytorch.py --steps 10

Two peers learn the built-in characters, with the settings of ``ray-dmml train`` without a config. The script trains
them twice: with the loop below, and with a cohort of the package in one process. It prints the terms of the loss at
every step, and at the end how many tensors of each network are equal to the bit.

Every random number depends on a key that ``seeded`` takes: the run's seed, the peer's seed, the step, and a purpose.
"""

import argparse
import math

import timm
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.reducers import MeanReducer
from timm.data import resolve_model_data_config
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import RandomAffine

from ray_dmml import ClassBalancedSampler, Config, DistanceWeightedNegativeMiner, load_splits, seeded
from ray_dmml.cohort.local import LocalCohort

RUN_SEED = 0
SHIFT = {"translate": [0.08, 0.08], "scale": [0.85, 1.1], "fill": 255}
PEERS = [  # three diversities: initial weights (by the seed), the view of the images, the interval between updates
    {"seed": 0, "view": RandomAffine(5, **SHIFT), "interval": 1, "lr": 1e-3},
    {"seed": 1, "view": RandomAffine(10, shear=10, **SHIFT), "interval": 2, "lr": 2e-3},
]


class Peer(nn.Module):
    """A network with its view, its interval and its optimizer."""

    def __init__(self, seed, view, interval, lr):
        super().__init__()
        self.seed, self.view, self.interval, self.lr = seed, view, interval, lr
        with seeded(RUN_SEED, seed, "init"):
            self.backbone = timm.create_model("resnet10t", num_classes=0)
        with seeded(RUN_SEED, seed, "head"):
            self.head = nn.Linear(self.backbone.num_features, 64)
        pixels = resolve_model_data_config(self.backbone)
        self.mean, self.std = (255 * torch.tensor(pixels[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
        self.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(param_groups_weight_decay(self, weight_decay=1e-4), lr)

    def forward(self, images, step):
        """The embeddings of the peer's own view of the images, before normalization: (B, 64)."""
        with seeded(RUN_SEED, self.seed, step, "view"):
            viewed = torch.stack([self.view(image) for image in images])
        return self.head(self.backbone((viewed - self.mean) / self.std))

    def learn(self, loss, step):
        """Averages the gradients of an interval, and updates at its end. The learning rate depends on the step only."""
        (loss / self.interval).backward()
        if (step + 1) % self.interval == 0:
            warmup, cosine = min(1.0, (step + 1) / 20), 0.5 * (1 + math.cos(math.pi * (step / 300)))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (warmup * cosine)
            self.optimizer.step()
            self.optimizer.zero_grad()


def relations(embeddings):
    """Distances between all pairs, (B, B), divided by their mean; cosines of the angles in all triples, (B, B, B)."""
    differences = embeddings[None, :] - embeddings[:, None]
    distances = differences.norm(dim=2)
    directions = F.normalize(differences, dim=2)
    return distances / distances[distances > 0].mean(), directions @ directions.mT


def relational_distillation(student, teacher):
    """The distance and the angle term: the student's relations should be those of the teacher, who gets no gradient.

    ``ray_dmml.relational_losses`` computes the same without a (B, B, D) tensor, and also takes equal embeddings."""
    of_student, of_teacher = relations(student.double()), relations(teacher.detach().double())
    return [F.smooth_l1_loss(own, target) for own, target in zip(of_student, of_teacher, strict=True)]


def dm2(steps, num_classes=16, distillation=relational_distillation):
    """Trains two peers on batches of ``num_classes`` classes with 4 images each."""
    images = load_splits(Config.quickstart().data).train
    sampler = ClassBalancedSampler(images.labels, num_classes, images_per_class=4, seed=RUN_SEED)
    miner = DistanceWeightedNegativeMiner()
    triplet_loss = TripletMarginLoss(margin=0.2, distance=miner.distance, reducer=MeanReducer())
    peers = [Peer(**settings) for settings in PEERS]
    for step in range(steps):
        indices = sampler.batch(step)  # the same images for both
        labels = torch.from_numpy(images.labels[indices])
        decoded = [images.source.read(index) for index in indices]
        outputs = [peer(decoded, step) for peer in peers]  # all embed before any of them updates
        for peer, own, other in zip(peers, outputs, reversed(outputs), strict=True):
            unit = F.normalize(own)
            with seeded(RUN_SEED, peer.seed, step, "miner"):
                metric = triplet_loss(unit, labels, miner(unit, labels))
            distance, angle = distillation(own, other.detach())
            peer.learn(metric + 1.0 * distance + 2.0 * angle, step)
            print(f"step {step} peer{peer.seed}: metric {metric:.4f}, distance {distance:.4f}, angle {angle:.4f}")
    return peers


def of_the_package(steps, num_classes=16):
    """The same two peers, trained by a cohort in this process, on the CPU."""
    same_threads = torch.get_num_threads()  # of which the last bits depend
    settings = {"data.classes_per_batch": num_classes, "cohort.threads_per_peer": same_threads}
    config = Config.quickstart(settings)
    cohort = LocalCohort(config, load_splits(config.data), torch.device("cpu"))
    cohort.run(0, steps, on_step=lambda step: None)
    cohort.close()
    return [peer.net for peer in cohort.peers]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--classes", type=int, default=16, help="number of classes in a batch, with 4 images each")
    arguments = parser.parse_args()
    plain = dm2(arguments.steps, arguments.classes)
    package = of_the_package(arguments.steps, arguments.classes)
    for number, (peer, net) in enumerate(zip(plain, package, strict=True)):
        weights, expected = peer.state_dict(), net.state_dict()
        num_equal = sum(torch.equal(weights[name], expected[name]) for name in expected)
        print(f"peer{number}: {num_equal} of {len(expected)} tensors are equal to the bit")
