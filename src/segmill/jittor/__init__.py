"""The second runtime: DFormer on pure Jittor. Mirrors the modules of segmill that need torch."""
