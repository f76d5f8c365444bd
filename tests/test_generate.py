"""The command: text on stdout as it comes, all else on stderr, one line for what cannot work."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.generate import main
from dsv3_jax.inference import generate
from tests.checkpoint.run_folders import write_run
from tests.commands import help_of
from tests.runs import jax_option

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 5)


def write(capsys: pytest.CaptureFixture, run: Path, *args: object) -> tuple[str, str]:
    """stdout without the last line end, and the last line of stderr."""
    capsys.readouterr()
    assert not main(["--checkpoint", str(run), *map(str, args)])
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    return out[:-1], err.splitlines()[-1]


def test_the_same_seed_writes_the_same_text_and_says_how_fast(run, capsys):
    args = ["--prompt", "some", "--max-tokens", 12, "--temperature", 1, "--top-p", 0.9]
    text, said = write(capsys, run, *args, "--seed", 1)
    assert text
    assert said.startswith("prompt 5 tokens, ")
    assert "; written 12, " in said
    assert said.endswith(" s; ended by --max-tokens")
    assert write(capsys, run, *args, "--seed", 1)[0] == text
    assert write(capsys, run, *args, "--seed", 2)[0] != text


def test_the_name_of_a_folder_cannot_steer_a_terminal(run, capsys, tmp_path):
    folder = tmp_path / "in\n\x1b[2J"
    shutil.copytree(run, folder)
    main(["--checkpoint", str(folder), "--prompt", "some", "--max-tokens", "1"])
    assert f"{tmp_path}/in\\n\\x1b[2J, step " in capsys.readouterr().err


def test_the_prompt_comes_from_the_option_a_file_or_stdin(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("so\r\n€".encode())
    by_option = write(capsys, run, "--prompt", "so\r\n€", "--max-tokens", 4)[0]
    by_file = write(capsys, run, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 4)[0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("so\r\n€".encode())))
    assert write(capsys, run, "--prompt", "-", "--max-tokens", 4)[0] == by_option == by_file
    assert write(capsys, run, "--prompt", "", "--max-tokens", 1)[1].startswith("prompt 1 tokens")


def forced(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The model writes this text, a byte a token, and ends it. Ids 0-5 are special tokens."""
    table = train_tokenizer(["some text"], 262).token_bytes
    ids = [table.index(bytes([byte])) for byte in text.encode()]

    def continued(weights, prompt_BT, num_tokens, how, clock):
        clock.prefill = clock.decoding = 1.0
        for token in [*ids, 1, *ids][:num_tokens]:
            clock.decoded += 1
            yield [token]

    monkeypatch.setattr(generate, "continued", continued)


def test_a_turn_ends_a_text_too(run, capsys, monkeypatch, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    table = train_tokenizer(["some text"], 262).token_bytes
    forced(monkeypatch, "ab!c")
    for ends in (table.index(b"!"), [7, table.index(b"!")]):
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        text, said = write(capsys, copy, "--prompt", "")
        assert (text, said.partition("; ended by ")[2]) == ("ab", "the end of the text")


def test_a_terminal_that_lacks_characters_gets_the_text_all_the_same(run, capfd, monkeypatch):
    forced(monkeypatch, "a€")
    written = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", written)
    main(["--checkpoint", str(run), "--prompt", ""])
    written.flush()
    assert written.buffer.getvalue() == b"a?\n"


def test_text_ends_with_the_end_token_a_stop_string_or_the_longest_sequence(
    run, capsys, monkeypatch
):
    forced(monkeypatch, "ab€cEND")
    text, said = write(capsys, run, "--prompt", "")
    assert (text, said.partition("; ended by ")[2]) == ("ab€cEND", "the end of the text")
    assert "; written 9, " in said
    text, said = write(capsys, run, "--prompt", "", "--stop", "cE", "zz")
    assert (text, said.partition("; ended by ")[2]) == ("ab€", "a stop string")
    text, said = write(capsys, run, "--prompt", "x" * 58)
    assert (text, said.partition("; ended by ")[2]) == ("ab€", "model.max_length")
    text, said = write(capsys, run, "--prompt", "", "--max-tokens", 3)
    assert (text, said.partition("; ended by ")[2]) == ("ab\ufffd", "--max-tokens")


def test_text_is_shown_as_it_comes_in_whole_characters(run, monkeypatch):
    forced(monkeypatch, "a€b")
    shown = []

    class Screen(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Screen())
    main(["--checkpoint", str(run), "--prompt", ""])
    assert shown == ["a", "a", "a", "a€", "a€b", "a€b\n"]


def test_bad_input_is_one_line_and_exit_code_2(run, capsys, tmp_path):
    (tmp_path / "latin").write_bytes(b"ab\xff")
    damaged = write_run(tmp_path / "damaged", 1)
    (damaged / "checkpoints/step_00000001/COMMITTED").write_text("0")
    (tmp_path / "empty").mkdir()
    here = ["--checkpoint", run]
    for args, said in (
        (["--checkpoint", tmp_path / "gone", "--prompt", "x"], "gone: no such folder"),
        (["--checkpoint", tmp_path / "empty", "--prompt", "x"], "empty: no config.json there"),
        (["--checkpoint", damaged, "--prompt", "x"], "no usable checkpoint in"),
        ([*here], "one of --prompt and --prompt-file is needed, and not both"),
        ([*here, "--prompt", "x", "--prompt-file", "y"], "is needed, and not both"),
        ([*here, "--prompt-file", tmp_path / "gone"], "No such file"),
        ([*here, "--prompt-file", tmp_path / "latin"], "latin: byte 0xff at offset 2 is not UTF-8"),
        ([*here, "--prompt", "a\udcff"], "--prompt: byte 0xff at offset 1 is not UTF-8"),
        (
            [*here, "--prompt", "x" * 63],
            "has 64 tokens, begin of sentence included; allowed: below",
        ),
        ([*here, "--prompt", "x", "--max-tokens", 0], "--max-tokens is 0; allowed: 1 or more"),
        ([*here, "--prompt", "x", "--temperature", -1], "temperature is -1.0; allowed: from 0"),
        ([*here, "--prompt", "x", "--top-p", 0], "top-p is 0.0; allowed: above 0, at most 1"),
        ([*here, "--prompt", "x", "--stop", ""], "a stop string is empty"),
        ([*here, "--prompt", "x", "--dtype", "int8"], "--dtype"),
        (["--prompt", "x"], "--checkpoint"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, args)])
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        lines = [
            line
            for line in err.splitlines()
            if not line.startswith(("checkpoint skipped", str(run)))
        ]
        assert out == ""
        assert len(lines) == 1, lines
        assert said in lines[0]


def test_help_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.generate")
    assert loaded.isdisjoint({"jax", "jaxlib", "numpy", "tokenizers", "safetensors"})
    for name in "checkpoint prompt prompt-file max-tokens temperature top-p stop step ema".split():
        assert f"--{name}" in shown
