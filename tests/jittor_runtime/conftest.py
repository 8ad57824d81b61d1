"""Jittor is imported here, with its compiled code in the project's folder, before any test."""

from importlib.util import find_spec

if find_spec("jittor"):
    from segmill.jittor.environment import prepare

    prepare()
