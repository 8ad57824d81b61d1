"""Every family trains 50 steps at 512 x 512 on CamVid's crops; speed, memory and latency beside it.

bfloat16 autocast over float32 weights, AdamW at 1e-4, random initial weights, channels_last,
TF32 for what stays float32. The crops are drawn and decoded before (the same for all), so that the
data pipeline is not measured. `loss` is the mean of the first and of the last five steps: it has to
fall. Peers of the same architecture, in the same process right after ours: transformers' classes
and torchvision's FCN, as their users train them (logits upsampled, then cross-entropy).

    python -m benchmarks.zoo --data DIR_OF_CAMVID [--only fcn,swin] [--steps 50] [--batch 16]
    python -m benchmarks.zoo --tiny                    on any machine; its numbers mean nothing
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks._zoo_peers import PEERS
from torch import Tensor, nn

from segmill.configuration import build, compose
from segmill.cost import count_parameters
from segmill.measure import inference_cost
from segmill.ops.upsample_argmax import upsample_argmax

PRIMARY = {
    "fcn": "fcn_r50-d8",
    "pspnet": "pspnet_r50-d8",
    "deeplabv3plus": "deeplabv3plus_r50-d8",
    "upernet": "upernet_r50",
    "ocrnet": "ocrnet_hr18",
    "gcnet": "gcnet_r50-d8",
    "isanet": "isanet_r50-d8",
    "nonlocal": "nonlocal_r50-d8",
    "dnlnet": "dnl_r50-d8",
    "psanet": "psanet_r50-d8",
    "segformer": "segformer_mit-b0",
    "segmenter": "segmenter_vit-t_mask",
    "segnext": "segnext_mscan-t",
    "setr_naive": "setr_vit-l_naive",
    "setr_pup": "setr_vit-l_pup",
    "setr_mla": "setr_vit-l-mla",
    "vit_deit": "vit_deit-s16_upernet",
    "mask2former": "mask2former_r50",
    "maskformer": "maskformer_r50-d32",
    "pointrend": "pointrend_r50",
    "knet": "knet-s3_r50-d8_fcn",
    "mobilenetv2": "mobilenet-v2-d8_fcn",
    "poolformer": "fpn_poolformer_s12",
    "fastfcn": "fastfcn_r50-d32_jpu_psp",
    "resnest": "resnest_s101-d8_fcn",
    "sem_fpn": "fpn_r50",
    "stdc": "stdc1",
    "twins": "twins_pcpvt-s_fpn_fpnhead",
    "swin": "swin-tiny-patch4-window7-in1k-pre_upernet",
    "hrnet": "fcn_hr18",
}
CLASSES = 11
Batch = tuple[Tensor, Tensor]  # normalised image, label with 255 = ignore


@dataclass(frozen=True)
class Row:
    """What one network did. Seconds are medians; memory is the most of a training step."""

    name: str
    who: str
    parameters: int
    step_seconds: float
    images_per_second: float
    peak_gib: float
    first_loss: float
    last_loss: float
    latency_seconds: float  # one image, to the class of every pixel
    inference_images_per_second: float

    def text(self) -> str:
        """One line of the table in docs/zoo.md."""
        return (
            f"| {self.name} | {self.who} | {self.parameters / 1e6:.2f} | "
            f"{self.images_per_second:.0f} | {self.peak_gib:.1f} | {1e3 * self.latency_seconds:.1f}"
            f" | {self.inference_images_per_second:.0f} | "
            f"{self.first_loss:.2f} -> {self.last_loss:.2f} |"
        )


class Labels(nn.Module):
    """Image to classes: upsampling and argmax in one operation, or one after the other."""

    def __init__(self, network: nn.Module, *, fused: bool) -> None:
        super().__init__()
        self.network = network
        self.fused = fused

    def forward(self, image: Tensor) -> Tensor:
        """The class of every pixel."""
        logits = self.network(image)
        size = (image.shape[-2], image.shape[-1])
        if logits.shape[-2:] != size and self.fused:
            return upsample_argmax(logits, size)
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits.argmax(1)


def pool_of_batches(options: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Normalised crops of CamVid (with --tiny: of generated rooms) and their labels."""
    side = options.side
    overrides = [
        "model=fcn_tiny",
        f"data={'scenes' if options.tiny else 'camvid'}",
        f"data.crop=[{side},{side}]",
        f"data.batch_size={options.batch}",
        f"data.workers={0 if options.tiny else 8}",
        "data.channels=3",
        "data.depth=null",
    ]
    if not options.tiny:
        # 480 x 360 photographs: a crop of 512 is cut from their doubled size, scaled by 0.5 to 2.
        overrides += [f"data.data_root={options.data}", "data.scale=[960,720]"]
    config = compose("train", overrides)
    protocol = build(config.protocol)
    model = build(config.model)
    data = build(config.data, seed=0, protocol=protocol, accumulate=1, start_step=0)
    data.setup("fit")
    batches = []
    for batch, _ in zip(data.train_dataloader(), range(options.pool), strict=False):
        label = batch["label"].long()
        label = torch.where(label < CLASSES, label, 255)
        image = model.normalise(batch["image"], batch["valid"])
        batches.append((image.to(device), label.to(device)))
    return batches


def measured(
    name: str, who: str, network: Any, batches: list[Batch], options: argparse.Namespace
) -> Row:
    """Train for the steps, then time inference."""
    device = batches[0][0].device
    cuda = device.type == "cuda"
    network.to(device).to(memory_format=torch.channels_last).train()
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-4, weight_decay=0.01, fused=True)
    seconds, losses = [], []
    for step in range(options.steps):
        if cuda and step == 3:  # what the choice of algorithms took is not the network's
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        image, label = batches[step % len(batches)]
        with torch.autocast(device.type, torch.bfloat16):
            terms = network.losses(image.to(memory_format=torch.channels_last), label)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    values = torch.stack(losses).tolist()
    few = max(1, min(5, len(values) // 2))
    median = statistics.median(seconds[len(seconds) // 2 :])
    image = batches[0][0].to(memory_format=torch.channels_last)
    repeats = 3 if options.tiny else 20
    labels = Labels(network, fused=who == "segmill")
    single = inference_cost(labels, image[:1], bf16=True, repeats=repeats)
    many = inference_cost(labels, image, bf16=True, repeats=repeats)
    return Row(
        name=name,
        who=who,
        parameters=count_parameters(network),
        step_seconds=median,
        images_per_second=len(image) / median,
        peak_gib=peak,
        first_loss=statistics.mean(values[:few]),
        last_loss=statistics.mean(values[-few:]),
        latency_seconds=single.median,
        inference_images_per_second=len(image) / many.median,
    )


def ours(name: str) -> nn.Module:
    """The primary variant with random weights."""
    sizes = [f"data.num_classes={CLASSES}", "data.channels=3"]
    return build(compose("load", [f"model={PRIMARY[name]}", *sizes]).model.network)


def main() -> None:
    """Print a row as soon as it is known; a family that fails is said so at its place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/camvid")
    parser.add_argument("--only", default=",".join(PRIMARY))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pool", type=int, default=8, help="batches that are drawn before")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--budget", type=float, default=1e9, help="no new family after, seconds")
    parser.add_argument("--out", type=Path, help="a JSON file, written anew after every row")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.batch, options.pool, options.side = 2, 2, 1, 64
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    batches = pool_of_batches(options, device)
    started, rows = time.monotonic(), []
    print("| family | who | M parameters | train images/s | GiB | latency ms | images/s | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.only.split(","):
        for who, make in (("segmill", None), *PEERS.get(name, {}).items()):
            if time.monotonic() - started > options.budget:
                print(f"| {name} | {who} | not run: the time was over |", flush=True)
                continue
            torch.manual_seed(0)
            try:
                network = ours(name) if make is None else make(CLASSES)
                row = measured(name, who, network, batches, options)
            except Exception as error:  # the other families shall still be measured
                text = f"{error}".strip().partition("\n")[0]
                print(f"| {name} | {who} | {type(error).__name__}: {text} |", flush=True)
                continue
            finally:
                network = None
                gc.collect()
                torch.cuda.empty_cache()
            rows.append(asdict(row))
            print(row.text(), flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
