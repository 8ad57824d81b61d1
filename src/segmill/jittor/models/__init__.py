"""Networks of the Jittor runtime."""
