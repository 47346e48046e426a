"""The formats, each by the exporter that transformers has for it."""

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from transformers_radio.disk import writing

from .program import Program, dynamic_shapes, example_images, executorch_sizes, square_shapes

# format -> packages that it needs, and the command that installs them
PACKAGES = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "pip install 'transformers_radio[export]'"),
    "torch-export": ((), ""),
    # its requirement of hydra-core excludes the omegaconf that recipes need, and exporting does without hydra
    "executorch": (("executorch",), "pip install --no-deps executorch && pip install flatbuffers ruamel.yaml"),
    "openvino": (("openvino",), "pip install openvino"),
}
FORMATS = tuple(PACKAGES)
# dtype -> what transformers.js has behind "model" in the name of the file: its "q8" is _quantized. It has no bf16.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "bf16": "_bf16", "q8": "_quantized"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "q8": torch.float32}
SINGLE_FILE = 1_900_000_000  # bytes; protobuf ends at 2 GiB


def check_format(format: str, dtype: str) -> None:
    """Raises ValueError for an unknown format or dtype, ImportError with the command for a missing package."""
    if format not in PACKAGES:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    if dtype == "q8" and format in ("executorch", "openvino"):
        raise ValueError(f"dtype q8 is for onnx and torch-export; {format} takes fp32, fp16 or bf16.")
    if importlib.util.find_spec("transformers.exporters") is None:
        raise ImportError(f"transformers {transformers.__version__} has no exporters: pip install -U transformers")
    packages, command = PACKAGES[format]
    if format == "torch-export" and dtype == "q8":
        packages, command = ("torchao",), "pip install 'transformers_radio[export]'"
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"format {format} with {dtype} needs {', '.join(missing)}: {command}")


def program_path(output: Path, format: str, dtype: str) -> Path:
    """The file for ONNX, beside its other precisions as transformers.js wants them; else a folder."""
    if format == "onnx":
        return output / "onnx" / f"model{SUFFIXES[dtype]}.onnx"
    return output / (format if dtype == "fp32" else f"{format}-{dtype}")


def write_program(student: Any, path: Path, format: str, dtype: str) -> None:
    """Exports the student to `path`; it is cast to `dtype` in place."""
    if format == "executorch":
        # plans its memory for the largest shape, and cannot compute the longer side where both are free
        (batch, height, width), channels = executorch_sizes(student)["large"], student.config.num_channels
        images, shapes = torch.rand(batch, channels, height, width), square_shapes(student)
    else:
        images, shapes = example_images(student), dynamic_shapes(student)
    program = Program(student.to(DTYPES[dtype])).eval()
    if dtype == "q8" and format == "torch-export":
        quantize_weights(student)
    exporter, config_class = _exporter(format)
    config = config_class(dynamic_shapes=shapes)
    with contextlib.redirect_stdout(sys.stderr):  # torch prints its progress
        exported = exporter.export(program, {"pixel_values": images}, config)
    with writing(path):
        if format != "onnx":
            exported.save_pretrained(path)
        elif dtype == "q8":
            _write_quantized_onnx(exported.program, path)
        else:
            _write_onnx(exported.program, path)


def quantize_weights(student: Any) -> None:
    """int8 weights and, as they come, int8 activations in every Linear (torchao), in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(student, Int8DynamicActivationInt8WeightConfig())


def _exporter(format: str) -> tuple[Any, Any]:
    # each file needs its runtime when it is imported
    if format == "onnx":
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig
    if format == "torch-export":
        from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

        return DynamoExporter(), DynamoConfig
    if format == "openvino":
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        return OpenVINOExporter(), OpenVINOConfig
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    return ExecutorchExporter(), ExecutorchConfig


def _write_onnx(model: Any, path: Path) -> None:
    """One file, or beyond protobuf's limit NAME_data beside it, where transformers.js looks for it."""
    import onnx_ir

    size = sum(weight.const_value.nbytes for weight in model.graph.initializers.values())
    onnx_ir.save(model, str(path), external_data=f"{path.name}_data" if size > SINGLE_FILE else None)


def _write_quantized_onnx(model: Any, path: Path) -> None:
    """int8 weights of all matrix products, activations as they come (onnxruntime's dynamic quantization)."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx_ir.serde.serialize_model(model)
    quantize_dynamic(
        proto, str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
    )
