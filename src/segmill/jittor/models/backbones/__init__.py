"""Trunks of the Jittor runtime."""
