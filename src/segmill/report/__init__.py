"""The single-file HTML report, overlays and tables."""
