"""Every command that the documentation shows composes, and the method that it shows runs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from segmill.configuration import compose
from segmill.sweep import jobs_of
from segmill.verbs import VERBS
from tiny_adaptation import adapt_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SCRIPT = ["python", "scripts/run_tta.py"]
# Options that the reader is shown how to write.
OWN = ("street", "upernet_convnext-t", "bias_entropy")


def commands_of(page: Path) -> list[list[str]]:
    """The words after `segmill` of every command in the page's blocks of code."""
    found = []
    for line in "".join(blocks_of(page, language="")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):  # environment variables
            words.pop(0)
        if words[:2] == SCRIPT:
            found.append(["adapt", *words[2:]])
        elif words[:1] == ["segmill"]:
            found.append(words[1:])
    return found


def blocks_of(page: Path, *, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in blocks if name == language]


SHOWN = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    for words in commands_of(page)
    if not any(own in word for word in words for own in OWN)
]


def test_both_languages_show_the_same_commands():
    english, chinese = (commands_of(ROOT / name) for name in ("README.md", "README.zh.md"))
    assert english == chinese
    assert english


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_of_the_documentation_composes(words):
    name = next(name for count in (2, 1) if (name := " ".join(words[:count])) in VERBS)
    verb, rest = VERBS[name], words[len(name.split()) :]
    flags = [word for word in rest if word.startswith("--")]
    keys = [word for word in rest if "=" in word and word not in flags]
    bare = [word for word in rest if word not in (*keys, *flags)]
    assert set(flags) <= {f"--{each}" for each in ("dry-run", "verify") if _takes(verb, each)}
    if verb.config is None:
        assert {word.partition("=")[0] for word in keys} <= set(verb.arguments)
        return
    assert not bare or verb.positional
    for job in jobs_of([*keys, *(f"{verb.positional}=x" for _ in bare[:1])]):
        compose(verb.config, job)


def test_the_method_that_is_shown_runs(tmp_path, monkeypatch):
    page = ROOT / "docs" / "add_a_tta_method.md"
    (tmp_path / "configs" / "tta").mkdir(parents=True)
    (tmp_path / "bias_entropy.py").write_text(blocks_of(page, language="python")[0])
    yaml = tmp_path / "configs" / "tta" / "bias_entropy.yaml"
    yaml.write_text(blocks_of(page, language="yaml")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = adapt_tiny(
        tmp_path,
        tta="bias_entropy",
        tta__method__share=0.95,
        limit=2,
        data__corruptions="[contrast]",
    )
    methods = json.loads((folder / "results.json").read_text(encoding="utf-8"))["methods"]
    assert [each["method"] for each in methods] == ["source", "bias_entropy"]
    assert methods[1]["tasks"][0]["loss"] > 0, "some pixels were sure, so something was learnt"


def _takes(verb, flag: str) -> bool:
    return {"dry-run": verb.dry_run, "verify": verb.verify}[flag]
