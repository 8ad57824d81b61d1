"""The root keys of each command and their types; configs/COMMAND.yaml holds their values.

A key that is no field here is refused, so that a misspelt one in an experiment file is not ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from segmill.errors import SegmillError

Runtime = Literal["torch", "jittor"]


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """What names a run."""

    name: str | None


@dataclass(frozen=True, kw_only=True)
class Published:
    """What others measured after training by this recipe; percent, null where nothing is printed.

    `source` is a file of MMSegmentation 1.2.2, whose numbers stand in metafile.yaml of its folder,
    or begins with the repository that it is in.
    """

    mIoU: float | None  # noqa: N815  (the standard term; one scale)
    mIoU_ms_flip: float | None  # noqa: N815
    checkpoint: str | None  # the file that was measured
    source: str


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(ExperimentSettings):
    """What names a training run, and what it should reach."""

    published: Published | None


@dataclass(frozen=True, kw_only=True)
class TrainKeys:
    """Root of configs/train.yaml."""

    runtime: Runtime
    data: Any
    model: Any
    protocol: Any
    trainer: Any
    optimizer: Any
    schedule: Any
    logging: Any
    model_name: str | None
    seed: int
    weights: str | None
    weights_may_miss: tuple[str, ...]
    weights_may_leave: tuple[str, ...]
    resume: str | None
    output_dir: str
    experiment: RecipeSettings


@dataclass(frozen=True, kw_only=True)
class EvalKeys:
    """Root of configs/eval.yaml."""

    runtime: Runtime
    data: Any
    model: Any
    protocol: Any
    trainer: Any
    model_name: str | None
    run: str | None
    weights: str | None
    weights_may_miss: tuple[str, ...]
    weights_may_leave: tuple[str, ...]
    split: str | None
    seed: int
    output_dir: str


@dataclass(frozen=True, kw_only=True)
class TTASettings:
    """The keys under `tta` of configs/adapt.yaml; `method` builds a segmill.tta.method.Method."""

    method: Any
    forward_mode: Literal["tta", "discriminative_only"]
    continual: bool
    mixed: bool
    predict: Literal["before", "after"]
    batch_statistics: bool
    max_epochs: int

    def __post_init__(self) -> None:
        if self.max_epochs < 1:
            raise SegmillError(f"tta.max_epochs={self.max_epochs} should be 1 or more.")
        if self.mixed and self.continual:
            raise SegmillError(
                "tta.mixed=true is one stream of all tasks, so there is nothing that "
                "tta.continual=true could carry on. Choose one of them."
            )


@dataclass(frozen=True, kw_only=True)
class AdaptKeys:
    """Root of configs/adapt.yaml."""

    data: Any
    model: Any
    tta: TTASettings
    optimizer: Any
    protocol: Any
    trainer: Any
    logging: Any
    model_name: str | None
    method_name: str | None
    seed: int
    run: str | None
    weights: str | None
    weights_may_miss: tuple[str, ...]
    weights_may_leave: tuple[str, ...]
    methods: Any
    limit: int | None
    tasks: tuple[int, ...] | None
    pictures: int
    resume: str | None
    output_dir: str
    experiment: ExperimentSettings


@dataclass(frozen=True, kw_only=True)
class PredictKeys:
    """Root of configs/predict.yaml."""

    runtime: Runtime
    protocol: Any
    data: Any
    run: str
    weights: str | None
    num_classes: int | None
    path: str | tuple[str, ...]
    depth: str | None
    output_dir: str | None
    alpha: float
    accelerator: Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class BenchKeys:
    """Root of configs/bench.yaml."""

    data: Any
    model: Any
    model_name: str | None
    size: tuple[int, int]
    batch: int
    precision: Literal["auto", "32-true", "bf16-mixed"]
    accelerator: Literal["auto", "cpu", "gpu"]
    train: bool
    compile: bool
    channels_last: bool
    repeats: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ExportKeys:
    """Root of configs/export.yaml."""

    run: str
    weights: str | None
    num_classes: int | None
    format: Literal["onnx", "torch"]
    output: Literal["logits", "label"]
    size: tuple[int, int]
    batch: int
    path: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class DataCheckKeys:
    """Root of configs/data_check.yaml."""

    data: Any
    every: int


@dataclass(frozen=True, kw_only=True)
class CorruptKeys:
    """Root of configs/corrupt.yaml."""

    data: Any
    out: str
    workers: int | None
    quality: int
    verify: bool


@dataclass(frozen=True, kw_only=True)
class DemoKeys:
    """Root of configs/demo.yaml."""

    output_dir: str
    name: str
    steps: int
    guide_steps: int
    seed: int


# Command -> its keys; a root file without an entry (load) is for Python callers only.
KEYS: dict[str, type] = {
    "train": TrainKeys,
    "eval": EvalKeys,
    "adapt": AdaptKeys,
    "predict": PredictKeys,
    "bench": BenchKeys,
    "export": ExportKeys,
    "data_check": DataCheckKeys,
    "corrupt": CorruptKeys,
    "demo": DemoKeys,
}

_MODEL = {"model": ("segmill.models.discriminative.Discriminative",)}
_TRAINING = {
    "data": (
        "segmill.data.datamodule.SegmentationData",
        "segmill.data.image_datamodule.ImageData",
    ),
    "trainer": ("segmill.commands.trainer_settings.TrainerSettings",),
}
_TASKS = "segmill.data.task_data.TaskData"
_ADAPTATION = {
    "data": (_TASKS, "segmill.data.classification_data.ClassificationTaskData"),
    "model": ("segmill.models.combined.CombinedModel",),
    "trainer": ("segmill.commands.adapt_trainer.AdaptTrainerSettings",),
}
# Command -> group -> what its options build. An option that builds what another command wants is
# refused by name; a class that stands in no row is the user's own and checked like any other.
BUILDS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {**_TRAINING, **_MODEL},
    "eval": {**_TRAINING, **_MODEL},
    "bench": _MODEL,
    "data_check": {
        "data": (
            "segmill.data.datamodule.SegmentationData",
            "segmill.data.classification_data.ClassificationTaskData",
        )
    },
    "adapt": _ADAPTATION,
    "corrupt": {"data": (_TASKS,)},
}
