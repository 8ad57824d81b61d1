"""Models and loaders of classification_step.py: real sizes, random weights made on the device."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from segmill.configuration import build, compose
from segmill.data.image_batches import ImageBatches
from segmill.data.loader import place_of_process
from segmill.models.combined import CombinedModel
from segmill.optim import OptimizerSettings
from segmill.tta.sharding import compile_parts

SIDE, CLASSES, SEED = 224, 1000, 0
WORDS = (
    "model=combined_classifier",
    "data=imagenet_c",
    "model.generative.weights=random",
    "model.generative.codec.weights=random",
)
TINY = (
    "model.discriminative.network.model_name=convnext_atto",
    "model.generative.network.channels=32",
    "model.generative.network.depth=2",
    "model.generative.network.num_heads=2",
    "model.generative.codec.block_channels=[8,8,8,8]",
    "model.generative.codec.layers_per_block=1",
    "model.generative.codec.norm_groups=4",
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the images of a step are gone through."""

    batch: int
    accumulate: int
    windows_at_once: int | None  # images that the guide takes at a time; None: the batch
    compiled: bool
    graphs: bool = False

    @property
    def images(self) -> int:
        """Images of a step."""
        return self.batch * self.accumulate

    def text(self) -> str:
        """In a line of the output."""
        parts = f", guide {self.windows_at_once} at a time" if self.windows_at_once else ""
        kind = "compiled" if self.compiled else "eager"
        kind += ", CUDA graphs" if self.graphs else ""
        return f"{self.batch} x {self.accumulate}{parts}, {kind}"


@dataclass(frozen=True)
class Work:
    """TFLOP of one pass: of the guide under one condition, the classifier, and the codec."""

    guide: float
    classifier: float
    codec: float
    conditions: int

    def of_step(self, images: int) -> float:
        """Forward once; backward, which takes twice as much, of all but the codec."""
        return images * (3 * self.conditions * self.guide + 3 * self.classifier + self.codec)


def device_of_process(*, cpu: bool) -> torch.device:
    """The GPU of this process, as Lightning numbers them."""
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def models(device: torch.device, *, tiny: bool) -> tuple[CombinedModel, OptimizerSettings]:
    """The same values on every device of a kind; small ones, so that nothing overflows."""
    config = compose("adapt", [*WORDS, *(TINY if tiny else ())])
    torch.manual_seed(SEED)
    with torch.device(device):
        model: CombinedModel = build(config.model)
    network = model.guide.network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    return model.to(device).eval(), build(config.optimizer)


def set_way(model: CombinedModel, way: Way) -> None:
    """Images the guide takes at a time; a compiled model stays so."""
    model.loss = replace(model.loss, windows_at_once=way.windows_at_once)


def compile_both(model: CombinedModel) -> None:
    """As trainer.compile=true does."""
    compile_parts(model)


def work(*, tiny: bool) -> Work:
    """Counted by torch on the meta device: products of matrices, convolutions and attention."""
    config = compose("adapt", [*WORDS, *(TINY if tiny else ())])
    with torch.device("meta"):
        model: CombinedModel = build(config.model)
        guide: Any = model.guide
        side = guide.view.short
        latent = torch.zeros(1, guide.codec.channels, side // guide.cell, side // guide.cell)
        calls = {
            "guide": lambda: guide.network(latent, torch.zeros(1), torch.zeros(1).long()),
            "classifier": lambda: model.discriminative.network(torch.zeros(1, 3, SIDE, SIDE)),
            "codec": lambda: guide.codec.encoder(torch.zeros(1, 3, side, side)),
        }
        found = {}
        for name, call in calls.items():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call()
            found[name] = counter.get_total_flops() / 1e12
    return Work(**found, conditions=model.loss.min_classes)


class Images:
    """Random images of ImageNet-C's size; an image is a function of its number."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        # Patches, so that images differ by more than noise.
        coarse = torch.rand(count, 3, 7, 7, generator=generator)
        fine = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="nearest")
        self.pixels = (255 * fine).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.pixels[index]


def as_batch(items: Sequence[tuple[int, Tensor]]) -> dict[str, Any]:
    """As ClassificationTaskData's."""
    image = torch.stack([each for _, each in items])
    return {
        "image": image,
        "original": image,
        "label": torch.tensor([index % CLASSES for index, _ in items]).view(-1, 1, 1),
        "name": [str(index) for index, _ in items],
        "size": (1, 1),
        "task": [1] * len(items),
    }


def loader(count: int, batch: int) -> DataLoader:
    """`batch` images for each process."""
    batches = ImageBatches(count=count, batch_size=batch, place=place_of_process)
    return DataLoader(
        Images(count),  # pyright: ignore[reportArgumentType]
        batch_sampler=batches,
        collate_fn=as_batch,
        pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 in products and convolutions."""
    held = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = held
