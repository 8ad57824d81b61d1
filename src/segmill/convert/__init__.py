"""From other code bases to this one: configurations that are read, never run, and weights."""
