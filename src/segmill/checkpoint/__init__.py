"""Read checkpoints of any origin, rename their keys, report, load."""
