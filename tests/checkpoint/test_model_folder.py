"""One folder is opened as what it is: a run, its checkpoints, one step of it, or Hugging Face's."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint.model_folder import open_model
from dsv3_jax.checkpoint.run_model import read_model
from dsv3_jax.config import YarnConfig
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.transformer import DeepSeekV3
from tests.checkpoint.hf_folders import random_tensors, write_folder
from tests.checkpoint.run_folders import CFG, write_run
from tests.shapes import random_model

HF = replace(
    CFG.model, mtp_depth=1, init_std=0.006, yarn=YarnConfig(factor=1.0), bos_id=0, eos_id=1
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 5, 7, average=True)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_folder(tmp_path_factory.mktemp("hf") / "hf", HF, random_tensors(HF, fp8=False))
    train_tokenizer(["some text"], 262).save(path / "tokenizer.json")
    return path


def head(model: DeepSeekV3) -> np.ndarray:
    return np.asarray(model.head_DV[...], np.float32)


def expected(step: int, factor: float = 1, dtype: jnp.dtype = jnp.bfloat16) -> np.ndarray:
    drawn = factor * random_model(CFG.model, seed=step).head_DV[...]
    return np.asarray(drawn.astype(dtype), np.float32)


def test_a_run_gives_its_newest_step_in_bfloat16_and_the_router_bias_in_float32(run: Path):
    opened = open_model(run)
    assert opened.step == 7
    assert opened.cfg == CFG.model
    assert opened.tokenizer.decode(opened.tokenizer.encode("some")) == "some"
    moe = opened.model.moe_layers.moe
    assert moe.w_gate_EDF.dtype == opened.model.head_DV.dtype == jnp.bfloat16
    assert moe.router.bias_E.dtype == jnp.float32
    assert np.array_equal(head(opened.model), expected(7))


@pytest.mark.parametrize("within", ["", "checkpoints", "checkpoints/step_00000005"])
def test_a_step_is_taken_by_option_or_by_its_folder(run: Path, within: str):
    opened = open_model(run / within, step=5, dtype="float32")
    assert opened.step == 5
    assert np.array_equal(head(opened.model), expected(5, dtype=jnp.float32))
    assert open_model(run / "checkpoints/step_00000005").step == 5


def test_the_average_is_taken_where_the_run_keeps_one(run: Path, tmp_path: Path):
    assert np.array_equal(head(open_model(run, average=True).model), expected(7, 2))
    with pytest.raises(ValueError, match="step 1 holds no average of the weights"):
        open_model(write_run(tmp_path / "plain", 1), average=True)


def test_a_damaged_newest_step_is_told_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = write_run(tmp_path / "run", 1, 2)
    (run / "checkpoints/step_00000002/manifest.json").write_text("{}")
    assert open_model(run).step == 1
    assert "step_00000002: CRC-32 of manifest.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"step_00000002: CRC-32 of manifest.json"):
        open_model(run, step=2)


def test_weights_are_read_as_stored_unless_a_dtype_is_asked_for(run: Path):
    assert read_model(run, 5).model.head_DV.dtype == jnp.float32


def test_a_hugging_face_folder_is_opened_as_stored_and_without_mtp(hf: Path):
    opened = open_model(hf)
    assert (opened.step, opened.cfg.mtp_depth, len(opened.model.mtp)) == (None, 0, 0)
    assert opened.model.head_DV.dtype == jnp.bfloat16
    assert opened.tokenizer.vocab_size == 262
    for how in ({"step": 3}, {"average": True}):
        with pytest.raises(ValueError, match="a Hugging Face folder has no steps and no average"):
            open_model(hf, **how)


def test_mtp_modules_are_read_where_drafts_are_asked_for(hf: Path, run: Path, tmp_path: Path):
    opened = open_model(hf, drafts=1)
    assert (opened.cfg.mtp_depth, len(opened.model.mtp)) == (1, 1)
    without = {n: x for n, x in random_tensors(HF, fp8=False).items() if "layers.1." not in n}
    promised = write_folder(tmp_path / "promised", HF, without)
    shutil.copy(hf / "tokenizer.json", promised)
    for folder, drafts, modules in ((hf, 2, 1), (promised, 1, 0), (run, 1, 0)):
        said = f"{drafts} drafts a step; allowed: 0 to {modules}, the MTP modules in {folder}"
        with pytest.raises(ValueError, match=f"^{said}$"):
            open_model(folder, drafts=drafts)


@pytest.mark.parametrize(
    ("content", "more"),
    [("{}", set()), ('{"eos_token_id": null}', set()), ('{"eos_token_id": [9, 17]}', {9, 17})],
)
def test_texts_end_also_where_generation_config_says(
    run: Path, tmp_path: Path, content: str, more: set[int]
):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "generation_config.json").write_text(content)
    assert open_model(folder).end_ids == open_model(run).end_ids | more


def test_texts_end_also_where_the_folders_template_ends_answers(run: Path, tmp_path: Path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    plain = open_model(run)
    mark, mark_id = max(plain.tokenizer.added_tokens.items(), key=lambda item: item[1])
    assert mark_id not in plain.end_ids
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}MARK{% endif %}"
    template = template.replace("MARK", mark) + "{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert open_model(folder).end_ids == plain.end_ids | {mark_id}
    (folder / "chat_template.jinja").write_text("{% for %}")  # no one's concern here
    assert open_model(folder).end_ids == plain.end_ids


def test_what_is_no_model_is_told_in_one_line(run: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("odd", "deep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("[" * 10**5)
    turns = Path(shutil.copytree(run, tmp_path / "turns"))
    (turns / "generation_config.json").write_text('{"eos_token_id": [1, [2]]}')
    (tmp_path / "odd/config.json").write_text("{")
    (tmp_path / "odd/tokenizer.json").write_text("{")
    bare = write_run(tmp_path / "bare", 1)
    (bare / "tokenizer.json").unlink()
    large = write_run(tmp_path / "large", 1)
    many = "".join(map(chr, range(0x100, 0x200)))
    train_tokenizer([many * 3], 400).save(large / "tokenizer.json")
    for path, how, said in (
        (tmp_path / "gone", {}, "gone: no such folder; needed: a run's folder, or"),
        (tmp_path / "empty", {}, "empty: no config.json there; needed"),
        (run / "checkpoints/step_00000005/arrays", {}, "arrays: no config.json there; needed"),
        (tmp_path / "odd", {}, "config.json is not JSON"),
        (tmp_path / "deep", {}, "config.json is not JSON: nested too deeply"),
        (turns, {}, r"config.json: eos_token_id is \[1, \[2\]\]; allowed: ids from 0 to 299"),
        (bare, {}, "bare: neither tokenizer.json nor tiktoken.model"),
        (large, {}, "allowed: below the model's vocab_size = 300"),
        (run, {"step": 6}, "no checkpoint of step 6 in .*: found steps"),
        (run / "checkpoints/step_00000005", {"step": 7}, "step 7 and step 5; allowed: one of them"),
        (write_run(tmp_path / "new"), {}, "no checkpoint in .*: found no such folder"),
    ):
        with pytest.raises((ValueError, OSError), match=said) as error:
            open_model(path, **how)
        assert "\n" not in str(error.value)
