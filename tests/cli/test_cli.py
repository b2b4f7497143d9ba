"""What every command's line shares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs.cli.command import run
from jobs.evaluate import EvaluateConfig
from jobs.evaluate import main as evaluate
from jobs.look import LookConfig
from jobs.look import main as look
from jobs.shard_imagenet import ShardConfig
from jobs.shard_imagenet import main as shard


@pytest.mark.parametrize(
    ("config", "main", "arguments", "message"),
    [
        (
            ShardConfig,
            shard,
            ["--source", "x", "--output", "s3://bucket/set"],
            "--output is the URL s3://bucket/set",
        ),
        (
            EvaluateConfig,
            evaluate,
            ["--data", "s3://bucket/set", "--checkpoint", "s3://bucket/run"],
            "--data is the URL s3://bucket/set",
        ),
        (
            LookConfig,
            look,
            ["--data", "gs://bucket/set"],
            "--data is the URL gs://bucket/set: it takes a path",
        ),
    ],
)
def test_a_url_is_not_taken_for_a_folder(
    config: type,
    main: object,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(config, main)  # type: ignore[arg-type]
    assert ended.value.code == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
