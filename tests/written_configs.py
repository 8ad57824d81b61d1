"""Small configs in the layouts of MMSegmentation 1.x and of the official DFormer code."""

from pathlib import Path

SEGFORMER = "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
PSPNET = "pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py"
TINY = "local_configs/NYUDepthv2/DFormer_Tiny.py"

_PIXELS = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
data_preprocessor = dict(
    type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True, pad_val=0, seg_pad_val=255)
"""
MMSEG = {
    "_base_/runtime.py": "default_scope = 'mmseg'\nload_from = None\nresume = False\n",
    "_base_/ade20k.py": """
dataset_type = 'ADE20KDataset'
data_root = 'data/ade'
crop_size = (512, 512)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=4, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type, data_root=data_root, pipeline=train_pipeline,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')))
val_dataloader = dict(
    batch_size=1, dataset=dict(type=dataset_type, data_root=data_root, pipeline=test_pipeline))
""",
    "_base_/schedule_160k.py": """
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005)
optim_wrapper = dict(type='OptimWrapper', optimizer=optimizer, clip_grad=None)
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=160000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=4000)
default_hooks = dict(logger=dict(type='LoggerHook', interval=50))
""",
    "_base_/segformer_mit-b0.py": _PIXELS
    + """
model = dict(
    type='EncoderDecoder', data_preprocessor=data_preprocessor, pretrained=None,
    backbone=dict(
        type='MixVisionTransformer', in_channels=3, embed_dims=32, num_stages=4,
        num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8], patch_sizes=[7, 3, 3, 3],
        sr_ratios=[8, 4, 2, 1], out_indices=(0, 1, 2, 3), mlp_ratio=4, drop_path_rate=0.1),
    decode_head=dict(
        type='SegformerHead', in_channels=[32, 64, 160, 256], in_index=[0, 1, 2, 3], channels=256,
        dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
""",
    "_base_/pspnet_r50-d8.py": _PIXELS
    + """
model = dict(
    type='EncoderDecoder', data_preprocessor=data_preprocessor, pretrained=None,
    backbone=dict(
        type='ResNetV1c', depth=50, num_stages=4, out_indices=(0, 1, 2, 3), dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1), norm_cfg=norm_cfg, norm_eval=False, contract_dilation=True),
    decode_head=dict(
        type='PSPHead', in_channels=2048, in_index=3, channels=512, pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead', in_channels=1024, in_index=2, channels=256, num_convs=1,
        concat_input=False, dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    test_cfg=dict(mode='whole'))
""",
    SEGFORMER: """
_base_ = ['../_base_/segformer_mit-b0.py', '../_base_/ade20k.py', '../_base_/runtime.py',
          '../_base_/schedule_160k.py']
model = dict(decode_head=dict(num_classes=150))
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={
        'pos_block': dict(decay_mult=0.), 'norm': dict(decay_mult=0.),
        'head': dict(lr_mult=10.)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False)]
train_dataloader = dict(batch_size=2)
""",
    PSPNET: """
_base_ = ['../_base_/pspnet_r50-d8.py', '../_base_/ade20k.py', '../_base_/runtime.py',
          '../_base_/schedule_160k.py']
model = dict(decode_head=dict(num_classes=150), auxiliary_head=dict(num_classes=150))
""",
}
DFORMER = {
    "local_configs/_base_/__init__.py": """
import os.path as osp
import time
import numpy as np
from easydict import EasyDict as edict
C = edict()
config = C
C.root_dir = "datasets"
C.abs_dir = osp.realpath(".")
""",
    "local_configs/_base_/datasets/NYUDepthv2.py": """
from .. import *
C.dataset_name = "NYUDepthv2"
C.dataset_path = osp.join(C.root_dir, "NYUDepthv2")
C.num_train_imgs = 795
C.num_classes = 40
C.background = 255
C.image_height, C.image_width = 480, 640
C.norm_mean = np.array([0.485, 0.456, 0.406])
C.norm_std = np.array([0.229, 0.224, 0.225])
""",
    TINY: """
from .._base_.datasets.NYUDepthv2 import *
\"\"\" network \"\"\"
C.backbone = "DFormer-Tiny"
C.pretrained_model = "pretrained/DFormer_Tiny.pth.tar"
C.decoder = "ham"
C.decoder_embed_dim = 512
C.optimizer = "AdamW"
C.lr = 6e-5
C.lr_power = 0.9
C.momentum = 0.9
C.weight_decay = 0.01
C.batch_size = 8
C.nepochs = 500
C.niters_per_epoch = C.num_train_imgs // C.batch_size + 1
C.train_scale_array = [0.5, 0.75, 1, 1.25, 1.5, 1.75]
C.warm_up_epoch = 10
C.bn_eps = 1e-3
C.bn_momentum = 0.1
C.drop_path_rate = 0.1
C.aux_rate = 0.0
C.checkpoint_start_epoch = 250
C.log_dir = osp.abspath("checkpoints/" + C.dataset_name)
C.log_dir = C.log_dir + "_" + time.strftime("%Y", time.localtime())
if not os.path.exists(config.log_dir):
    os.makedirs(config.log_dir, exist_ok=True)
""",
}


def write_configs(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
