"""SegFormer as transformers computes it: a thin wrapper around its class.

Paper:   Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with
         Transformers", NeurIPS 2021, https://arxiv.org/abs/2105.15203
Follows: transformers' `SegformerForSemanticSegmentation`. Our own network computes the same faster:
         variants segformer_mit-b*_linear, tied to this one by tests/models/test_segformer.py.
Weights: nvidia/segformer-b* on the hub, through `key_rules()["hf"]`.
"""

from collections.abc import Sequence

from jaxtyping import Float, Integer
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segmill.checkpoint.keys import Prefix, Rename, Rule
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy

ENCODER = r"model\.segformer\.encoder\."
STAGE = r"model.segformer.stages.\1."
# From the names in the hub's files to those of transformers 5. A key takes one rule, so a block's
# key is spelled out part by part.
OLD_BLOCK, NEW_BLOCK = ENCODER + r"block\.(\d)\.(\d+)\.", STAGE + r"blocks.\2."
REDUCTION = "attention.sequence_reduction."
KEYS_FROM_HF: tuple[Rule, ...] = (
    Rename(ENCODER + r"patch_embeddings\.(\d)\.(.+)", STAGE + r"patch_embeddings.\2"),
    Rename(ENCODER + r"layer_norm\.(\d)\.(.+)", STAGE + r"layer_norm.\2"),
    Rename(OLD_BLOCK + r"layer_norm_1\.(.+)", NEW_BLOCK + r"layernorm_before.\3"),
    Rename(OLD_BLOCK + r"layer_norm_2\.(.+)", NEW_BLOCK + r"layernorm_after.\3"),
    Rename(OLD_BLOCK + r"attention\.self\.query\.(.+)", NEW_BLOCK + r"attention.q_proj.\3"),
    Rename(OLD_BLOCK + r"attention\.self\.key\.(.+)", NEW_BLOCK + r"attention.k_proj.\3"),
    Rename(OLD_BLOCK + r"attention\.self\.value\.(.+)", NEW_BLOCK + r"attention.v_proj.\3"),
    Rename(
        OLD_BLOCK + r"attention\.self\.sr\.(.+)", NEW_BLOCK + REDUCTION + r"sequence_reduction.\3"
    ),
    Rename(
        OLD_BLOCK + r"attention\.self\.layer_norm\.(.+)", NEW_BLOCK + REDUCTION + r"layer_norm.\3"
    ),
    Rename(OLD_BLOCK + r"attention\.output\.dense\.(.+)", NEW_BLOCK + r"attention.o_proj.\3"),
    Rename(OLD_BLOCK + r"mlp\.dense(\d)\.(.+)", NEW_BLOCK + r"mlp.fc\3.\4"),
    Rename(OLD_BLOCK + r"(mlp\.dwconv\..+)", NEW_BLOCK + r"\3"),
    Rename(r"model\.decode_head\.linear_c\.(.+)", r"model.decode_head.linear_projections.\1"),
)
ADD_PREFIX: tuple[Rule, ...] = (
    Prefix("segformer.", "model.segformer."),
    Prefix("decode_head.", "model.decode_head."),
)


class SegFormerHF(nn.Module):
    """transformers' network as `model`; logits at stride 4."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        reductions: Sequence[int],
        mlp_ratio: int,
        drop_path_rate: float,
        head_channels: int,
        dropout: float,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.model = SegformerForSemanticSegmentation(
            SegformerConfig(
                num_channels=in_channels,
                num_encoder_blocks=len(depths),
                hidden_sizes=list(channels),
                depths=list(depths),
                num_attention_heads=list(num_heads),
                sr_ratios=list(reductions),
                mlp_ratios=[mlp_ratio] * len(depths),
                drop_path_rate=drop_path_rate,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                decoder_hidden_size=head_channels,
                classifier_dropout_prob=dropout,
                num_labels=num_classes,  # pyright: ignore[reportCallIssue] - of its parent
            )
        )

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K h w"]:
        return self.model(pixel_values=image).logits

    def losses(
        self, image: Float[Tensor, "B C H W"], label: Integer[Tensor, "B H W"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy at the label's size."""
        return {"decode.loss_ce": upsample_cross_entropy(self(image), label)}

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        """transformers 4 names its modules as the files do; only 5 needs the renaming."""
        renamed = any(name.startswith("model.segformer.stages.") for name in self.state_dict())
        return {"hf": ADD_PREFIX + (KEYS_FROM_HF if renamed else ())}
