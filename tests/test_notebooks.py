"""Notebooks run from the first cell to the last, and are committed without outputs."""

import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.shapes import FAST_COMPILATION

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A run of seconds: what a notebook shows does not depend on sizes.
SMALL = (
    "--model.vocab-size 300 --model.d-model 32 --model.num-layers 1 --model.num-heads 2 "
    "--model.num-dense-layers 0 "
    "--model.q-latent 16 --model.kv-latent 16 --model.nope-dim 8 --model.rope-dim 8 "
    "--model.v-dim 8 --model.dense-hidden 32 --model.expert-hidden 16 --model.num-experts 4 "
    "--model.experts-per-token 2 --model.num-groups 2 --model.num-kept-groups 1 "
    "--data.length 32 --data.validation-fraction 0.2 --train.rows 2 --train.remat none "
    "--train.dtype float32 --output.log-every 2 --output.eval-every 3 --output.eval-rows 2 "
    "--output.sample-tokens 8"
)


class Expected(NamedTuple):
    """What the outputs of a notebook hold, and what it is told so that it takes seconds."""

    texts: tuple[str, ...]
    pictures: int
    environment: dict[str, str]


# Three processes compile for one model and find each other's programs.
QUICK = {
    "XLA_FLAGS": " ".join(f"--{name}={value}".lower() for name, value in FAST_COMPILATION.items()),
    "JAX_COMPILATION_CACHE_DIR": "programs",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",  # lines of source take a sixth of the tracing
}
EXPECTED = {
    "01_train_tiny": Expected(
        ("bits per byte of validation text", "busiest expert"), 2, {"NOTEBOOK_STEPS": "6"}
    ),
    "02_generate_and_serve": Expected(
        (
            "; ended by --max-tokens",  # the command
            "text 5 ",  # of six at once
            "drafts held: ",  # of how many
            "greedy texts are the same with drafts and without",
            '200 {"status":"ok"}',
            '"finish_reason": "length"',  # curl, whole
            "data: [DONE]",  # and in pieces
            "logit_bias: ",  # what is refused
            "CompletionUsage(",  # OpenAI's package
            "16 clients: first token after ",
            'dsv3_requests_total{path="/v1/completions",status="400"} 2.0',
            'dsv3_requests_total{path="/v1/completions",status="404"} 1.0',
            "tokens that came: 6 of 6\nexit code 143\n",
            "nobody is there any more",
        ),
        5,
        QUICK | {"NOTEBOOK_STEPS": "1", "NOTEBOOK_TOKENS": "6"},
    ),
    "03_finetune_and_evaluate": Expected(
        (
            '{"messages": [{"role": "user", "content": "',
            "tokens before: <",
            "tokens in the loss: [",  # and no others
            "of 24 exact, ",
            " samples to train on, ",
            "', right is '",  # behind what the model wrote
            "bits per byte",
            "24 prompts of up to ",
            "mean reward: ",
            "| fine_tuning/text.txt |",  # the command's table
        ),
        3,
        QUICK
        | {"NOTEBOOK_STEPS": "1", "NOTEBOOK_SAMPLES": "24", "NOTEBOOK_EPOCHS": "1"}
        | {"NOTEBOOK_UPDATES": "2"}
        | {"NOTEBOOK_TUNING": "--data.length 64"},
    ),
}


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def test_every_notebook_has_its_expectations():
    assert [path.stem for path in NOTEBOOKS] == list(EXPECTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_explains_itself(path: Path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    first = "".join(cells(path, "markdown")[0]["source"])
    assert first.startswith("# ")
    assert any("REPO_URL = " in "".join(cell["source"]) for cell in cells(path, "code"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_no_port(path: Path):
    code = "\n".join("".join(cell["source"]) for cell in cells(path, "code"))
    assert re.findall(r"localhost|127\.0\.0\.1|:\d{4,5}\b|--port (?!0)\S+", code) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks run, one after the other as users do: the second finds the first one's
    model, and trains its own where it runs alone. Holds a small text, and a kernel that is this
    very interpreter.
    """
    found = tmp_path_factory.mktemp("notebooks")
    (found / "text").mkdir()
    for part in range(4):
        lines = [f"def f{i}(x):\n    return x + {i * i % 97}\n\n" for i in range(30)]
        (found / "text" / f"{part}.txt").write_text(f"# part {part}\n" + "".join(lines))
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel = found / "kernels" / "here"
    kernel.mkdir(parents=True)
    spec |= {"display_name": "here", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    executed = execute(path, folder, monkeypatch)
    outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    texts = "".join(out.get("text", "") for out in outputs)
    kinds = [kind for out in outputs for kind in out.get("data", {})]
    expected = EXPECTED[path.stem]
    assert [text for text in expected.texts if text not in texts] == [], texts
    assert "Traceback" not in texts
    assert "\x1b[" not in texts, "a live display, which a notebook cannot redraw"
    assert kinds.count("image/png") == expected.pictures
    assert "text/html" in kinds
    (run,) = (folder / "runs").iterdir()
    assert (run / "report.html").is_file()


def execute(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The notebook with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    for name, value in EXPECTED[path.stem].environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NOTEBOOK_FLAGS", f"{SMALL} --data.source '{folder}/text/*.txt'")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most of the time is compilation
    monkeypatch.setenv("DSV3_ALLOCATOR", "default")  # or commands would start twice
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # or jupyter_core warns of the change
    monkeypatch.setenv("JUPYTER_PATH", os.fspath(folder))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="here",
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()
