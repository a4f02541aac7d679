"""The Dockerfiles, as far as that goes without running their steps, which `make image-test` does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_builder import (
    Builder,
    DockerfileError,
    Image,
    Surroundings,
    container_command,
    context_files,
    expand,
    parse,
    stages_of,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
EXTRAS = {"Dockerfile.cpu": ("engine", "s3", "gcs", "azure"), "Dockerfile": ("gpu", "s3", "gcs", "azure")}
REQUIREMENTS = {"Dockerfile.cpu": "requirements-cpu.txt", "Dockerfile": "requirements.txt"}
BOTH = pytest.mark.parametrize("name", sorted(EXTRAS))


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [program, *(DOCKER / name for name in EXTRAS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@BOTH
def test_a_worker_is_process_1_and_not_root(name: str) -> None:
    last = stages_of(parse(DOCKER / name))[-1]
    found = {command.cmd.upper(): command for command in last}
    assert found["ENTRYPOINT"].json and found["ENTRYPOINT"].value == ("batchinfer",)
    assert found["CMD"].json and found["CMD"].value == ("worker",)
    user, _, group = found["USER"].value[0].partition(":")
    assert int(user) >= 10_000 and int(group) >= 10_000, "Kubernetes can tell a number from root"
    assert found["HEALTHCHECK"].value[1:] == ("python3", "-P", "-m", "batchinfer.jobs.health")


@BOTH
def test_what_is_copied_is_there_and_bases_have_a_version(name: str) -> None:
    commands = parse(DOCKER / name)
    arguments = dict(
        c.value[0].split("=", 1) for c in commands if c.cmd.upper() == "ARG" and "=" in c.value[0]
    )
    known: set[str] = set()
    files = context_files(ROOT)
    for stage in stages_of(commands):
        base = expand(stage[0].value[0], arguments)
        assert base in known or re.fullmatch(r"[a-z]+:\d+\.\d+(-\w+)?", base), base
        known.add(stage[0].value[-1])
        for command in stage:
            if command.cmd.upper() == "COPY" and not any(
                flag.startswith("--from") for flag in command.flags
            ):
                assert all(source == "." or source in files for source in command.value[:-1]), (
                    command.original
                )


@BOTH
def test_pip_installs_only_what_is_pinned(name: str) -> None:
    text = (DOCKER / name).read_text()
    installs = re.findall(r"pip install (.*?)(?: \\| ;;|$)", text, re.MULTILINE)
    assert len(installs) >= 4
    for words in installs:
        pinned = "--requirement docker/" in words or re.search(r"\w==[\d.]+$", words)
        assert "--no-cache-dir" in words
        assert pinned or "--no-deps" in words, words
    assert f"--requirement docker/{REQUIREMENTS[name]}" in text


def pins(name: str) -> dict[str, str]:
    """Exact versions by package."""
    found = {}
    for file in (REQUIREMENTS[name], "torch.txt"):
        for line in (DOCKER / file).read_text().splitlines():
            if line and not line.startswith("#"):
                package, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()  # type: ignore[union-attr]
                found[canonicalize_name(package)] = version
    return found


def wanted(extras: tuple[str, ...]) -> Iterator[Requirement]:
    """What pyproject.toml asks for with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    for line in lines:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            yield from wanted(tuple(requirement.extras))
        else:
            yield requirement


@BOTH
def test_the_pins_are_what_the_project_and_its_packages_ask_for(name: str) -> None:
    pinned = pins(name)
    for requirement in wanted(EXTRAS[name]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    checked = 0
    for package, version in pinned.items():
        try:
            here = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        if here.version.partition("+")[0] != version:
            continue
        if package == "torch" and name == "Dockerfile.cpu":
            continue  # the build that is installed here may be the one for CUDA
        for line in here.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), (
                    package,
                    line,
                )
                checked += 1
    assert checked > 100


def test_both_images_have_the_same_versions_and_no_others_packages() -> None:
    cpu, cuda = pins("Dockerfile.cpu"), pins("Dockerfile")
    assert cpu.items() <= cuda.items()
    more = cuda.keys() - cpu.keys()
    assert "triton" in more and all(re.match("nvidia-|cuda-|triton", package) for package in more)


def test_the_context_holds_the_sources_and_nothing_else() -> None:
    files = {name for name in context_files(ROOT) if (ROOT / name).is_file()}
    tops = {name.partition("/")[0] for name in files}
    parts = {"batchinfer", "connectors", "docker", "engine", "jobs", "kernels"}
    assert tops == parts | {"LICENSE", "README.md", "pyproject.toml"}
    ours = {name.removeprefix("docker/") for name in files if name.startswith("docker/")}
    assert ours == {*REQUIREMENTS.values(), "torch.txt"}
    assert not any("__pycache__" in name or name.endswith((".pyc", ".so")) for name in files)


@pytest.mark.slow
def test_the_context_makes_a_package_that_another_user_runs(tmp_path: Path) -> None:
    """The Dockerfile's own install command, on the context alone, into a clean prefix."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    image = Builder(ROOT, tmp_path / "image", {}, {}, Surroundings()).build(tmp_path / "Dockerfile")
    command = next(line for line in (DOCKER / "Dockerfile.cpu").read_text().splitlines() if " . \\" in line)
    words = command.removeprefix("RUN pip install ").removesuffix(" . \\").split()
    prefix = tmp_path / "prefix"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            *words,
            "--no-index",
            f"--target={prefix}",
            image.root,
        ],
        check=True,
    )
    for path in (tmp_path, *tmp_path.parents):  # another user must get here
        if path.owner() == Path(prefix).owner() and not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o001)
    other = ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"] if os.geteuid() == 0 else []
    script = f"import sys; sys.path.insert(0, {str(prefix)!r}); from batchinfer.cli import main; main()"
    for part, expected in (("worker", "JOB_URI"), ("status", "--watch")):
        done = subprocess.run(
            [*other, sys.executable, "-I", "-c", script, part, "--help"],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={"PATH": os.environ["PATH"], "HOME": "/"},
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


# -- the builder that `make image-test` uses ---------------------------------------------------------


def build(tmp_path: Path, text: str, **arguments: str) -> Image:
    context = tmp_path / "context"
    context.mkdir(exist_ok=True)
    (context / ".dockerignore").write_text("# a comment\n*.tmp\nsecret\n")
    (tmp_path / "Dockerfile").write_text(text)
    work = tmp_path / f"work{len(list(tmp_path.iterdir()))}"
    return Builder(context, work, {}, arguments, Surroundings()).build(tmp_path / "Dockerfile")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "part" / "deep").mkdir(parents=True)
    (folder / "part" / "deep" / "file").write_text("content")
    (folder / "part" / "left.tmp").write_text("")
    (folder / "one.tmp").write_text("")
    (folder / "two").write_text("")
    (folder / "secret").write_text("")
    (folder / "link").symlink_to("part/deep")
    return folder


def test_copies_follow_the_rules(context: Path, tmp_path: Path) -> None:
    image = build(
        tmp_path, "FROM scratch\nWORKDIR /a\nWORKDIR b\nCOPY part two ./\nCOPY two renamed\nCOPY . /all/\n"
    )
    found = {str(path.relative_to(image.root)) for path in image.root.rglob("*") if not path.is_dir()}
    assert found >= {"a/b/deep/file", "a/b/two", "a/b/renamed", "all/part/deep/file", "all/two"}
    assert not any(name.endswith(("secret", "one.tmp")) for name in found)
    assert os.readlink(image.root / "all" / "link") == "part/deep"
    with pytest.raises(DockerfileError, match="line 2: there is no absent to copy"):
        build(tmp_path, "FROM scratch\nCOPY absent /\n")


def test_arguments_and_variables_follow_the_rules(context: Path, tmp_path: Path) -> None:
    text = (
        'ARG ONE=1\nARG TWO=two-$ONE\nFROM scratch AS first\nARG TWO\nENV A="x y" B=${TWO:-none} C=$ONE\n'
        "ARG A=shadow\nENV D=$A E=${F:-$B} G=\\$A\nCOPY two /\n"
        'FROM first\nARG TWO\nENV F=${TWO:+given}\nUSER 5:6\nENTRYPOINT ["p"]\nCMD ["q"]\n'
    )
    image = build(tmp_path, text)
    names = dict(image.environment)
    names.pop("PATH")
    assert names == {"A": "x y", "B": "two-1", "C": "", "D": "x y", "E": "two-1", "G": "$A", "F": "given"}
    assert (image.user, image.entrypoint, image.command) == ("5:6", ("p",), ("q",))
    assert (image.root / "two").exists()
    assert build(tmp_path, text, TWO="2").environment["B"] == "2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("CMD run it", "CMD in shell form"),
        ("ENTRYPOINT run it", "ENTRYPOINT in shell form"),
        ("RUN --mount=type=cache,target=/x true", "RUN with flags"),
        ("ADD file /", "ADD is not known"),
        ("COPY --link two /", "COPY knows no link"),
    ],
)
def test_what_the_builder_does_not_know_is_refused(
    context: Path, tmp_path: Path, line: str, message: str
) -> None:
    with pytest.raises(DockerfileError, match=f"line 2: {message}"):
        build(tmp_path, f"FROM scratch\n{line}\n")


@given(st.text("abc${}:-+_\\ ", max_size=20))
def test_what_names_no_variable_stays(text: str) -> None:
    if "$" not in text:
        assert expand(text, {"a": "x"}) == text
    assert expand("${a}", {"a": text}) == text


def test_a_command_in_a_container_is_its_own_shell_word(tmp_path: Path) -> None:
    image = Image(tmp_path, {"NAME": "a b; c"}, "7:8")
    command = container_command(image, ["echo", "$(id)", "it's"])
    script = command[-1].splitlines()[-1]
    assert script.startswith("exec chroot --userspec=7:8 --groups= . /usr/bin/setpriv --no-new-privs")
    assert "'NAME=a b; c'" in script and "'$(id)'" in script
