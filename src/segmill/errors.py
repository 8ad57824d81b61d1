"""The one exception that a user's mistake raises; the command line prints it as a paragraph."""


class SegmillError(ValueError):
    """What was wrong, what was found (file, key, value), and what to do about it."""
