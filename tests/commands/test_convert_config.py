"""Converted configs compose to the recipes that they are; what differs is mapped or said."""

import logging
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from segmill.cli import main
from segmill.configuration import compose
from written_configs import DFORMER, MMSEG, PSPNET, SEGFORMER, TINY, write_configs


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch):
    write_configs(tmp_path, MMSEG | DFORMER)
    monkeypatch.chdir(tmp_path)
    yield
    logging.getLogger("segmill").handlers.clear()


def convert(*words: str) -> int:
    return main(["convert", "config", *words])


def composed(name: str, *without: str) -> dict[str, Any]:
    """The experiment's whole configuration but for what its name and its machine decide."""
    config: Any = OmegaConf.to_container(compose("train", [f"experiment={name}"]), resolve=True)
    for key in ("experiment", *without):
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node.pop(last)
    return config


def changed(tmp_path: Path, text: str, base: str = SEGFORMER) -> str:
    """A config of one's own that starts from another one."""
    path = tmp_path / Path(base).parent / "mine_4xb4.py"
    path.write_text(f"_base_ = './{Path(base).name}'\n{text}")
    return str(path)


@pytest.mark.parametrize(
    ("file", "recipe"),
    [(SEGFORMER, "segformer_mit-b0_ade20k_160k"), (PSPNET, "pspnet_r50-d8_ade20k_160k")],
)
def test_a_config_of_mmsegmentation_is_its_recipe(file: str, recipe: str, capsys) -> None:
    assert convert(file, "name=mine") == 0
    assert composed("mine", "data.data_root") == composed(recipe, "data.data_root")
    assert "segmill train experiment=mine --dry-run" in capsys.readouterr().out


def test_a_config_of_dformer_is_its_recipe() -> None:
    assert convert(TINY) == 0
    own = ("data.data_root", "weights")
    assert composed("DFormer_Tiny", *own) == composed("dformer-tiny_nyu", *own)
    assert composed("DFormer_Tiny")["weights"] == "pretrained/DFormer_Tiny.pth.tar"


def test_what_a_config_changes_becomes_a_key(tmp_path: Path) -> None:
    text = """
model = dict(
    backbone=dict(num_layers=[3, 4, 6, 3], drop_path_rate=0.2),
    decode_head=dict(dropout_ratio=0.0, loss_decode=dict(class_weight=[2.0] * 150)),
    test_cfg=dict(mode='slide', crop_size=(480, 480), stride=(320, 320)))
optim_wrapper = dict(
    type='AmpOptimWrapper', optimizer=dict(lr=1e-4), clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys=dict(_delete_=True, head=dict(lr_mult=5.0))))
train_cfg = dict(max_iters=80000)
param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=80000, by_epoch=False)]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomCrop', crop_size=(480, 480), cat_max_ratio=0.5)]))
"""
    assert convert(changed(tmp_path, text), "name=mine") == 0
    config = compose("train", ["experiment=mine"])
    network = config.model.network
    assert network.backbone.depths == [3, 4, 6, 3]
    assert network.backbone.drop_path_rate == 0.2
    assert network.decode_head.dropout == 0.0
    assert network.class_weight == [2.0] * 150
    assert (config.protocol.mode, config.protocol.window) == ("slide", [480, 480])
    assert config.protocol.stride == [320, 320]
    assert config.trainer.precision == "16-mixed"
    assert (config.trainer.clip, config.trainer.max_steps) == (1.0, 80000)
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.rules == {"head": {"lr_mult": 5.0}}
    assert (config.schedule.warmup_steps, config.schedule.power) == (0, 0.9)
    assert config.data.batch_size == 16, "4 GPUs, from the file's name"
    assert (config.data.crop, config.data.cat_max_ratio) == ([480, 480], 0.5)
    assert (config.data.flip, config.data.photometric) == (0.0, False)


@pytest.mark.parametrize(
    ("name", "words", "batch"),
    [
        ("pspnet_r50-d8_512x1024_80k", [], 4),
        ("pspnet_r50-d8_8x4_512x512_80k", [], 32),
        ("pspnet_r50-d8_2xb4-80k_ade20k-512x512", [], 8),
        ("pspnet_r50-d8_2xb4-80k_ade20k-512x512", ["gpus=3"], 12),
    ],
)
def test_the_global_batch_counts_the_gpus_of_the_name(
    name: str, words: list[str], batch: int, capsys
) -> None:
    path = Path(PSPNET).with_name(f"{name}.py")
    path.write_text(f"_base_ = './{Path(PSPNET).name}'")
    assert convert(str(path), "name=mine", *words) == 0
    assert compose("train", ["experiment=mine"]).data.batch_size == batch
    unsure = "taken for one GPU" in capsys.readouterr().out
    assert unsure == (batch == 4)


def test_a_level_of_zero_and_their_default_are_kept_apart(tmp_path: Path) -> None:
    head = "dict(_delete_=True, type='SegformerHead', channels=256, num_classes=150)"
    assert convert(changed(tmp_path, f"model = dict(decode_head={head})"), "name=mine") == 0
    assert compose("train", ["experiment=mine"]).model.network.decode_head.dropout == 0.1


def test_what_is_not_taken_over_is_said(tmp_path: Path, capsys) -> None:
    text = """
model = dict(
    pretrained='open-mmlab://mit_b0', backbone=dict(drop_rate=0.3, novelty=1),
    decode_head=dict(
        align_corners=True, norm_cfg=dict(type='GN'), loss_decode=dict(type='DiceLoss')))
train_dataloader = dict(batch_size=probe())
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'stages.3': dict(lr_mult=0.5)}))
"""
    assert convert(changed(tmp_path, text), "name=mine") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "check: not downloaded" in lines["model.pretrained"]
    assert "dropped: here it is always 0.0" in lines["model.backbone.drop_rate"]
    assert "dropped: not known" in lines["model.backbone.novelty"]
    assert "dropped: here it is always False" in lines["model.decode_head.align_corners"]
    assert "dropped: here it is always 'SyncBN'" in lines["model.decode_head.norm_cfg.type"]
    assert "dropped: here it is always 'Cross" in lines["model.decode_head.loss_decode.type"]
    assert "not read: line 7 of mine_4xb4.py: probe(...)" in lines["train_dataloader.batch_size"]
    rule = lines["optim_wrapper.paramwise_cfg.custom_keys.stages.3.lr_mult"]
    assert "check: a part of MMSegmentation's parameter names" in rule
    head = Path("configs/experiment/mine.yaml").read_text().partition("defaults")[0]
    assert "batch_size: not read" in head


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (
            "model = dict(backbone=dict(type='SwinTransformer'))",
            "model.backbone is SwinTransformer",
        ),
        ("model = dict(decode_head=dict(type='NewHead'))", "model.decode_head is NewHead"),
        ("model = dict(backbone=make())", "model.backbone is not read"),
        ("model = dict(auxiliary_head=dict(type='FCNHead'))", "differ in their auxiliary heads"),
        ("train_dataloader = dict(dataset=dict(type='Own'))", "Own, which has no YAML here"),
        ("optim_wrapper = dict(optimizer=dict(type='Lion'))", "The optimizer is 'Lion'"),
    ],
)
def test_another_network_data_set_or_optimizer_is_refused(
    text: str, answer: str, tmp_path: Path, capsys
) -> None:
    assert convert(changed(tmp_path, text)) == 2
    printed = capsys.readouterr().err
    assert answer in printed
    assert printed.count("\n") == 1
    assert not Path("configs").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([SEGFORMER.replace("b0", "b9")], "does not exist"),
        (["segformer"], "is a folder, not a config"),
        (["zeros.py"], "is no text"),
        (["cut.py"], "line 1, is no Python"),
        (["other.py"], "neither a config of MMSegmentation"),
        (["nameless.py"], "names no model of ours"),
        ([SEGFORMER, "model=segformer_mit-b9"], "did you mean segformer_mit-b"),
        ([SEGFORMER, "data=ade21k"], "did you mean ade20k"),
        ([SEGFORMER, "out=taken.yaml"], "taken.yaml exists already"),
        ([SEGFORMER, "out=segformer"], "is a folder. Name a file"),
        ([SEGFORMER, "gpus=many"], "gpus=many: this should be a whole number"),
        ([SEGFORMER, "gpus=0"], "this should be 1 or more"),
        ([SEGFORMER, "--nmae", "x"], "did you mean --name"),
    ],
)
def test_a_mistake_is_answered(words: list[str], answer: str, capsys) -> None:
    Path("zeros.py").write_bytes(b"\xff\xfe\0")
    Path("cut.py").write_text("model = dict(")
    Path("other.py").write_text("x = 1")
    Path("nameless.py").write_text("model = dict()")
    Path("taken.yaml").touch()
    assert convert(*words) == 2
    printed = capsys.readouterr().err
    assert answer in printed
    assert printed.count("\n") == 1


def test_an_experiment_is_replaced_only_when_asked_to(capsys) -> None:
    assert convert(TINY, "name=mine") == 0
    assert convert(TINY, "name=mine") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert convert(TINY, "name=mine", "overwrite=true") == 0


def test_one_size_is_one_size(tmp_path: Path) -> None:
    pipeline = """train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(683, 512), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512))]))"""
    assert convert(changed(tmp_path, pipeline), "name=mine") == 0
    data = compose("train", ["experiment=mine"]).data
    assert (data.scale, data.ratio, data.cat_max_ratio) == ([683, 512], [1.0, 1.0], 1.0)


def test_a_step_that_cannot_be_switched_off_is_said(tmp_path: Path, capsys) -> None:
    pipeline = """train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True)]))"""
    assert convert(changed(tmp_path, pipeline), "name=mine") == 0
    printed = capsys.readouterr().out
    head = Path("configs/experiment/mine.yaml").read_text().partition("defaults")[0]
    for lacks in ("has no RandomCrop", "resizes nothing"):
        assert f"Note: the training pipeline {lacks}" in printed
        assert f"check: the training pipeline {lacks}" in head


@pytest.mark.parametrize(
    ("step", "answer"),
    [
        ("dict(type='Resize', scale=(683, 512))", "dropped: theirs stretches the image"),
        (
            "dict(type='RandomResize', scale=[(512, 512), (1024, 512)], keep_ratio=True)",
            "dropped: data.scale is one (long edge, short edge)",
        ),
    ],
)
def test_a_resize_of_another_kind_is_said(step: str, answer: str, tmp_path: Path, capsys) -> None:
    pipeline = f"train_dataloader = dict(dataset=dict(pipeline=[{step}]))"
    assert convert(changed(tmp_path, pipeline), "name=mine") == 0
    assert answer in capsys.readouterr().out
    compose("train", ["experiment=mine"])


@pytest.mark.parametrize(
    "schedulers",
    [
        "dict(type='LinearLR', start_factor=1e-6, end=probe(), by_epoch=False), POLY",
        "dict(type='PolyLR', power=probe(), eta_min=probe(), by_epoch=False)",
        "dict(type='MultiStepLR', milestones=probe(), gamma=probe(), by_epoch=False)",
    ],
)
def test_a_schedule_that_is_not_read_leaves_ours(schedulers: str, tmp_path: Path, capsys) -> None:
    poly = "dict(type='PolyLR', power=1.0, begin=1500, end=160000, by_epoch=False)"
    text = f"param_scheduler = [{schedulers.replace('POLY', poly)}]"
    assert convert(changed(tmp_path, text), "name=mine") == 0
    assert "probe(...) is not called" in capsys.readouterr().out
    compose("train", ["experiment=mine"])


def test_the_warm_up_comes_first_wherever_it_stands(tmp_path: Path, capsys) -> None:
    text = """param_scheduler = [
    dict(type='PolyLR', power=1.0, begin=1500, end=160000, by_epoch=False),
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False)]"""
    assert convert(changed(tmp_path, text), "name=mine") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".begin" in line]
    assert len(lines) == 2
    assert all(line.endswith("same by default") for line in lines)


def test_a_decay_that_overlaps_the_warm_up_is_said(tmp_path: Path, capsys) -> None:
    text = """param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, end=160000, by_epoch=False)]"""
    assert convert(changed(tmp_path, text), "name=mine") == 0
    assert "check: theirs decays during the warm-up" in capsys.readouterr().out


def own_dformer(tmp_path: Path, text: str) -> str:
    """A config of one's own that starts as DFormer-Tiny's does."""
    path = (tmp_path / TINY).with_name("mine.py")
    path.write_text(f"{(tmp_path / TINY).read_text()}\n{text}\n")
    return str(path)


def test_dformer_without_scales_has_one(tmp_path: Path) -> None:
    assert convert(own_dformer(tmp_path, "C.train_scale_array = None")) == 0
    assert compose("train", ["experiment=mine"]).data.transform.factors == [1.0]


def test_dformer_on_data_with_another_transform_composes(capsys) -> None:
    assert convert(TINY, "name=mine", "data=scenes") == 0
    assert compose("train", ["experiment=mine"]).data.transform is None
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "dropped: data=scenes has data.scale" in lines["train_scale_array"]


@pytest.mark.parametrize(
    ("text", "answer", "word"),
    [
        ("C.backbone = pick()", "C.backbone is not read (line", "model=dformer-small"),
        ("C.dataset_name = 'KITTI'", "C.dataset_name is 'KITTI'", "data=nyu_depth_v2"),
    ],
)
def test_what_an_error_about_dformer_asks_for_helps(
    text: str, answer: str, word: str, tmp_path: Path, capsys
) -> None:
    file = own_dformer(tmp_path, text)
    assert convert(file) == 2
    printed = capsys.readouterr().err
    assert answer in printed
    assert f"Say {word.partition('=')[0]}=NAME" in printed
    assert convert(file, word) == 0
