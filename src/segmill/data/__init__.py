"""Data sets, transforms and generated scenes; all but the DataModule run without torch."""
