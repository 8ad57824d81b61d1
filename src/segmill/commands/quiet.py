"""What Lightning says that is no news here is left out."""

import logging
import warnings

MESSAGES = (
    # The run folder already holds config.yaml and, when a run goes on, its checkpoints.
    ".*exists and is not empty.*",
    # Lightning on torch 2.14.
    ".*treespec, LeafSpec.*",
    # Scores come from a confusion matrix that is already summed over the ranks.
    ".*It is recommended to use `self.log.*",
    # Workers are a key of the data set; many cores are no reason to change it.
    ".*does not have many workers.*",
    ".*This DataLoader will create .* worker processes.*",
    # Adaptation: eval mode is the point, and some methods only look.
    ".*module.s. in eval mode at the start of training.*",
    ".*configure_optimizers` returned `None`.*",
)


def quiet_lightning() -> None:
    """Devices, advertisements and the warnings above."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
