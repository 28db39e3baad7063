"""What firmware costs a user: one line if it cannot be built, a copy of its VARS."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import firmware


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pybhyve" / "firmware"


def test_missing_packages_are_named(cache, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")

    assert firmware.main(["bhyve"]) == 1

    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(
        "firmware: building bhyve's firmware needs packages that are not installed: "
        "apt-get install acpica-tools dpkg-dev g++ gcc make nasm patch python3"
    )


def test_what_is_built_is_kept(cache, capfd):
    built = cache / f"edk2-2022.11-6+deb12u2.{firmware.RECIPE}"
    built.mkdir(parents=True)
    (cache / "edk2-2022.11-6+deb12u2.0").mkdir()  # by another recipe

    assert firmware.main(["bhyve", "bhyve-without-variables"]) == 0

    assert capfd.readouterr().out == (
        f"bhyve\t{built}/BHYVE_CODE.fd\t{built}/BHYVE_VARS.fd\n"
        f"bhyve-without-variables\t{built}/BHYVE.fd\n"
    )


def test_unknown_firmware(cache, capfd):
    with pytest.raises(SystemExit):
        firmware.main(["coreboot"])

    assert "no firmware coreboot: bhyve, " in capfd.readouterr().err


def test_variables_are_made_once(tmp_path):
    template = tmp_path / "template"
    template.write_bytes(b"new")
    image = firmware.Image(Path("rom"), template)
    variables = tmp_path / "VARS.fd"

    assert image.option(variables) == f"bootrom,rom,{variables},fwcfg=bhyve"
    variables.write_bytes(b"used")

    assert image.option(variables) == f"bootrom,rom,{variables},fwcfg=bhyve"
    assert variables.read_bytes() == b"used"
    assert image.option() == "bootrom,rom,fwcfg=bhyve"
