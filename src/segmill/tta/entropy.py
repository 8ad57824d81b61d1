"""How unsure a prediction is, pixel by pixel."""

from jaxtyping import Float
from torch import Tensor


def pixel_entropy(logits: Float[Tensor, "B K h w"]) -> Float[Tensor, "B h w"]:
    """Entropy of the softmax over the classes, in nats: 0 when sure, ln K when all are alike."""
    log_prob = logits.float().log_softmax(dim=1)
    return -(log_prob.exp() * log_prob).sum(dim=1)
