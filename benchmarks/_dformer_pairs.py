"""What `dformer` compares: ours and the peer with the same weights, random data, their results."""

import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import _dformer_peer_head, _dformer_peers, _dformerv2_peers
from torch import Tensor, nn

from segmill.models.backbones.dformer import DFormer
from segmill.models.backbones.dformerv2 import DFormerV2
from segmill.models.encoder_decoder import EncoderDecoder
from segmill.models.families.dformer import LightHamHead

CLASSES = 40
V1: dict[str, Any] = {"heads": [1, 2, 4, 8], "mlp_ratios": [8, 8, 4, 4], "windows": [0, 7, 7, 7]}
V2: dict[str, Any] = {"mlp_ratios": [4, 4, 3, 3]}
SIZES: dict[str, dict[str, Any]] = {
    "dformer-s": V1 | {"widths": [64, 128, 256, 512], "depths": [2, 2, 4, 2]},
    "dformer-l": V1 | {"widths": [96, 192, 288, 576], "depths": [3, 3, 12, 2]},
    "dformerv2-s": V2
    | {
        "widths": [64, 128, 256, 512],
        "depths": [3, 4, 18, 4],
        "heads": [4, 4, 8, 16],
        "head_ranges": [4, 4, 6, 6],
        "layer_scale": [None] * 4,
    },
    "dformerv2-l": V2
    | {
        "widths": [112, 224, 448, 640],
        "depths": [4, 8, 25, 8],
        "heads": [7, 7, 14, 20],
        "head_ranges": [6, 6, 6, 6],
        "layer_scale": [None, None, 1e-6, 1e-6],
    },
}
TINY: dict[str, Any] = {"depths": [1, 1, 1, 1], "widths": [32, 64, 64, 64], "heads": [1, 2, 2, 2]}
HEAD: dict[str, Any] = {
    "ham_channels": 512,
    "rank": 64,
    "train_steps": 6,
    "eval_steps": 7,
    "dropout": 0.1,
}


def pair(name: str, device: str, *, tiny: bool) -> tuple[Any, Any]:
    """Ours and the peer with the same random weights; no branch is scaled to nothing."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES[name] | {"drop_path_rate": 0.1} | (TINY if tiny else {})
    channels = 1024 if name == "dformerv2-l" else 512
    head = HEAD | {"channels": channels, "num_classes": CLASSES}
    v2 = name.startswith("dformerv2")
    ours = EncoderDecoder(
        backbone=DFormerV2(**sizes) if v2 else DFormer(**sizes),
        decode_head=partial(LightHamHead, **head, in_index=[1, 2, 3]),
    )
    trunk = _dformerv2_peers.DFormerV2 if v2 else _dformer_peers.DFormer
    theirs = _dformer_peer_head.LightHamHead(in_channels=sizes["widths"], **head)
    peer = _dformer_peer_head.Segmentor(trunk(**sizes), theirs)
    for key, parameter in ours.named_parameters():
        if "layer_scale" in key or "gamma" in key or key.endswith("Geo.weight"):
            nn.init.uniform_(parameter, 0.3, 0.7)
    modules: list[Any] = [*ours.modules(), *peer.modules()]
    for module in modules:
        if type(module).__name__ == "DropPath":
            module.rate = 0.1
    peer.load_state_dict(ours.state_dict())
    # Ours as the documentation trains on CUDA; the published code leaves the layout to torch.
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    return ours.to(device).to(memory_format=layout), peer.to(device)


def batch(size: int, device: str, *, tiny: bool) -> tuple[Tensor, Tensor]:
    """Normalised RGB-D and labels in blocks, a tenth of them ignored."""
    height, width = (64, 96) if tiny else (480, 640)
    image = torch.randn(size, 4, height, width, device=device)
    blocks = torch.randint(0, CLASSES, (size, height // 16, width // 16), device=device)
    label = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    label[torch.rand(label.shape, device=device) < 0.1] = 255
    return image, label


def loss_of(network: Any, image: Tensor, label: Tensor) -> Tensor:
    """The only term."""
    (loss,) = network.losses(image, label).values()
    return loss


def compared(ours: Any, peer: Any, image: Tensor, label: Tensor) -> str:
    """Logits, loss and gradients of both in eval, from the same bases, in float32 without TF32."""
    results = []
    for network in (ours, peer):
        network.eval()
        torch.manual_seed(1)
        logits = network(image)
        wide = F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
        torch.manual_seed(1)
        loss = loss_of(network, image, label)
        names, wanted = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        known = {
            name: torch.zeros(()) if gradient is None else gradient
            for name, gradient in zip(names, gradients, strict=True)
        }
        results.append((wide.detach(), loss.item(), known))
    (wide, loss, gradients), (peer_wide, peer_loss, peer_gradients) = results
    apart = {
        name: float((gradient - peer_gradients[name]).norm() / (peer_gradients[name].norm() + 1e-9))
        for name, gradient in gradients.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    return (
        f"logits differ by at most {(wide - peer_wide).abs().max():.1e} (largest "
        f"{peer_wide.abs().max():.1f}), loss {loss:.6f} and {peer_loss:.6f}, gradients: median "
        f"{statistics.median(apart.values()):.1e}, worst {apart[worst]:.1e} ({worst})"
    )


def print_kernels(title: str, recorded: Any, wall: float, many: int) -> None:
    """Of one call of three; busy far below its time means that launching is the limit."""
    events = [each for each in recorded.key_averages() if each.self_device_time_total > 0]
    events.sort(key=lambda each: -each.self_device_time_total)
    busy = sum(each.self_device_time_total for each in events) / 3e3
    launches = sum(each.count for each in events) / 3
    print(f"\n## {title}: {wall:.2f} ms, device busy {busy:.2f} ms, {launches:.0f} kernels\n")
    print("| ms | share | calls | kernel |\n|---|---|---|---|")
    for each in events[:many]:
        spent = each.self_device_time_total / 3e3
        name = each.key.replace("|", "/")[:110]
        print(f"| {spent:.3f} | {spent / busy:.1%} | {each.count / 3:.0f} | {name} |", flush=True)
