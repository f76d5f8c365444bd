"""Fine-tuning on meshes, in FP8 and over pipelines, and what transformers makes of its result."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint.model_folder import open_model
from dsv3_jax.convert import main as convert
from tests.shapes import compiled
from tests.tuning import MESHES, Tuning, entries_of

STEPS = ("--train.rows", 4, "--train.steps", 3, "--schedule.learning-rate", 1e-3)
KINDS = MESHES | {
    "pipeline": (
        *("--train.microbatches", 2, "--mesh.pipe", 2),
        *("--pipeline.schedule", "1f1b", "--pipeline.stages", "E+1|H+M"),
    ),
}


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    made = Tuning(tmp_path_factory.mktemp("sft"))
    made.make()
    return made


@pytest.fixture(scope="module")
def plain(tuning: Tuning) -> Path:
    """On one device, with samples of what it writes."""
    assert tuning.tune(tuning.home / "plain", *STEPS, "--output.sample-tokens", 6) == 0
    return tuning.home / "plain" / "sft-001"


def losses(run: Path) -> np.ndarray:
    entries = entries_of(run, "train")
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    return np.array([[entry[f"{kind}_loss"] for kind in ("main", "mtp")] for entry in entries])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind == "mesh" else pytest.mark.exhaustive)
        for kind in KINDS
    ],
)
def test_fine_tuning_is_the_same_on_every_mesh(
    tuning: Tuning, plain: Path, tmp_path: Path, kind: str
):
    assert tuning.tune(tmp_path, *STEPS, *KINDS[kind]) == 0
    np.testing.assert_allclose(losses(tmp_path / "sft-001"), losses(plain), rtol=1e-4)


@pytest.mark.exhaustive
def test_fine_tuning_runs_in_fp8(tuning: Tuning, plain: Path, tmp_path: Path):
    assert tuning.tune(tmp_path, *STEPS, "--quant.recipe", "fp8") == 0
    found, expected = losses(tmp_path / "sft-001"), losses(plain)
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert not np.array_equal(found, expected)


@pytest.mark.slow
def test_the_sample_of_a_run_is_an_answer_to_its_prompt(plain: Path):
    assert entries_of(plain, "sample")[-1]["prompt"] == "Who are you?"


@pytest.mark.slow
def test_transformers_computes_the_same_from_the_export(plain: Path, tmp_path: Path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = importlib.import_module("tests.checkpoint.transformers_models")
    convert(["export", str(plain), str(tmp_path / "out"), "--dtype", "float32"])
    model, _ = theirs.load(tmp_path / "out")
    tokens = theirs.make_tokens(model)
    ours = compiled(open_model(plain, dtype=np.float32).model)(tokens)
    np.testing.assert_allclose(np.asarray(ours), theirs.logits_of(model, tokens), atol=2e-4)
