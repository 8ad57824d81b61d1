"""Peers of `zoo`: the same architecture in transformers or torchvision, trained as its users do."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn

HF: Any = transformers  # its configurations take their keywords without declaring them
SEMANTIC = 0.4  # weight of the auxiliary head in transformers' UPerNet and in FCN


class Upsampled(nn.Module):
    """A network with logits at a lower resolution and perhaps auxiliary ones."""

    def __init__(self, network: nn.Module, logits_of: Callable[[Any], list[Tensor]]) -> None:
        super().__init__()
        self.network = network
        self.logits_of = logits_of

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the main head."""
        return self.logits_of(self.network(image))[0]

    def losses(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Upsample, then cross-entropy; the auxiliary one weighted."""
        terms = {}
        for index, logits in enumerate(self.logits_of(self.network(image))):
            wide = F.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(wide, label, ignore_index=255)
            terms[f"loss_{index}"] = loss if index == 0 else SEMANTIC * loss
        return terms


class UPerNet(nn.Module):
    """transformers' UPerNet, which upsamples and weighs inside."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.network = HF.UperNetForSemanticSegmentation(config)

    def forward(self, image: Tensor) -> Tensor:
        """Logits at the image's size."""
        return self.network(image).logits

    def losses(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Both heads'."""
        return {"loss": self.network(image, labels=label).loss}


class MaskClassification(nn.Module):
    """transformers' MaskFormer and Mask2Former; masks of the classes that are present."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Scores of the classes at the image's size, as its image processor computes them."""
        out = self.network(image)
        masks = F.interpolate(
            out.masks_queries_logits, image.shape[-2:], mode="bilinear", align_corners=False
        )
        classes = out.class_queries_logits.softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, masks.sigmoid())

    def losses(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The sum of all terms of all layers."""
        present = [each.unique() for each in label]
        classes = [each[each != 255] for each in present]
        masks = [
            (each[None] == names[:, None, None]).float()
            for each, names in zip(label, classes, strict=True)
        ]
        return {"loss": self.network(image, mask_labels=masks, class_labels=classes).loss}


def segformer(num_classes: int) -> nn.Module:
    """SegFormer-B0."""
    config = HF.SegformerConfig(num_labels=num_classes)
    network = HF.SegformerForSemanticSegmentation(config)
    return Upsampled(network, lambda out: [out.logits])


def fcn(num_classes: int) -> nn.Module:
    """FCN on a dilated ResNet-50; torchvision's head has one convolution only."""
    network = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True
    )
    return Upsampled(network, lambda out: [out["out"], out["aux"]])


def upernet_swin(num_classes: int) -> nn.Module:
    """UPerNet on Swin-T."""
    backbone = HF.SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    return UPerNet(HF.UperNetConfig(backbone_config=backbone, num_labels=num_classes))


def upernet_resnet(num_classes: int) -> nn.Module:
    """UPerNet on ResNet-50 (7 x 7 stem instead of three 3 x 3)."""
    return UPerNet(
        HF.UperNetConfig(
            backbone_config=_resnet(), auxiliary_in_channels=1024, num_labels=num_classes
        )
    )


def maskformer(num_classes: int) -> nn.Module:
    """MaskFormer on ResNet-50; its loss is that of the last layer, ours of all six."""
    config = HF.MaskFormerConfig(
        backbone_config=_resnet(),
        decoder_config=HF.DetrConfig(),
        num_labels=num_classes,
    )
    return MaskClassification(HF.MaskFormerForInstanceSegmentation(config))


def mask2former(num_classes: int) -> nn.Module:
    """Mask2Former on ResNet-50."""
    config = HF.Mask2FormerConfig(backbone_config=_resnet(), num_labels=num_classes)
    return MaskClassification(HF.Mask2FormerForUniversalSegmentation(config))


def _resnet() -> Any:
    return HF.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])


PEERS: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "fcn": {"torchvision": fcn},
    "segformer": {"transformers": segformer},
    "swin": {"transformers": upernet_swin},
    "upernet": {"transformers": upernet_resnet},
    "maskformer": {"transformers": maskformer},
    "mask2former": {"transformers": mask2former},
}
