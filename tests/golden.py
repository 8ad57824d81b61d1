"""Golden values of the originals: weights, inputs and labels are functions of names and shapes.

`goldens/mmseg/NAME.json|npz` holds what MMSegmentation 1.2.2 computed with these weights.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "goldens"


def stream(tag: str) -> np.random.Generator:
    """The random stream of a name."""
    digest = hashlib.sha256(tag.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def golden_weight(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """The float32 array that the golden run used for the parameter or buffer `name`."""
    draw, count, last = stream(name), math.prod(shape), name.rsplit(".", 1)[-1]
    if last == "running_var":
        values = 1.0 + 0.1 * draw.random(count)
    elif last == "running_mean":
        values = 0.1 * draw.standard_normal(count)
    elif len(shape) <= 1:
        values = _vector(last, draw.standard_normal(count))
    else:
        values = _matrix(name, shape, gain, draw.standard_normal(count))
    return values.reshape(shape).astype(np.float32)


def _vector(last: str, normal: np.ndarray) -> np.ndarray:
    if last == "weight":
        return 1.0 + 0.1 * normal
    if last.endswith("bias"):
        return 0.1 * normal
    return -(0.5 + 0.1 * normal) if last == "scale" else 0.5 + 0.1 * normal


def _matrix(name: str, shape: tuple[int, ...], gain: float, normal: np.ndarray) -> np.ndarray:
    if any(part in name for part in ("query_embed", "query_feat", "level_embed")):
        return normal
    is_weight = name.rsplit(".", 1)[-1] == "weight"
    fan_in = math.prod(shape[1:]) if is_weight else shape[-1]
    values = normal / math.sqrt(max(fan_in, 1)) * (gain if is_weight else 1.0)
    if "transformer_decoder." in name and name.endswith(("out_proj.weight", "ffn.layers.1.weight")):
        return 0.2 * values
    return 4.0 * values if name.endswith("cls_embed.weight") else values


class ModelGolden:
    """One model of `goldens/mmseg`: its state dict as the original had it, and what came out."""

    def __init__(self, name: str) -> None:
        self.meta: dict[str, Any] = json.loads((FOLDER / "mmseg" / f"{name}.json").read_text())
        self.data = np.load(FOLDER / "mmseg" / f"{name}.npz")

    def state(self) -> dict[str, np.ndarray]:
        """The original's floating-point state dict: {MMSegmentation's key: array}."""
        return {
            key: golden_weight(key, tuple(shape), self.meta["gain"])
            for key, shape, dtype in self.meta["state_dict"]
            if dtype.startswith("float")
        }

    def label(self, batch: int = 2, height: int = 128, width: int = 128) -> np.ndarray:
        """Ground truth of the loss goldens: (B, H, W) int64 with 255 = ignore."""
        num_classes = self.meta["num_classes"]
        draw = stream(f"label:{batch}x{height}x{width}:{num_classes}")
        palette = draw.choice(num_classes, size=12, replace=False)
        blocks = draw.integers(0, 12, size=(batch, (height + 15) // 16, (width + 15) // 16))
        label = palette[blocks].astype(np.int64)
        label.reshape(-1)[::13] = 255
        return label.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]


def golden_image(height: int, width: int, batch: int = 1) -> np.ndarray:
    """Input of the model goldens, already normalised: (B, 3, H, W) float32."""
    draw = stream(f"input:{batch}x3x{height}x{width}")
    fine = draw.standard_normal((batch, 3, height, width))
    coarse = draw.standard_normal((batch, 3, (height + 7) // 8, (width + 7) // 8))
    coarse = coarse.repeat(8, axis=2).repeat(8, axis=3)[:, :, :height, :width]
    return (coarse + 0.5 * fine).astype(np.float32)


def component(name: str) -> dict[str, Any]:
    """`goldens/mmseg/components/NAME.json`."""
    return json.loads((FOLDER / "mmseg" / "components" / f"{name}.json").read_text())


def loss_inputs() -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Logits (2, 19, 24, 32), label (2, 24, 32) and class weights behind losses.json."""
    logits = (2 * stream("loss:logits").standard_normal((2, 19, 24, 32))).astype(np.float32)
    draw = stream("loss:label")
    label = draw.integers(0, 19, size=(2, 24, 32)).astype(np.int64)
    label[draw.random((2, 24, 32)) < 0.1] = 255
    return logits, label, [round(0.5 + 0.05 * index, 2) for index in range(19)]


def iou_inputs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Three (pred, label) pairs of iou.json: 10 classes, two of which never occur."""
    draw, pairs = stream("iou"), []
    for height, width in ((40, 50), (33, 61), (64, 64)):
        label = draw.integers(0, 8, size=(height, width))
        hit = draw.random((height, width)) < 0.6
        pred = np.where(hit, label, draw.integers(0, 9, size=(height, width)))
        ignored = draw.random((height, width)) < 0.08
        pairs.append((pred, np.where(ignored, 255, label)))
    return pairs


def preprocessing_inputs() -> list[np.ndarray]:
    """Two uint8 BGR images, channels first, of preproc.json."""
    draw = stream("preproc")
    return [draw.integers(0, 256, size=s, dtype=np.uint8) for s in ((3, 70, 90), (3, 64, 100))]


def postprocessing_logits() -> np.ndarray:
    """Logits (1, 7, 24, 32) of post.json and postprocess.npz."""
    return stream("post").standard_normal((1, 7, 24, 32)).astype(np.float32)


def transform_inputs() -> tuple[np.ndarray, np.ndarray]:
    """BGR image (300, 400, 3) and label (300, 400) of transforms.json; seeds are in each case."""
    draw, height, width = stream("tf:300x400"), 300, 400
    shape = ((height + 7) // 8, (width + 7) // 8, 3)
    blocks = draw.integers(0, 256, size=shape, dtype=np.uint8)
    image = blocks.repeat(8, 0).repeat(8, 1)[:height, :width].astype(int)
    image = np.clip(image + draw.integers(-20, 21, size=(height, width, 3)), 0, 255)
    shape = ((height + 31) // 32, (width + 31) // 32)
    label = draw.integers(0, 151, size=shape, dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    return image.astype(np.uint8), label[:height, :width]


class DFormerGolden:
    """One model of `goldens/dformer`: what the official code computed for inputs made by name."""

    def __init__(self, name: str) -> None:
        self.meta: dict[str, Any] = json.loads((FOLDER / "dformer" / f"{name}.json").read_text())
        self.data = np.load(FOLDER / "dformer" / f"{name}.npz")

    def state(self) -> dict[str, np.ndarray]:
        """{official key: array}; what the golden run left as it was built is not among them."""
        return dformer_state(self.meta["state_dict"])


def dformer_state(shapes: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of the DFormer goldens for {key: shape}; they follow from prefix and key."""
    built = ("num_batches_tracked", "angle", "decay")
    return {
        key: dformer_weight(prefix + key, tuple(shape))
        for key, shape in shapes.items()
        if key.rsplit(".", 1)[-1] not in built
    }


def dformer_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As `golden_weight`, except for the scales of layers."""
    if name.rsplit(".", 1)[-1].startswith("layer_scale"):
        return (1.0 + 0.1 * stream(name).standard_normal(shape)).astype(np.float32)
    return golden_weight(name, shape)


def dformer_normal(tag: str, *shape: int) -> np.ndarray:
    """An input of the DFormer goldens, float32: `rgb`, `depth`, `train_rgb`, `unit_x`, ..."""
    return stream(tag).standard_normal(shape).astype(np.float32)


def dformer_bases(batch: int, width: int = 512, rank: int = 64) -> np.ndarray:
    """What the official code drew before its factorisation, 0..1."""
    return stream("nmf_bases").random((batch, width, rank)).astype(np.float32)
