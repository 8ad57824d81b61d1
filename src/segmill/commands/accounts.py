"""Which accounts this machine can use without asking."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlsplit

WANDB_SERVER = "https://api.wandb.ai"


def has_wandb_key() -> bool:
    """Whether W&B could log in without asking: a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_SERVER)).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
