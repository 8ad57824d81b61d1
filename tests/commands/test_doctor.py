"""`segmill doctor`: what it finds and what it tells to do."""

import pytest
from packaging.requirements import Requirement

from segmill import cli
from segmill.commands import doctor
from segmill.commands.doctor import Finding


def test_this_machine_passes(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch + torchvision" in printed
    assert printed.splitlines()[-1] == "Next: segmill demo"


def test_a_failed_check_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding("fail", "disk", "full", "tidy")]))
    assert cli.main(["doctor"]) == 2
    assert "disk: not usable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "status"),
    [(None, "fail"), ("2.6.3", "fail"), ("2.6.6", "ok"), ("1.9", "warn"), ("2.14.1+cu130", "ok")],
)
def test_a_package_is_held_against_its_range(monkeypatch, version, status):
    monkeypatch.setattr(doctor, "_installed", lambda name: version)
    assert doctor.package(Requirement("lightning>=2.6.1,<3")).status == status


def test_torchvision_of_another_torch_fails(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.26.0")
    finding = doctor.torchvision_build()
    assert finding.status == "fail"
    assert "needs torchvision 0." in finding.remedy


def test_an_offline_hub_says_what_to_copy(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def unreachable(*_, **__):
        raise OSError

    monkeypatch.setattr(doctor.socket, "create_connection", unreachable)
    assert "weights=FILE" in doctor.hub().remedy


def test_a_wandb_key_in_the_environment_is_found(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "online" in doctor.wandb_key().found
