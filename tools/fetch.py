"""Debian packages as files: fetched with apt, checked, unpacked, never installed.

``python -m tools.fetch NAME...`` prints where each package's files lie.

A package is kept under ``$XDG_CACHE_HOME/pybhyve/packages/NAME/VERSION-SHA256``: a
point release, which takes the old version off the mirrors, adds to the cache and
replaces nothing.  The hash is the one in apt's signed lists.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KERNEL_METAPACKAGE: Final = re.compile(r"linux-image-(?:[a-z]+-)?[a-z0-9]+$")
"""Kernel packages without a version hold no kernel: they depend on one that does."""


class FetchError(Exception):
    """A package that cannot be had; the message says which, and why."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package's files, unpacked under ``root`` as they would lie under ``/``."""

    name: str
    version: str
    sha256: str
    root: Path

    def file(self, pattern: str) -> Path:
        """The one file that matches ``pattern``, a glob relative to the root."""
        found = sorted(self.root.glob(pattern))
        if len(found) != 1:
            raise FetchError(
                f"{self.name} {self.version}: "
                f"{len(found)} files match {pattern!r}, not one"
            )
        return found[0]

    def __str__(self) -> str:
        """Name, version and the start of the hash, as reports show them."""
        return f"{self.name} {self.version} (sha256 {self.sha256[:16]})"


@dataclass(frozen=True, slots=True)
class _Offer:
    """What the package lists say of a package's candidate version."""

    name: str
    version: str
    sha256: str
    depends: str


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/pybhyve``, created."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "pybhyve"
    path.mkdir(parents=True, exist_ok=True)
    return path


used: Final[dict[str, Package]] = {}
"""The packages that this process has asked for, by the names it used."""


def package(name: str, sha256: str | None = None) -> Package:
    """Fetch a package, or find it in the cache.

    A kernel metapackage stands for the kernel it depends on.  With ``sha256`` exactly
    that build is wanted.  Raises FetchError.
    """
    if name not in used:
        used[name] = _package(name, sha256)
    return used[name]


def _package(name: str, sha256: str | None) -> Package:
    if sha256 is not None:
        for cached in _cached(name):
            if cached.sha256 == sha256:
                return cached
    # The system's lists may be missing, or older than what the mirror still holds;
    # lists of our own need no privilege and leave the system as it is.
    reason = "not in apt's package lists"
    for lists in (system_lists, own_lists):
        options = lists()
        offer = _resolve(name, options)
        if offer is None:
            continue
        if sha256 not in (None, offer.sha256):
            reason = f"pinned to {sha256}, but {offer.version} is {offer.sha256}"
            continue
        unpacked = _place(offer)
        if unpacked.is_dir():
            return Package(offer.name, offer.version, offer.sha256, unpacked)
        try:
            return _download(offer, options, unpacked)
        except FetchError as error:
            reason = str(error)
    # Without a network, what an earlier run used is better than nothing.
    if sha256 is None and (earlier := _cached(name)):
        print(f"{name}: {reason}; using {earlier[-1]}", file=sys.stderr)
        return earlier[-1]
    raise FetchError(f"{name}: {reason}")


def _packages_dir() -> Path:
    return cache_dir() / "packages"


def _place(offer: _Offer) -> Path:
    # bhyve's options would split or expand most other signs; versions have no "_".
    version = offer.version.replace(":", "_")
    return _packages_dir() / offer.name / f"{version}-{offer.sha256}"


def _cached(name: str) -> list[Package]:
    """Cached builds of ``name``, or of what its metapackage stood for; newest last."""
    pattern = name
    if KERNEL_METAPACKAGE.match(name):
        pattern = name.replace("linux-image-", "linux-image-[0-9]*-")
    places = sorted(
        _packages_dir().glob(f"{pattern}/*-*"), key=lambda path: path.stat().st_mtime
    )
    found = []
    for place in places:
        version, _, sha256 = place.name.rpartition("-")
        found.append(
            Package(place.parent.name, version.replace("_", ":"), sha256, place)
        )
    return found


def system_lists() -> list[str]:
    """No options: apt uses the system's package lists, which may be old or missing."""
    return []


def own_lists() -> list[str]:
    """Options that make apt use fresh package lists kept in our cache."""
    return _fresh_lists(cache_dir() / "apt", [])


def sources(options: Sequence[str], kind: str = "deb", release: str = "") -> list[str]:
    """Debian's own among the system's apt sources, as sources.list has them.

    ``kind`` is what they become: deb or deb-src; of another release than one whose
    name begins with ``release`` there are none.
    """
    fields = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)\t$(SIGNED_BY)"
    targets = subprocess.run(
        [
            *("apt-get", *options, "indextargets", f"--format={fields}"),
            *("Created-By: Packages", "Origin: Debian"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    found = set()
    for target in targets.stdout.splitlines():
        uri, name, component, signed_by = target.split("\t")
        if name.startswith(release):
            option = f"[signed-by={signed_by}] " if signed_by.startswith("/") else ""
            found.add(f"{kind} {option}{uri} {name} {component}")
    return sorted(found)


def source(name: str, directory: Path) -> Path:
    """Fetch a source package's files into ``directory``; its description (.dsc).

    Apt has checked them against its signed lists.  Raises FetchError.
    """
    found = sources(system_lists(), "deb-src") or sources(own_lists(), "deb-src")
    if not found:
        raise FetchError(f"{name}: apt has no sources of Debian's")
    apt = cache_dir() / "apt-src"
    apt.mkdir(exist_ok=True)
    (apt / "sources.list").write_text("\n".join(found) + "\n")
    private = [
        f"-oDir::Etc::sourcelist={apt / 'sources.list'}",
        "-oDir::Etc::sourceparts=-",
    ]
    done = subprocess.run(
        [
            *("apt-get", "-q", *_fresh_lists(apt, private)),
            *("source", "--download-only", "--only-source", name),
        ],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        cwd=directory,
        check=False,
    )
    descriptions = list(directory.glob(f"{name}_*.dsc"))
    if done.returncode != 0 or len(descriptions) != 1:
        raise FetchError(f"apt-get could not fetch the source of {name}")
    return descriptions[0]


def _fresh_lists(apt: Path, options: Sequence[str]) -> list[str]:
    options = [
        *options,
        f"-oDir::State::lists={apt / 'lists'}",
        f"-oDir::Cache={apt / 'cache'}",
        # Root's cache directory is closed to the user that apt would fetch as.
        "-oAPT::Sandbox::User=root",
    ]
    for directory in ("lists/partial", "cache/archives/partial"):
        (apt / directory).mkdir(parents=True, exist_ok=True)
    print("updating the package lists ...", file=sys.stderr)
    # A third party's repository that is down must not keep Debian's from us.
    subprocess.run(
        ["apt-get", "-q", *options, "update"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        check=False,
    )
    return options


def _resolve(name: str, options: list[str]) -> _Offer | None:
    offer = _show(name, options)
    if offer is not None and KERNEL_METAPACKAGE.match(name):
        kernel = re.search(r"linux-image-[0-9][^ ,]*", offer.depends)
        return _show(kernel[0], options) if kernel else None
    return offer


def _show(name: str, options: list[str]) -> _Offer | None:
    try:
        shown = subprocess.run(
            ["apt-cache", *options, "show", "--no-all-versions", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise FetchError("apt-cache is not here: guests come from Debian") from error
    fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", shown.stdout, re.MULTILINE))
    if "SHA256" not in fields:
        return None
    return _Offer(name, fields["Version"], fields["SHA256"], fields.get("Depends", ""))


def _download(offer: _Offer, options: list[str], unpacked: Path) -> Package:
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {offer.name} {offer.version} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=unpacked.parent) as scratch:
        # The sandbox user may not enter our cache; apt would say so at each download.
        command = ["apt-get", "-q", "-oAPT::Sandbox::User=root", *options, "download"]
        done = subprocess.run(
            [*command, f"{offer.name}={offer.version}"],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            cwd=scratch,
            check=False,
        )
        archives = list(Path(scratch).glob("*.deb"))
        if done.returncode != 0 or len(archives) != 1:
            raise FetchError(f"apt-get could not fetch {offer.version}")
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if digest != offer.sha256:
            raise FetchError(f"{offer.version} has sha256 {digest}, not {offer.sha256}")
        files = Path(scratch) / "files"
        subprocess.run(["dpkg", "-x", archives[0], files], check=True)
        try:
            files.rename(unpacked)
        except OSError:
            # Another run was quicker; what it unpacked is the same.
            shutil.rmtree(files)
    return Package(offer.name, offer.version, offer.sha256, unpacked)


def main() -> int:
    """Fetch the packages that the command line names."""
    try:
        for name in sys.argv[1:]:
            found = package(name)
            print(found, found.root, sep="\t")
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
