"""The training loss of the Jittor runtime."""

import jittor as jt
import numpy as np
from jaxtyping import Float, Int

from segmill.data.sample import IGNORE
from segmill.jittor.models.layers import constant, resize


def upsample_cross_entropy(
    logits: Float[jt.Var, "B K h w"], label: Int[jt.Var, "B H W"]
) -> Float[jt.Var, "1"]:
    """Mean cross-entropy, at the label's size, over the pixels whose label is not 255.

    Without any such pixel it is 0.
    """
    logits = resize(logits, tuple(label.shape[-2:]))
    shifted = logits - logits.max(dim=1, keepdims=True).stop_grad()
    classes = constant(np.arange(logits.shape[1], dtype=np.int32)).reshape(1, -1, 1, 1)
    own = (shifted * (label.unsqueeze(1) == classes)).sum(1)
    valid = (label != IGNORE).float32()
    surprise = (shifted.exp().sum(1).log() - own) * valid
    # Row by row: one running sum of all pixels would lose digits.
    return surprise.sum(2).sum(1).sum() / valid.sum().maximum(1.0)
