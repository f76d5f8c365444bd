"""The command: FP8 through our own checkpoints to the bit, runs to Hugging Face, a look inside,
starting a run from either; one line and exit code 2 for what cannot work.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from dsv3_jax.checkpoint import new_folder, store
from dsv3_jax.config import RunConfig
from dsv3_jax.config.run import from_dict
from dsv3_jax.convert import main
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.generate import main as generate
from dsv3_jax.model.router import RouterBias
from dsv3_jax.train import __main__ as training
from dsv3_jax.train.run import prepare
from dsv3_jax.train.snapshot import weights_of
from dsv3_jax.train.step import TrainState
from tests.checkpoint.hf_folders import (
    BF16,
    F32,
    FP8,
    SMALL,
    assert_same_tensors,
    expanded,
    random_bits,
    random_tensors,
    read_folder,
    save,
    write_folder,
)
from tests.runs import jax_option
from tests.shapes import random_model

# One dense and one MoE layer, and MTP.
CFG = replace(SMALL, num_layers=2, mtp_depth=1)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random bits, in FP8, in two files; a tokenizer beside them."""
    path = write_folder(tmp_path_factory.mktemp("hf") / "in", CFG, random_bits(CFG), files=2)
    train_tokenizer(["some text " * 9], 300).save(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def imported(source: Path) -> Path:
    """What `import --keep-fp8` makes of it."""
    out = source.with_name("kept")
    with jax_option("jax_disable_most_optimizations"):
        assert not run("import", source, out, "--keep-fp8")
    return out


def run(*args: object) -> int | None:
    return main([str(arg) for arg in args])


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = (
        line for line in captured.err.splitlines() if not line.startswith(("loading", "warning"))
    )
    return line.removeprefix("error: ")


def test_fp8_through_our_own_checkpoint_is_the_same_to_the_bit(tmp_path: Path, source, imported):
    assert not run("export", imported, tmp_path / "out", "--fp8")
    assert_same_tensors(read_folder(tmp_path / "out"), read_folder(source))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "scale_fmt" not in config["quantization_config"]


def test_an_imported_model_lies_in_a_folder_like_a_runs(imported: Path):
    cfg = from_dict(RunConfig, json.loads((imported / "config.json").read_text()))
    assert cfg.model == CFG
    assert store.steps(imported / "checkpoints") == [0]
    checkpoint = store.load(imported / "checkpoints")
    assert set(checkpoint.arrays) == {"params", "router_bias"}
    params = checkpoint.arrays["params"]
    assert params["layers.1.moe.w_up_EDF.values"].dtype == FP8
    assert params["layers.1.moe.w_up_EDF.scales"].shape == (4, 2, 2)
    assert params["layers.1.ffn_norm_D"].dtype == BF16
    assert not [path for path in imported.parent.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two steps, as `train` leaves it; the later step has an average."""
    folder = tmp_path_factory.mktemp("runs") / "run-001"
    folder.mkdir()
    tensors = random_tensors(CFG, fp8=False, dtype=F32)
    source = write_folder(folder.with_name("hf"), CFG, tensors)
    with jax_option("jax_disable_most_optimizations"):
        run("import", source, folder, "--overwrite")
    checkpoint = store.load(folder / "checkpoints")
    params, biases = checkpoint.arrays["params"], checkpoint.arrays["router_bias"]
    store.delete(folder / "checkpoints", 0)
    for step in (3, 4):
        moved = {name: x * np.float32(step) for name, x in params.items()}
        arrays = {"params": moved, "router_bias": biases, "mu": moved, "nu": moved}
        if step == 4:
            arrays["average"] = {name: x * np.float32(7) for name, x in params.items()}
        meta = {"config": checkpoint.meta["config"], "data": {"tokenizer": "x"}}
        store.save(folder / "checkpoints", step, arrays, meta)
    return folder


@pytest.mark.parametrize(
    ("flags", "factor"), [((), 4), (("--step", 3), 3), (("--ema",), 7)], ids=str
)
def test_a_run_is_exported_in_bfloat16(tmp_path: Path, trained: Path, flags: tuple, factor: int):
    """The masters of the newest step, of a given one, or their average, rounded once."""
    tensors = random_tensors(CFG, fp8=False, dtype=F32)
    assert not run("export", trained, tmp_path / "out", *flags)
    expected = {
        name: x if name.endswith("bias") else (x * F32.type(factor)).astype(BF16)
        for name, x in tensors.items()
    }
    assert_same_tensors(read_folder(tmp_path / "out"), expected)


def test_what_ends_an_answer_is_exported_with_the_template(tmp_path: Path, trained: Path):
    tokenizer = train_tokenizer(["some text " * 9], 300)
    mark, mark_id = max(tokenizer.added_tokens.items(), key=lambda item: item[1])
    chat = Path(shutil.copytree(trained, tmp_path / "chat"))
    tokenizer.save(chat / "tokenizer.json")
    template = "{% for m in messages %}{{ m.content }}MARK{% endfor %}".replace("MARK", mark)
    (chat / "chat_template.jinja").write_text(template)
    known = {"bos_token_id": CFG.bos_id, "eos_token_id": CFG.eos_id}
    more, none = known | {"temperature": 0.6}, {"eos_token_id": None}
    for name, kept in (("out", {}), ("more", more), ("none", none)):
        if kept:
            (chat / "generation_config.json").write_text(json.dumps(kept))
        assert not run("export", chat, tmp_path / name)
        told = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert told == (kept or known) | {"eos_token_id": [CFG.eos_id, mark_id]}
    (chat / "generation_config.json").unlink()
    (chat / "chat_template.jinja").unlink()
    assert not run("export", chat, tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()


def test_a_run_is_exported_in_fp8_as_released(tmp_path: Path, trained: Path):
    assert not run("export", trained, tmp_path / "out", "--fp8", "--scale", "pow2")
    written = read_folder(tmp_path / "out")
    released = random_tensors(CFG, fp8=True)
    assert {n: (x.dtype, x.shape) for n, x in written.items()} == {
        n: (x.dtype, x.shape) for n, x in released.items()
    }
    scales = np.concatenate([x.ravel() for n, x in written.items() if n.endswith("_scale_inv")])
    assert (np.frexp(scales)[0] == 0.5).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"


def test_a_hugging_face_folder_is_exported_from_fp8_to_bfloat16(tmp_path: Path):
    tensors = random_tensors(SMALL, fp8=True)
    source = write_folder(tmp_path / "in", SMALL, tensors)
    assert not run("export", source, tmp_path / "out")
    assert_same_tensors(read_folder(tmp_path / "out"), expanded(tensors))


def test_mtp_can_be_left_out_and_a_model_be_replaced(tmp_path: Path, source, capsys):
    out = tmp_path / "out"
    assert not run("import", source, out)
    capsys.readouterr()
    assert "holds a model already; --overwrite" in refused(capsys, "import", source, out)
    assert not run("import", source, out, "--skip-mtp", "--overwrite")
    cfg = from_dict(RunConfig, json.loads((out / "config.json").read_text()))
    assert cfg.model == replace(CFG, mtp_depth=0)
    params = store.load(out / "checkpoints").arrays["params"]
    assert params["layers.0.mla.w_o_HU_D"].dtype == BF16
    assert not any(name.startswith("mtp.") for name in params)


# --- inspect ---


def inspected(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    capsys.readouterr()
    assert not run("inspect", path)
    return capsys.readouterr().out


def test_inspect_tells_what_a_hugging_face_folder_holds(source: Path, capsys):
    text = inspected(capsys, source)
    tensors = read_folder(source)
    size = sum(x.nbytes for x in tensors.values())
    assert f"tensors    {len(tensors)}, {size:,} bytes; files: 2" in text
    in_fp8 = [x for x in tensors.values() if x.dtype == FP8]
    assert f"F8_E4M3 {len(in_fp8):17,}  {sum(x.nbytes for x in in_fp8):>20,} bytes" in text
    assert "2 layers, 1 of them dense; 4 experts, 2 active" in text
    assert text.endswith("missing    none\nunknown    none\n")


def test_inspect_tells_what_is_missing_and_unknown(tmp_path: Path, capsys):
    tensors = random_tensors(CFG, fp8=True)
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors = {n: x for n, x in tensors.items() if n != gone} | {"x.y": np.ones(1, F32)}
    text = inspected(capsys, write_folder(tmp_path / "in", CFG, tensors))
    assert f"missing    1: {gone}\n" in text
    assert f"unknown    2: {gone}_scale_inv, x.y\n" in text


def test_inspect_tells_of_a_model_that_is_not_supported(tmp_path: Path, capsys):
    path = write_folder(tmp_path / "in", CFG, {"x.y": np.ones(3, F32)})
    config = json.loads((path / "config.json").read_text()) | {"scoring_func": "softmax"}
    (path / "config.json").write_text(json.dumps(config))
    text = inspected(capsys, path)
    assert "tensors    1, 12 bytes" in text
    assert "model      not supported: " in text
    assert "scoring_func is 'softmax'" in text


def test_inspect_tells_what_a_run_holds(trained: Path, imported: Path, capsys):
    text = inspected(capsys, trained)
    assert "a run; checkpoints of steps: 3, 4\n" in text
    assert all(f"bytes; {group}\n" in text for group in ("params", "router_bias", "mu", "average"))
    assert text.endswith("missing    none\nunknown    none\n")
    text = inspected(capsys, imported)
    assert "float8_e4m3fn" in text
    assert text.endswith("missing    none\nunknown    none\n")


# --- training from them ---


def prepared(tmp_path: Path, weights: Path, *flags: str):
    """What `train --init-from` has before its first step."""
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n\n" * 40)
    (tmp_path / "b.txt").write_text("def g(y):\n    return y\n\n" * 40)
    flags = (f"--data.source={tmp_path}/*.txt", "--data.length=16", *flags)
    flags = (*flags, "--data.validation-fraction=0.5", f"--output.folder={tmp_path / 'runs'}")
    options, resume, init_from = training.resolve([f"--init-from={weights}", *flags])
    return prepare(options.run, resume, lambda line: None, init_from)


@pytest.mark.parametrize("kind", ["hugging face", "imported, in FP8"])
def test_a_run_starts_from_either_folder(tmp_path: Path, kind: str, monkeypatch):
    """With its configuration, its tokenizer and, expanded, its very weights."""
    cfg = replace(CFG, vocab_size=300)
    tensors = random_tensors(cfg, fp8=True)
    source = write_folder(tmp_path / "hf", cfg, tensors)
    tokenizer = train_tokenizer(["some text " * 9], 300)
    tokenizer.save(source / "tokenizer.json")
    if kind != "hugging face":
        run("import", source, tmp_path / "ours", "--keep-fp8")
        source = tmp_path / "ours"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = prepared(tmp_path, source)
    assert made.cfg.model == cfg
    assert made.corpus.tokenizer.content_hash == tokenizer.content_hash
    assert made.checkpoint.meta["data"]["tokenizer"] == tokenizer.content_hash
    assert {"params", "router_bias"} == set(made.checkpoint.arrays)
    graphdef, params, biases = nnx.split(random_model(cfg), nnx.Param, RouterBias)
    begun = weights_of(made.checkpoint, made.cfg, TrainState(params, biases, ()))
    model = nnx.merge(graphdef, begun.params, begun.biases)
    expected = {name: x.astype(F32) for name, x in expanded(tensors, F32).items()}
    assert_same_tensors(save(model, tmp_path / "again", dtype="float32"), expected)


def test_a_folder_that_lacks_its_mtp_modules_is_taken_without_them(tmp_path: Path, capsys):
    """As transformers writes it."""
    cfg = replace(CFG, vocab_size=300)
    without = random_tensors(replace(cfg, mtp_depth=0), fp8=False)
    source = write_folder(tmp_path / "hf", cfg, without)
    train_tokenizer(["some text " * 9], 300).save(source / "tokenizer.json")
    said = refused(capsys, "export", source, tmp_path / "out")
    assert "there is no tensor model.layers.2.*; --skip-mtp" in said
    assert not run("export", source, tmp_path / "out", "--skip-mtp")
    assert_same_tensors(read_folder(tmp_path / "out"), without)
    with pytest.raises(ValueError, match=r"train: --model\.mtp-depth 0"):
        prepared(tmp_path, source)
    assert prepared(tmp_path, source, "--model.mtp-depth=0").cfg.model.mtp_depth == 0


def test_a_hugging_face_folder_writes_the_same_text_imported_or_not(tmp_path: Path, capsys):
    cfg = replace(CFG, vocab_size=300)
    source = write_folder(tmp_path / "hf", cfg, random_tensors(cfg, fp8=True))
    train_tokenizer(["some text " * 9], 300).save(source / "tokenizer.json")
    run("import", source, tmp_path / "ours", "--keep-fp8")
    capsys.readouterr()
    texts = []
    for path in (source, tmp_path / "ours"):
        flags = ["--prompt", "some", "--max-tokens", "3", "--dtype", "float32"]
        assert not generate(["--checkpoint", str(path), *flags])
        text, said = capsys.readouterr()
        assert "; written 3" in said
        texts.append(text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["imported", "hugging face"])
def test_what_was_never_trained_cannot_be_resumed(source, imported, capsys, kind: str):
    path = imported if kind == "imported" else source
    before = sorted(path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        training.main(["--resume", str(path)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--init-from {path} starts a new run from it" in line
    assert sorted(path.rglob("*")) == before


# --- what cannot work ---


def test_what_a_source_links_to_is_not_replaced(tmp_path: Path, source: Path, capsys):
    """As a folder in Hugging Face's cache does."""
    blobs, links = Path(shutil.copytree(source, tmp_path / "blobs")), tmp_path / "links"
    links.mkdir()
    for path in blobs.iterdir():
        (links / path.name).symlink_to(path)
    capsys.readouterr()
    for args in (("import", links, blobs), ("export", links, blobs)):
        assert "holds the source" in refused(capsys, *args, "--overwrite")
    assert_same_tensors(read_folder(blobs), read_folder(source))


def test_bad_requests_are_told_in_one_line(tmp_path: Path, source, trained, capsys):
    capsys.readouterr()
    out = tmp_path / "out"
    for args, message in (
        (("import", tmp_path / "none", out), f"{tmp_path / 'none'}: no such folder"),
        (("import", trained, out), "has no model_type: not of Hugging Face"),
        (("import", source, source.parent, "--overwrite"), "holds the source"),
        (("export", tmp_path / "none", out), f"{tmp_path / 'none'}: no such folder"),
        (("export", trained, out, "--step", 5), "no checkpoint of step 5 in"),
        (("export", trained, out, "--step", 3, "--ema"), "step 3 holds no average of the weights"),
        (("export", source, out, "--ema"), "--ema and --step are for runs"),
        (
            ("inspect", tmp_path),
            "no config.json there; needed: a run's folder, or",
        ),
        ((), "Expected one of {import, export, inspect}"),
    ):
        assert message in refused(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_an_import_onto_a_full_disk_leaves_nothing(tmp_path: Path, source, monkeypatch, capsys):
    capsys.readouterr()
    disk = type("", (), {"free": 10**6})
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda path: disk)
    assert "not enough disk" in refused(capsys, "import", source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
