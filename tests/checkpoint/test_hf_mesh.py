"""Hugging Face folders to models on a mesh and back: the numbers of one device, each read for the
devices that hold it and for no other, in place.

Which device holds what is written out here by hand as well as asked of `weight_spec`.
"""

import contextlib
import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint import hf
from dsv3_jax.checkpoint.tensor_file import Tensor, read_header
from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import make_mesh, weight_spec
from dsv3_jax.quant.fp8 import Blocked
from tests.checkpoint.hf_folders import (
    FP8,
    RAGGED,
    assert_same_tensors,
    load,
    random_tensors,
    save,
    write_folder,
)
from tests.runs import jax_option

ROOT = Path(__file__).parents[2]
# Few tensors: the program that moves one is compiled for every device.
CFG = replace(
    RAGGED,
    num_layers=2,
    num_dense_layers=0,
    q_latent=None,
    num_experts=8,
    num_shared_experts=0,
    mtp_depth=1,
)
EXPERTS = {"w_gate_EDF", "w_up_EDF", "w_down_EFD"}
MESHES = {
    "8 devices": MeshConfig(local=8),
    "2 groups of 2 nodes": MeshConfig(data=2, node=2, local=2),
    "2 nodes": MeshConfig(node=2),
    "2 devices": MeshConfig(local=2),
}
# MTP, the second kind of path, in one form alone, for the same reason.
FORMS = {"kept": {"keep_fp8": True, "skip_mtp": True}, "expanded": {"skip_mtp": True}, "bf16": {}}
CASES = [
    ("8 devices", "kept"),
    ("2 groups of 2 nodes", "kept"),
    ("2 nodes", "bf16"),
    ("2 devices", "expanded"),
]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Programs that move a tensor need no optimisation here."""
    with jax_option("jax_disable_most_optimizations"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in BF16 and in FP8, weights and scales in different files."""
    parent = tmp_path_factory.mktemp("hf")
    found = {
        name: write_folder(parent / name, CFG, random_tensors(CFG, fp8=name == "fp8"), files=3)
        for name in ("bf16", "fp8")
    }
    return found | {"kept": found["fp8"], "expanded": found["fp8"]}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> Callable[[str | None, str], DeepSeekV3]:
    """A form of the weights on one of `MESHES`, or without a mesh."""

    @cache
    def of(shape: str | None, form: str) -> DeepSeekV3:
        mesh = make_mesh(MESHES[shape]) if shape else None
        with jax_option("jax_disable_most_optimizations"):
            return load(folders[form], mesh=mesh, **FORMS[form])

    return of


def named(model: DeepSeekV3) -> dict[str, list[jax.Array]]:
    """Arrays by name: of a `Blocked` its values and its scales."""
    flat = nnx.to_flat_state(nnx.split(model)[1])
    return {".".join(map(str, path)): jax.tree.leaves(v.get_value()) for path, v in flat}


def numbers(x: jax.Array) -> bytes:
    return np.ascontiguousarray(np.asarray(x)).tobytes()


# --- reading ---


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_every_device_holds_its_experts_and_all_else(loaded, shape: str, form: str):
    """Sharded as `weight_spec` says; on every device the bits that one device would hold there."""
    mesh, model = make_mesh(MESHES[shape]), loaded(shape, form)
    expected, actual = named(loaded(None, form)), named(model)
    assert expected.keys() == actual.keys()
    assert model.cfg == loaded(None, form).cfg
    assert any(name.startswith("mtp.0.block.moe.w_") for name in actual) == (form == "bf16")
    for name, arrays in actual.items():
        for x, whole in zip(arrays, expected[name], strict=True):
            assert (x.shape, x.dtype) == (whole.shape, whole.dtype)
            assert x.sharding == NamedSharding(mesh, weight_spec(name))
            for shard in x.addressable_shards:
                own = own_experts(mesh, shard.device, name)
                assert numbers(shard.data) == numbers(np.asarray(whole)[own]), (name, shard.device)
    kept = [x for _, x in nnx.to_flat_state(nnx.split(model)[1])]
    assert any(isinstance(x.get_value(), Blocked) for x in kept) == (form == "kept")


def own_experts(mesh: Mesh, device: jax.Device, name: str) -> tuple[slice, ...]:
    """What a device holds of an array: experts in order over the nodes, and over a node's devices.
    In a stack they are the second dimension.
    """
    if name.rpartition(".")[2] not in EXPERTS:
        return ()
    _, _, node, local = (int(i[0]) for i in np.nonzero(mesh.devices == device))
    nodes, locals_ = mesh.devices.shape[2:]
    share, number = CFG.num_experts // (nodes * locals_), node * locals_ + local
    mine = slice(number * share, (number + 1) * share)
    return (mine,) if name.startswith("mtp") else (slice(None), mine)


@pytest.mark.parametrize("shape", ["8 devices", "2 groups of 2 nodes"])
def test_each_tensor_is_read_once_and_only_for_who_holds_it(folders, monkeypatch, shape: str):
    """No device is given a byte more than it holds in the end, and in the same memory."""
    placed, read, cfg = hf.placed, Tensor.read, MESHES[shape]
    reads: Counter[tuple[Path, int]] = Counter()
    given: Counter[jax.Device] = Counter()
    places: set[int] = set()

    def counted(tensor: Tensor) -> np.ndarray:
        reads[tensor.file, tensor.offset] += 1
        return read(tensor)

    def watched(stack, x, index, transposed):
        before = [part.unsafe_buffer_pointer() for part in jax.tree.leaves(stack)]
        (device,) = jax.tree.leaves(stack)[0].devices()
        given[device] += sum(part.nbytes for part in jax.tree.leaves(x))
        stack = placed(stack, x, index, transposed=transposed)
        assert [part.unsafe_buffer_pointer() for part in jax.tree.leaves(stack)] == before
        places.update(before)
        return stack

    monkeypatch.setattr(Tensor, "read", counted)
    monkeypatch.setattr(hf, "placed", watched)
    model = load(folders["kept"], mesh=make_mesh(cfg), **FORMS["kept"])

    stored = {
        (tensor.file, tensor.offset): 2 if name.endswith("_scale_inv") else 1  # they are checked
        for file in folders["kept"].glob("*.safetensors")
        for name, tensor in read_header(file).items()
        if not name.startswith("model.layers.2.")
    }
    assert reads == stored
    shards = [s for xs in named(model).values() for x in xs for s in x.addressable_shards]
    held = Counter()
    for shard in shards:
        held[shard.device] += shard.data.nbytes
    assert given == held
    assert len(given) == cfg.size
    assert {shard.data.unsafe_buffer_pointer() for shard in shards} == places


def test_no_more_lives_at_any_time_than_the_model_in_the_end(folders, monkeypatch):
    placed, peak = hf.placed, 0

    def alive() -> int:
        return sum(x.nbytes for x in jax.live_arrays()) - before

    def watched(stack, x, index, transposed):
        nonlocal peak
        stack = placed(stack, x, index, transposed=transposed)
        peak = max(peak, alive())
        return stack

    gc.collect()  # or a model that another test left would go meanwhile
    before = 0
    before = alive()
    monkeypatch.setattr(hf, "placed", watched)
    model = load(folders["bf16"], mesh=make_mesh(MESHES["2 nodes"]), **FORMS["bf16"])
    shards = (s for xs in named(model).values() for x in xs for s in x.addressable_shards)
    assert peak == sum(shard.data.nbytes for shard in shards)


# --- writing ---


@pytest.mark.parametrize(
    ("shape", "form", "fp8"),
    [
        ("2 groups of 2 nodes", "kept", True),
        ("2 nodes", "bf16", False),
        ("2 devices", "expanded", True),
    ],
)
def test_what_is_written_does_not_depend_on_the_mesh(
    tmp_path: Path, loaded, shape: str, form: str, fp8: bool
):
    """Untouched FP8, newly quantised FP8, and plain."""
    for out, source in (("one", loaded(None, form)), ("mesh", loaded(shape, form))):
        save(source, tmp_path / out, fp8=fp8)
    one, mesh = (
        {file.name: file.read_bytes() for file in (tmp_path / out).iterdir()}
        for out in ("one", "mesh")
    )
    assert one == mesh


def test_tensors_that_devices_share_are_put_together(tmp_path: Path, loaded):
    """As of a trainer that spreads each weight over its devices."""
    mesh, whole = make_mesh(MeshConfig(data=2)), loaded(None, "expanded")

    def spread(x: jax.Array) -> jax.Array:
        last = "data" if x.shape[-1] % 2 == 0 else None
        spec = PartitionSpec(*[None] * (x.ndim - 1), last)
        return jax.device_put(np.asarray(x), NamedSharding(mesh, spec))

    graphdef, state = nnx.split(whole)
    shared = nnx.merge(graphdef, jax.tree.map(spread, state))
    assert not shared.moe_layers.moe.w_up_EDF.is_fully_replicated
    written = save(shared, tmp_path / "shared", fp8=True)
    assert_same_tensors(written, save(whole, tmp_path / "one", fp8=True))


# --- choices of the caller ---


def test_a_mesh_in_use_is_no_hindrance(tmp_path: Path, folders, loaded):
    """Within `jax.set_mesh` the same model comes in and goes out, with a mesh or without."""
    mesh = make_mesh(MESHES["8 devices"])
    with jax.set_mesh(mesh):
        sharded = load(folders["kept"], mesh=mesh, **FORMS["kept"])
        whole = load(folders["kept"], **FORMS["kept"])
        written = save(sharded, tmp_path / "out", fp8=True)
    for name, arrays in named(loaded(None, "kept")).items():
        for x, y, z in zip(arrays, named(sharded)[name], named(whole)[name], strict=True):
            assert numbers(x) == numbers(y) == numbers(z)
            assert len(y.devices()) == 8
            assert z.devices() == x.devices()
    assert_same_tensors(written, save(whole, tmp_path / "whole", fp8=True))


def test_a_mesh_may_be_of_one_device_and_not_the_first(folders, loaded):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[-1:])
    model = load(folders["kept"], mesh=mesh, **FORMS["kept"])
    for name, arrays in named(model).items():
        for x, expected in zip(arrays, named(loaded(None, "kept"))[name], strict=True):
            assert x.devices() == {jax.devices()[-1]}
            assert numbers(x) == numbers(expected)


@pytest.mark.parametrize(
    ("sizes", "axes", "problem"),
    [
        ((2, 2), ("data", "node"), "mesh has axes data, node; allowed: pipe, data, node, local"),
        ((1, 2, 1, 2), ("data", "pipe", "node", "local"), "mesh has axes data, pipe, node, local;"),
        ((1,), ("x",), "mesh has axes x; allowed"),
        ((1, 2, 3, 1), None, "8 experts on a mesh of node 3 x local 1 = 3 devices; .* divides 8$"),
        ((1, 1, 2, 3), None, "8 experts on a mesh of node 2 x local 3 = 6 devices; .* divides 8$"),
    ],
)
def test_other_meshes_are_refused_in_one_line(folders, sizes, axes, problem: str):
    axes = axes or ("pipe", "data", "node", "local")
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    mesh = Mesh(devices, axes, axis_types=(AxisType.Explicit,) * len(axes))
    with pytest.raises(ValueError, match=problem) as refusal:
        load(folders["bf16"], mesh=mesh)
    assert "\n" not in str(refusal.value)


def test_a_configuration_is_no_mesh(folders):
    with pytest.raises(ValueError, match=r"mesh is a MeshConfig; allowed: a jax\.sharding\.Mesh"):
        load(folders["bf16"], mesh=MeshConfig())


# --- several processes ---

PROCESS = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))

from dsv3_jax import load_pretrained, save_pretrained
from dsv3_jax.checkpoint.tensor_file import Tensor
from dsv3_jax.config.mesh import MeshConfig
from dsv3_jax.parallel.mesh import make_mesh

read, reads = Tensor.read, []
Tensor.read = lambda tensor: reads.append(tensor.spec.dtype.itemsize) or read(tensor)
for cfg in (MeshConfig(local=4), MeshConfig(data=2, local=2)):
    reads.clear()
    model = load_pretrained(sys.argv[3], mesh=make_mesh(cfg), keep_fp8=True, progress=False)
    shards = model.moe_layers.moe.w_up_EDF[...].values.addressable_shards
    print(reads.count(1), *(f"{s.index[1].start}-{s.index[1].stop}" for s in shards))
    try:
        save_pretrained(model, Path(sys.argv[4]) / sys.argv[2], fp8=True, progress=False)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_process_reads_what_its_devices_hold(tmp_path: Path):
    """Two processes of two devices each: half of the experts each, then all of them each."""
    cfg = replace(CFG, mtp_depth=0)
    tensors = random_tensors(cfg, fp8=True)
    path = write_folder(tmp_path / "in", cfg, tensors)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PROCESS, f"localhost:{free_port()}"]
    with contextlib.ExitStack() as stack:
        started = [
            subprocess.Popen(
                [*command, str(rank), path, tmp_path / "out"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for process in started:
            stack.callback(process.kill)
        results = [process.communicate(timeout=240) for process in started]
    in_fp8 = [name for name, x in tensors.items() if x.dtype == FP8]
    experts = sum(".experts." in name for name in in_fp8)
    for rank, (out, errors) in enumerate(results):
        assert started[rank].returncode == 0, errors
        half, refusal, all_ = out.splitlines()
        assert half == f"{len(in_fp8) - experts // 2} " + ("0-2 2-4", "4-6 6-8")[rank]
        assert "lies on devices of other processes in part; allowed: a model that" in refusal
        assert all_ == f"{len(in_fp8)} 0-4 4-8"
        written = (tmp_path / "out" / str(rank) / "model.safetensors").read_bytes()
        assert written == (tmp_path / "out" / "0" / "model.safetensors").read_bytes()


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]
