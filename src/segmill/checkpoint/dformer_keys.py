r"""Key rules of DFormer's official files, which otherwise have our names.

Pretraining files name the trunk alone, with or without `backbone.`; see
`segmill.checkpoint.load.choose_rules` for prefixes, and `read.WRAPPERS` for the averaged weights
(`state_dict_ema`) that are preferred.
"""

from segmill.checkpoint.keys import Drop, Rule

KEYS_FROM_DFORMER: tuple[Rule, ...] = (
    # Norms on the stages' outputs that no forward pass used.
    Drop(r"(backbone\.)?norm[0-3]\..+"),
    # The classifier of the pretraining on ImageNet.
    Drop(r"(backbone\.)?(head|pred|fc|classifier)\..+"),
)
