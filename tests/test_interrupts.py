"""What a signal ends leaves quietly, with the signal's code, and nothing half-written behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_jax import generate, pretokenize
from dsv3_jax.data.shards import ShardWriter
from dsv3_jax.data.tokenizer import train_tokenizer
from tests.checkpoint.hf_folders import SMALL, random_tensors, write_folder
from tests.checkpoint.run_folders import write_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Hugging Face folder, and beside it a run and a text."""
    path = write_folder(tmp_path / "hf", SMALL, random_tensors(SMALL, fp8=False))
    train_tokenizer(["some text " * 9], 262).save(path / "tokenizer.json")
    (tmp_path / "text.txt").write_text("some text " * 99)
    return path


def stopped(patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """SIGTERM comes right after this has been called."""
    real = getattr(owner, name)

    def act(*args, **kwargs):
        result = real(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return result

    patch.setattr(owner, name, act)


def test_sigterm_leaves_nothing_of_a_pretokenization(source: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source / "cache"))
    out = source.parent / "new" / "out"
    out.parent.mkdir()
    stopped(monkeypatch, ShardWriter, "add")
    with pytest.raises(KeyboardInterrupt):
        pretokenize.main(["--source", str(source.parent / "*.txt"), "--out", str(out)])
    assert not list(out.parent.iterdir())


def test_sigterm_unwinds_generate(monkeypatch, capsys):
    stopped(monkeypatch, generate, "_prompt")
    with pytest.raises(KeyboardInterrupt):
        generate.main(["--checkpoint", "gone", "--prompt", "x"])
    assert capsys.readouterr() == ("", "")


def interrupted(number: int, ready: Callable[[], bool], *command: object) -> None:
    """Starts a command, sends it the signal when it is ready, and sees how it ends."""
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-m", *map(str, command)]
    with subprocess.Popen(words, **options) as process:
        while process.poll() is None and not ready():
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert "ignored" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_conversion_stopped_while_it_writes_leaves_nothing(source: Path, command: str, number):
    folder = source.parent / "new"
    folder.mkdir()
    interrupted(
        number,
        lambda: any(folder.glob(".out.*.part/*")),
        "dsv3_jax.convert",
        command,
        source,
        folder / "out",
    )
    assert not list(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_generate_stopped_while_xla_compiles_leaves_quietly(tmp_path: Path, number):
    run = write_run(tmp_path / "run", 1)
    begun = time.monotonic()
    options = ("--checkpoint", run, "--prompt", "x", "--max-tokens", 60)
    interrupted(number, lambda: time.monotonic() > begun + 5, "dsv3_jax.generate", *options)
