"""Two small models, methods as their YAML says, and torch's optimizers behind the Updater."""

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from segmill.configuration import build
from segmill.models.combined import CombinedModel, Update
from segmill.models.discriminative import Discriminative
from segmill.paths import CONFIGS
from segmill.tta.batch_statistics import BatchStatistics
from tiny_adapt import tiny_loss, tiny_views

CLASSES = 5
# Three images, one of them portrait.
VIEWS = [tiny_views(48, 64, seed=1), tiny_views(64, 48, seed=2), tiny_views(48, 64, seed=3)]


class BatchNormNet(nn.Module):
    """Two BatchNorms over the image, one over a global mean; stride 4. No name says "norm"."""

    LAYERS, SHARPNESS = ("first.1", "second.1", "pooled.1"), 2.5

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.second = nn.Sequential(
            nn.Conv2d(6, 7, 3, 2, 1, bias=False), nn.BatchNorm2d(7), nn.ReLU()
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(7))
        self.dropout = nn.Dropout(0.5)
        self.classify = nn.Conv2d(7, CLASSES, 1)

    def forward(self, image):
        features = self.second(self.first(image))
        return self.classify(self.dropout(features + self.pooled(features)))


class LayerNormNet(nn.Module):
    """Patches of 4 pixels, normalised three times."""

    LAYERS, SHARPNESS = ("first", "second", "last"), 4.0

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.first, self.second, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.mix_again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.classify = nn.Linear(8, CLASSES)

    def forward(self, image):
        tokens = self.patches(image).movedim(1, -1)
        tokens = tokens + self.mix(self.first(tokens)).relu()
        tokens = tokens + self.mix_again(self.second(tokens)).relu()
        return self.classify(self.dropout(self.last(tokens))).movedim(-1, 1)


class TorchUpdater:
    """What the harness does, without Lightning."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.steps = optimizer, 0

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.steps += 1
        self.optimizer.step()
        self.optimizer.zero_grad()

    def zero_grad(self):
        self.optimizer.zero_grad()

    def forget(self):
        self.optimizer.state.clear()


def tiny_combined(network: type[nn.Module], *, sharpness: float | None = None) -> CombinedModel:
    """The same weights every time; the network's own sharpness leaves some pixels unsure."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        built = network()
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:  # scales are not all 1, shifts not all 0
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            if name == "classify.weight":
                parameter.data.mul_(built.SHARPNESS if sharpness is None else sharpness)
        for name, buffer in built.named_buffers():
            if "running" in name:  # near the variances that these weights give
                buffer.mul_(0.1).add_(0.2 * torch.rand_like(buffer))
    model = CombinedModel(
        discriminative=Discriminative(network=built, mean=[0.5] * 3, std=[0.25] * 3),
        generative=None,
        update=Update(discriminative=True, generative=False, update_norm_only=False),
        loss=tiny_loss(),
    )
    return model.eval()


def method_of(name: str, model: CombinedModel, **settings: Any) -> Any:
    """The method that configs/tta/NAME.yaml describes, but for `settings`."""
    node = OmegaConf.load(CONFIGS / "tta" / f"{name}.yaml").tta.method
    return build(OmegaConf.merge(node, settings), model=model)


def optimizer_of(parameters: dict[str, nn.Parameter], lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters.values()), lr=lr, momentum=0.9)


def adapted(
    name: str,
    model: CombinedModel,
    *,
    seed: int = 0,
    optimizer: Callable[..., torch.optim.Optimizer] = optimizer_of,
    batch_statistics: bool = False,
    **settings: Any,
) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    """The method after all images, and its logits and losses on the way."""
    method = method_of(name, model, **settings)
    parameters = method.parameters_to_update()
    updater = TorchUpdater(optimizer(parameters)) if parameters else None
    logits, losses = adapt_to_all(method, updater, seed=seed, batch_statistics=batch_statistics)
    return method, logits, losses


def adapt_to_all(
    method: Any, updater: Any, *, seed: int = 0, batch_statistics: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in method.model.named_parameters():
        parameter.requires_grad_(name in method.parameters_to_update())
    statistics = BatchStatistics(method.model.discriminative)
    if batch_statistics:
        statistics.apply()
    results = [
        method.adapt(views, updater or TorchUpdater(_nothing()), generator) for views in VIEWS
    ]
    statistics.undo()
    return [logits for logits, _ in results], [loss for _, loss in results]


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in module.state_dict().items()}


def _nothing() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1)])
