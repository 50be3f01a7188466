"""Plain PyTorch: diversified mutual learning with torch.distributed and no Ray, a process a peer.

    echo 10 > steps
    PYTHONPATH=experiments torchrun --nproc-per-node 2 -m benchmarks.plain_dm2 FOLDER < steps

trains 10 steps. NCCL where every peer has a GPU, else gloo.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from benchmarks.plain import BATCH_SIZE, DEVICE, EMBEDDING_SIZE, Trainee, batches
from benchmarks.worker import serve
from ray_dmml.losses.relational import relational_losses


def main(folder: str, loaders: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if torch.cuda.device_count() >= 2 else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    trainee = Trainee(seed=rank)
    data = batches(folder, num_views=1, view_seed=rank, loaders=int(loaders))
    received = [torch.empty(BATCH_SIZE, EMBEDDING_SIZE, device=DEVICE) for _ in range(world)]

    def steps(count: int) -> dict[str, float]:
        loss = torch.zeros(())
        for _ in range(count):
            (images,), labels = next(data)
            embedding = trainee.embed(images)
            exchange = dist.all_gather(received, embedding.detach(), async_op=True)
            loss = trainee.metric(embedding, labels.to(DEVICE))
            exchange.wait()
            others = received[:rank] + received[rank + 1 :]
            mutual = relational_losses(embedding, others)
            loss = loss + mutual.distance + 2 * mutual.angle
            trainee.learn(loss)
        return {"loss": float(loss.detach())}

    serve(steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
