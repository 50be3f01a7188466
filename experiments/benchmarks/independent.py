"""Plain PyTorch: one net that learns alone. Two of them at the same time never talk.

    echo 10 | PYTHONPATH=experiments python -m benchmarks.independent FOLDER SEED

trains 10 steps.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.plain import DEVICE, Trainee, batches
from benchmarks.worker import serve


def main(folder: str, seed: str, loaders: str) -> None:
    torch.set_num_threads(1)
    trainee = Trainee(seed=int(seed))
    data = batches(folder, num_views=1, view_seed=int(seed), loaders=int(loaders))

    def steps(count: int) -> dict[str, float]:
        loss = torch.zeros(())
        for _ in range(count):
            (images,), labels = next(data)
            loss = trainee.metric(trainee.embed(images), labels.to(DEVICE))
            trainee.learn(loss)
        return {"loss": float(loss.detach())}

    serve(steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
