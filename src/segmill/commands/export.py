"""`segmill export run=RUN`: a model as ONNX or torch.export file, run once and compared."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from segmill.configuration import Invocation
from segmill.errors import SegmillError
from segmill.models.exported import Exported
from segmill.segmenter import Segmenter, open_segmenter

log = logging.getLogger(__name__)

Array = Shaped[np.ndarray, "..."]
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 20  # the first with GridSample on any rank; onnxruntime knows it since 1.17
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# float32 in another order of summation, over a network's depth; more is reported as a difference.
CLOSE = 1e-3


def run(config: DictConfig, context: Invocation) -> None:  # noqa: ARG001
    """Export, run the file, print the largest difference; raise when the export is impossible."""
    if config.format == "onnx":
        _check_packages()
    segmenter = open_segmenter(config.run, weights=config.weights, num_classes=config.num_classes)
    module = Exported(
        segmenter.model,
        output=config.output,
        align_corners=segmenter.protocol.align_corners,
    ).eval()
    torch.manual_seed(config.seed)
    image = 255 * torch.rand(config.batch, segmenter.channels, *config.size)
    path = _path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write, read = {"onnx": (_write_onnx, _run_onnx), "torch": (_write_torch, _run_torch)}[
        config.format
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own, about things that nobody here chose
        try:
            write(module, image, path)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
            raise SegmillError(_why(config, error)) from error
        theirs = read(path, image)
    if config.weights is None and not Path(config.run).exists():
        log.info("weights=null: the weights in this file are random.")
    log.info("%s: %.1f MiB, %s", path, path.stat().st_size / 2**20, _takes(config, segmenter))
    _compare(module, image, theirs)


def _write_onnx(module: nn.Module, image: Tensor, path: Path) -> None:
    # ONNX writes attention out; only the plain implementation has that one's memory layout.
    with sdpa_kernel(SDPBackend.MATH):
        program: Any = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["output"],
            verbose=False,
        )
    partial = path.with_suffix(".partial")
    program.save(partial, external_data=False)
    partial.replace(path)


def _run_onnx(path: Path, image: Tensor) -> Array:
    import onnxruntime  # only this format needs it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": image.numpy()})[0])


def _write_torch(module: nn.Module, image: Tensor, path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(module, (image,))
    partial = path.with_suffix(".partial.pt2")
    torch.export.save(program, partial)
    partial.replace(path)


def _run_torch(path: Path, image: Tensor) -> Array:
    program = torch.export.load(path).module()
    with torch.no_grad():
        return program(image).numpy()


def _compare(module: nn.Module, image: Tensor, theirs: Array) -> None:
    """Against the model in memory; a model that draws numbers also differs from itself."""
    with torch.no_grad():
        ours, again = module(image).numpy(), module(image).numpy()
    if ours.shape != theirs.shape:
        raise SegmillError(f"The file gives {theirs.shape}, the model {ours.shape}.")
    if ours.dtype.kind == "i":
        log.info(
            "The file was run: %.6f of the pixels have the model's class.", _same(ours, theirs)
        )
        return
    difference, scale = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    log.info("The file was run: largest difference %.2e of logits up to %.3g.", difference, scale)
    own = float(np.abs(ours - again).max())
    if own:
        log.info(
            "This model draws random numbers in every forward pass: by itself it differs by %.2e. "
            "The file draws its own.",
            own,
        )
    elif difference > CLOSE * scale:
        raise SegmillError(
            "The file computes something else than the model; do not use it. It was kept for "
            "a look at the cause; please report it with the command."
        )


def _same(ours: Array, theirs: Array) -> float:
    return float((ours == theirs).mean())


def _check_packages() -> None:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise SegmillError(
            f'format=onnx needs {", ".join(absent)}: pip install "segmill[export]". '
            "format=torch needs nothing more."
        )


def _path(config: DictConfig) -> Path:
    suffix = SUFFIX[config.format]
    if config.path is not None:
        return Path(config.path)
    run = Path(config.run)
    if run.is_dir():
        return run / f"model{suffix}"
    return run.with_suffix(suffix) if run.is_file() else Path(f"{run.name}{suffix}")


def _takes(config: DictConfig, segmenter: Segmenter) -> str:
    height, width = config.size
    pixels = "RGB" if segmenter.channels == 3 else "RGB and depth"
    return (
        f"takes float32 ({config.batch}, {segmenter.channels}, {height}, {width}) {pixels} of "
        f"0 to 255, gives {config.output}"
    )


def _why(config: DictConfig, error: Exception) -> str:
    cause = error.__cause__ or error
    first = next((line for line in f"{cause}".splitlines() if line.strip()), type(cause).__name__)
    return (
        f"{config.run} cannot be exported as {config.format}: {first.strip()} "
        f"({type(cause).__name__}). Try format={'torch' if config.format == 'onnx' else 'onnx'}, "
        "or another size."
    )
