"""TensorBoard and W&B receive what `metrics.jsonl` does, and a missing package is one line."""

import math
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3_jax.config import OutputConfig, RunConfig
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.writers import open_writers, scalars

RECORDS = [
    {
        "kind": "train",
        "step": 10,
        "tokens": 5120,
        "main_loss": 2.5,
        "grad_norms": {"embedding": 0.5, "mtp": None},
        "device_peak_memory": None,
        "grad_norm": math.nan,
    },
    {"kind": "validation", "step": 10, "tokens": 5120, "whole": True, "bits_per_byte": 1.75},
    {"kind": "experts", "step": 10, "tokens": 5120, "layers": ["layers.1"], "load_LE": [[1, 2]]},
    {"kind": "sample", "step": 10, "tokens": 5120, "prompt": "def ", "text": "f():\n<b>pass\n"},
    {"kind": "event", "step": 11, "tokens": 5632, "event": "skipped", "text": "not finite"},
]


def config(**output) -> RunConfig:
    return RunConfig(output=OutputConfig(**output))


def log(cfg: RunConfig, run: RunFolder, **options) -> None:
    for writer in open_writers(cfg, run, **options):
        for record in RECORDS:
            writer.write(record)
        writer.close()


def test_without_the_options_there_is_no_writer(tmp_path: Path):
    assert open_writers(RunConfig(), RunFolder(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


def test_scalars_are_all_numbers_also_those_in_tables():
    found = dict(scalars(RECORDS[0]))
    assert math.isnan(found.pop("grad_norm"))
    assert found == {"tokens": 5120.0, "main_loss": 2.5, "grad_norms/embedding": 0.5}
    assert dict(scalars(RECORDS[1])) == {"tokens": 5120.0, "bits_per_byte": 1.75}


# TensorBoard


def events(folder: Path) -> list:
    """The event files' contents: length, its checksum, event, its checksum, and so on."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + size]))
            place += size + 16
    return found


def test_tensorboard_reads_back_what_was_written(tmp_path: Path):
    log(config(tensorboard=True), RunFolder(tmp_path))
    values, texts = {}, {}
    for event in events(tmp_path / "tensorboard"):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                values[value.tag] = (event.step, value.simple_value)
            else:
                texts[value.tag] = (event.step, value.tensor.string_val[0].decode())
    assert values == {
        "train/tokens": (10, 5120.0),
        "train/main_loss": (10, 2.5),
        "train/grad_norms/embedding": (10, 0.5),
        "validation/tokens": (10, 5120.0),
        "validation/bits_per_byte": (10, 1.75),
    }
    assert texts == {
        "sample/text_summary": (10, "    def f():\n    <b>pass\n"),
        "event/text_summary": (11, "    not finite"),
    }


def test_a_resumed_run_hides_what_was_logged_after_its_checkpoint(tmp_path: Path):
    log(config(tensorboard=True), RunFolder(tmp_path), resume_step=8)
    restarts = [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert restarts == [9]


# Weights & Biases


class FakeRun:
    """A run of W&B that remembers."""

    def __init__(self) -> None:
        self.id, self.logged, self.finished, self.defined = "abc123", [], False, []

    def define_metric(self, name: str, **options) -> None:
        self.defined.append((name, options))

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A module in wandb's place."""
    fake = SimpleNamespace(run=FakeRun(), started=[], Error=RuntimeError, Html=lambda text: text)

    def init(**options) -> FakeRun:
        fake.started.append(options)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_receives_scalars_and_text_by_tokens(tmp_path: Path, wandb: SimpleNamespace):
    cfg, run = config(wandb="project"), RunFolder(tmp_path)
    log(cfg, run)
    (started,) = wandb.started
    assert (started["project"], started["name"], started["id"]) == ("project", tmp_path.name, None)
    assert started["config"]["train"]["steps"] == cfg.train.steps
    place = {"step": 10, "tokens": 5120}
    train, validation, sample, event = wandb.run.logged
    assert math.isnan(train.pop("train/grad_norm"))
    assert train == place | {"train/main_loss": 2.5, "train/grad_norms/embedding": 0.5}
    assert validation == place | {"validation/bits_per_byte": 1.75}
    assert sample == place | {"sample": "<pre>def f():\n&lt;b&gt;pass\n</pre>"}
    assert event["event"] == "<pre>not finite</pre>"
    assert ("*", {"step_metric": "tokens"}) in wandb.run.defined
    assert wandb.run.finished


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path, wandb: SimpleNamespace):
    for _ in range(2):
        log(config(wandb="project"), RunFolder(tmp_path))
    assert [options["id"] for options in wandb.started] == [None, "abc123"]
    assert all(options["resume"] == "allow" for options in wandb.started)


def test_a_refusal_of_wandb_is_one_line(tmp_path: Path, wandb: SimpleNamespace):
    def refuse(**options):
        raise wandb.Error("no key is known")

    wandb.init = refuse
    with pytest.raises(ValueError, match=r"output\.wandb is 'project': no key is known"):
        open_writers(config(wandb="project"), RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("package", "option"), [("tensorboardX", {"tensorboard": True}), ("wandb", {"wandb": "p"})]
)
def test_a_missing_package_is_one_line_and_nothing_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: SimpleNamespace, package: str, option
):
    monkeypatch.setitem(sys.modules, package, None)
    both = replace(OutputConfig(tensorboard=True, wandb="p"), **option)
    with pytest.raises(
        ValueError, match=rf"needs the package {package}; pip install 'dsv3_jax\[lo"
    ):
        open_writers(RunConfig(output=both), RunFolder(tmp_path))
    assert wandb.started == []
    assert list(tmp_path.iterdir()) == []
