"""Heads of the Jittor runtime, one family a file."""
