"""Notebooks run from the first cell to the last, and are committed without outputs."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A run of seconds: what a notebook shows does not depend on sizes.
SMALL = (
    "--model.vocab-size 300 --model.d-model 32 --model.num-layers 2 --model.num-heads 2 "
    "--model.q-latent 16 --model.kv-latent 16 --model.nope-dim 8 --model.rope-dim 8 "
    "--model.v-dim 8 --model.dense-hidden 32 --model.expert-hidden 16 --model.num-experts 4 "
    "--model.experts-per-token 2 --model.num-groups 2 --model.num-kept-groups 1 "
    "--data.length 32 --data.validation-fraction 0.2 --train.rows 2 --train.remat none "
    "--train.dtype float32 --output.log-every 2 --output.eval-every 3 --output.eval-rows 2 "
    "--output.sample-tokens 8"
)


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["01_train_tiny.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_explains_itself(path: Path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    first = "".join(cells(path, "markdown")[0]["source"])
    assert first.startswith("# ")
    assert any("REPO_URL = " in "".join(cell["source"]) for cell in cells(path, "code"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    executed = execute(path, tmp_path, monkeypatch)
    outputs = [out for cell in executed.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    texts = "".join(out.get("text", "") for out in outputs)
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert "bits per byte of validation text" in texts
    assert "busiest expert" in texts
    assert "\x1b[" not in texts, "a live display, which a notebook cannot redraw"
    assert {"image/png", "text/html"} <= kinds
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "report.html").is_file()


def execute(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The notebook with its outputs, run in `folder` on a small text by this very interpreter."""
    import nbformat
    from nbclient import NotebookClient

    (folder / "text").mkdir()
    for part in range(4):
        lines = [f"def f{i}(x):\n    return x + {i * i % 97}\n\n" for i in range(30)]
        (folder / "text" / f"{part}.txt").write_text(f"# part {part}\n" + "".join(lines))
    monkeypatch.setenv("NOTEBOOK_STEPS", "6")
    monkeypatch.setenv("NOTEBOOK_FLAGS", f"{SMALL} --data.source '{folder}/text/*.txt'")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # most of the time is compilation
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # or jupyter_core warns of the change
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel = folder / "kernels" / "here"
    kernel.mkdir(parents=True)
    spec |= {"display_name": "here", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", os.fspath(folder))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="here",
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()
