"""Trained peers as one module of plain torch: decoded uint8 images in, embeddings out."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from ray_dmml.config.parts import describe
from ray_dmml.data.center_view import CenterView
from ray_dmml.errors import UserError
from ray_dmml.exporting.quiet import quiet
from ray_dmml.models.embedding_net import EmbeddingNet, standardize

INPUT, OUTPUT = "images", "embeddings"
"""The names of the input and the output of an exported file."""

VIEWS = "views"
"""First part of the names of what computes the evaluation views."""


class Embedder(nn.Module):
    """Evaluation view, scaling, net and normalisation of one peer, or of several: the ensemble.

    Args:
        peers: evaluation view and net of each, in the order of the cohort.
        half: the nets compute in float16. Views, scaling and normalisation remain float32.
    """

    def __init__(self, peers: Sequence[tuple[CenterView, EmbeddingNet]], *, half: bool) -> None:
        super().__init__()
        self.views = nn.ModuleList(view.as_matrices() for view, _ in peers)
        nets = [copy.deepcopy(net) if half else net for _, net in peers]
        self._dtype = torch.float16 if half else torch.float32
        for net in nets:
            net.backbone.to(self._dtype)
            net.head.to(self._dtype)
        self.nets = nn.ModuleList(nets)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, rows of length 1."""
        embeddings = []
        for view, net in zip(self.views, self.nets, strict=True):
            scaled = standardize(view(images), net.mean, net.std)  # type: ignore[arg-type]
            features = net.features(scaled.to(self._dtype))  # type: ignore[operator]
            embeddings.append(F.normalize(net.head(features).float()))  # type: ignore[operator]
        return embeddings[0] if len(embeddings) == 1 else torch.cat(embeddings, dim=1) / len(embeddings) ** 0.5


def traced(embedder: Embedder, decode_size: int, name: str) -> ExportedProgram:
    """The embedder as a program of torch.export, for batches of any size. It names no file of this machine.

    Raises:
        UserError: torch.export cannot trace the net.
    """
    example = torch.zeros(2, 3, decode_size, decode_size, dtype=torch.uint8)
    try:
        with quiet():
            program = torch.export.export(embedder.eval(), (example,), dynamic_shapes={INPUT: {0: Dim("batch")}})
    except Exception as error:  # torch.export raises many types
        raise UserError(f"{name} cannot be exported, because torch.export fails: {describe(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
