"""The table of commands: a new command is one row here and one module in `commands/`.

Standard library only: `segmill --help` must not wait for torch or Hydra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command.

    With `config` it is composed from configs/CONFIG.yaml and called as `run(config, context)`.
    Without, its `arguments` (name -> conversion of the text) are the keywords of its function; the
    first one may be written without its name.
    """

    module: str
    jittor: str | None = None  # the module for runtime=jittor
    function: str = "run"
    summary: str
    usage: str
    config: str | None = None
    arguments: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    positional: str | None = None  # the key that a word without `=` is stored in
    dry_run: bool = False
    verify: bool = False
    keys: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()


def yes_or_no(text: str) -> bool:
    """`true` or `false`."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


# What an argument should be, where its conversion may fail.
EXPECTED: dict[Callable[[str], Any], str] = {int: "a whole number", yes_or_no: "true or false"}


VERBS: dict[str, Verb] = {
    "train": Verb(
        module="segmill.commands.train",
        jittor="segmill.commands.jittor_train",
        config="train",
        dry_run=True,
        summary="train a model; leaves a run folder with checkpoints, scores and a report",
        usage="segmill train [GROUP=OPTION ...] [key=value ...] [--dry-run]",
        keys=(
            ("experiment=NAME", "a whole recipe: model, data, schedule; segmill models lists them"),
            ("experiment.name=NAME", "the run folder's name"),
            ("data.data_root=DIR", "where the data set lies"),
            ("data.batch_size=N", "the global batch, however many devices share it"),
            ("optimizer.learning_rate=R", "the base learning rate"),
            ("trainer.max_steps=N", "optimizer steps"),
            ("trainer.devices=N", "processes; more than one is DDP"),
            ("weights=SOURCE", "start from a file, a run, a hub id or `timm` (step 0)"),
            ("resume=RUN", "go on where RUN stopped"),
            ("seed=N", "every random draw and the order of the samples"),
        ),
        examples=(
            "segmill train model=segformer_mit-b0 data=camvid data.data_root=data/camvid",
            "segmill train experiment=segformer_mit-b0_ade20k_160k weights=timm trainer=gpu",
            "segmill train model=pspnet_r50-d8 data=ade20k weights=timm trainer=ddp --dry-run",
            "segmill train model=fcn_r50-d8,upernet_r50 seed=0,1,2    # six runs in a row",
            "segmill train resume=runs/my_run",
        ),
    ),
    "eval": Verb(
        module="segmill.commands.evaluate",
        jittor="segmill.commands.jittor_evaluate",
        config="eval",
        summary="score a run or a checkpoint under a named protocol",
        usage="segmill eval run=RUN | model=NAME data=NAME weights=SOURCE [protocol=NAME]",
        keys=(
            ("run=RUN", "a run folder or its model.safetensors"),
            ("weights=SOURCE", "without a run: a checkpoint of any origin for model=NAME"),
            ("split=NAME", "the data set's split; default its validation split"),
            ("protocol.KEY=VALUE", "one setting of the protocol, e.g. protocol.flip=true"),
        ),
        examples=(
            "segmill eval run=runs/my_run split=test protocol=ms_flip",
            "segmill eval model=pspnet_r50-d8 data=ade20k data.data_root=data/ADEChallengeData2016 "
            "weights=pspnet.pth",
        ),
    ),
    "adapt": Verb(
        module="segmill.commands.adapt",
        config="adapt",
        summary="adapt a model to corrupted images at test time, methods side by side",
        usage="segmill adapt [tta=NAME] [run=RUN | weights=SOURCE] [data=NAME] [key=value ...]",
        keys=(
            ("tta=NAME", "the method; source runs beside it for comparison"),
            ("methods=[A,B]", "several methods in one table"),
            ("run=RUN", "a run of segmill train: the model that adapts"),
            ("model/generative=NAME", "the guide; model.generative.weights=SOURCE its weights"),
            ("data.corruptions=[A,B]", "a task for each; data.severities=[5]"),
            ("tta.continual=true", "go on from task to task; default: each starts from the source"),
            ("tta.forward_mode=discriminative_only", "no guide, no update"),
            ("limit=N", "images of each task"),
            ("resume=RUN", "go on with the tasks that an interrupted run has left"),
        ),
        examples=(
            "CUDA_VISIBLE_DEVICES=0,1 segmill adapt data.data_root=data/ade20k_c",
            "segmill adapt run=runs/my_run data=camvid_c methods=[bn,tent,dusa] "
            "model/generative=sit_camvid model.generative.weights=runs/my_guide",
            "segmill adapt trainer.fast_dev_run=true",
        ),
    ),
    "predict": Verb(
        module="segmill.commands.predict",
        jittor="segmill.commands.jittor_predict",
        config="predict",
        positional="path",
        summary="segment an image, a folder, a glob or a video: overlay, index PNG, legend",
        usage="segmill predict run=RUN PATH [PATH ...]",
        keys=(
            ("run=RUN", "a run folder, its model.safetensors, or a variant with weights=FILE"),
            ("output_dir=DIR", "where the pictures go; default predictions/ in the run folder"),
            ("alpha=0.5", "opacity of the classes in the overlay"),
        ),
        examples=(
            "segmill predict run=runs/my_run street.jpg",
            "segmill predict run=pspnet_r50-d8 weights=pspnet.pth num_classes=150 photos/",
            "segmill predict run=runs/my_run drive.mp4 output_dir=out",
        ),
    ),
    "bench": Verb(
        module="segmill.commands.bench",
        config="bench",
        summary="measure a model on this machine: latency, images a second, memory",
        usage="segmill bench model=NAME [key=value ...]",
        keys=(
            ("model=NAME", "the variant; model=A,B measures one after the other"),
            ("size=[H,W]", "of the images; batch=N of them at once"),
            ("precision=KIND", "32-true or bf16-mixed; default: what the device is good at"),
            ("compile=true", "torch.compile of the network"),
            ("train=false", "inference only"),
        ),
        examples=(
            "segmill bench model=segformer_mit-b0",
            "segmill bench model=upernet_r50 batch=16 compile=true channels_last=true",
        ),
    ),
    "export": Verb(
        module="segmill.commands.export",
        config="export",
        summary="write a model as ONNX or torch.export file, run the file and compare",
        usage="segmill export run=RUN [format=onnx|torch] [output=logits|label]",
        keys=(
            ("run=RUN", "a run folder, its model.safetensors, or a variant with weights=FILE"),
            ("format=torch", "a torch.export program (.pt2); default ONNX"),
            ("output=label", "the class of every pixel; default: logits at the network's stride"),
            ("size=[H,W]", "of the images that the file takes; batch=N of them"),
        ),
        examples=(
            "segmill export run=runs/my_run",
            "segmill export run=segformer_mit-b0 num_classes=19 size=[512,1024] output=label",
            "segmill export run=runs/my_run format=torch path=model.pt2",
        ),
    ),
    "models": Verb(
        module="segmill.commands.models",
        arguments={"word": str, "format": str},
        summary="list every model: size, published mIoU, the experiment that trains it",
        usage="segmill models [WORD] [format=table|markdown]",
        keys=(
            ("WORD", "a family, a part of a name, or a whole name: then everything about it"),
            ("format=markdown", "the table of docs/zoo.md"),
        ),
        examples=(
            "segmill models",
            "segmill models upernet",
            "segmill models segformer_mit-b0",
        ),
    ),
    "demo": Verb(
        module="segmill.commands.demo",
        config="demo",
        summary="everything once on generated rooms, without a network; some minutes on two cores",
        usage="segmill demo [key=value ...]",
        keys=(("output_dir=DIR", "default runs"), ("steps=N", "training steps of each model")),
        examples=("segmill demo", "segmill demo steps=200 name=quick"),
    ),
    "doctor": Verb(
        module="segmill.commands.doctor",
        summary="check this machine: versions, GPUs, disk, data, keys; says what to do",
        usage="segmill doctor",
        examples=("segmill doctor",),
    ),
    "weights inspect": Verb(
        module="segmill.commands.weights",
        function="run_inspect",
        arguments={"file": Path, "model": str},
        required=("file",),
        summary="say where a checkpoint comes from, and what would load into which model",
        usage="segmill weights inspect FILE [model=NAME]",
        keys=(("model=NAME", "compare with this variant; default: the best match"),),
        examples=(
            "segmill weights inspect pspnet_r50-d8_512x512_160k_ade20k.pth",
            "segmill weights inspect segformer.safetensors model=segformer_mit-b5",
        ),
    ),
    "convert config": Verb(
        module="segmill.commands.convert_config",
        function="run_config",
        arguments={
            "file": Path,
            "out": Path,
            "name": str,
            "model": str,
            "data": str,
            "gpus": int,
            "overwrite": yes_or_no,
        },
        required=("file",),
        summary="turn a config of MMSegmentation or DFormer into an experiment file; runs nothing",
        usage="segmill convert config FILE [out=FILE] [key=value ...]",
        keys=(
            ("out=FILE", "the experiment's YAML; default configs/experiment/NAME.yaml"),
            ("name=NAME", "the experiment's name; default: the file's"),
            ("model=NAME", "our variant, where the file's name does not say it"),
            ("data=NAME", "our data set, where the file's is not known here"),
            ("gpus=N", "of the original's runs, where the file's name does not say it"),
            ("overwrite=true", "replace the YAML that is there"),
        ),
        examples=(
            "segmill convert config configs/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
            "segmill convert config local_configs/NYUDepthv2/DFormer_Tiny.py out=tiny.yaml",
        ),
    ),
    "convert weights": Verb(
        module="segmill.commands.convert",
        function="run_weights",
        arguments={
            "file": Path,
            "to": str,
            "out": Path,
            "model": str,
            "overwrite": yes_or_no,
        },
        required=("file", "to"),
        summary="write a checkpoint's weights for torch, for Jittor, or as safetensors",
        usage="segmill convert weights FILE to=safetensors|torch|jittor [out=FILE] [key=value ...]",
        keys=(
            ("to=FORMAT", "safetensors, torch (.pth) or jittor (.pkl); --to FORMAT does the same"),
            ("out=FILE", "default: next to FILE, with the format's suffix"),
            ("model=NAME", "rename to this variant's names; default: names as in the file"),
            ("overwrite=true", "replace the file that is there"),
        ),
        examples=(
            "segmill convert weights DFormer_Tiny.pth.tar to=jittor",
            "segmill convert weights official.pth to=safetensors model=segformer_mit-b0",
        ),
    ),
    "data check": Verb(
        module="segmill.commands.data",
        function="run_check",
        config="data_check",
        summary="find every bad file of a data set before it is used; pixels per class",
        usage="segmill data check data=NAME [data.data_root=DIR]",
        keys=(("every=N", "look at each N-th sample only"),),
        examples=(
            "segmill data check data=camvid data.data_root=data/camvid",
            "segmill data check data=ade20k every=50",
            "segmill data check data=imagenet_c data.data_root=data/imagenet-c every=100",
        ),
    ),
    "corrupt": Verb(
        module="segmill.commands.corrupt",
        config="corrupt",
        verify=True,
        summary="write the corrupted images of a data set, with labels and check sums; resumable",
        usage="segmill corrupt data=NAME out=DIR [data.data_root=CLEAN] [key=value ...] [--verify]",
        keys=(
            ("data.data_root=DIR", "where the clean images lie"),
            ("out=DIR", "where the corrupted ones go; then a data.data_root of segmill adapt"),
            ("data.corruptions=[A,B]", "which ones; data.severities=[1,3,5] how strong"),
            ("data.frost_dir=DIR", "ImageNet-C's frost photographs; default: generated textures"),
            ("quality=95", "of JPEG files; PNG is lossless"),
            ("workers=N", "processes; default: one a core"),
        ),
        examples=(
            "segmill corrupt data=ade20k_c data.data_root=data/ADEChallengeData2016 "
            "out=data/ade20k_c",
            "segmill corrupt data=camvid_c out=data/camvid_c data.corruptions=[fog,snow]",
            "segmill corrupt data=ade20k_c out=data/ade20k_c --verify",
        ),
    ),
    "data new": Verb(
        module="segmill.commands.data",
        function="run_new",
        arguments={"folder": Path, "name": str},
        required=("folder",),
        summary="write the YAML of a data set by looking at its folder",
        usage="segmill data new FOLDER [name=NAME]",
        keys=(("name=NAME", "the data set's name; default: the folder's"),),
        examples=("segmill data new data/street", "segmill data new data/x name=street"),
    ),
}
