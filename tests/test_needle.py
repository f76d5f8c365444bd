"""The command: a table on stdout, a folder of results that can be repeated, one line for what
cannot work.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dsv3_jax.data.held_out import is_held_out
from dsv3_jax.evaluate import haystack
from dsv3_jax.needle import main
from tests.checkpoint import run_folders
from tests.checkpoint.hf_folders import random_tensors, write_folder
from tests.commands import help_of
from tests.runs import jax_option

CFG = replace(run_folders.CFG, model=replace(run_folders.CFG.model, max_length=512))


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folders, "CFG", CFG)
        return run_folders.write_run(tmp_path_factory.mktemp("runs") / "run", 5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("some line of text, and then another one\n" * 20)
    return path


def measure(capsys: pytest.CaptureFixture, run: Path, *args: object) -> tuple[list[str], list[str]]:
    """Lines of stdout and of stderr."""
    capsys.readouterr()
    options = ("--checkpoint", run, "--depths", 2, "--needles", 2, "--dtype", "float32", *args)
    assert not main([*map(str, options)])
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_results_tell_all_that_repeats_them(run, text, capsys, tmp_path):
    where = ("--haystack", text, "--lengths", 256, "--seed", 3)
    out, err = measure(capsys, run, *where, "--out", tmp_path / "out")
    assert [line.split() for line in out[1:]] == [
        ["depth", "256"],
        ["0%", "0%"],
        ["100%", "0%"],
        ["mean", "0%"],
    ]
    assert "256 tokens: 4 of 4 prompts" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "needle.json",
        "needle.md",
        "needle.png",
    }
    record = json.loads((tmp_path / "out/needle.json").read_text())
    assert (record["step"], record["dtype"], record["max_length"]) == (5, "float32", 512)
    assert record["haystack"]["documents"] == 1
    assert record["versions"].keys() == {"dsv3_jax", "python", "jax"}
    assert record["machine"]
    assert [(cell["length"], cell["depth"], cell["prompts"]) for cell in record["cells"]] == [
        (256, 0.0, 2),
        (256, 1.0, 2),
    ]
    with Image.open(tmp_path / "out/needle.png") as picture:
        assert picture.size[0] > picture.size[1] > 100
    assert "| 100% | 0% |" in (tmp_path / "out/needle.md").read_text()
    # With the options as they are recorded, in another folder; other lengths change no cell.
    given = record["options"]
    again = [x for name in ("haystack", "seed") for x in (f"--{name}", given[name])]
    measure(capsys, run, *again, "--lengths", 512, 256, "--out", tmp_path / "again")
    repeated = json.loads((tmp_path / "again/needle.json").read_text())
    assert repeated["cells"][:2] == record["cells"]
    assert [cell["length"] for cell in repeated["cells"]] == [256, 256, 512, 512]
    measure(capsys, run, *where, "--seed", 4, "--out", tmp_path / "other")
    other = json.loads((tmp_path / "other/needle.json").read_text())
    assert other["cells"][0]["logprob"] != record["cells"][0]["logprob"]


def test_without_options_lengths_are_of_the_model_and_text_of_the_library(run, capsys, monkeypatch):
    library = [haystack.Document(f"{i}", f"text {i}\n" * 90) for i in range(300)]
    assert any(is_held_out(one.text, 0.02) for one in library)
    monkeypatch.setattr(haystack, "iterate_documents", lambda source: iter(library))
    out, err = measure(capsys, run)
    assert err[1].startswith("stdlib, held-out documents: ")
    # A token is a byte: an eighth and a quarter of the longest, 512 tokens, are too short.
    assert err[2:4] == [f"{length} tokens: no room for a needle, left out" for length in (64, 128)]
    assert out[1].split() == ["depth", "256", "512"]


@pytest.mark.slow
def test_a_hugging_face_folder_is_a_model_too(run, text, capsys, tmp_path):
    cfg = replace(CFG.model, yarn=replace(CFG.model.yarn, factor=1.0))
    folder = write_folder(tmp_path / "hf", cfg, random_tensors(cfg, fp8=False))
    (folder / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    where = ("--haystack", text, "--lengths", 256, "--out", tmp_path / "out")
    measure(capsys, folder, *where)
    record = json.loads((tmp_path / "out/needle.json").read_text())
    assert record["step"] is None
    assert (tmp_path / "out/needle.md").read_text().startswith("# hf\n")


def test_bad_input_is_one_line_and_exit_code_2(run, text, capsys, tmp_path):
    (tmp_path / "latin").write_bytes(b"ab\xff")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/results").write_text("of somebody")
    here = ["--checkpoint", run, "--haystack", text]
    for args, said in (
        (["--depths", 2], "--checkpoint"),
        (["--checkpoint", tmp_path / "gone"], "gone: no such folder"),
        (["--checkpoint", tmp_path / "full"], "full: no config.json there"),
        ([*here, "--step", 6], "6"),
        ([*here, "--lengths", 256, 513], "513 tokens; allowed: at most model.max_length = 512"),
        ([*here, "--lengths", 100], "--lengths: 100 tokens; allowed: at least "),
        ([*here, "--lengths", 0], "a length is 0; allowed: 1 or more"),
        ([*here, "--depths", 0], "--depths is 0; allowed: 1 or more"),
        ([*here, "--needles", 0], "--needles is 0; allowed: 1 or more"),
        ([*here, "--seed", -1], "--seed is -1; allowed: 0 or more"),
        ([*here[:2], "--haystack", tmp_path / "gone"], "gone': no file matches"),
        ([*here[:2], "--haystack", tmp_path / "latin"], "latin is not utf-8 text: byte 0xff"),
        ([*here[:2], "--haystack", tmp_path], f"is a folder; allowed: files, as in '{tmp_path}/"),
        ([*here, "--out", tmp_path / "full"], "holds results and no model; allowed: a new or"),
        ([*here, "--out", tmp_path / "latin"], "latin is a file; allowed: a new folder"),
        ([*here, "--out", tmp_path / "latin/x"], "latin is a file"),
        ([*here, "--dtype", "int8"], "--dtype"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, args)])
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        # What was opened is told before the mistake is found.
        lines = [x for x in err.splitlines() if not x.startswith((str(run), f"{text}:"))]
        assert out == ""
        assert len(lines) == 1, lines
        assert said in lines[0]
        assert not any(name in lines[0] for name in ("pretokenize", "data."))  # options of training
    short = tmp_path / "short.txt"
    short.write_text("word " * 20)
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, [*here[:2], "--haystack", short, "--lengths", "512"])])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "short.txt: 102 tokens, and " in said
    assert "allowed: a longer text, or shorter --lengths" in said


def test_a_disk_that_is_full_leaves_nothing(run, text, capsys, tmp_path, monkeypatch):
    def full(figure, path, option):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("dsv3_jax.drawing.save_picture", full)
    where = ("--haystack", text, "--lengths", 256, "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        measure(capsys, run, *where)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"error: cannot write {tmp_path}/out/needle.png: No space left on device"
    assert [*tmp_path.iterdir()] == []


def test_help_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.needle")
    assert loaded.isdisjoint({"jax", "jaxlib", "numpy", "tokenizers", "safetensors", "matplotlib"})
    options = "checkpoint lengths depths needles haystack out seed step ema dtype"
    for name in options.split():
        assert f"--{name} " in shown
