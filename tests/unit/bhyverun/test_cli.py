"""The command line: what each option sets, what is refused and with which status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybhyve.bhyverun.cli import FLAGS, main, new_config, parse_args
from pybhyve.bhyverun.lpcdev import NAMES
from pybhyve.pci import registry
from pybhyve.variables import GlobalOptions

DEFAULTS = new_config().dump()


@pytest.fixture(autouse=True)
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("PYBHYVE_RUNDIR", str(path))
    return path


def variables(*argv: str) -> str:
    """What a command line adds to the defaults."""
    config = new_config()
    assert parse_args([*argv, "vm"], config) is None
    return "".join(
        line
        for line in config.dump().splitlines(keepends=True)
        if line not in DEFAULTS.splitlines(keepends=True) and line != "name=vm\n"
    )


@pytest.mark.parametrize(
    ("argv", "dump"),
    [
        (["-a"], "x86.x2apic=false\n"),
        (["-A"], ""),
        (["-C"], "memory.guest_in_core=true\n"),
        (["-D"], "destroy_on_poweroff=true\n"),
        (["-e"], "x86.strictio=true\n"),
        (["-H"], "x86.vmexit_on_hlt=true\n"),
        (["-I"], ""),
        (["-P"], "x86.vmexit_on_pause=true\n"),
        (["-S"], "memory.wired=true\n"),
        (["-u"], "rtc.use_localtime=false\n"),
        (["-W"], "virtio_msix=false\n"),
        (["-w"], "x86.strictmsr=false\n"),
        (["-x"], "x86.x2apic=true\n"),
        (["-Y"], "x86.mptable=false\n"),
        (
            ["-xHP"],
            "x86.x2apic=true\nx86.vmexit_on_hlt=true\nx86.vmexit_on_pause=true\n",
        ),
        (["-x", "-a"], "x86.x2apic=false\n"),
        (["-c", "2"], "cpus=2\n"),
        (["-c2"], "cpus=2\n"),
        (["-Hc2"], "x86.vmexit_on_hlt=true\ncpus=2\n"),
        (["-c", "sockets=2,cores=3"], "sockets=2\ncores=3\n"),
        (["-c", ""], "sockets=1\ncores=1\nthreads=1\ncpus=1\n"),
        (["-G", "1234"], "gdb.port=1234\n"),
        (["-G", "w::1:1234"], "gdb.wait=true\ngdb.address=::1\ngdb.port=1234\n"),
        (["-K", "de"], "keyboard.layout=de\n"),
        (["-m", "2G"], "memory.size=2G\n"),
        (["-n", "id=1,size=1G,cpus=0-1"], "domains.1.size=1G\ndomains.1.cpus=0-1\n"),
        (["-o", "a.b=c=d"], "a.b=c=d\n"),
        (["-p", "0:1", "-p", "0:2"], "vcpu.0.cpuset=1,2\n"),
        (["-r", "ckp"], "restore=ckp\n"),
        (["-U", "x"], "uuid=x\n"),
        (["-f", "name=opt/a,string=x,y"], "fwcfg.0.name=opt/a\nfwcfg.0.string=x,y\n"),
        (["-f", "a,file=/f"], "fwcfg.0.name=a\nfwcfg.0.file=/f\n"),
        (["-l", "com1,stdio"], "lpc.com1.path=stdio\n"),
        (["-l", "COM2,tcp=a,b"], "lpc.com2.path=tcp=a,b\n"),
        (["-l", "bootrom,/r"], "bootrom=/r\n"),
        (["-l", "bootrom,/r,/v"], "bootrom=/r\nbootvars=/v\n"),
        (["-l", "bootrom,/r,fwcfg=qemu"], "lpc.fwcfg=qemu\nbootrom=/r\n"),
        (
            ["-l", "tpm,passthru,/dev/tpm0"],
            "tpm.type=passthru\ntpm.path=/dev/tpm0\ntpm.version=2.0\n",
        ),
        (
            ["-l", "tpm,swtpm,/s,version=1.2"],
            "tpm.type=swtpm\ntpm.path=/s\ntpm.version=1.2\n",
        ),
        (["-l", "pc-testdev"], "lpc.pc-testdev=true\n"),
        (["-s", "0,hostbridge"], "pci.0.0.0.device=hostbridge\n"),
        (["-s", "3:1,hostbridge"], "pci.0.3.1.device=hostbridge\n"),
        (["-s", "2:3:1,hostbridge"], "pci.2.3.1.device=hostbridge\n"),
        (["-s", "31:7,lpc"], "pci.0.31.7.device=lpc\n"),
        (
            ["-s", "4,uart,tcp=127.0.0.1:4000"],
            "pci.0.4.0.device=uart\npci.0.4.0.path=tcp=127.0.0.1:4000\n",
        ),
        (
            ["-s", "0,amd_hostbridge"],
            "pci.0.0.0.device=hostbridge\npci.0.0.0.pcireg.vendor=0x1022\n"
            "pci.0.0.0.pcireg.device=0x7432\n",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_an_option_sets(argv, dump):
    assert variables(*argv) == dump


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["-c", "core=1", "vm"], 64, "bhyve: invalid cpu topology 'core=1'"),
        (["-f", "x", "vm"], 64, "bhyve: invalid fwcfg item 'x'"),
        (["-f", "x" * 56 + ",string=", "vm"], 64, "bhyve: invalid fwcfg item"),
        (["-k", "/nonexistent", "vm"], 4, "bhyve: Failed to open configuration file"),
        (["-l", "com5,stdio", "vm"], 64, "bhyve: invalid lpc device configuration 'co"),
        (["-l", "com1", "vm"], 64, "bhyve: invalid lpc device configuration 'com1'"),
        (["-l", "bootrom", "vm"], 4, 'invalid bootrom option "bootrom"'),
        (["-l", "tpm", "vm"], 4, 'invalid tpm type "tpm"'),
        (["-l", "tpm,swtpm", "vm"], 4, 'invalid tpm path "tpm,swtpm"'),
        (["-n", "size=1G", "vm"], 64, "bhyve: invalid NUMA configuration 'size=1G'"),
        (["-o", "a", "vm"], 64, "bhyve: invalid configuration option 'a'"),
        (["-o", "a=", "vm"], 64, "bhyve: invalid configuration option 'a='"),
        (["-o", "a..b=1", "vm"], 4, "bhyve: Invalid configuration node a..b"),
        (["-p", "1", "vm"], 64, "bhyve: invalid vcpu pinning configuration '1'"),
        (["-s", "1", "vm"], 4, 'Invalid PCI slot info field "1"'),
        (["-s", "x,lpc", "vm"], 4, 'Invalid PCI slot info field "x,lpc"'),
        (["-s", "32,lpc", "vm"], 4, 'Invalid PCI slot info field "32,lpc"'),
        (["-s", "256:0:0,lpc", "vm"], 4, "Invalid PCI slot info field"),
        (["-s", "0:0:8,lpc", "vm"], 4, "Invalid PCI slot info field"),
        (["-s", "3,nope", "vm"], 4, 'pci slot 0:3:0: unknown device "nope"'),
        (
            ["-s", "3,lpc", "-s", "3,hostbridge", "vm"],
            4,
            "pci slot 0:3:0 already occupied!",
        ),
        ([], 1, "Usage: bhyve [-"),
        (["a", "b"], 1, "Usage: bhyve [-"),
        (["-Z", "vm"], 1, "bhyve: illegal option -- Z"),
        (["-c"], 1, "bhyve: option requires an argument -- c"),
        (["-m", "x", "vm"], 64, "bhyve: invalid memsize 'x'"),
        (["-m", "", "vm"], 64, "bhyve: invalid memsize ''"),
        (["-m", "0", "vm"], 64, "bhyve: invalid memsize '0'"),
        (["-c", "4,cores=2", "vm"], 4, "Topology (4 sockets, 2 cores, 1 threads)"),
        (["-p", "0:1023", "vm"], 4, "bhyve: vcpu 0 cannot run on host CPUs 1023"),
        (["vm"], 4, "bhyve: no bootrom was configured"),
        (["-o", "x86.mptable=maybe", "vm"], 4, "for boolean variable x86.mptable"),
        (["-o", "engine=fast", "vm"], 4, "expected auto, kvm or soft"),
        (["-o", "engine=kvm", "vm"], 4, "engine kvm is not available in this version"),
        (["-G", "1", "vm"], 4, "is not available in this version"),
        (["-G", "65536", "vm"], 4, "gdb.port"),
        (["-r", "x", "vm"], 4, "is not available in this version"),
        (["-l", "bootrom,/dev/null", "vm"], 4, 'bootrom "/dev/null": not a regular'),
        (["-o", "lpc.bootrom=x", "vm"], 4, "use '-o bootrom' instead"),
        (["-l", "bootrom,x", "-o", "kernel=x", "vm"], 4, "bootrom and kernel exclude"),
        (["-l", "tpm,swtpm,x", "vm"], 4, "a TPM is not available in this version"),
        (["-o", "kernel=/nonexistent", "vm"], 4, "/nonexistent"),
        (["-c", "255", "vm"], 4, "255 vCPUs requested but only 254 available"),
        (["a/b"], 4, "'a/b' is not a VM name"),
        (["x" * 230], 4, "the VM name is 230 bytes long"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_is_refused(capfd, argv, status, message):
    assert main(argv) == status

    out, err = capfd.readouterr()
    assert message in err
    assert out == ""
    if status != 1:
        assert all(line.startswith("bhyve: ") for line in err.splitlines())
    assert "Traceback" not in err


@pytest.mark.parametrize("name", sorted(registry.NOT_AVAILABLE))
def test_a_device_that_is_not_written_yet(capfd, name):
    if name in registry._EMULATIONS:
        pytest.fail(f"{name} is written: take it off the list")

    assert main(["-s", f"3,{name},x", "vm"]) == 4

    assert capfd.readouterr().err == (
        f'bhyve: pci slot 0:3:0: device "{name}" is not available in this version\n'
    )


def test_help_is_on_stderr_and_no_error(capfd):
    assert main(["-h", "-Z"]) == 0

    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("Usage: bhyve [-aCDeHhPSuWwxY]\n")


@pytest.mark.parametrize("word", ["help", "hel", "h", ""])
def test_lists_take_any_beginning_of_help(capfd, word):
    assert main(["-s", word]) == 0
    assert capfd.readouterr().out.split() == registry.names()
    assert main(["-l", word]) == 0
    assert capfd.readouterr().out.split() == list(NAMES)


def test_config_dump_exits_1(capfd):
    assert main(["-o", "config.dump=1", "-c", "2", "x"]) == 1

    assert capfd.readouterr().out == (
        "acpi_tables=true\nacpi_tables_in_memory=true\nmemory.size=256M\n"
        "x86.strictmsr=true\nx86.verbosemsr=false\nlpc.fwcfg=bhyve\n"
        "config.dump=1\ncpus=2\nname=x\n"
    )


def test_a_name_from_the_variables_is_enough(capfd):
    assert main(["-o", "name=x", "-o", "config.dump=1"]) == 1

    assert "name=x\n" in capfd.readouterr().out


def test_a_config_file_is_one_more_option(capfd, tmp_path):
    file = tmp_path / "vm.conf"
    file.write_text("cpus=4\nname=f\n")

    assert main(["-c", "2", "-k", str(file), "-o", "config.dump=1"]) == 1

    assert "cpus=4\nname=f\n" in capfd.readouterr().out


def test_config_check_reports_what_nothing_reads(capfd):
    argv = ["-s", "0,hostbridge", "-s", "1,lpc,x=1", "-o", "memory.siz=1"]
    argv += ["-o", "config.check=1", "-o", "pci.0.9=x"]

    assert main([*argv, "vm"]) == 4

    lines = capfd.readouterr().err.splitlines()
    assert "bhyve: unknown variable memory.siz (did you mean memory.size?)" in lines
    assert "bhyve: unknown variable pci.0.1.0.x" in lines
    assert "bhyve: unknown variable pci.0.9" in lines
    assert not any("device" in line for line in lines)


def test_every_flag_sets_a_declared_variable():
    declared = {row.name for row in GlobalOptions.describe()}

    assert {flag.variable for flag in FLAGS} - {""} <= declared


def test_messages_do_not_change_the_terminal(capfd):
    assert main(["-o", "a\x1b[31m\udcff", "vm"]) == 64

    err = capfd.readouterr().err
    assert r"'a\x1b[31m\udcff'" in err


def test_traceback_on_request(capfd, monkeypatch):
    monkeypatch.setenv("PYBHYVE_TRACEBACK", "1")

    assert main(["-m", "x", "vm"]) == 64

    assert "Traceback" in capfd.readouterr().err


def test_a_reader_that_leaves_is_no_error(rundir):
    command = [sys.executable, "-m", "pybhyve.bhyverun.cli", "-o", "config.dump=1"]
    read_end, write_end = os.pipe()
    os.close(read_end)

    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run([*command, "x"], stdout=closed, stderr=subprocess.PIPE)

    assert (done.returncode, done.stderr) == (4, b"")


def test_interrupting_is_quiet():
    code = (
        "import signal\n"
        "from pybhyve.program import run_program\n"
        "run_program('x', lambda argv: signal.raise_signal(signal.SIGINT) or 0, [], '')"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True)

    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


words = st.one_of(
    st.text(st.sampled_from("abhs0123:,=.%()-\\\n \0é\udcff"), max_size=20),
    st.sampled_from(["help", "0,lpc", "com1,stdio", "cpus=2", "a=b", "31:7,uart"]),
)
options = st.one_of(
    st.sampled_from(["-" + flag.letter for flag in FLAGS]),
    st.tuples(st.sampled_from("cfGKklmnoprsU"), words).map(lambda t: f"-{t[0]}{t[1]}"),
    words,
)


@settings(
    max_examples=300,
    deadline=None,
    # The directory of the fixture stays empty: no command line here makes a VM.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(options, max_size=6))
def test_any_command_line_is_taken_or_refused(capfd, rundir, argv):
    status = main(argv)

    out, err = capfd.readouterr()
    assert status in (0, 1, 4, 64)
    assert err.startswith(("bhyve: ", "Usage: ")) or out
    assert "Traceback" not in err
    assert "internal error" not in err
    assert not list(rundir.glob("*"))
