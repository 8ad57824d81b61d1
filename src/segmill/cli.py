"""The command line: find the verb, say what is wrong in one paragraph, start the command.

Only `commands/` do work. Help needs neither Hydra nor torch, so both are imported late.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segmill.errors import SegmillError
from segmill.options import suggestion
from segmill.verbs import EXPECTED, VERBS, Verb

FLAGS = ("-h", "--help", "--dry-run", "--verify", "--trace", "-m", "--multirun", "--version")
WRONG_INPUT, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143


@dataclass(frozen=True)
class Line:
    """A command line, taken apart."""

    argv: tuple[str, ...]
    verb: str
    words: tuple[str, ...]  # neither the verb nor a flag
    flags: frozenset[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status is 0, 1 (failed), 2 (wrong input), 130 (Ctrl-C) or 143
    (SIGTERM)."""
    argv = tuple(sys.argv[1:] if argv is None else argv)
    try:
        line = _taken_apart(argv)
        return _start(line)
    except SegmillError as error:
        return _report(argv, f"{error}", WRONG_INPUT)
    except KeyboardInterrupt:
        return _report(argv, "Stopped.", INTERRUPTED)
    except SystemExit as error:
        # Lightning shuts a run down after Ctrl-C and then exits with 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            return _report(argv, "Stopped.", INTERRUPTED)
        if error.code is None:  # Lightning's word for SIGTERM, which Python takes for success
            return _report(argv, "Ended by SIGTERM.", TERMINATED)
        raise
    except ModuleNotFoundError as error:
        return _report(argv, _not_installed(error), WRONG_INPUT)
    except Exception as error:
        # Lightning's own shutting down may fail too, on a model that was refused half-built.
        if isinstance(error.__context__, SegmillError):
            return _report(argv, f"{error.__context__}", WRONG_INPUT)
        text = f"{type(error).__name__}: {error}\nThis is unexpected. Run again with --trace to see"
        return _report(argv, f"{text} where it comes from.", FAILED)


def _start(line: Line) -> int:
    if "--version" in line.flags:
        from segmill import __version__

        return _say(f"segmill {__version__}")
    if not line.verb or line.flags & {"-h", "--help"}:
        from segmill.usage import overview, verb_help

        return _say(verb_help(line.verb) if line.verb else overview())
    verb = VERBS[line.verb]
    for flag, known in (("--dry-run", verb.dry_run), ("--verify", verb.verify)):
        if flag in line.flags and not known:
            raise SegmillError(f"segmill {line.verb} has no {flag}.")
    _log_to_stdout()
    if verb.config is None:
        _call_plain(line, verb)
        return 0
    return _call_composed(line, verb)


def _call_plain(line: Line, verb: Verb) -> None:
    """A command without a configuration: its words are the keywords of its function."""
    keywords = {}
    for word in line.words:
        key, equals, value = word.partition("=")
        if not equals and verb.arguments:
            key, value = next(iter(verb.arguments)), word
        if key not in verb.arguments:
            hint = suggestion(key, verb.arguments)
            raise SegmillError(f"{word}: no such argument{hint or '.'} {_see_help(line.verb)}")
        if key in keywords:
            raise SegmillError(f"{word}: {key} is given already. {_see_help(line.verb)}")
        keywords[key] = _read(key, value, verb)
    for key in verb.required:
        if key not in keywords:
            raise SegmillError(f"segmill {line.verb} needs {key}: {verb.usage}")
    getattr(importlib.import_module(verb.module), verb.function)(**keywords)


def _read(key: str, value: str, verb: Verb) -> Any:
    """The value that an argument's text stands for."""
    conversion = verb.arguments[key]
    try:
        return conversion(value)
    except ValueError as error:
        raise SegmillError(f"{key}={value}: this should be {EXPECTED[conversion]}.") from error


def _call_composed(line: Line, verb: Verb) -> int:
    """A command with a configuration; several values for a key are several runs."""
    from segmill.configuration import Invocation, compose
    from segmill.sweep import check_jobs, jobs_of, run_jobs

    assert verb.config is not None
    overrides = _overrides(line, verb)
    if "--verify" in line.flags:
        overrides.append("verify=true")
    jobs = jobs_of(overrides)
    if len(jobs) > 1:
        check_jobs(verb.config, jobs)
        flags = line.flags - {"-m", "--multirun", "--verify"}
        return run_jobs(line.verb, jobs, flags=sorted(flags))
    context = Invocation(
        verb=line.verb,
        argv=line.argv,
        command=shlex.join(["segmill", *line.argv]),
        overrides=tuple(overrides),
        dry_run="--dry-run" in line.flags,
    )
    config = compose(verb.config, overrides)
    module = verb.module
    if config.get("runtime") == "jittor":
        assert verb.jittor is not None  # every command with a runtime has one
        module = verb.jittor
    getattr(importlib.import_module(module), verb.function)(config, context)
    return 0


def _overrides(line: Line, verb: Verb) -> list[str]:
    """The line's key=value words; words without `=` become the verb's positional key."""
    from segmill.configuration import quoted

    overrides = [word for word in line.words if "=" in word or word.startswith(("+", "~"))]
    bare = [word for word in line.words if word not in overrides]
    if bare and verb.positional is None:
        raise SegmillError(f"{bare[0]!r} is not key=value. {_see_help(line.verb)}")
    if len(bare) == 1:
        overrides.append(f"{verb.positional}={quoted(bare[0])}")
    elif bare:
        overrides.append(f"{verb.positional}=[{','.join(quoted(word) for word in bare)}]")
    return overrides


def _taken_apart(argv: tuple[str, ...]) -> Line:
    words = [word for word in argv if not word.startswith("-")]
    lines = (" ".join(words[:count]) for count in (2, 1))
    name = next((line for line in lines if line in VERBS), "")
    words, flags = _words_and_flags(argv, VERBS[name].arguments if name else {})
    if name:
        rest = tuple(words[len(name.split()) :])
        return Line(argv=argv, verb=name, words=rest, flags=flags)
    if words and not flags & {"-h", "--help"}:
        raise SegmillError(_unknown_verb(words))
    return Line(argv=argv, verb="", words=(), flags=flags)


def _words_and_flags(
    argv: Sequence[str], arguments: Mapping[str, Callable[[str], Any]]
) -> tuple[list[str], frozenset[str]]:
    """`--name value` and `--name=value` become `name=value` for the arguments of a plain verb."""
    words, flags = [], set()
    left = iter(argv)
    for word in left:
        key, equals, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not word.startswith("-"):
            words.append(word)
        elif word in FLAGS:
            flags.add(word)
        elif word.startswith("--") and key in arguments:
            value = value if equals else next(left, "")
            if not value or (not equals and value.startswith("-")):
                raise SegmillError(f"{word} needs a value: {word} VALUE, or {key}=VALUE.")
            words.append(f"{key}={value}")
        else:
            known = [*FLAGS, *(f"--{each}" for each in arguments)]
            hint = suggestion(word.partition("=")[0], known) or "."
            raise SegmillError(f"There is no flag {word}{hint} Flags: {', '.join(known)}.")
    return words, frozenset(flags)


def _unknown_verb(words: Sequence[str]) -> str:
    """Two-word commands are answered with the second words that exist."""
    family = [name for name in VERBS if name.startswith(f"{words[0]} ")]
    if family:
        return f"Write {' or '.join(f'segmill {name}' for name in family)}."
    hint = suggestion(" ".join(words[:2]), VERBS) or suggestion(words[0], VERBS) or "."
    return f"There is no command {words[0]!r}{hint} All commands: {', '.join(VERBS)}."


def _see_help(verb: str) -> str:
    return f"See segmill {verb} --help."


def _not_installed(error: ModuleNotFoundError) -> str:
    """The Jittor environment has no torch, and an extra may be missing anywhere."""
    jittor = ", ".join(f"segmill {name}" for name, verb in VERBS.items() if verb.jittor)
    return (
        f"this command needs {error.name}, which is not installed here ({sys.executable}). Install "
        f"it: pip install 'segmill[all]'. Without torch there are runtime=jittor ({jittor}) and "
        "segmill convert."
    )


def _log_to_stdout() -> None:
    """Results go to the terminal; of several processes only the first one speaks."""
    log = logging.getLogger("segmill")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]  # anew: in one process, stdout may be another one than last time
    log.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.ERROR)


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    return 0


def _report(argv: Sequence[str], text: str, status: int) -> int:
    if "--trace" in argv:
        traceback.print_exc()
    sys.stderr.write(f"segmill: {text}\n")
    return status
