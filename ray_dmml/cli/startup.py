"""Starting Ray and importing torch at the same time. Each of them takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import Thread


@contextmanager
def ray_and_torch(local: bool = False) -> Iterator[None]:
    """A Ray session for the length of the block, with torch imported.

    Args:
        local: no session.

    Raises:
        UserError: the cluster cannot be joined.
    """
    if local:
        yield
        return
    from ray_dmml.ray_backend.session import ray_session

    loading = Thread(target=import_module, args=("ray_dmml.training.run",))
    loading.start()
    try:
        with ray_session():
            loading.join()
            yield
    finally:
        loading.join()  # Python cannot exit during an import of torch.
