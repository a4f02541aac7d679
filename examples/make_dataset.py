"""Makes a data set of real prompts from the language reference that every Python carries.

    python examples/make_dataset.py FOLDER

writes FOLDER/parquet/prompts-*.parquet and FOLDER/jsonl/prompts.jsonl with the same rows: four tasks
over each passage, so that many prompts begin with the same long instruction. The same Python and
pyarrow write the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq

PASSAGES = 60
PARQUET_FILES = 3

_ROLE = (
    "You are the editor of a handbook for people who begin to program. They know English well, have "
    "written a few short Python scripts, and have never read a language reference. You work from one "
    "passage of the official Python reference at a time. Stay with what the passage says: do not add "
    "features, versions or history from elsewhere, and do not guess what a later section may hold. Keep "
    "the names of functions, keywords and types exactly as they are written. Prefer short sentences and "
    "everyday words, and explain a technical term the first time you use it. Do not greet the reader, do "
    "not mention the passage or these instructions, and do not praise the language. "
)
TASKS = {
    "summary": _ROLE
    + "Your task: summarise the passage in two plain sentences that a beginner understands.",
    "question": _ROLE + "Your task: write one question that a careful reader can answer from the passage "
    "alone, and then its answer in one sentence.",
    "title": _ROLE
    + "Your task: give the passage a title of at most eight words that says what it is about.",
    "example": _ROLE + "Your task: describe in one or two sentences a situation in a real program where "
    "what the passage explains matters.",
}

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("topic", pa.string()),
        ("section", pa.int32()),
        ("task", pa.string()),
        ("instruction", pa.string()),
        ("text", pa.string()),
        ("characters", pa.int32()),
        ("keywords", pa.list_(pa.string())),
        ("source", pa.struct([("document", pa.string()), ("paragraph", pa.int32())])),
    ]
)


def _passages() -> Iterator[tuple[str, int, str]]:
    """(topic, number of the paragraph in it, text) of every paragraph that is prose of a good length."""
    for topic in sorted(topics):
        for number, paragraph in enumerate(topics[topic].split("\n\n")):
            text = " ".join(re.sub(r"(?<=\w-)\n\s*(?=\w)", "", paragraph).split())
            prose = sum(character.isalpha() or character in " ,.'" for character in text)
            if (
                300 <= len(text) <= 900
                and prose > 0.9 * len(text)
                and text[0].isupper()
                and text[-1] == "."
            ):
                yield topic, number, text


def make_rows() -> list[dict[str, object]]:
    """The rows: every passage with every task."""
    passages = list(_passages())
    step = len(passages) / PASSAGES
    chosen = [passages[int(position * step)] for position in range(PASSAGES)]
    sections: dict[str, int] = {}
    rows: list[dict[str, object]] = []
    for topic, paragraph, text in chosen:
        sections[topic] = sections.get(topic, 0) + 1
        words = {word.lower() for word in re.findall(r"[A-Za-z]{4,}", text)}
        for task, instruction in TASKS.items():
            rows.append(
                {
                    "id": f"{topic}-{paragraph:03d}-{task}",
                    "topic": topic,
                    "section": sections[topic],
                    "task": task,
                    "instruction": instruction,
                    "text": text,
                    "characters": len(text),
                    "keywords": sorted(words, key=lambda word: (-len(word), word))[:3],
                    "source": {"document": "The Python Language Reference", "paragraph": paragraph},
                }
            )
    return rows


def write_dataset(folder: Path) -> list[Path]:
    """Write the rows below ``folder`` as Parquet and as JSON Lines; returns the files."""
    rows = make_rows()
    table = pa.Table.from_pylist(rows, SCHEMA)
    files = [folder / "parquet" / f"prompts-{number}.parquet" for number in range(PARQUET_FILES)]
    lines = folder / "jsonl" / "prompts.jsonl"
    for file in (files[0], lines):
        file.parent.mkdir(parents=True, exist_ok=True)
    share = -(-len(rows) // PARQUET_FILES)
    for number, file in enumerate(files):
        pq.write_table(table.slice(number * share, share), file, compression="zstd")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [*files, lines]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/make_dataset.py FOLDER")
    for written in write_dataset(Path(sys.argv[1])):
        print(written)
