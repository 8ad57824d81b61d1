"""Model folders as diffusers writes them, with tiny random networks; and guides from the YAMLs."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from segmill import configuration
from segmill.paths import CONFIGS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NO_CODEC_SHIFT = {"shift_factor": 0.0609, "scaling_factor": 1.5305}


def guide(name: str, *overrides: str, data: str = "scenes") -> Any:
    """The guide of configs/model/generative/NAME.yaml; overrides are without `guide.`."""
    return configuration.build(node(name, *overrides, data=data))


def node(name: str, *overrides: str, data: str = "scenes") -> Any:
    """The configuration itself, in plain containers."""
    chosen = [f"data={data}", f"+model/generative@guide={name}"]
    values = [f"++guide.{each}" for each in overrides]
    with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[*chosen, *values])
    return OmegaConf.to_container(config.guide, resolve=True)


def filled(name: str, *overrides: str, data: str = "scenes") -> Any:
    built = guide(name, *overrides, data=data)
    built.fill(torch.device("cpu"))
    return built


def classes_file(folder: Path) -> Path:
    """Three classes; the last one is called otherwise in prompts."""
    file = folder / "classes.csv"
    rows = ["name,red,green,blue,prompt", "wall,1,1,1,", "sky,2,2,2,", "ball,3,3,3,red ball"]
    file.write_text("\n".join(rows))
    return file


def sd3_pipeline(folder: Path, *, t5: bool) -> Any:
    """A StableDiffusion3Pipeline, saved in `folder`; the sizes are those of sd3_tiny."""
    seed_all()
    sizes = node("sd3_tiny")["transformer"]
    encoders = {
        f"text_encoder{number}": clip_with_projection(width)
        for number, width in (("", 8), ("_2", 12))
    }
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**sizes),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, **NO_CODEC_SHIFT),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        text_encoder_3=t5_encoder(sizes["joint_attention_dim"]) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
        **encoders,
    )
    randomise(pipeline.transformer)
    pipeline.save_pretrained(folder)
    return pipeline


def sd15_pipeline(folder: Path) -> Any:
    """A StableDiffusionPipeline saved in `folder` and its ControlNet in `folder/control`."""
    seed_all()
    config = node("sd15_tiny")
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        unet=diffusers.UNet2DConditionModel(**config["unet"]),
        controlnet=diffusers.ControlNetModel(**config["controlnet"]),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        vae=autoencoder(),
        tokenizer=clip_tokenizer(folder),
        text_encoder=transformers.CLIPTextModel(clip_config(12, None)).eval(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # A new ControlNet's last layers are zero, so it would not be seen.
    randomise(pipeline.controlnet)
    pipeline.save_pretrained(folder)
    pipeline.controlnet.save_pretrained(folder / "control")
    return pipeline


def seed_all() -> None:
    torch.manual_seed(0)


def randomise(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)


def autoencoder(**keys: Any) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        **keys,
    ).eval()


def clip_config(width: int, projection: int | None) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection or width,
        max_position_embeddings=77,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        pad_token_id=1,
    )


def clip_with_projection(width: int) -> Any:
    return transformers.CLIPTextModelWithProjection(clip_config(width, width)).eval()


def clip_tokenizer(folder: Path) -> Any:
    """One token a letter."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*LETTERS, *(f"{each}</w>" for each in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    )


def t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return transformers.T5TokenizerFast(
        vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0
    )


def t5_encoder(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=4 + len(LETTERS), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()
