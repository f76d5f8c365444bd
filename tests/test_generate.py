"""The command: text on stdout as it comes, all else on stderr, one line for what cannot work.
Many prompts are answered as each alone would be, in a line each.
"""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import YarnConfig
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.generate import main
from dsv3_jax.inference import generate
from tests.checkpoint.hf_folders import random_tensors, write_folder
from tests.checkpoint.run_folders import CFG, write_run
from tests.commands import help_of
from tests.inference.engines import programs_compiled_once
from tests.runs import jax_option

ROOT = Path(__file__).parents[1]
# In float32: two programs round differently, and bfloat16's likeliest tokens are often close.
PLAIN = ("--dtype", "float32")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 5, mtp_depth=1)


def write(capsys: pytest.CaptureFixture, run: Path, *args: object) -> tuple[str, str]:
    """stdout without the last line end, and the last line of stderr."""
    capsys.readouterr()
    assert not main(["--checkpoint", str(run), *PLAIN, *map(str, args)])
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
    main(["--checkpoint", str(folder), *PLAIN, "--prompt", "some", "--max-tokens", "1"])
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

    def continued(weights, prompt_BT, num_tokens, how, statistics):
        statistics.reading = statistics.going_on = 1.0
        for token in [*ids, 1, *ids][:num_tokens]:
            statistics.stepped += 1
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
    (tmp_path / "bad.jsonl").write_text("{")
    here = ["--checkpoint", run]
    for args, said in (
        (["--checkpoint", tmp_path / "gone", "--prompt", "x"], "gone: no such folder"),
        (["--checkpoint", tmp_path / "empty", "--prompt", "x"], "empty: no config.json there"),
        (["--checkpoint", damaged, "--prompt", "x"], "no usable checkpoint in"),
        ([*here], "one of --prompt, --prompt-file and --prompts is needed, and no two"),
        ([*here, "--prompt", "x", "--prompt-file", "y"], "is needed, and no two"),
        ([*here, "--prompt", "x", "--prompts", "y"], "is needed, and no two"),
        ([*here, "--prompt", "x", "--out", "y"], "--out and --logprobs go with"),
        ([*here, "--prompt", "x", "--logprobs"], "--out and --logprobs go with"),
        ([*here, "--prompts", tmp_path / "gone"], "No such file"),
        ([*here, "--prompts", tmp_path / "bad.jsonl"], "bad.jsonl line 1: no JSON: "),
        ([*here, "--prompts", here[1] / "config.json", "--out", here[1] / "config.json"], "holds"),
        ([*here, "--prompt", "x", "--rows", 0], "--rows is 0; allowed: at least 1"),
        ([*here, "--prompt", "x", "--drafts", 2], "2 drafts a step; allowed: 0 to 1, the MTP"),
        ([*here, "--prompt", "x", "--devices", 0], "--devices is 0; allowed: 1 to 4,096"),
        ([*here, "--prompt", "x", "--mesh.data", 9], "mesh has 1 x 9 x 1 x 1 = 9 devices"),
        ([*here, "--prompt", "x", "--mesh.local", 3], "allowed: multiples of the 3 devices"),
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


# --- the engine ----------------------------------------------------------------------------------


ENGINE = ("--drafts", 1, "--rows", 1, "--pages", 1)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once() -> Iterator[None]:
    with programs_compiled_once():
        yield


def many(capsys: pytest.CaptureFixture, *args: object) -> tuple[list[dict], str]:
    """What stdout's lines hold, and the last line of stderr."""
    capsys.readouterr()
    main([*map(str, args)])
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err.splitlines()[-1]


def test_drafts_change_no_text_and_are_told(run, capsys):
    text, _ = write(capsys, run, "--prompt", "some text", "--max-tokens", 20)
    args = (*ENGINE, "--prompt", "some text", "--max-tokens", 20)
    drafted, said = write(capsys, run, *args)
    assert drafted == text
    assert "; written 20, " in said
    assert " of 1 drafts accepted; compiled in " in said
    assert said.endswith("; ended by --max-tokens")


def test_each_of_many_is_answered_as_it_would_be_alone(run, capsys, tmp_path):
    lines = [
        {"prompt": "some text", "id": "first"},
        {"prompt": "x" * 63, "id": 7},
        {"prompt": "text", "max_tokens": 5},
        {"prompt": ""},
        {"prompt": "text" * 3, "max_tokens": 200},
    ]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    args = ("--checkpoint", run, *PLAIN, *ENGINE, "--prompts", file, "--max-tokens", 20)
    none, said = many(capsys, *args, "--out", out, "--logprobs")
    assert none == []
    assert said.startswith("5 prompts, 2 of them failed; read 28 tokens, ")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["index"] for one in found] == [0, 1, 2, 3, 4]
    assert [one.get("id") for one in found] == ["first", 7, None, None, None]
    assert "the prompt has 64 tokens; allowed: below 64" in found[1]["error"]
    assert "the prompt is empty; allowed: " in found[3]["error"]
    kept = [found[i] for i in (0, 2, 4)]
    assert [one["ended"] for one in kept] == ["max_tokens", "max_tokens", "max_length"]
    assert [one["tokens"] for one in kept] == [20, 5, 51]
    assert [one["prompt_tokens"] for one in kept] == [10, 5, 13]
    for one in kept:
        assert len(one["logprobs"]) == one["tokens"]
        assert one["logprob"] == pytest.approx(sum(one["logprobs"]), rel=1e-5)
        prompt = lines[one["index"]]["prompt"]
        alone = write(capsys, run, "--prompt", prompt, "--max-tokens", one["tokens"])[0]
        assert alone == one["text"]


@pytest.mark.slow
def test_what_is_drawn_is_what_each_seed_draws_alone(run, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("some\nsome\n")
    warm = ("--max-tokens", 12, "--temperature", 1, "--top-p", 0.9)
    args = ("--checkpoint", run, *PLAIN, *warm, "--seed", 4, "--prompts", tmp_path / "in.txt")
    (one, two), said = many(capsys, *args)
    assert one["text"] != two["text"]
    assert said.startswith("2 prompts; read 10 tokens, ")
    for seed, answer in ((4, one), (5, two)):
        alone = write(capsys, run, *warm, "--seed", seed, "--prompt", "some")[0]
        assert alone == answer["text"]


def test_answers_that_a_disk_has_no_room_for_are_one_line(run, capsys, tmp_path):
    (tmp_path / "in.txt").write_text("x" * 63)
    args = ("--checkpoint", run, "--prompts", tmp_path / "in.txt", "--out", "/dev/full")
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: [Errno 28] No space left on device: '/dev/full'"


@pytest.mark.exhaustive
def test_a_hugging_face_folder_on_a_mesh_writes_with_drafts_what_it_does_without(tmp_path, capsys):
    cfg = replace(CFG.model, mtp_depth=1, init_std=0.006, yarn=YarnConfig(factor=1.0))
    cfg = replace(cfg, bos_id=0, eos_id=1)
    folder = write_folder(tmp_path / "hf", cfg, random_tensors(cfg, fp8=True))
    train_tokenizer(["some text"], 262).save(folder / "tokenizer.json")
    (tmp_path / "in.txt").write_text("some\ntext\nsome text\n")
    mesh = ("--drafts", 1, "--mesh.node", 2, "--mesh.local", 2)
    args = ("--checkpoint", folder, *PLAIN, "--prompts", tmp_path / "in.txt", "--max-tokens", 20)
    (plain, _), (meshed, said) = (many(capsys, *args, *more) for more in ((), mesh))
    assert meshed == plain
    assert {one["tokens"] for one in plain} == {20}
    assert " of 1 drafts accepted; " in said


def test_help_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.generate")
    assert loaded.isdisjoint({"jax", "jaxlib", "numpy", "tokenizers", "safetensors"})
    options = "checkpoint prompt prompt-file prompts out logprobs max-tokens temperature top-p stop"
    options += " step ema rows drafts fp8-cache page-slots pages chunk devices mesh.data mesh.node"
    for name in options.split():
        assert f"--{name} " in shown
