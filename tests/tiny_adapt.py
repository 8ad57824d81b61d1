"""A small model, a small guide and a plain updater: adaptation without weights or a Trainer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn

from segmill.models.combined import CombinedModel, Update
from segmill.models.discriminative import Discriminative
from segmill.models.guide_view import GuideView
from segmill.models.joint_loss import JointLoss
from segmill.tta.method import Views

CLASSES = 7


class TinyNetwork(nn.Module):
    """Logits at stride 4."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, 6, 5, stride=4, padding=2)
        self.norm = nn.GroupNorm(2, 6)
        self.classify = nn.Conv2d(6, num_classes, 3, padding=1)

    def forward(self, image):
        return self.classify(self.norm(self.stem(image)).relu())


class TinyField(nn.Module):
    """A velocity of three-channel latents, conditioned on a class and the time."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.classes = nn.Embedding(num_classes + 1, 5)
        self.time = nn.Linear(1, 5)
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        self.last = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, noisy_latent, t, classes):
        condition = self.classes(classes) + self.time(t[:, None])
        features = self.norm(self.first(noisy_latent)) + condition[:, :, None, None]
        return self.last(F.silu(features))


class TinyGuide(nn.Module):
    """A flow of images shrunk to one latent cell every eight pixels; it counts its calls."""

    def __init__(self, *, num_classes: int, view: GuideView):
        super().__init__()
        self.num_classes, self.cell, self.view = num_classes, 8, view
        self.network = TinyField(num_classes)
        self.calls: list[tuple[int, int]] = []

    def blocks(self):
        return [self.network.first]

    def fill(self, device):
        self.network.to(device)

    @torch.no_grad()
    def encode(self, window):
        return F.avg_pool2d(window.float() / 127.5 - 1, self.cell)

    def noisy(self, latent, noise, t):
        share = t[:, None, None, None]
        return (1 - share) * latent + share * noise, noise - latent

    def predict(self, noisy_latent, t, classes):
        count, each = classes.shape
        self.calls.append((count, each))
        latents = noisy_latent.repeat_interleave(each, dim=0)
        predicted = self.network(latents, t.repeat_interleave(each), classes.flatten())
        return predicted.unflatten(0, (count, each))


class PlainUpdater:
    """Keeps each step's gradients, averaged over the processes as sharding does; plain descent."""

    def __init__(self, parameters: dict[str, nn.Parameter], *, rate: float = 0.0):
        self.parameters, self.rate = parameters, rate
        self.steps: list[dict[str, torch.Tensor]] = []

    def backward(self, loss):
        loss.backward()

    @torch.no_grad()
    def step(self):
        gradients = {}
        for name, parameter in self.parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if distributed.is_initialized():
                distributed.all_reduce(gradient)
                gradient /= distributed.get_world_size()
            gradients[name] = gradient.clone()
            parameter -= self.rate * gradient
        self.steps.append(gradients)
        self.zero_grad()

    def zero_grad(self):
        for parameter in self.parameters.values():
            parameter.grad = None

    def forget(self):
        """Nothing is gathered."""


def tiny_loss(**changes: Any) -> JointLoss:
    """Settings as in configs/model/combined.yaml, but for `changes`."""
    settings: dict[str, Any] = {
        "topk": 1,
        "classes_threshold": 20,
        "min_classes": 0,
        "temperature": 1.0,
        "logits": "normed",
        "mask_reduction": "valid",
        "timestep_range": (0.25, 0.25),
        "class_chunk": None,
        "windows_at_once": 1,
        "buckets": (),
    }
    return JointLoss(**settings | changes)


def tiny_model(
    *,
    update: tuple[bool, bool, bool] = (True, True, False),
    view: tuple[int, int | None, int | None] = (32, 32, 16),
    channels: int = 3,
    **loss: Any,
) -> CombinedModel:
    """The same weights every time; `update` and `view` in the order of their classes' fields."""
    short, window, stride = view
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TinyNetwork(channels, CLASSES)
        guide = TinyGuide(
            num_classes=CLASSES,
            view=GuideView(short=short, window=window, stride=stride, multiple=8),
        )
    model = CombinedModel(
        discriminative=Discriminative(
            network=network, mean=[0.5] * channels, std=[0.25] * channels
        ),
        generative=guide,
        update=Update(discriminative=update[0], generative=update[1], update_norm_only=update[2]),
        loss=tiny_loss(**loss),
    )
    return model.eval()


def tiny_views(height: int = 40, width: int = 66, *, channels: int = 3, seed: int = 0) -> Views:
    """An image of patches of colour; both models see it as it is."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(1, channels, height // 8, width // 8, generator=generator)
    image = (255 * F.interpolate(patches, (height, width), mode="nearest")).to(torch.uint8)
    return Views(image=image, original=image)


def adapt_once(
    method: Callable[..., Any],
    model: CombinedModel,
    views: Views,
    *,
    rate: float = 0.0,
    **keys: Any,
) -> tuple[torch.Tensor, torch.Tensor, PlainUpdater]:
    """Logits, loss and the updater after one image, all draws from seed 0."""
    adapting = method(model=model, **{"step": "image"} | keys)
    updater = PlainUpdater(adapting.parameters_to_update(), rate=rate)
    generator = torch.Generator().manual_seed(0)
    logits, loss = adapting.adapt(views, updater, generator)
    return logits, loss, updater
