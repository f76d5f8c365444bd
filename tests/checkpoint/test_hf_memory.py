"""Memory of moving a tensor, by the compiler's own count; and of a folder of several GB, measured
in a process of its own.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.checkpoint.hf import placed
from dsv3_jax.checkpoint.hf_table import abstract_model
from dsv3_jax.checkpoint.hf_writing import Writing, part
from dsv3_jax.checkpoint.tensor_file import Spec, write_file
from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.quant.fp8 import abstract_blocked

ROOT = Path(__file__).parents[2]
# 3.1 GB in FP8, the largest tensor 0.2 GB. A second copy of the experts would be 2.4 GB at least.
LARGE = ModelConfig(
    vocab_size=64_000,
    d_model=1_600,
    num_layers=6,
    num_dense_layers=1,
    num_heads=16,
    q_latent=1_000,
    dense_hidden=6_000,
    expert_hidden=1_500,
    num_experts=64,
    max_length=4096,
    yarn=YarnConfig(factor=1.0),
)
# Anonymous memory only: pages of the files are the system's to drop.
MEASURE = """
import json, sys, threading, time
import jax
from dsv3_jax import load_pretrained, save_pretrained
from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.parallel.mesh import make_mesh

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def watch():
    while not done.wait(0.002):
        peaks[0] = max(peaks[0], anonymous())

source, out, keep = sys.argv[1], sys.argv[2], sys.argv[3] != "expanded"
mesh = None
if sys.argv[3] == "on a mesh":
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = make_mesh(MeshConfig(data=2, local=2))
jax.numpy.zeros(3).block_until_ready()
done, before, peaks = threading.Event(), anonymous(), [0]
threading.Thread(target=watch, daemon=True).start()
model = load_pretrained(source, mesh=mesh, keep_fp8=keep, progress=False)
size = sum(s.data.nbytes for x in jax.tree.leaves(model) for s in x.addressable_shards)
loading, peaks[0] = peaks[0] - before - size, 0
before = anonymous()
save_pretrained(model, out, fp8=keep, progress=False)
done.set()
print(json.dumps({"size": size, "loading": loading, "saving": peaks[0] - before}))
"""


def programs(dtype: str) -> Iterator[jax.stages.Compiled]:
    """Those that put a tensor into a stack of 16 layers of 64 experts, and take one out."""
    index, shape = (np.int32(1), np.int32(2)), STACK
    abstract = abstract_blocked(shape) if dtype == "fp8" else jax.ShapeDtypeStruct(shape, dtype)
    slice_ = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[:1:-1], x.dtype), abstract)
    yield placed.lower(abstract, slice_, index, transposed=True).compile()
    yield part.lower(abstract, index).compile()
    if dtype == "fp8":  # expanded on the way
        wide = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        yield placed.lower(wide, slice_, index, transposed=True).compile()


STACK = (16, 64, 40, 30)
IN_PLACE = {"parameter", "bitcast", "bitcast-convert", "dynamic-update-slice", "fusion"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_moving_a_tensor_touches_nothing_else_of_its_stack(dtype: str):
    """No program converts or copies an array of the stack's shape, nor has memory for one."""
    shape = ",".join(map(str, STACK))
    for program in programs(dtype):
        found = set(re.findall(rf"\[{shape}\]\S* ([a-z][\w-]*)\(", program.as_text()))
        assert "parameter" in found
        assert found <= IN_PLACE
        assert program.memory_analysis().temp_size_in_bytes < 16 * 40 * 30


def cheap_arrays(specs: Mapping[str, Spec]) -> Iterator[tuple[str, np.ndarray]]:
    for name, spec in specs.items():
        yield name, np.ones(spec.shape, spec.dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("large") / "in"
    path.mkdir()
    writing = Writing(abstract_model(LARGE), fp8=True, dtype="bfloat16")
    assert writing.size > 3e9
    file_of = {}
    for file, names in writing.files(10**9).items():
        specs = {name: writing.specs[name] for name in names}
        write_file(path / file, specs, cheap_arrays(specs))
        file_of |= dict.fromkeys(names, file)
    index = {"weight_map": file_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(LARGE.to_hf()))
    yield path
    for file in path.iterdir():
        file.unlink()


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["kept", "expanded", "on a mesh"])
def test_memory_beyond_the_model_is_a_few_tensors(tmp_path: Path, folder: Path, kind: str):
    command = [sys.executable, "-c", MEASURE, folder, tmp_path / "out", kind]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    print(measured)
    specs = Writing(abstract_model(LARGE), fp8=True, dtype="bfloat16").specs
    allowed = 3 * max(spec.size for spec in specs.values()) + 10**9
    assert measured["size"] > 3e9 * (1 if kind == "kept" else 1.9)  # two groups hold two copies
    assert measured["loading"] < allowed, measured
    assert measured["saving"] < allowed, measured
    for file in (tmp_path / "out").iterdir():
        file.unlink()
