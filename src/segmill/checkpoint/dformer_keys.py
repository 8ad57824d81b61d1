r"""Key rules of the official DFormer and DFormerv2 files, whose names are otherwise ours.

Pretraining files name the trunk alone, with or without `backbone.` or `module.` before it:
`segmill.checkpoint.choose` tries that. Where the file has averaged weights (`state_dict_ema`), they
are what is read, as in the official loader: `segmill.checkpoint.read.WRAPPERS`.
"""

from segmill.checkpoint.keys import Drop, Rule

CLASSIFIER = r"(head|pred|proj|fc|classifier)"

KEYS_FROM_DFORMER: tuple[Rule, ...] = (
    # Norms of the stages' outputs, which no forward pass uses, and the classifier of ImageNet: a
    # trunk's own weights are never that close to its root.
    Drop(r"backbone\.\w+\.(weight|bias|running_mean|running_var|num_batches_tracked)"),
    Drop(rf"(backbone\.)?(norm[0-3]?|{CLASSIFIER})\..+"),
)
