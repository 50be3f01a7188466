"""Plain torch.distributed: two processes that exchange 128 x 512 float32 embeddings by gloo.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment, as torchrun sets them.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from benchmarks.worker import serve

ROWS, SIZE = 128, 512


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sent = torch.randn(ROWS, SIZE)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size())]

    def exchange(count: int) -> dict[str, float]:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            dist.all_gather(received, sent)
        return {"seconds": (time.perf_counter() - began) / count}

    serve(exchange)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
