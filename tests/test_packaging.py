"""The package is whole however it is installed, and from every folder. No network is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
PARTS = ("jobs", "engine", "kernels", "connectors")
LOOK = """
import batchinfer, batchinfer.jobs.types, batchinfer.engine.types, batchinfer.kernels
import batchinfer.connectors.types as types
from pathlib import Path
print(Path(batchinfer.__file__).parent, Path(types.__file__).parent.parent)
"""

pytestmark = pytest.mark.slow


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources as a clone has them."""
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "benchmarks"
    )
    return Path(
        shutil.copytree(
            ROOT, tmp_path_factory.mktemp("clone") / "repository", symlinks=True, ignore=ignored
        )
    )


def build(source: Path, kind: str, target: Path) -> Path:
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    name = run([sys.executable, "-c", code, target], source).split()[-1]
    return target / name


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(clone, "wheel", tmp_path_factory.mktemp("wheel"))


def environment(folder: Path) -> Path:
    """The Python of a fresh environment that sees this one's packages, but not its batchinfer."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    packages = run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder
    ).strip()
    # Added by a .pth file, so the .pth files in there, such as an editable install's, don't count.
    Path(packages, "others.pth").write_text(SITE_PACKAGES)
    return python


def install(python: Path, *what: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install"]
    run([*pip, "--no-deps", "--no-index", "--no-build-isolation", "--quiet", *what], python.parent)


def source_files(root: Path) -> set[str]:
    """What a package must hold, by its path in it."""
    front = root / "batchinfer"
    found = {str(path.relative_to(root)) for name in ("*.py", "commands/*.py") for path in front.glob(name)}
    found.add("batchinfer/py.typed")
    for part in PARTS:
        for suffix in ("py", "cpp", "h", "html", "json"):
            found |= {f"batchinfer/{path.relative_to(root)}" for path in (root / part).rglob(f"*.{suffix}")}
    return found


def test_a_wheel_holds_every_source_and_nothing_else(clone: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == source_files(clone)
    assert wheel.name.startswith("batchinfer_jobs-")


def test_a_source_distribution_builds_the_same_wheel(clone: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build(clone, "sdist", tmp_path)
    with tarfile.open(archive) as content:
        content.extractall(tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = zipfile.ZipFile(build(unpacked, "wheel", tmp_path))
    first = zipfile.ZipFile(wheel)
    assert sorted(again.namelist()) == sorted(first.namelist())
    for name in first.namelist():
        if not name.endswith("/RECORD"):
            assert again.read(name) == first.read(name), name


def test_an_installed_wheel_works_from_every_folder(clone: Path, wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "environment")
    install(python, wheel)
    for folder, flags in ((tmp_path, []), (clone, ["-P"])):
        package, part = run([python, *flags, "-c", LOOK], folder).split()
        assert package == part
        assert Path(package).is_relative_to(tmp_path)
    assert "submit" in run([python, "-P", "-m", "batchinfer", "--help"], clone)
    assert "submit" in run([python.with_name("batchinfer"), "--help"], tmp_path)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_works_from_every_folder(mode: str, clone: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "environment")
    source = tmp_path / "repository"
    shutil.copytree(clone, source, symlinks=True)
    install(python, "--config-settings", f"editable_mode={mode}", "--editable", source)
    for folder, flags in ((tmp_path, []), (source, []), (source, ["-P"])):
        package, part = run([python, *flags, "-c", LOOK], folder).split()
        assert package == part
    assert "submit" in run([python, "-P", "-m", "batchinfer", "--help"], source)


def test_a_bare_clone_works_without_being_installed(clone: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "environment")
    assert "submit" in run([python, "-m", "batchinfer", "--help"], clone)
    assert "submit" in run([python, "-m", "batchinfer", "--help"], tmp_path, PYTHONPATH=str(clone))
    package, part = run([python, "-c", LOOK], tmp_path, PYTHONPATH=str(clone)).split()
    assert Path(package) == Path(part) == clone / "batchinfer"
