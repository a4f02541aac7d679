"""The parts of the project know only what they may know."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("batchinfer", "connectors", "engine", "jobs", "kernels")
TORCHLESS = ("types", "scheduler", "blocks", "prefix", "order", "attribution")
CLOUD = {"fsspec", "s3fs", "gcsfs", "adlfs", "boto3", "botocore", "aiobotocore", "google", "azure"}
HEAVY = {"torch", "transformers", "triton", "ray", "kubernetes", "moto"} | CLOUD - {"fsspec"}


def sources(folder: str) -> list[Path]:
    """The Python files of a part; those of ``batchinfer`` without the links to the others."""
    found = (ROOT / folder).glob("*.py") if folder == "batchinfer" else (ROOT / folder).rglob("*.py")
    return sorted(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "batchinfer" else ("batchinfer", *parts))
    return name.removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of the modules and names imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in {
            "import_module",
            "__import__",
        }:
            yield from (
                a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


FILES = [path for folder in FOLDERS for path in sources(folder)]
BY_NAME = pytest.mark.parametrize("path", FILES, ids=module_name)


def test_every_part_is_there() -> None:
    for folder in FOLDERS[1:]:
        link = ROOT / "batchinfer" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / folder
        assert len(sources(folder)) > 1


@BY_NAME
def test_a_part_imports_only_what_it_may(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0]
    module = module_name(path)
    for name in imported(path):
        top = name.partition(".")[0]
        assert top not in FOLDERS[1:], f"{name}: parts are imported as batchinfer.{top}"
        own = name.split(".")[1] if within(name, "batchinfer") and "." in name else None
        match part:
            case "kernels":
                assert own in (None, "kernels") and name != "batchinfer"
            case "engine":
                assert own in (None, "engine", "kernels")
            case "connectors":
                assert own in (None, "connectors")
            case "jobs":
                assert own in (None, *FOLDERS[1:])
        if part in ("engine", "kernels"):
            assert top not in CLOUD | {"pydantic", "pyarrow", "yaml", "typer", "rich"}
        if top in CLOUD and part != "jobs":
            assert module == "batchinfer.connectors.storage"
        if part == "jobs":
            assert top not in {"fsspec", "s3fs", "gcsfs", "adlfs"}
        if within(module, "batchinfer.jobs.backends"):
            assert own != "engine"
        if part == "engine" and path.stem in TORCHLESS and path.parent.name == "engine":
            assert top not in {"torch", "transformers"}


@BY_NAME
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    """Outside the engine and kernels, nothing heavy is imported when a module is."""
    if path.relative_to(ROOT).parts[0] in ("engine", "kernels"):
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Try):
            for name in imports(node):
                assert name.partition(".")[0] not in HEAVY, f"{name} is imported with the module"


@BY_NAME
def test_only_the_job_folder_spells_its_paths(path: Path) -> None:
    if path == ROOT / "jobs" / "folder.py":
        return
    tree = ast.parse(path.read_text())
    documentation = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            assert "_batchinfer" not in node.value, f"line {node.lineno} spells a path in the job folder"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after ``code``."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return set(done.stdout.split())


def test_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import batchinfer, batchinfer.engine.types, batchinfer.engine.config")
    assert not loaded & {"torch", "transformers", "s3fs", "fsspec", "pydantic", "pyarrow", "typer", "boto3"}


@pytest.mark.parametrize("name", TORCHLESS)
def test_planning_parts_of_the_engine_load_no_torch(name: str) -> None:
    assert not loaded_by(f"import batchinfer.engine.{name}") & {"torch", "transformers", "pydantic"}


def test_connectors_and_the_command_line_load_nothing_heavy() -> None:
    loaded = loaded_by(
        "import batchinfer.cli, batchinfer.connectors.readers, batchinfer.connectors.storage"
    )
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "s3fs", "boto3", "botocore", "pydantic"}


def test_the_engine_alone_needs_neither_pydantic_nor_cloud_packages() -> None:
    """Every module of the engine and kernels can be imported where these packages are not installed."""
    modules = [
        module_name(path) for path in FILES if path.relative_to(ROOT).parts[0] in ("engine", "kernels")
    ]
    modules = [name for name in modules if not within(name, "batchinfer.kernels.triton")]
    absent = ["pydantic", "fsspec", "s3fs", "boto3", "pyarrow", "typer", "rich", "yaml", "gguf"]
    loaded_by(
        f"for name in {absent}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {modules}: importlib.import_module(name)\n"
        "from batchinfer import Engine, SamplingParams"
    )


def test_a_package_called_kernels_disturbs_nobody() -> None:
    """transformers imports a module of this name when it finds one, as it does at the repository's root."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert list(imports(tree)) == []
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "__version__" not in names
    assert not (ROOT / "tests" / "__init__.py").exists()
    script = "import transformers, kernels; print(kernels.__file__); transformers.LlamaConfig()"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
