"""The head and the loss of `_dformer_peers`, in the same way."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvModule(nn.Module):
    """1 x 1 convolution, norm, perhaps ReLU."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class NMF2D(nn.Module):
    """Multiplicative updates by batched products, in the type that autocast chooses."""

    def __init__(self, rank: int, train_steps: int, eval_steps: int) -> None:
        super().__init__()
        self.rank, self.train_steps, self.eval_steps = rank, train_steps, eval_steps

    def forward(self, x: Tensor) -> Tensor:
        """As published, with the products of the updates in their order."""
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height * width)
        bases = torch.rand(batch, channels, self.rank, device=x.device)
        bases = F.normalize(bases, dim=1)
        coef = F.softmax(torch.bmm(x.transpose(1, 2), bases), dim=-1)
        for _ in range(self.train_steps if self.training else self.eval_steps):
            coef = self._coefficients(x, bases, coef)
            numerator = torch.bmm(x, coef)
            denominator = bases.bmm(coef.transpose(1, 2).bmm(coef))
            bases = bases * numerator / (denominator + 1e-6)
        coef = self._coefficients(x, bases, coef)
        return torch.bmm(bases, coef.transpose(1, 2)).view(batch, channels, height, width)

    def _coefficients(self, x: Tensor, bases: Tensor, coef: Tensor) -> Tensor:
        numerator = torch.bmm(x.transpose(1, 2), bases)
        denominator = coef.bmm(bases.transpose(1, 2).bmm(bases))
        return coef * numerator / (denominator + 1e-6)


class Bread(nn.Module):
    """A convolution under the name `conv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """With bias."""
        return self.conv(x)


class Hamburger(nn.Module):
    """Bread, ham, bread."""

    def __init__(self, channels: int, rank: int, train_steps: int, eval_steps: int) -> None:
        super().__init__()
        self.ham_in = Bread(channels)
        self.ham = NMF2D(rank, train_steps, eval_steps)
        self.ham_out = ConvModule(channels, channels, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual."""
        return F.relu(x + self.ham_out(self.ham(F.relu(self.ham_in(x)))))


class LightHamHead(nn.Module):
    """Resize, concatenate, squeeze."""

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        ham_channels: int,
        channels: int,
        rank: int,
        train_steps: int,
        eval_steps: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.squeeze = ConvModule(sum(in_channels[1:]), ham_channels, relu=True)
        self.hamburger = Hamburger(ham_channels, rank, train_steps, eval_steps)
        self.align = ConvModule(ham_channels, channels, relu=True)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits at stride 8."""
        size = features[1].shape[2:]
        maps = [
            F.interpolate(each, size, mode="bilinear", align_corners=False) for each in features[1:]
        ]
        x = self.align(self.hamburger(self.squeeze(torch.cat(maps, dim=1))))
        return self.conv_seg(self.dropout(x))


class Segmentor(nn.Module):
    """Logits at the size of the image; the loss of all pixels that have a label."""

    def __init__(self, backbone: nn.Module, decode_head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.decode_head = backbone, decode_head

    def forward(self, image: Tensor) -> Tensor:
        """Four channels, the last is depth."""
        depth = image[:, 3:].expand(-1, 3, -1, -1)
        logits = self.decode_head(self.backbone(image[:, :3], depth))
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)

    def losses(self, image: Tensor, label: Tensor) -> dict[str, Any]:
        """Of the pixels that are not 255."""
        each = F.cross_entropy(self(image), label, reduction="none", ignore_index=255)
        return {"loss": each[label != 255].mean()}
