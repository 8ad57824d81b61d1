"""Score seven made-up images on N processes: `python evaluate_synthetic.py N RESULT.json`.

A program of its own, because Lightning starts the other processes by running it again.
"""

import json
import sys
from pathlib import Path

import lightning
import torch
from torch import distributed
from torch.utils.data import DataLoader

import golden
from segmill.data.stream import Shard
from segmill.evaluation import EvaluationModule
from segmill.models.discriminative import Discriminative
from test_inference import network
from test_protocol import protocol

IMAGES = 7  # odd: two processes get four and three


class Images(torch.utils.data.Dataset):
    """Images of different sizes with labels of seven classes."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> dict:
        draw, height, width = golden.stream(f"ddp:{index}"), 20 + 3 * index, 31
        image = draw.integers(0, 256, (1, 3, height, width)).astype("uint8")
        label = draw.choice([0, 1, 2, 3, 4, 5, 6, 255], (1, height, width)).astype("uint8")
        return {
            "inputs": [torch.from_numpy(image)],
            "label": torch.from_numpy(label),
            "name": str(index),
            "size": (height, width),
            "index": index,
        }


def place() -> tuple[int, int]:
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def model() -> Discriminative:
    return Discriminative(network=network(), mean=[0.5] * 3, std=[0.2] * 3)


def evaluate(processes: int, folder: Path) -> EvaluationModule:
    torch.set_num_threads(1)
    module = EvaluationModule(model=model(), protocol=protocol(), class_names=tuple("abcdefg"))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    images = Images()
    loader = DataLoader(
        images, batch_size=None, sampler=Shard(IMAGES, place), collate_fn=lambda item: item
    )
    trainer.test(module, dataloaders=loader, verbose=False)
    return module


if __name__ == "__main__":
    path = Path(sys.argv[2])
    module = evaluate(int(sys.argv[1]), path.parent)
    if module.global_rank == 0:
        confusion = module.confusion.tolist()
        path.write_text(json.dumps({"confusion": confusion, "per_image": module.per_image}))
    if distributed.is_initialized():
        # Gloo's threads would otherwise race with the interpreter's exit.
        distributed.barrier()
        distributed.destroy_process_group()
