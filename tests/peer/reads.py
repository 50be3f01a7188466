"""Counts what makes a CPU wait for its GPU, in a step on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten: Any = torch.ops.aten
READING = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
}
"""Their results, or the sizes of these, depend on values."""
INDEXING = {aten.index, aten.index_put, aten.index_put_}
"""With a mask, whose True values are counted."""
COPYING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


class Reads(TorchDispatchMode):
    """``with Reads(labels) as reads`` counts them in ``reads.names``. Values of the given tensors, and what is computed
    from them alone, are on the CPU anyway."""

    def __init__(self, *on_cpu: Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self._on_cpu = list(on_cpu)  # held, so that no other tensor gets the id of one
        self._copies = _Copies(self.names)

    def __enter__(self) -> Reads:
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        is_on_cpu = all(any(each is other for other in self._on_cpu) for each in given)
        name = func.overloadpacket
        masks = name in INDEXING and any(
            each.dtype in (torch.bool, torch.uint8) for each in tree_leaves(args[1]) if each is not None
        )
        if (name in READING or masks) and not is_on_cpu:
            self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        if is_on_cpu:
            self._on_cpu += [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        return result


class _Copies(TorchFunctionMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COPYING:
            self._names.append(func.__name__)
        return func(*args, **(kwargs or {}))
