"""The command line as a person meets it: help, refusals, exit statuses, sweeps."""

import logging
import sys
import types

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from segmill import cli, sweep, verbs
from segmill.errors import SegmillError
from segmill.verbs import VERBS, Verb


@pytest.fixture
def fake(monkeypatch):
    """A command module that the table points at; returns the list of its calls."""
    calls = []
    module = types.SimpleNamespace(
        run=lambda config, context: calls.append((config, context)),
        plain=lambda **keywords: calls.append(keywords),
    )

    def fail(config, context):
        raise RuntimeError("the disk is full")

    def stop(config, context):
        raise KeyboardInterrupt

    def shut_down(config, context):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    module.fail, module.stop, module.shut_down = fail, stop, shut_down
    monkeypatch.setitem(sys.modules, "fake_command", module)
    for name, function in (
        ("work", "run"),
        ("break", "fail"),
        ("stop", "stop"),
        ("down", "shut_down"),
    ):
        row = Verb(
            module="fake_command",
            function=function,
            summary="",
            usage="",
            config="predict",
            positional="path",
            dry_run=True,
        )
        monkeypatch.setitem(VERBS, name, row)
    plain = Verb(
        module="fake_command",
        function="plain",
        summary="",
        usage="segmill look at FILE",
        arguments={"file": str, "model": str},
        required=("file",),
    )
    monkeypatch.setitem(VERBS, "look at", plain)
    return calls


@pytest.fixture(autouse=True)
def _quiet_logger():
    yield
    logging.getLogger("segmill").handlers.clear()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_command_has_help_with_examples(verb, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert VERBS[verb].summary in text
    assert VERBS[verb].examples[0] in text


def test_help_lists_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VERBS)


def test_help_takes_no_comment_for_a_group(capsys):
    cli.main(["train", "--help"])
    assert "_self_" not in capsys.readouterr().out


def test_train_help_lists_the_options_of_its_groups(capsys):
    cli.main(["train", "-h"])
    text = capsys.readouterr().out
    assert "fcn_r50-d8" in text
    assert "ms_flip" in text


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("trian", "did you mean train?"),
        ("train --dryrun", "did you mean --dry-run?"),
        ("weights inspct file", "segmill weights inspect"),
        ("eval --dry-run", "no --dry-run"),
        ("train pspnet", "is not key=value"),
        ("doctor now", "no such argument"),
        ("models upernet swin", "swin: word is given already"),
    ],
)
def test_a_wrong_line_ends_with_status_2_and_one_paragraph(line, answer, capsys):
    assert cli.main(line.split()) == 2
    printed = capsys.readouterr()
    assert answer in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_command_gets_its_configuration_and_what_was_typed(fake):
    assert cli.main(["work", "run=runs/x", "my photo (1).jpg", "--dry-run"]) == 0
    config, context = fake[0]
    assert config.path == "my photo (1).jpg"
    assert context.dry_run
    assert context.argv == ("work", "run=runs/x", "my photo (1).jpg", "--dry-run")
    assert context.command == "segmill work run=runs/x 'my photo (1).jpg' --dry-run"


def test_several_words_become_a_list(fake):
    assert cli.main(["work", "run=runs/x", "a.jpg", "it's b.jpg"]) == 0
    assert list(fake[0][0].path) == ["a.jpg", "it's b.jpg"]


def test_a_plain_command_takes_its_first_argument_without_a_name(fake):
    assert cli.main(["look", "at", "x.pth", "model=fcn"]) == 0
    assert fake == [{"file": "x.pth", "model": "fcn"}]


@pytest.mark.parametrize("words", [["--model", "fcn"], ["--model=fcn"], ["model=fcn"]])
def test_an_argument_of_a_plain_command_may_be_written_as_a_flag(words, fake):
    assert cli.main(["look", "at", "x.pth", *words, "--trace"]) == 0
    assert fake == [{"file": "x.pth", "model": "fcn"}]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--modle", "fcn"], "did you mean --model"),
        (["--modle=fcn"], "did you mean --model"),
        (["--model"], "--model needs a value"),
        (["--model", "--trace"], "--model needs a value"),
    ],
)
def test_a_wrong_flag_of_a_plain_command_is_explained(words, answer, fake, capsys):
    assert cli.main(["look", "at", "x.pth", *words]) == 2
    assert answer in capsys.readouterr().err
    assert fake == []


def test_a_plain_command_names_its_missing_argument(fake, capsys):
    assert cli.main(["look", "at"]) == 2
    assert "needs file" in capsys.readouterr().err


def test_an_unexpected_error_is_one_paragraph_and_status_1(fake, capsys):
    assert cli.main(["break", "run=x", "a.jpg"]) == 1
    text = capsys.readouterr().err
    assert "RuntimeError: the disk is full" in text
    assert "--trace" in text
    assert "Traceback" not in text


def test_trace_shows_the_stack(fake, capsys):
    assert cli.main(["break", "run=x", "a.jpg", "--trace"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["stop", "down"])
def test_ctrl_c_ends_with_status_130(fake, verb):
    assert cli.main([verb, "run=x", "a.jpg"]) == 130


def test_sigterm_is_no_success(fake, monkeypatch, capsys):
    def shut_down(config, context):
        raise SIGTERMException

    monkeypatch.setattr(sys.modules["fake_command"], "shut_down", shut_down)
    assert cli.main(["down", "run=x", "a.jpg"]) == 143
    assert "SIGTERM" in capsys.readouterr().err


def test_comma_lists_make_the_cartesian_product():
    jobs = sweep.jobs_of(["model=a,b", "seed=0,1", "data.crop=[8,8]", "name='x,y'"])
    assert [job[:2] for job in jobs] == [
        ["model=a", "seed=0"],
        ["model=a", "seed=1"],
        ["model=b", "seed=0"],
        ["model=b", "seed=1"],
    ]
    assert jobs[0][2:] == ["data.crop=[8,8]", "name='x,y'"]


def test_a_sweep_goes_on_after_a_failure_and_answers_with_the_worst_status(fake, monkeypatch):
    commands = []

    def status(command):
        commands.append(command)
        return 0 if "alpha=1" in command else 2

    monkeypatch.setattr(sweep, "_status", status)
    assert cli.main(["work", "run=x", "a.jpg", "alpha=0,1", "--dry-run", "-m"]) == 2
    assert [command[2:] for command in commands] == [
        ["segmill", "work", "run=x", "alpha=0", "path='a.jpg'", "--dry-run"],
        ["segmill", "work", "run=x", "alpha=1", "path='a.jpg'", "--dry-run"],
    ]


def test_a_sweep_starts_nothing_when_its_last_run_is_wrong(fake, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_jobs", pytest.fail)
    assert cli.main(["work", "run=x", "a.jpg", "protocol=whole,wole"]) == 2
    assert "protocol=wole" in capsys.readouterr().err


def test_ctrl_c_waits_for_the_run_and_ends_the_sweep(monkeypatch):
    class Interrupted:
        returncode, asked = 0, 0

        def poll(self):
            return None if self.asked < 2 else 0

        def wait(self):
            self.asked += 1
            if self.asked == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command: Interrupted())
    assert sweep.run_jobs("train", [["seed=0"], ["seed=1"]], flags=[]) == 130


def test_values_that_cannot_be_read_are_all_named():
    with pytest.raises(SegmillError, match=r"2 problems(.|\n)*crop(.|\n)*scale"):
        sweep.jobs_of(["data.crop=[1,", "data.scale={2"])


def test_every_row_of_the_table_has_its_root_file():
    from segmill.paths import CONFIGS

    for name, verb in verbs.VERBS.items():
        assert verb.config is None or (CONFIGS / f"{verb.config}.yaml").is_file(), name


def test_a_misspelt_runtime_is_told_which_there_are(capsys):
    assert cli.main(["train", "runtime=jitor"]) == 2
    assert "there are torch and jittor" in capsys.readouterr().err


def test_jittor_is_said_to_live_elsewhere(capsys):
    assert cli.main(["train", "runtime=jittor", "model=dformer-tiny"]) == 2
    assert "make jittor" in capsys.readouterr().err
