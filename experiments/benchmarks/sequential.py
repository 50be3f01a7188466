"""Plain PyTorch: diversified mutual learning in one process that trains two nets in turn.

    echo 10 | PYTHONPATH=experiments python -m benchmarks.sequential FOLDER

trains 10 steps, on 2 threads. An image is decoded once for both nets.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.plain import DEVICE, Trainee, batches
from benchmarks.worker import serve
from ray_dmml.losses.relational import relational_losses


def main(folder: str, loaders: str) -> None:
    torch.set_num_threads(2)
    trainees = [Trainee(seed=seed) for seed in range(2)]
    data = batches(folder, num_views=2, view_seed=0, loaders=int(loaders))

    def steps(count: int) -> dict[str, float]:
        loss = torch.zeros(())
        for _ in range(count):
            views, labels = next(data)
            labels = labels.to(DEVICE)
            embeddings = [t.embed(view) for t, view in zip(trainees, views, strict=True)]
            published = [embedding.detach() for embedding in embeddings]
            for i, (trainee, embedding) in enumerate(zip(trainees, embeddings, strict=True)):
                mutual = relational_losses(embedding, [published[1 - i]])
                loss = trainee.metric(embedding, labels) + mutual.distance + 2 * mutual.angle
                trainee.learn(loss)
        return {"loss": float(loss.detach())}

    serve(steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
