"""The command without lm-eval: texts by perplexity, and one line for what cannot be."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from dsv3_jax.evaluate.__main__ import main
from tests.checkpoint.run_folders import write_run
from tests.commands import help_of, mistake_of
from tests.inference.conftest import _quick  # noqa: F401

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 5)


@pytest.fixture
def without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed, where it is."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a)
    )


def test_help_loads_neither_jax_nor_lm_eval():
    text, loaded = help_of("dsv3_jax.evaluate.__main__")
    for option in ("--tasks", "--include-path", "--perplexity", "--temperatures", "--out"):
        assert option in text
    assert not loaded & {"jax", "flax", "lm_eval", "torch", "datasets"}


def test_texts_are_scored_without_lm_eval(run, capsys, tmp_path, without_lm_eval):
    """A run and the same text twice: the same numbers on the page and in the folder."""
    (tmp_path / "a.txt").write_text("some text, longer than the model's context " * 3)
    (tmp_path / "b.txt").write_text("text €")
    out, files = tmp_path / "new" / "out", [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    args = ["--checkpoint", str(run), "--perplexity", *files, "--batch", "2", "--stride", "48"]
    assert not main([*args, "--out", str(out)])
    page, said = capsys.readouterr()
    assert said.splitlines()[-1] == str(out)
    assert (out / "results.md").read_text() == page
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md"}
    content = json.loads((out / "results.json").read_text())
    found = content["texts"]
    assert set(found) == {*files, "all 2"}
    sizes = [Path(file).stat().st_size for file in files]
    assert [found[file]["bytes"] for file in files] == sizes
    assert found["all 2"]["bytes"] == sum(sizes)
    both = sum(found[file]["nats"] for file in files)
    assert found["all 2"]["nats"] == pytest.approx(both)
    made = content["made"]
    assert made["checkpoint"]["step"] == 5
    assert made["checkpoint"]["hash"].startswith("crc32 of the manifest ")
    assert made["stride"] == 48
    assert made["command"].startswith("python -m dsv3_jax.evaluate --checkpoint ")
    assert {"python", "jax", "dsv3_jax"} <= set(made["versions"])


def test_a_mistake_is_one_line_and_exit_code_2(run, capsys, tmp_path):
    (tmp_path / "text").write_text("text")
    (tmp_path / "latin").write_bytes(b"ab\xff")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "mine").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = ["--perplexity", tmp_path / "text"]
    here = ["--checkpoint", run, *text]
    for args, said in (
        (text, "--checkpoint"),
        (["--checkpoint", tmp_path / "gone", *text], "gone: no such folder"),
        (["--checkpoint", run], "--tasks, --perplexity or both are needed"),
        (["--checkpoint", run, "--tasks", " , "], "--tasks, --perplexity or both are needed"),
        (["--checkpoint", run, "--perplexity", tmp_path / "gone"], "No such file"),
        (["--checkpoint", run, "--perplexity", tmp_path / "latin"], "at offset 2 is not UTF-8"),
        (["--checkpoint", run, "--perplexity", tmp_path / "empty"], "empty is empty; allowed"),
        ([*here, "--limit", 0], "--limit is 0; allowed: 1 or more"),
        ([*here, "--limit", "x"], "--limit is 'x'; allowed: whole numbers"),
        ([*here, "--num-fewshot", -1], "--num-fewshot is -1; allowed: 0 or more"),
        ([*here, "--max-tokens", 0], "--max-tokens is 0; allowed: 1 or more"),
        ([*here, "--batch", 0], "--batch is 0; allowed: 1 or more"),
        ([*here, "--stride", 0], "--stride is 0; allowed: 1 or more"),
        ([*here, "--seed", -1], "--seed is -1; allowed: 0 to 2^32 - 1"),
        ([*here, "--temperatures", -1], "--temperatures has -1.0; allowed: from 0"),
        ([*here, "--temperatures", "hot"], "--temperatures"),
        ([*here, "--repeats", 0], "--repeats is 0; allowed: 1 or more"),
        ([*here, "--repeats", 2], "allowed: with --temperatures above 0"),
        ([*here, "--chat-template", tmp_path / "text"], "--chat-template goes with --chat"),
        ([*here, "--limit", 1], "--limit goes with --tasks"),
        ([*here, "--num-fewshot", 1], "--num-fewshot goes with --tasks"),
        ([*here, "--include-path", tmp_path], "--include-path goes with --tasks"),
        ([*here, "--temperatures", 1], "--temperatures goes with --tasks"),
        ([*here, "--max-tokens", 1], "--max-tokens goes with --tasks"),
        ([*here, "--chat"], "--chat goes with --tasks"),
        (["--checkpoint", run, "--tasks", "x", "--stride", 8], "--stride goes with --perplexity"),
        ([*here, "--rows", 0], "--rows is 0; allowed: at least 1"),
        ([*here, "--out", tmp_path / "text"], "text exists already; allowed: a new or an empty"),
        ([*here, "--out", tmp_path / "held"], "held exists already; allowed: a new or an empty"),
        ([*here, "--out", tmp_path / "model"], "model exists already; allowed: a new or an empty"),
        ([*here, "--out", tmp_path / "text" / "below"], "text is a file; allowed: a new folder"),
        ([*here, "--step", 6], "no checkpoint of step 6"),
    ):
        assert said in mistake_of(main, [*map(str, args)], capsys)


def test_a_stride_beyond_the_model_is_told_before_its_weights_are_read(run, capsys, tmp_path):
    (tmp_path / "text").write_text("text")
    args = ["--checkpoint", run, "--perplexity", tmp_path / "text", "--stride", 65]
    said = mistake_of(main, [*map(str, args)], capsys)
    assert said == "error: --stride is 65; allowed: 1 to model.max_length = 64\n"


def test_without_lm_eval_a_line_says_how_to_get_it(run, capsys, without_lm_eval):
    said = mistake_of(main, ["--checkpoint", str(run), "--tasks", "mmlu"], capsys)
    assert "--tasks needs lm-eval, which is not installed: python -m pip install lm_eval" in said
    assert "--perplexity works without" in said


def test_the_hash_is_that_of_the_weights(run, tmp_path):
    """The same weights elsewhere have it too, others have not."""
    from dsv3_jax.checkpoint.model_folder import open_model
    from dsv3_jax.evaluate import origin
    from dsv3_jax.inference.weights import lay_out

    def hash_of(folder: Path) -> str:
        opened = open_model(folder)
        return origin.checkpoint_of(folder, opened, lay_out(opened.model))["hash"]

    def hash_of_files(name: str, *contents: bytes) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for number, content in enumerate(contents):
            (folder / f"model-{number}.safetensors").write_bytes(content)
        return origin._hf_hash(folder)

    assert hash_of_files("a", b"x", b"yz") == hash_of_files("b", b"x", b"yz")
    assert hash_of_files("c", b"xy", b"z") != hash_of_files("d", b"x", b"yz")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert hash_of(copy) == hash_of(run)
    assert hash_of(write_run(tmp_path / "other", 6)) != hash_of(run)
