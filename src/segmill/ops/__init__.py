"""Fused operations on low-resolution logits: Triton on CUDA, row chunks on the CPU."""
