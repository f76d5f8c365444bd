"""`python -m dsv3_jax.sft`: a model fine-tuned from end to end, exactly resumed, and taken away."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import store
from dsv3_jax.checkpoint.model_folder import open_model
from dsv3_jax.config.load import load_json
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.convert import main as convert
from dsv3_jax.data.held_out import is_held_out
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.sft import COMMAND, main
from dsv3_jax.train import command
from dsv3_jax.train.beginning import joint_corpus, settled
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.run import prepare
from dsv3_jax.train.snapshot import weights_of
from tests.commands import help_of
from tests.runs import random_state, send_at_step, timeless
from tests.shapes import compiled
from tests.tuning import TEMPLATE, Tuning, assert_same_arrays, entries_of


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    made = Tuning(tmp_path_factory.mktemp("sft"))
    made.make()
    return made


@pytest.fixture(scope="module")
def tuned(tuning: Tuning) -> Path:
    """A whole run of the default two epochs."""
    assert tuning.tune(tuning.home / "runs", pictures=True) == 0
    return tuning.home / "runs" / "sft-001"


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_makes_two_epochs_on_the_reports_cosine(tuned: Path):
    train = entries_of(tuned, "train")
    steps, rows = len(train), train[-1]["rows"]
    assert rows == 2 * steps
    result = json.loads((tuned / "result.json").read_text())
    assert 2 <= result["passes"] <= 2 + 2 / 7  # ended by the step that ends the second one
    assert result["zlib_bits_per_byte"] is None  # zlib would not know the questions
    assert "zlib" not in (tuned / "report.html").read_text()
    rates = [entry["learning_rate"] for entry in train]
    share = np.arange(steps) / steps
    expected = 1e-6 + 4e-6 * (1 + np.cos(np.pi * share)) / 2
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert "sft-001" in (tuned / "report.html").read_text()
    assert json.loads((tuned / "config.json").read_text())["train"]["steps"] == steps


def test_steps_that_take_an_epoch_more_are_told():
    rows = SimpleNamespace(rows_of_epochs=lambda epochs: 3 * epochs)
    corpus = SimpleNamespace(train=rows, tokenizer=SimpleNamespace(bos_id=0, eos_id=1))
    cfg, said = tiny_run(), []
    for count in (4, 8, 16):  # 8, 8 and 16 rows
        cfg = replace(cfg, train=replace(cfg.train, rows=count))
        steps = settled(cfg, corpus, 2, 0, said.append).train.steps
        assert steps == -(-6 // count)
    (line,) = said
    assert "--epochs 2 are 6 rows, whole steps take 16: " in line


def test_the_loss_is_that_of_the_answers_alone(tuning: Tuning, tuned: Path):
    """Of the whole held-out split, by hand: each sample alone, its answers by the template."""
    opened = open_model(tuned, dtype=np.float32)
    model, tokenizer = compiled(opened.model), opened.tokenizer
    nats, count = 0.0, 0
    for line in map(json.loads, tuning.samples.read_text().splitlines()):
        users = [m["content"] for m in line["messages"] if m["role"] == "user"]
        if not is_held_out(json.dumps(users), 0.25):
            continue
        ids, answers = ids_of(line["messages"], tokenizer)
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        logprob_TV = jax.nn.log_softmax(np.asarray(model(padded))[0])
        for place in np.flatnonzero(answers):
            nats, count = nats - float(logprob_TV[place - 1, ids[place]]), count + 1
    result = json.loads((tuned / "result.json").read_text())
    assert result["validation_loss"] == pytest.approx(nats / count, rel=1e-5)


def ids_of(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """A conversation by the template, and which of its ids are an answer's."""
    ids, answers = [], []
    for message in messages:
        is_answer = message["role"] == "assistant"
        text = message["content"] if is_answer else f"?{message['content']}="
        found = tokenizer.encode(text).tolist() + [tokenizer.eos_id] * is_answer
        ids, answers = ids + found, answers + [is_answer] * len(found)
    return ids, answers


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tuning: Tuning, tuned: Path, tmp_path: Path):
    """In the middle of an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 6, signal.SIGTERM)
        assert tuning.tune(tmp_path) == 128 + signal.SIGTERM
    run = tmp_path / "sft-001"
    assert len(entries_of(run, "train")) == 6
    assert tuning.run("--resume", run) == 0
    last = store.steps(tuned / "checkpoints")[-1]
    one, two = (timeless(path) for path in (run, tuned))
    assert [e for e in one if e["kind"] == "train"] == [e for e in two if e["kind"] == "train"]
    assert_same_arrays(run, tuned, last)


def test_a_resumed_run_has_its_template_whatever_became_of_the_file(tuned: Path):
    cfg, folder = load_json(tuned / "config.json"), RunFolder(tuned)
    gone = replace(cfg, data=replace(cfg.data, chat_template="gone.jinja"))
    kept, said = load_tokenizer(folder.tokenizer), []
    one = joint_corpus(cfg, kept, said.append, folder, None)
    two = joint_corpus(gone, kept, said.append, folder, None)
    assert one.content_hash == two.content_hash
    with pytest.raises(ValueError, match=r"data\.chat_template gone\.jinja: No such file"):
        joint_corpus(gone, kept, said.append, None, folder)


def test_an_export_holds_weights_tokenizer_and_template(tuned: Path, tmp_path: Path):
    convert(["export", str(tuned), str(tmp_path / "out"), "--dtype", "float32"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    back = open_model(tmp_path / "out")
    tokens = np.arange(64, dtype=np.int32)[None]
    one, two = (
        np.asarray(compiled(m)(tokens))
        for m in (back.model, open_model(tuned, dtype=np.float32).model)
    )
    np.testing.assert_array_equal(one, two)


def test_the_mtp_modules_of_a_run_are_left_out_on_demand(
    tuning: Tuning, tuned: Path, tmp_path: Path
):
    """All else is what it was, also where a Hugging Face folder has them."""
    named = {}
    for folder in (tuned, tuning.model):
        args = ["--init-from", str(folder), "--data.source", str(tuning.samples)]
        args += ["--output.folder", str(tmp_path), "--data.length", "32", "--model.mtp-depth", "0"]
        options, _, init_from = command.resolve(COMMAND, args)
        prepared = prepare(options.run, None, lambda line: None, init_from, epochs=1)
        named[folder] = set(prepared.checkpoint.arrays["params"])
        assert prepared.cfg.model.mtp_depth == 0
        weights_of(prepared.checkpoint, prepared.cfg, random_state(prepared.cfg))  # all fit
    whole = store.load(tuned / "checkpoints").arrays
    assert any(name.startswith("mtp.") for name in whole["params"])
    kept = {name: x for name, x in whole["params"].items() if not name.startswith("mtp.")}
    assert named[tuned] == named[tuning.model] == set(kept)


# --- what a user may get wrong -------------------------------------------------------------------


def test_help_names_the_options_and_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.sft")
    assert loaded.isdisjoint({"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain", "numpy"})
    assert {"--epochs", "--init-from", "--data.too-long", "--data.chat-template"} <= set(
        re.findall(r"--[a-z][\w.-]*", shown)
    )


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--init-from="], "--init-from is needed"),
        (["--init-from", "nowhere"], "--init-from nowhere: no run there"),
        (["--epochs", "0"], "--epochs is 0; allowed: 1 or more"),
        (["--epochs", "1", "--train.steps", "3"], "--epochs and --train.steps: allowed: one"),
        (["--print-config"], "need --train.steps"),
        (["--data.format", "text"], "data.format is text; allowed for"),
        (["--data.no-isolate"], "data.isolate is False; allowed with data.format messages"),
        (["--data.fim-rate", "0.1"], "data.fim_rate is 0.1; allowed with data.format messages: 0"),
        (["--data.source", "none.jsonl"], "no file matches"),
        (["--data.length", "4"], "no sample is left of 40; 40 dropped, longer than data.length 4"),
        (["--data.chat-template", "{t}"], "samples.jsonl line 1: {t}: no chats"),
        (["--data.source", "{s}"], "bad.jsonl line 2: messages[0].role is 'tool'; allowed: 'sys"),
        (["--model.d-model", "48"], "another model: model.d_model is 48"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run_behind(
    tuning: Tuning, tmp_path: Path, args: list[str], line: str, capsys: pytest.CaptureFixture
):
    places = {"{t}": tmp_path / "t.jinja", "{s}": tmp_path / "bad.jsonl"}
    places["{t}"].write_text("{{ raise_exception('no chats') }}")
    good = tuning.samples.read_text().splitlines()[0]
    places["{s}"].write_text(f"{good}\n{good.replace('user', 'tool')}\n")
    for short, path in places.items():
        args, line = [arg.replace(short, str(path)) for arg in args], line.replace(short, str(path))
    given = ["--output.folder", str(tmp_path / "runs"), "--data.source", str(tuning.samples)]
    if not any(arg.startswith("--init-from") for arg in args):
        given += ["--init-from", str(tuning.model)]
    elif "--init-from=" in args:
        args = []
    small = ["--data.length", "32", "--train.rows", "2", "--train.dtype", "float32"]
    with pytest.raises(SystemExit) as stop:
        main([*given, *small, *args])
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()  # behind the progress of loading the model
    assert [place for place, one in enumerate(told) if one.startswith("error: ")] == [len(told) - 1]
    assert line in told[-1]
    assert not list(tmp_path.glob("runs/*"))
