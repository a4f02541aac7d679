"""Images without a container engine: a Dockerfile's steps in root file systems, and commands run in them.

    python tests/image_builder.py --dockerfile docker/Dockerfile.cpu --base DEBIAN_ROOT TARGET

Dockerfiles are read by BuildKit's own parser and .dockerignore by the Docker client's matcher. A RUN step
is run in namespaces of its own below chroot, so it needs root and Linux. DEBIAN_ROOT is what stands for
every image that FROM names but the build does not make, such as debootstrap's work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import dockerfile
from docker.utils.build import exclude_paths

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAME = re.compile(r"\\\$|\$\{(\w+)(?::([-+])([^}]*))?\}|\$(\w+)")


class DockerfileError(Exception):
    """What is wrong with a Dockerfile, by line."""


@dataclass(frozen=True)
class Image:
    """A root file system and how a container of it is started."""

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    user: str = "0:0"
    folder: str = "/"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()


@dataclass(frozen=True)
class Surroundings:
    """What RUN steps find beside the image: files of this machine and variables, as an engine gives
    steps its proxy settings. Neither stays in the image."""

    binds: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def expand(text: str, names: Mapping[str, str]) -> str:
    """``text`` with $NAME, ${NAME}, ${NAME:-word} and ${NAME:+word} replaced, as in an instruction."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[4]
        if name is None:
            return "$"
        given = names.get(name, "")
        if match[2] == "-":
            return given or expand(match[3], names)
        if match[2] == "+":
            return expand(match[3], names) if given else ""
        return given

    return _NAME.sub(value, text)


def parse(path: Path) -> tuple[dockerfile.Command, ...]:
    """The instructions of a Dockerfile."""
    return tuple(dockerfile.parse_file(str(path)))


def context_files(context: Path) -> set[str]:
    """Paths below ``context`` that a build may see: those that .dockerignore leaves."""
    patterns = (context / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]
    # The client sends the list itself as well, but no instruction gets it.
    return set(exclude_paths(str(context), patterns)) - {".dockerignore"}


def stages_of(commands: Sequence[dockerfile.Command]) -> list[list[dockerfile.Command]]:
    """The instructions by stage, each beginning with its FROM; those before the first FROM are left out."""
    stages: list[list[dockerfile.Command]] = []
    for command in commands:
        if command.cmd.upper() == "FROM":
            stages.append([])
        if stages:
            stages[-1].append(command)
    return stages


def global_arguments(commands: Sequence[dockerfile.Command], given: Mapping[str, str]) -> dict[str, str]:
    """The ARGs before the first FROM."""
    found: dict[str, str] = {}
    for command in commands:
        if command.cmd.upper() == "FROM":
            break
        for item in command.value:
            name, _, default = item.partition("=")
            found[name] = given.get(name, expand(default, found))
    return found


class Builder:
    """Runs one Dockerfile's instructions; stages are folders below ``work``."""

    def __init__(
        self,
        context: Path,
        work: Path,
        bases: Mapping[str, Path],
        arguments: Mapping[str, str],
        surroundings: Surroundings,
    ) -> None:
        """``bases`` maps images to root file systems; "*" stands for every other image."""
        self._context = context
        self._files = context_files(context)
        self._work = work
        self._bases = bases
        self._arguments = arguments
        self._surroundings = surroundings
        self._stages: dict[str, Image] = {}

    def build(self, path: Path) -> Image:
        """Run the Dockerfile at ``path``; returns its last stage."""
        commands = parse(path)
        top = global_arguments(commands, self._arguments)
        image = Image(self._work)
        for number, stage in enumerate(stages_of(commands)):
            image = self._stage(str(number), stage, top)
        return image

    def _stage(self, number: str, commands: Sequence[dockerfile.Command], top: Mapping[str, str]) -> Image:
        first, *others = commands
        words = [expand(word, top) for word in first.value]
        name = words[2] if len(words) == 3 else number
        image = self._start(words[0], self._work / name)
        variables: dict[str, str] = {}
        for command in others:
            print(f"[{name}] {' '.join(command.original.split())}", flush=True)
            image = self._step(image, command, variables, top)
        self._stages[name] = self._stages[number] = image
        return image

    def _start(self, base: str, root: Path) -> Image:
        if base in self._stages:
            made = self._stages[base]
            subprocess.run(["cp", "-a", "--reflink=auto", f"{made.root}/.", _folder(root)], check=True)
            return replace(made, root=root)
        root.mkdir(parents=True)
        if base != "scratch":
            source = self._bases.get(base) or self._bases["*"]
            subprocess.run(["cp", "-a", "--reflink=auto", f"{source}/.", root], check=True)
        return Image(root)

    def _step(
        self, image: Image, command: dockerfile.Command, arguments: dict[str, str], top: Mapping[str, str]
    ) -> Image:
        kind, value, where = command.cmd.upper(), command.value, f"line {command.start_line}"
        names = {**arguments, **image.environment}
        if kind == "RUN":
            if command.flags or command.heredocs:
                raise DockerfileError(f"{where}: RUN with flags or here-documents is not known here")
            words = list(value) if command.json else ["/bin/sh", "-c", value[0]]
            self._run(image, words, arguments)
        elif kind == "COPY":
            self._copy(image, command, names)
        elif kind == "ARG":
            for item in value:
                name, equals, default = item.partition("=")
                default = expand(_unquoted(default), names) if equals else top.get(name, "")
                arguments[name] = self._arguments.get(name, default)
        elif kind == "ENV":
            pairs = dict(zip(value[::2], value[1::2], strict=True))
            new = {name: expand(_unquoted(text), names) for name, text in pairs.items()}
            image = replace(image, environment={**image.environment, **new})
        elif kind == "WORKDIR":
            image = replace(image, folder=os.path.join(image.folder, expand(value[0], names)))
            _folder(_inside(image.root, image.folder))
        elif kind == "USER":
            image = replace(image, user=expand(value[0], names))
        elif kind in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
            if not command.json:
                raise DockerfileError(f"{where}: {kind} in shell form puts a shell before the program")
            if kind == "ENTRYPOINT":  # a new entry point has no arguments of an old one
                image = replace(image, entrypoint=tuple(value), command=())
            elif kind == "CMD":
                image = replace(image, command=tuple(value))
            else:
                image = replace(image, health=tuple(value[1:]))
        elif kind != "LABEL":
            raise DockerfileError(f"{where}: {kind} is not known here")
        return image

    def _run(self, image: Image, words: Sequence[str], arguments: Mapping[str, str]) -> None:
        names = {"HOME": "/root", **self._surroundings.environment, **arguments, **image.environment}
        binds = [(path, str(path), True) for path in (*self._surroundings.binds, Path("/etc/resolv.conf"))]
        made = [made for path, _, _ in binds for made in _mount_point(path, _inside(image.root, str(path)))]
        command = container_command(replace(image, environment=names), words, binds=binds)
        try:
            subprocess.run(command, check=True, env={"PATH": DEFAULT_PATH}, stdin=subprocess.DEVNULL)
        finally:
            for path in made:  # nothing of this machine stays in the image
                path.unlink() if path.is_file() else path.rmdir()

    def _copy(self, image: Image, command: dockerfile.Command, names: Mapping[str, str]) -> None:
        flags = dict(flag.lstrip("-").partition("=")[::2] for flag in command.flags)
        if unknown := flags.keys() - {"from", "chown"}:
            raise DockerfileError(f"line {command.start_line}: COPY knows no {', '.join(unknown)} here")
        *sources, target = (expand(word, names) for word in command.value)
        destination = _inside(image.root, os.path.join(image.folder, target))
        for source in sources:
            if "from" in flags:
                found = _inside(self._stages[flags["from"]].root, source)
                files = None
            else:
                found = self._context / source.lstrip("/")
                files = self._files
            if not found.exists():
                raise DockerfileError(f"line {command.start_line}: there is no {source} to copy")
            into = (
                destination / found.name if found.is_file() and target.endswith(("/", ".")) else destination
            )
            before = set(_tree(into)) if "chown" in flags else set()
            self._copy_one(found, into, files)
            for path in (set(_tree(into)) - before) if "chown" in flags else ():
                user, _, group = flags["chown"].partition(":")
                os.chown(path, int(user), int(group or user), follow_symlinks=False)

    def _copy_one(self, source: Path, target: Path, files: set[str] | None) -> None:
        """A file to ``target``, or a folder's content into it; of the context only ``files``."""
        _folder(target.parent)
        if source.is_file():
            shutil.copy2(source, target)
        elif files is None:
            subprocess.run(["cp", "-a", f"{source}/.", _folder(target)], check=True)
        else:
            _folder(target)
            for name in sorted(files):
                path = self._context / name
                if not path.is_relative_to(source):
                    continue
                place = target / path.relative_to(source)
                if path.is_symlink() or path.is_file():
                    _folder(place.parent)
                    shutil.copy2(path, place, follow_symlinks=False)
                else:
                    _folder(place)


def container_command(
    image: Image,
    words: Sequence[str],
    *,
    binds: Sequence[tuple[Path, str, bool]] = (),
    temporary: Sequence[str] = (),
    read_only: bool = False,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """The command that runs ``words`` in a container of ``image``, as its process 1.

    It has its own mounts, processes and IPC, but this machine's network. ``binds`` are (path here, path
    there, read-only); ``temporary`` folders get a file system in memory, mounted as an engine does it.
    No capability is left to a user other than root.
    """
    root = shlex.quote(str(image.root))
    steps = [
        "set -e",
        "mount --make-rprivate /",
        f"mount --bind {root} {root}",
        f"cd {root}",
        "mount -t proc -o nosuid,nodev,noexec proc proc",
        "mount -t tmpfs -o nosuid,mode=755 tmpfs dev",
        "for node in null zero full random urandom; do",
        "  touch dev/$node; mount --bind /dev/$node dev/$node",
        "done",
        "ln -s /proc/self/fd dev/fd; ln -s /proc/self/fd/0 dev/stdin",
        "ln -s /proc/self/fd/1 dev/stdout; ln -s /proc/self/fd/2 dev/stderr",
        "mkdir dev/pts; mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts",
        "ln -s pts/ptmx dev/ptmx",
        "mkdir -m 1777 dev/shm; mount -t tmpfs -o nosuid,nodev,noexec,size=64m tmpfs dev/shm",
    ]
    for source, target, fixed in binds:
        place = shlex.quote(target.lstrip("/"))
        steps.append(f"mount --bind {shlex.quote(str(source))} {place}")
        if fixed:
            steps.append(f"mount -o remount,bind,ro {place}")
    if read_only:
        steps.append(f"mount -o remount,bind,ro {root}")
    for target in temporary:
        place = shlex.quote(target.lstrip("/"))
        steps.append(f"mount -t tmpfs -o nosuid,nodev,noexec,mode=1777 tmpfs {place}")
    names = {**image.environment, **(environment or {})}
    inner = ["env", "--ignore-environment", f"--chdir={image.folder}"]
    inner += [*(f"{name}={text}" for name, text in names.items()), *words]
    user, _, group = image.user.partition(":")
    # Every program replaces the one before it, so the last one is process 1.
    identity = [f"--userspec={user}:{group or user}", "--groups="]
    drop = [] if user == "0" else ["/usr/bin/setpriv", "--no-new-privs", "--inh-caps=-all"]
    steps.append(f"exec chroot {shlex.join([*identity, '.', *drop, *inner])}")
    return ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "sh", "-c", "\n".join(steps)]


def container_process(engine: subprocess.Popen[bytes]) -> int:
    """The id here of process 1 of a container that ``engine`` runs by ``container_command``."""
    children = Path(f"/proc/{engine.pid}/task/{engine.pid}/children")
    while engine.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.01)
    raise RuntimeError(f"the container ended with {engine.returncode} before its process could be seen")


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _tree(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.exists() else []


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _mount_point(source: Path, place: Path) -> list[Path]:
    """Make something to mount ``source`` on; returns what was made, innermost first."""
    made = [path for path in (place, *place.parents) if not path.exists() and not path.is_symlink()]
    if made:
        _folder(place.parent)
        place.mkdir() if source.is_dir() else place.touch()
    return made


def save(image: Image, path: Path) -> None:
    """Write how the image's containers are started as JSON."""
    values = {**vars(image), "root": str(image.root), "environment": dict(image.environment)}
    path.write_text(json.dumps(values, indent=2))


def main() -> None:
    """Build an image."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path, help="folder for the stages, made anew")
    parser.add_argument("--dockerfile", type=Path, required=True)
    parser.add_argument("--context", type=Path, default=Path())
    parser.add_argument("--base", type=Path, required=True, help="root file system for FROM")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--bind", action="append", default=[], type=Path, help="what steps see of this machine"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for steps alone")
    options = parser.parse_args()
    shutil.rmtree(options.target, ignore_errors=True)
    pairs = [dict(item.split("=", 1) for item in items) for items in (options.build_arg, options.env)]
    surroundings = Surroundings(tuple(options.bind), pairs[1])
    builder = Builder(
        options.context.resolve(), options.target.resolve(), {"*": options.base}, pairs[0], surroundings
    )
    image = builder.build(options.dockerfile)
    save(image, options.target / "image.json")
    print(image.root)


if __name__ == "__main__":
    sys.exit(main())
