"""Commands that take a job's address find its store by the environment, and say so where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filled_jobs import Filled

from batchinfer import cli
from batchinfer.connectors.errors import translate


def test_the_environment_s_endpoint_is_enough(
    s3_moto: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Filled(f"{s3_moto.uri}/answers", shards=1)
    job.commit(0)
    for arguments in (["status"], ["report", "-o", str(tmp_path / "page.html")], ["results"]):
        with pytest.raises(SystemExit) as left:
            cli.app([arguments[0], job.folder.uri, *arguments[1:], "--json"])
        assert not left.value.code
        assert json.loads(capfd.readouterr().out)["uri"] == job.folder.uri


class NoBucket(Exception):
    response = {"Error": {"Code": "NoSuchBucket"}}  # noqa: RUF012


class EndpointConnectionError(ConnectionError):
    pass


@pytest.mark.parametrize("error", [NoBucket(), EndpointConnectionError("refused")])
def test_who_forgot_the_endpoint_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert "set AWS_ENDPOINT_URL" in str(translate(error, "s3://bucket/answers"))
    assert "AWS_ENDPOINT_URL" not in str(translate(error, "gs://bucket/answers"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "AWS_ENDPOINT_URL" not in str(translate(error, "s3://bucket/answers"))
