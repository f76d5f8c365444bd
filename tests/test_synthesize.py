"""The command: samples from a checkpoint and from a server, kills at any moment, one line for what
cannot work.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint.model_folder import open_model
from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.inference import programs
from dsv3_jax.inference.generate import continued
from dsv3_jax.inference.options import EngineOptions
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.sampling import sampling
from dsv3_jax.inference.statistics import Statistics
from dsv3_jax.inference.text import TextStream
from dsv3_jax.inference.weights import lay_out
from dsv3_jax.posttrain import synthesis_report
from dsv3_jax.serve import Options as ServeOptions
from dsv3_jax.serve import _service
from dsv3_jax.server.keys import Keys
from dsv3_jax.synthesize import main
from tests.checkpoint.run_folders import write_run
from tests.commands import help_of, mistake_of
from tests.posttrain.scripted_models import chat, scripted_server, write_lines
from tests.runs import jax_option
from tests.server.serving import serving
from tests.shapes import FAST_COMPILATION

ROOT = Path(__file__).parents[1]
# A random model writes any byte: with these it stops before it is cut.
STOPS = tuple("etaoinshrdlu")
DRAWN = ("--max-tokens", 30, "--stop", *STOPS)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Compiles without optimising; engines of one model and the same sizes share their programs."""
    known, real = {}, Programs._compile

    def compile_(self, body, *args):
        key = f"{body} {jax.tree.map(np.shape, args[2:])}"
        if key not in known:
            known[key] = real(self, body, *args)
        return known[key]

    with pytest.MonkeyPatch.context() as patch, jax_option("jax_disable_most_optimizations"):
        patch.setattr(Programs, "_compile", compile_)
        patch.setattr(programs, "COMPILER_OPTIONS", FAST_COMPILATION)
        yield


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis_report, "draw_lengths", lambda stages, path: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 5)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"prompt": f"{n}?", "id": f"p{n}", "kind": "reasoning_original"} for n in range(3)]
    return write_lines(tmp_path / "prompts.jsonl", *lines)


def synthesize(*args: object) -> None:
    assert not main([*map(str, args)])


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, Any]]:
    """Samples without the times and the address that they came from."""
    found = lines_of(out / "samples.jsonl")
    for one in found:
        one["provenance"] |= {"time": "", "server": ""}
    return found


def test_a_checkpoint_writes_samples_and_a_run_that_lost_some_writes_them_again(
    checkpoint, prompts, tmp_path, capsys
):
    out = tmp_path / "out"
    with prompts.open("a") as file:  # one that no model of 64 tokens can read
        file.write(json.dumps({"prompt": "x" * 70, "kind": "writing"}) + "\n")
    args = ("--prompts", prompts, "--out", out, "--checkpoint", checkpoint, "--dtype", "float32")
    args += (*DRAWN, "--rows", 1, "--pages", 1, "--candidates", 2, "--keep", 2, "--seed", 3)
    synthesize(*args)
    said = capsys.readouterr()
    assert said.out.startswith(f"{out / 'samples.jsonl'}: ")
    assert " samples of " in said.out
    assert "8 candidates; 2 failed; " in said.out
    made = lines_of(out / "samples.jsonl")
    assert made
    assert {one["kind"] for one in made} == {"reasoning_original"}
    assert {one["provenance"]["step"] for one in made} == {5}
    assert {one["provenance"]["model"] for one in made} == {"run"}
    entries = lines_of(out / "candidates.jsonl")
    assert len({entry["text"] for entry in entries[:6]}) == 6
    assert all("allowed: below 64" in entry["failed"] for entry in entries[6:])
    kept = (out / "candidates.jsonl").read_bytes()
    (out / "candidates.jsonl").write_bytes(kept[: len(kept) * 2 // 3])
    samples = timeless(out)
    synthesize(*args)
    again = lines_of(out / "candidates.jsonl")
    assert [one | {"time": ""} for one in again] == [one | {"time": ""} for one in entries]
    assert timeless(out) == samples
    capsys.readouterr()
    synthesize(*args)
    assert not capsys.readouterr().err  # no model was opened
    assert timeless(out) == samples


def alone(checkpoint: Path, entries: list[dict[str, Any]]) -> Iterator[str]:
    """Each answer without an engine."""
    opened = open_model(checkpoint, dtype="float32")
    template, weights = ChatTemplate(opened.tokenizer), lay_out(opened.model)
    for entry in entries:
        asked = [{"role": "user", "content": f"{entry['id'][1:]}?"}]
        prompt_BT = np.array([template.encode(asked)])
        stream, text = TextStream(opened.tokenizer.token_bytes, STOPS), ""
        how = sampling(entry["seed"], 1.0, 1.0)
        for token_B in continued(weights, prompt_BT, 30, how, Statistics()):
            if int(token_B[0]) in opened.end_ids:
                break
            text += stream.add(int(token_B[0]))
            if stream.stopped:
                break
        yield text + stream.finish()


@pytest.mark.slow
def test_a_server_and_an_engine_give_what_the_model_writes_alone(checkpoint, prompts, tmp_path):
    local, served = tmp_path / "local", tmp_path / "served"
    common = ("--prompts", prompts, *DRAWN, "--keep", 2, "--candidates", 2)
    small = EngineOptions(rows=1, pages=1, chunk=16)
    options = ServeOptions(checkpoint, dtype="float32", warm_up=False, engine=small)
    with serving(_service(options, Keys())) as url:
        synthesize(*common, "--out", served, "--server", url, "--model", "run")
    by = ("--checkpoint", checkpoint, "--dtype", "float32", "--rows", 1, "--pages", 1)
    synthesize(*common, "--out", local, *by, "--chunk", 16)
    entries = lines_of(local / "candidates.jsonl")
    assert [entry["text"] for entry in entries] == list(alone(checkpoint, entries))
    texts = [
        {(e["id"], e["candidate"]): e["text"] for e in lines_of(out / "candidates.jsonl")}
        for out in (local, served)
    ]
    assert texts[0] == texts[1]
    messages = [
        [one["messages"] for one in lines_of(out / "samples.jsonl")] for out in (local, served)
    ]
    assert messages[0] == messages[1] != []


# --- a server ------------------------------------------------------------------------------------


def answer_of(number: int, body: dict[str, Any]) -> tuple[int, Any]:
    """A function of what is asked."""
    return 200, chat(f"{body['messages'][-1]['content']} \\boxed{{{body['seed'] % 2}}}")


def served(url: str, prompts: Path, out: Path) -> tuple[object, ...]:
    asking = ("--prompts", prompts, "--out", out, "--server", url, "--model", "scripted")
    return (*asking, "--candidates", 5, "--keep", 5, "--near-duplicates", 0, "--concurrency", 2)


def test_answers_of_a_server_are_judged_and_kept(tmp_path, capsys, monkeypatch):
    lines = [{"prompt": f"{n}?", "reference": "1", "kind": "reasoning"} for n in range(3)]
    prompts, out = write_lines(tmp_path / "p.jsonl", *lines), tmp_path / "out"
    monkeypatch.setenv("MY_KEY", " secret\n")
    with scripted_server(answer_of) as (url, asked):
        args = (*served(url, prompts, out), "--verifier", "boxed", "--api-key-env", "MY_KEY")
        synthesize(*args)
    assert len(asked) == 30
    assert {body["headers"]["Authorization"] for body in asked} == {"Bearer secret"}
    made = lines_of(out / "samples.jsonl")
    assert {one["messages"][-1]["content"][-9:] for one in made} == {"\\boxed{1}"}
    assert all(one["verification"]["verdict"] == "accepted" for one in made)
    entries = lines_of(out / "candidates.jsonl")
    assert {(e["seed"] % 2, e["verification"]["verdict"]) for e in entries} == {
        (1, "accepted"),
        (0, "rejected"),
    }
    assert not any(b"secret" in path.read_bytes() for path in out.iterdir())
    assert ": 6 samples of 6 problems; 6 problems; 30 candidates; " in capsys.readouterr().out


def kill_after(count: int, prompts: Path, out: Path, number: signal.Signals) -> int:
    """Starts the command in a process of its own, and kills it while it asks, once the journal has
    so many lines more. Nothing else is answered before. Returns its exit code.
    """
    process: list[subprocess.Popen] = []
    journal = out / "candidates.jsonl"
    before = journal.read_bytes().count(b"\n") if journal.exists() else 0
    told = threading.Event()

    def answer(asked: int, body: dict[str, Any]) -> tuple[int, Any]:
        if asked == count + 1:  # two are on their way: the others were answered
            deadline = time.monotonic() + 60
            while journal.read_bytes().count(b"\n") < before + count:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process[0].send_signal(number)
            told.set()
        elif asked >= count:
            assert told.wait(90)
        return answer_of(asked, body)

    environment = os.environ | {"DSV3_ALLOCATOR": "default"}
    with scripted_server(answer) as (url, _):
        command = [sys.executable, "-m", "dsv3_jax.synthesize", *served(url, prompts, out)]
        process.append(
            subprocess.Popen(
                [*map(str, command)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return process[0].wait(120)


def check_kills(
    prompts: Path, folder: Path, counts: tuple[int, ...], number: signal.Signals
) -> None:
    """Kills a run again and again, then lets it end: 15 candidates, each once."""
    whole, out = folder / "whole", folder / "out"
    with scripted_server(answer_of) as (url, _):
        synthesize(*served(url, prompts, whole))
    for count in counts:
        assert kill_after(count, prompts, out, number) in (-number, 128 + number)
    kept = [(e["id"], e["candidate"]) for e in lines_of(out / "candidates.jsonl")]
    assert 0 <= len(kept) - sum(counts) <= 2 * len(counts)
    with scripted_server(answer_of) as (url, asked):
        synthesize(*served(url, prompts, out))
    entries = [(e["id"], e["candidate"]) for e in lines_of(out / "candidates.jsonl")]
    assert entries[: len(kept)] == kept
    assert len(entries) == len(set(entries)) == 15
    assert len(asked) == 15 - len(kept)
    assert timeless(out) == timeless(whole)
    assert len(timeless(out)) == len({json.dumps(one["messages"]) for one in timeless(out)}) > 3


def test_a_killed_run_goes_on_without_duplicates(prompts, tmp_path):
    check_kills(prompts, tmp_path, (7,), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_killed_again_and_again_goes_on_without_duplicates(prompts, tmp_path):
    check_kills(prompts, tmp_path, (1, 4, 3), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_is_told_to_leave_goes_on_too(prompts, tmp_path):
    check_kills(prompts, tmp_path, (6,), signal.SIGTERM)


# --- mistakes ------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_2(prompts, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3, "kind": "writing"}')
    (tmp_path / "exam.jsonl").write_text("{")
    (tmp_path / "own.json").write_text('{"reasoning_original": {"user": "{{ name }}"}}')
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.delenv("NO_KEY", raising=False)
    with scripted_server(answer_of) as (gone, _):
        pass
    out = tmp_path / "out"
    at = ("--prompts", prompts, "--out", out)
    by = (*at, "--server", gone, "--model", "m", "--retries", 0)
    for args, said in (
        (at, "one of --server and --checkpoint is needed, and no two"),
        ((*by, "--checkpoint", tmp_path), "one of --server and --checkpoint is needed, and no two"),
        ((*at, "--server", gone), "--server and --model go together"),
        ((*by, "--step", 3), "--step: allowed with --checkpoint alone"),
        ((*by, "--rows", 3), "the engine's options: allowed with --ch"),
        (
            (*at, "--checkpoint", tmp_path, "--api-key-env", "A"),
            "--api-key-env: allowed with --server",
        ),
        (by, f"--server {gone}: cannot be reached: Connection refused; tried once"),
        ((*by, "--server", "gone"), "--server is 'gone'; allowed: http://host:port"),
        ((*by, "--api-key-env", "NO_KEY"), "--api-key-env NO_KEY: no key there"),
        ((*at, "--checkpoint", tmp_path / "gone"), "gone: no such folder"),
        ((*at, "--checkpoint", tmp_path, "--chat-template", tmp_path / "pipe"), "not a plain"),
        ((*by, "--prompts", tmp_path / "gone"), "No such file"),
        ((*by, "--prompts", tmp_path / "bad.jsonl"), "bad.jsonl line 1: prompt is 3; allowed: "),
        ((*by, "--kind", "poem"), "--kind is 'poem'; allowed: reasoning, "),
        ((*by, "--verifier", "boxd"), "--verifier is 'boxd'; allowed: exact, boxed, "),
        ((*by, "--verifier", "boxed"), "prompts.jsonl line 1: no reference; --verifier boxed"),
        ((*by, "--templates", tmp_path / "own.json"), "line 1: its user template fails: 'name' is"),
        ((*by, "--value", "name"), "--value is name; allowed: NAME=TEXT"),
        ((*by, "--decontaminate", tmp_path / "exam.jsonl"), "exam.jsonl line 1: no JSON"),
        ((*by, "--reviewed", tmp_path / "bad.jsonl"), "bad.jsonl line 1: no sample of this"),
        ((*by, "--candidates", 0), "--candidates is 0; allowed: 1 to"),
        ((*by, "--temperature", 0), "--candidates is 4; allowed: 1, since all are the same"),
        ((*by, "--temperature", -1), "--temperature is -1.0; allowed: from 0 to below 1e38"),
        ((*by, "--temperature", 1e39), "--temperature is 1e+39; allowed: from 0 to below 1e38"),
        ((*by, "--top-p", 0), "--top-p is 0.0; allowed: above 0, at most 1"),
        ((*by, "--max-tokens", 0), "--max-tokens is 0; allowed: 1 or more"),
        ((*by, "--stop", ""), "--stop is ''; allowed: strings of one character or more"),
        ((*by, "--seed", -1), "--seed is -1; allowed: 0 to"),
        ((*by, "--keep", 0), "--keep is 0; allowed: 1 or more"),
        ((*by, "--near-duplicates", 2), "--near-duplicates is 2.0; allowed: 0 to 1"),
        ((*by, "--prefer", "best"), "--prefer"),
        ((*by, "--out", prompts), "is a file; allowed: a new or an empty folder"),
        ((*by, "--out", tmp_path), "holds bad.jsonl; allowed: a new or an empty folder"),
    ):
        line = mistake_of(main, [*map(str, args)], capsys)
        assert said in line
        assert not out.exists()


def test_another_configuration_in_the_same_folder_is_refused(prompts, tmp_path, capsys):
    with scripted_server(answer_of) as (url, asked):
        args = served(url, prompts, tmp_path / "out")
        synthesize(*args)
        capsys.readouterr()
        for change, said in (
            (("--temperature", 0.7), "with another --temperature: 1.0, now 0.7; allowed: the same"),
            (("--model", "other"), "with another --model: 'scripted', now 'other'"),
            (
                ("--keep", 1),
                "with another --keep: 5, now 1; allowed: the same settings, or another",
            ),
        ):
            assert said in mistake_of(main, [*map(str, (*args, *change))], capsys)
        synthesize(*args, "--keep", 1, "--reselect")
        synthesize(*args, "--keep", 1, "--concurrency", 1, "--retries", 0)
    assert len(asked) == 15
    assert len(lines_of(tmp_path / "out" / "samples.jsonl")) == 3


def test_a_template_of_chats_that_refuses_is_told_and_leaves_nothing(
    checkpoint, prompts, tmp_path, capsys
):
    (tmp_path / "chat.jinja").write_text("{{ raise_exception('no users') }}")
    args = ("--prompts", prompts, "--out", tmp_path / "out", "--checkpoint", checkpoint)
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, (*args, "--chat-template", tmp_path / "chat.jinja"))])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {prompts} line 1: " in last
    assert "no users" in last
    assert not (tmp_path / "out").exists()


def test_help_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.synthesize")
    assert loaded.isdisjoint({"jax", "jaxlib", "numpy", "tokenizers", "safetensors", "jinja2"})
    options = "prompts out server model api-key-env concurrency timeout retries checkpoint step ema"
    options += (
        " dtype chat-template kind templates value candidates verifier decontaminate reviewed"
    )
    options += " reselect seed temperature top-p max-tokens stop keep prefer near-duplicates"
    options += " near-ngram contamination-ngram rows drafts fp8-cache devices mesh.data"
    for name in options.split():
        assert f"--{name} " in shown
