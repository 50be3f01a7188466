"""ONNX files: written by torch's exporter, quantised and run by onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ray_dmml.config.parts import describe
from ray_dmml.errors import UserError
from ray_dmml.exporting.embedder import INPUT, OUTPUT, VIEWS
from ray_dmml.exporting.quiet import quiet

MAX_BYTES = 2**31
"""Of one file: protobuf holds no more."""


def require_onnx() -> None:
    """Raises UserError unless the packages of the extra ``export`` are installed."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_module(package)
    except ImportError as error:
        raise UserError(f"format onnx needs the extra: pip install 'ray-dmml[export]' ({error})") from None


def write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, Any], *, quantise: bool) -> None:
    """Writes a program as one ONNX file with its metadata: each value a string, as JSON if it is none.

    Args:
        quantise: weights of linear layers and convolutions are int8, and their inputs are quantised as they come
            (dynamic quantisation). Convolutions in groups lose too much by it and remain float32.

    Raises:
        UserError: the exporter fails, or the file would be too large.
    """
    import onnx

    try:
        with quiet():
            result = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT], external_data=False
            )
            assert result is not None
            model = result.model_proto
    except Exception as error:  # the exporter raises many types
        raise UserError(f"torch's exporter to ONNX fails: {describe(error)}") from error
    # The exporter notes at each node where in the code it comes from, with paths of this machine.
    for node in model.graph.node:
        del node.metadata_props[:]
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]
    if model.ByteSize() >= MAX_BYTES:
        raise UserError(f"{path.name} would be larger than 2 GiB, the most that an ONNX file holds; use format torch")
    if quantise:
        model = _quantised(model, path)
    onnx.helper.set_model_props(
        model, {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    )
    onnx.save(model, path)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """The model of a file in onnxruntime, on the CPU with torch's number of threads: (B, 3, S, S) uint8 -> (B, D)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(images: Tensor) -> Tensor:
        (embeddings,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return torch.from_numpy(embeddings)

    return embed


def _quantised(model: Any, path: Path) -> Any:
    """The model in int8; ``path`` is used for it on the way."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet():
        onnx.save(model, path)
        quant_pre_process(path, path, skip_symbolic_shape=True)
        # onnxruntime is quick for linear layers in signed integers, and for convolutions in unsigned ones.
        for kind, weight_type in (("MatMul", QuantType.QInt8), ("Conv", QuantType.QUInt8)):
            kept = [node.name for node in onnx.load(path).graph.node if _remains_float(node)]
            quantize_dynamic(
                path,
                path,
                op_types_to_quantize=[kind],
                per_channel=True,
                weight_type=weight_type,
                nodes_to_exclude=kept,
            )
    return onnx.load(path)


def _remains_float(node: Any) -> bool:
    """Whether a node is a product of a view, or a convolution in groups."""
    num_groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return num_groups > 1 or any(name.startswith(VIEWS) for name in node.input)
