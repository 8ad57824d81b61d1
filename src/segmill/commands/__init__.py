"""The verbs of the command line: the only files that see a Hydra configuration."""
