"""Stable Diffusion 1.5 with ControlNet for segmentation maps, as a guide: it predicts the noise.

Paper:   Li et al., "Exploring Structured Semantic Priors Underlying Diffusion Score for Test-time
         Adaptation" (DUSA), NeurIPS 2024, whose guide for segmentation this is; Rombach et al.,
         CVPR 2022, https://arxiv.org/abs/2112.10752; Zhang et al., ICCV 2023,
         https://arxiv.org/abs/2302.05543
Follows: github.com/BIT-DA/DUSA: the control image is all zeros, UNet and ControlNet both adapt,
         t = 100 of 1000, latents are the codec's means * 0.18215, CLIP's last hidden states.
Weights: stable-diffusion-v1-5/stable-diffusion-v1-5 and lllyasviel/control_v11p_sd15_seg, or
         folders in their layout.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from segmill.checkpoint.sharded import Draws, SafetensorsFiles, draw, fill
from segmill.errors import SegmillError
from segmill.models.generative.codec import KLCodec
from segmill.models.generative.model_folder import (
    RANDOM,
    ModelFolder,
    Part,
    built_on_meta,
    check_view,
    fill_codec,
    from_diffusers,
    identity,
    network_part,
    sizes_of,
    weights_file,
)
from segmill.models.generative.text import ClassText, TextCache, encode_sd15, sd15_parts
from segmill.models.guide_view import GuideView

STEPS = 1000
BETAS = (0.00085, 0.012)  # their square roots rise evenly over the steps: "scaled linear"
CLIP_TOKENS = 77
SCHEDULER = "scheduler_config.json"
PARTS = (
    network_part("unet"),
    network_part("vae"),
    Part("scheduler", ((SCHEDULER,),), (SCHEDULER,)),
)
ABOUT = (
    "Stable Diffusion 1.5 is the repository stable-diffusion-v1-5/stable-diffusion-v1-5 of the "
    "Hugging Face hub (4.3 GB); with a network it is downloaded on first use. Without one here, "
    "copy the folder from elsewhere and set model.generative.weights=THAT_FOLDER; "
    "model.generative.weights=random measures speed without any weights."
)
ABOUT_CONTROL = (
    "The ControlNet is the repository lllyasviel/control_v11p_sd15_seg of the Hugging Face hub "
    "(1.4 GB); with a network it is downloaded on first use. Without one here, copy the folder "
    "from elsewhere and set model.generative.control_weights=THAT_FOLDER."
)

Latent = Float[Tensor, "N C h w"]
Times = Float[Tensor, " N"]


class ControlledUNet(nn.Module):
    """A UNet and a ControlNet that sees a black control image."""

    def __init__(self, *, unet: Any, controlnet: Any, cell: int) -> None:
        super().__init__()
        self.unet, self.controlnet, self.cell = unet, controlnet, cell

    def forward(
        self,
        noisy_latent: Latent,
        timestep: Int64[Tensor, " N"],
        tokens: Float[Tensor, "N T D"],
    ) -> Latent:
        """The noise in each latent."""
        height, width = noisy_latent.shape[2:]
        # One image for the whole batch: its features are added to every latent's.
        control = noisy_latent.new_zeros(1, 3, self.cell * height, self.cell * width)
        down, middle = self.controlnet(
            noisy_latent,
            timestep,
            encoder_hidden_states=tokens,
            controlnet_cond=control,
            return_dict=False,
        )
        (noise,) = self.unet(
            noisy_latent,
            timestep,
            encoder_hidden_states=tokens,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )
        return noise


class SD15ControlNetGuide(nn.Module):
    """`network` has both networks, on the meta device until `fill`.

    `weights` and `control_weights`: hub ids, folders in diffusers' layout, or `random` for both.
    `unet` and `controlnet`: sizes under diffusers' names; null takes the folders'. Time t is step
    round(1000 t): the published one is 0.1.
    """

    tokens: Float[Tensor, "K T D"]
    signal: Float[Tensor, " S"]  # share of the image's variance that is left after each step

    def __init__(
        self,
        *,
        weights: str,
        revision: str | None,
        control_weights: str,
        control_revision: str | None,
        unet: Mapping[str, Any] | None,
        controlnet: Mapping[str, Any] | None,
        codec: KLCodec,
        view: GuideView,
        text: ClassText,
    ) -> None:
        super().__init__()
        self.view, self.codec, self.cell = view, codec, codec.cell
        self.folder, self.control_folder = _found(
            weights, revision, control_weights, control_revision, text
        )
        _check_schedule(self.folder)
        kinds = from_diffusers("UNet2DConditionModel"), from_diffusers("ControlNetModel")
        places = self.folder and self.folder / "unet", self.control_folder
        networks = [
            built_on_meta(kind, sizes_of(given, kind, place, key=f"model.generative.{key}"))
            for kind, given, place, key in zip(
                kinds, (unet, controlnet), places, ("unet", "controlnet"), strict=True
            )
        ]
        self.network = ControlledUNet(unet=networks[0], controlnet=networks[1], cell=codec.cell)
        # The smallest map of features is a whole number of cells, as in training.
        check_view(view, codec.cell * 2 ** (len(networks[0].down_blocks) - 1))
        prompts = text.all_prompts()
        self.num_classes = len(prompts) - 1
        if self.folder is None:
            shape = (len(prompts), CLIP_TOKENS, networks[0].config.cross_attention_dim)
            tokens = draw("text.tokens", shape, torch.device("cpu"))
        else:
            encode = partial(encode_sd15, self.folder, prompts)
            tokens = _entry(self.folder, text).read(encode)["tokens"]
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("signal", _signal(), persistent=False)

    @staticmethod
    def missing(
        *,
        weights: str,
        revision: str | None,
        control_weights: str,
        control_revision: str | None,
        text: Mapping[str, Any],
        **_others: Any,
    ) -> list[str]:
        """What has to be fetched before such a guide can be built, a paragraph each; quick.

        Takes the values of its YAML, parts as mappings.
        """
        if weights == RANDOM:
            return []
        named = ClassText(**{key: value for key, value in text.items() if key != "_target_"})
        needed = _needed(weights, revision, named), _control(control_weights, control_revision)
        problems = [each.problem() for each in needed]
        return [problem for problem in problems if problem is not None]

    def blocks(self) -> list[Any]:
        """The resolutions of both networks."""
        unet, control = self.network.unet, self.network.controlnet
        shared = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        return [*shared, *control.down_blocks, control.mid_block]

    def fill(self, device: torch.device) -> None:
        """Memory and values for both networks, each process its own shards; codec and text."""
        if self.folder is None or self.control_folder is None:
            fill(self.network, Draws(), device)
        else:
            places = {
                "unet.": weights_file(self.folder / "unet"),
                "controlnet.": weights_file(self.control_folder),
            }
            with SafetensorsFiles(places) as files:
                fill(self.network, files, device)
        fill_codec(self.codec, self.folder and self.folder / "vae")
        self.codec.to(device)
        self.tokens, self.signal = self.tokens.to(device), self.signal.to(device)

    def encode(
        self, window: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, "N C h w"]:
        """Latents of about unit variance; the mean of the codec's distribution, nothing drawn."""
        return self.codec.encode(window)

    def noisy(self, latent: Latent, noise: Latent, t: Times) -> tuple[Latent, Latent]:
        """Latent and noise mixed so that the variance stays one; the target is the noise."""
        signal = self.signal[_steps(t)][:, None, None, None]
        latent, noise = latent.float(), noise.float()
        return signal.sqrt() * latent + (1 - signal).sqrt() * noise, noise

    def predict(
        self, noisy_latent: Latent, t: Times, classes: Int64[Tensor, "N M"]
    ) -> Float[Tensor, "N M C h w"]:
        """The noise; windows times classes are one batch."""
        count, each = classes.shape
        noise = self.network(
            noisy_latent.repeat_interleave(each, dim=0),
            _steps(t).repeat_interleave(each),
            self.tokens[classes.flatten()],
        )
        return noise.float().unflatten(0, (count, each))


def _steps(t: Times) -> Int64[Tensor, " N"]:
    return (STEPS * t.float()).round().long().clamp(max=STEPS - 1)


def _signal() -> Float[Tensor, " S"]:
    first, last = BETAS
    betas = torch.linspace(first**0.5, last**0.5, STEPS, dtype=torch.float32) ** 2
    return (1 - betas).cumprod(dim=0)


def _check_schedule(folder: Path | None) -> None:
    """Refuse a model that was trained with other noise, or to predict something else."""
    if folder is None:
        return
    file = folder / "scheduler" / SCHEDULER
    found = json.loads(file.read_text(encoding="utf-8"))
    expected = {
        "beta_start": BETAS[0],
        "beta_end": BETAS[1],
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": STEPS,
        "prediction_type": "epsilon",
    }
    wrong = [
        f"{key}={found[key]} ({value} is needed)"
        for key, value in expected.items()
        if key in found and found[key] != value
    ]
    if wrong:
        raise SegmillError(
            f"{file} is not Stable Diffusion 1.5's: {', '.join(wrong)}. Give a model of its kind "
            "as model.generative.weights."
        )


def _found(
    weights: str, revision: str | None, control: str, control_revision: str | None, text: ClassText
) -> tuple[Path | None, Path | None]:
    """Both folders; None if random."""
    if (weights == RANDOM) != (control == RANDOM):
        raise SegmillError(
            f"model.generative.weights={weights} and model.generative.control_weights={control}: "
            "give both as folders or hub ids, or both as random."
        )
    if weights == RANDOM:
        return None, None
    path = _needed(weights, revision, text).path()
    return path, _control(control, control_revision).path()


def _control(weights: str, revision: str | None) -> ModelFolder:
    return ModelFolder(
        weights=weights, revision=revision, parts=(network_part(""),), about=ABOUT_CONTROL
    )


def _needed(weights: str, revision: str | None, text: ClassText) -> ModelFolder:
    """The folder, with the text encoder unless its output is kept already."""
    needed = ModelFolder(weights=weights, revision=revision, parts=PARTS, about=ABOUT)
    here = needed.here()
    if here is not None and _entry(here, text).filled:
        return needed
    return replace(needed, parts=(*PARTS, *sd15_parts()))


def _entry(folder: Path, text: ClassText) -> TextCache:
    facts = {"encoders": "sd15", "clip_tokens": CLIP_TOKENS}
    return TextCache(text.cache, {**facts, **text.facts(), "model": identity(folder)})
