"""A training run small enough for tests: six generated rooms of 32 x 48, a network of 180 k."""

from pathlib import Path

from segmill.cli import main


def tiny_overrides(folder: Path, **changes: object) -> list[str]:
    """The words after `segmill train`; `changes` are further key=value, dots written as __."""
    words = [
        "model=segformer_tiny",
        "data=scenes",
        "data.channels=3",
        f"data.data_root={folder / 'scenes'}",
        "data.generate.train=6",
        "data.generate.val=3",
        "data.generate.test=3",
        "data.generate.height=32",
        "data.generate.width=48",
        "data.crop=[32,48]",
        "data.scale=[48,32]",
        "data.batch_size=2",
        "trainer=cpu",
        "trainer.max_steps=6",
        "trainer.val_every=3",
        "trainer.log_every=1",
        "trainer.progress=false",
        "schedule.warmup_steps=2",
        f"output_dir={folder / 'runs'}",
        "experiment.name=tiny",
    ]
    return words + [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]


def train_tiny(folder: Path, **changes: object) -> Path:
    """Train through the command line; returns the run folder."""
    status = main(["train", *tiny_overrides(folder, **changes), "--trace"])
    assert status == 0
    return folder / "runs" / str(changes.get("experiment__name", "tiny"))
