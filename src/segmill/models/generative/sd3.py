"""Stable Diffusion 3 as a guide: a rectified flow that predicts velocities from text.

Paper:   Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
         ICML 2024, https://arxiv.org/abs/2403.03206
Follows: diffusers' SD3Transformer2DModel and StableDiffusion3Pipeline: timesteps are 1000 t,
         latents (mean - shift) * scale, without T5 its 256 tokens are zeros. No shifted schedule.
Weights: stabilityai/stable-diffusion-3-medium-diffusers, or any folder in this layout; the sizes
         of SD3.5 work too.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from segmill.checkpoint.sharded import Draws, SafetensorsFiles, draw, fill
from segmill.errors import SegmillError
from segmill.models.generative.codec import KLCodec
from segmill.models.generative.model_folder import (
    RANDOM,
    ModelFolder,
    built_on_meta,
    check_view,
    fill_codec,
    from_diffusers,
    identity,
    network_part,
    sizes_of,
    weights_file,
)
from segmill.models.generative.shared_token import SharedTokenAttention
from segmill.models.generative.text import ClassText, TextCache, encode_sd3, sd3_parts
from segmill.models.guide_view import GuideView

STEPS = 1000  # the transformer's time at t = 1
CLIP_TOKENS = 77
PARTS = (network_part("transformer"), network_part("vae"))
ABOUT = (
    "Stable Diffusion 3 medium is the repository stabilityai/stable-diffusion-3-medium-diffusers "
    "of the Hugging Face hub (6 GB without T5). It is gated: accept its licence on the model's "
    "page, then log in with `hf auth login` or set HF_TOKEN, and it is downloaded on first use. "
    "Without network here, copy the folder from elsewhere and set model.generative.weights="
    "THAT_FOLDER; model.generative.weights=random measures speed without any weights."
)

Latent = Float[Tensor, "N C h w"]
Times = Float[Tensor, " N"]


class SD3Guide(nn.Module):
    """`network` is the transformer, on the meta device until `fill`.

    `weights`: a hub id, a folder in diffusers' layout, or `random`. `transformer`: its sizes under
    diffusers' names; null takes the folder's. `t5_tokens` is the length of T5's part of the text;
    without `t5` these are zeros, and `collapse_t5` lets one of them stand for all, with the same
    result.
    """

    tokens: Float[Tensor, "K T D"]
    pooled: Float[Tensor, "K P"]

    def __init__(
        self,
        *,
        weights: str,
        revision: str | None,
        transformer: Mapping[str, Any] | None,
        codec: KLCodec,
        view: GuideView,
        text: ClassText,
        t5: bool,
        t5_tokens: int,
        collapse_t5: bool,
    ) -> None:
        super().__init__()
        if t5 and collapse_t5:
            raise SegmillError(
                "model.generative.collapse_t5=true is for runs without T5: with t5=true its tokens "
                "differ. Set model.generative.collapse_t5=false."
            )
        kind = from_diffusers("SD3Transformer2DModel")
        self.view, self.codec, self.cell = view, codec, codec.cell
        self.zeros = 0 if t5 else 1 if collapse_t5 else t5_tokens
        t5_length = t5_tokens if t5 else 0
        self.folder = _found(weights, revision, text, t5_length)
        place = self.folder and self.folder / "transformer"
        sizes = sizes_of(transformer, kind, place, key="model.generative.transformer")
        self.network = built_on_meta(kind, sizes)
        check_view(view, codec.cell * self.network.config.patch_size)
        if collapse_t5:
            for block in self.blocks():
                block.attn.set_processor(SharedTokenAttention(t5_tokens))
        prompts = text.all_prompts()
        self.num_classes = len(prompts) - 1
        if self.folder is None:
            embeddings = self._random_text(len(prompts), CLIP_TOKENS + t5_length)
        else:
            encode = partial(encode_sd3, self.folder, prompts, t5_tokens=t5_length)
            embeddings = _entry(self.folder, text, t5_length).read(encode)
        for name in ("tokens", "pooled"):
            self.register_buffer(name, embeddings[name], persistent=False)

    @staticmethod
    def missing(
        *,
        weights: str,
        revision: str | None,
        text: Mapping[str, Any],
        t5: bool,
        t5_tokens: int,
        **_others: Any,
    ) -> list[str]:
        """What has to be fetched before such a guide can be built, a paragraph each; quick.

        Takes the values of its YAML, parts as mappings.
        """
        if weights == RANDOM:
            return []
        named = ClassText(**{key: value for key, value in text.items() if key != "_target_"})
        problem = _needed(weights, revision, named, t5_tokens if t5 else 0).problem()
        return [] if problem is None else [problem]

    def blocks(self) -> list[Any]:
        """The transformer's blocks."""
        return list(self.network.transformer_blocks)

    def fill(self, device: torch.device) -> None:
        """Memory and values for the transformer, each process its own shards; codec and text."""
        if self.folder is None:
            fill(self.network, Draws(given={"pos_embed.pos_embed": self._positions()}), device)
        else:
            with SafetensorsFiles({"": weights_file(self.folder / "transformer")}) as files:
                fill(self.network, files, device)
        fill_codec(self.codec, self.folder and self.folder / "vae")
        self.codec.to(device)
        self.tokens, self.pooled = self.tokens.to(device), self.pooled.to(device)

    def encode(
        self, window: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, "N C h w"]:
        """Latents of about unit variance; the mean of the codec's distribution, nothing drawn."""
        return self.codec.encode(window)

    def noisy(self, latent: Latent, noise: Latent, t: Times) -> tuple[Latent, Latent]:
        """On the straight line from the latent to the noise; the target is its velocity."""
        share = t.float()[:, None, None, None]
        latent, noise = latent.float(), noise.float()
        return (1 - share) * latent + share * noise, noise - latent

    def predict(
        self, noisy_latent: Latent, t: Times, classes: Int64[Tensor, "N M"]
    ) -> Float[Tensor, "N M C h w"]:
        """Velocities; windows times classes are one batch."""
        count, each = classes.shape
        chosen = classes.flatten()
        self._check_positions(noisy_latent.shape[2:])
        (velocity,) = self.network(
            hidden_states=noisy_latent.repeat_interleave(each, dim=0),
            encoder_hidden_states=self._context(self.tokens[chosen]),
            pooled_projections=self.pooled[chosen],
            timestep=(STEPS * t.float()).repeat_interleave(each),
            return_dict=False,
        )
        return velocity.float().unflatten(0, (count, each))

    def _context(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B _T _D"]:
        """CLIP's tokens at the width of T5's, and zeros where T5's would be."""
        missing = self.network.config.joint_attention_dim - tokens.shape[2]
        return F.pad(tokens, (0, missing, 0, self.zeros))

    def _check_positions(self, size: torch.Size) -> None:
        config = self.network.config
        most = config.pos_embed_max_size * config.patch_size
        if max(size) > most:
            raise SegmillError(
                f"The guide's windows have {max(size)} latent cells a side, its positions are for "
                f"{most} ({most * self.cell} pixels). Give model.generative.view a window."
            )

    def _random_text(self, prompts: int, length: int) -> dict[str, Float[Tensor, "..."]]:
        config, host = self.network.config, torch.device("cpu")
        tokens = (prompts, length, config.joint_attention_dim)
        pooled = (prompts, config.pooled_projection_dim)
        return {
            "tokens": draw("text.tokens", tokens, host),
            "pooled": draw("text.pooled", pooled, host),
        }

    def _positions(self) -> Float[Tensor, "1 T D"]:
        """The buffer of the position codes, which weights from a folder bring along."""
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        config = self.network.config
        codes = get_2d_sincos_pos_embed(
            config.num_attention_heads * config.attention_head_dim,
            config.pos_embed_max_size,
            base_size=config.sample_size // config.patch_size,
            output_type="pt",
        )
        return codes.float()[None]


def _found(weights: str, revision: str | None, text: ClassText, t5_length: int) -> Path | None:
    """The folder, with the text encoders unless their output is kept already; None if random."""
    if weights == RANDOM:
        return None
    return _needed(weights, revision, text, t5_length).path()


def _needed(weights: str, revision: str | None, text: ClassText, t5_length: int) -> ModelFolder:
    needed = ModelFolder(weights=weights, revision=revision, parts=PARTS, about=ABOUT)
    here = needed.here()
    if here is not None and _entry(here, text, t5_length).filled:
        return needed
    return replace(needed, parts=(*PARTS, *sd3_parts(t5=t5_length > 0)))


def _entry(folder: Path, text: ClassText, t5_length: int) -> TextCache:
    facts = {"encoders": "sd3", "clip_tokens": CLIP_TOKENS, "t5_tokens": t5_length}
    return TextCache(text.cache, {**facts, **text.facts(), "model": identity(folder)})
