"""Batches for the Jittor runtime."""
