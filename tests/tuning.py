"""A small model, samples for it, and fine-tuning in this process: for all tests of the command."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dsv3_jax
from dsv3_jax.checkpoint import store
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.sft import main
from dsv3_jax.train.metrics import read_metrics
from tests.runs import SmallRun
from tests.shapes import random_model, tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ ('=' if m.role == 'assistant' else '?') + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)
FLAGS = (
    *("--train.dtype", "float32", "--data.length", 32, "--train.rows", 2),
    *("--data.validation-fraction", 0.25, "--output.sample-tokens", 0),
    # Validated, saved and drawn at the end alone: pictures take longer than such steps.
    *("--output.log-every", 1, "--output.eval-every", 100, "--output.save-every", 100),
)


MESHES = {
    "mesh": ("--mesh.node", 2, "--mesh.local", 2),
    "rows over devices": ("--mesh.local", 2, "--mesh.sequence", "local"),
}
"""Options of runs on several devices"""


@dataclass(frozen=True)
class Tuning:
    """A model in a Hugging Face folder, samples, and a way to start the command here."""

    home: Path

    @property
    def model(self) -> Path:
        return self.home / "model"

    @property
    def samples(self) -> Path:
        return self.home / "samples.jsonl"

    def make(self) -> None:
        """Additions, as if said in a chat; the template lies beside the model."""
        cfg = tiny_model(vocab_size=300, num_layers=1, num_dense_layers=0, bos_id=0, eos_id=1)
        dsv3_jax.save_pretrained(random_model(cfg), self.model, progress=False, dtype="float32")
        train_tokenizer(["1+2=3 and so on\n"] * 9, 300).save(self.model / "tokenizer.json")
        (self.model / "chat_template.jinja").write_text(TEMPLATE)
        lines = []
        for i in range(40):
            turns = [("user", f"{i}+{i % 7}"), ("assistant", f"{i + i % 7}")] * (1 + i % 2)
            lines.append({"messages": [{"role": r, "content": c} for r, c in turns], "kind": "x"})
        self.samples.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def tune(self, out: Path, *args: object, pictures: bool = False) -> int | None:
        """The command in this process, into the folder `out`."""
        given = ("--init-from", self.model, "--data.source", self.samples, *FLAGS)
        return self.run("--output.folder", out, *given, *args, pictures=pictures)

    def run(self, *args: object, pictures: bool = False) -> int | None:
        with SmallRun(self.home).quick(pictures):
            return main(list(map(str, args)))


def entries_of(run: Path, kind: str) -> list[dict]:
    return [entry for entry in read_metrics(run / "metrics.jsonl") if entry["kind"] == kind]


def assert_same_arrays(run: Path, other: Path, step: int) -> None:
    """Weights, biases and moments bit for bit."""
    one, two = (store.load(path / "checkpoints", step).arrays for path in (run, other))
    assert one.keys() == two.keys() >= {"params", "router_bias", "mu", "nu"}
    for group, named in one.items():
        for name, array in named.items():
            np.testing.assert_array_equal(array, two[group][name], err_msg=f"{group}/{name}")
