"""Models from and to Hugging Face folders, tensor by tensor (facts of the format: `hf_table`).

Reading: a stack of layers is allocated once, on the device, and each tensor is put into its place
from the file's own pages, by a program that gives the stack's memory back as its result. So memory
beyond the model itself is a few tensors, not a second model. On a mesh each device has a stack of
its own experts; what is none of theirs is not read.

Writing goes through the same table the other way, and no shard is ever held in memory.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dsv3_jax.checkpoint.folder_tokenizer import open_tokenizer
from dsv3_jax.checkpoint.hf_check import (
    check_count,
    check_names,
    check_tensors,
    differences,
    is_fp8,
)
from dsv3_jax.checkpoint.hf_folder import INDEX, HFFolder, open_folder
from dsv3_jax.checkpoint.hf_pieces import Filling, check_mesh, fillings, off_any_mesh
from dsv3_jax.checkpoint.hf_table import SCALES, Entry, abstract_model, copies, entries
from dsv3_jax.checkpoint.hf_writing import Writing
from dsv3_jax.checkpoint.new_folder import new_folder
from dsv3_jax.checkpoint.progress import bar
from dsv3_jax.checkpoint.tensor_file import write_file
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.plain_json import read_table
from dsv3_jax.data.answers import AnswerTemplate
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.quant.bits import as_bits
from dsv3_jax.quant.fp8 import Blocked, abstract_blocked

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tiktoken.model",
    GENERATION,
)
BF16 = jnp.dtype(jnp.bfloat16)


# --- reading -------------------------------------------------------------------------------------


def load_pretrained(
    path: str | Path,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    keep_fp8: bool = False,
    *,
    skip_mtp: bool = False,
    progress: bool = True,
) -> DeepSeekV3:
    """The model of a Hugging Face folder: BF16, FP16, FP32 or FP8 blocks, in one file or many.

    Args:
        dtype: of the weights; None keeps them as stored and expands FP8 to bfloat16. Layers of a
            stack share one dtype, the narrowest that holds all of theirs exactly. The router's
            bias is float32 in any case.
        mesh: with the axes of `parallel.mesh.make_mesh`. Experts, [E, ...] or [L, E, ...], are
            spread over node and local, all else is whole on every device (`weight_spec`); scales
            lie as their values. A process reads what its own devices hold, and checks the scales
            and the copies of all, so that all refuse a folder. Layers of such a model compute
            inside a `shard_map` alone. None: JAX's default device.
        keep_fp8: linears stored in FP8 become `Blocked`, values and scales untouched.
        skip_mtp: leave MTP modules out, be they in the folder or not.

    ValueError or OSError, one line, for a folder that does not hold exactly this model; ValueError
    for a mesh of other axes, or with a node x local of which the number of experts is no multiple.
    """
    folder = open_folder(path)
    cfg = folder.model_config(skip_mtp)
    if mesh is not None:
        check_mesh(mesh, cfg)
    if skip_mtp:
        folder = folder.without_mtp(cfg.num_layers)
    check_count(folder, cfg)
    graphdef, abstract = nnx.split(abstract_model(cfg))
    table, repeated = entries(cfg, abstract), copies(cfg)
    found = differences(folder, cfg, table, repeated)
    check_names(folder, found, cfg)
    check_tensors(folder, table, repeated)
    groups = _by_path(table)
    flat = dict(nnx.to_flat_state(abstract))
    abstract_values = {
        path: _abstract_value(flat[path], group, folder, dtype, keep_fp8)
        for path, group in groups.items()
    }
    with off_any_mesh():
        values = fillings(abstract_values, mesh)
        mine = [entry for entry in table if values[entry.path].places(entry.index)]
        total = sum(folder.tensors[entry.hf].spec.size for entry in mine)
        with bar("loading", total, shown=progress) as reading:
            for entry in mine:
                _put(values[entry.path], entry, folder, reading.advance)
    loaded = {path: flat[path].replace(value.whole()) for path, value in values.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _by_path(table: Iterable[Entry]) -> dict[tuple, list[Entry]]:
    groups: dict[tuple, list[Entry]] = {}
    for entry in table:
        groups.setdefault(entry.path, []).append(entry)
    return groups


def _abstract_value(
    variable: nnx.Variable, group: Sequence[Entry], folder: HFFolder, dtype: Any, keep_fp8: bool
) -> jax.ShapeDtypeStruct | Blocked:
    """Shape and dtype in which a variable will hold its tensors."""
    shape, stored = variable.shape, {entry.hf: folder.tensors[entry.hf] for entry in group}
    in_fp8 = [name for name, tensor in stored.items() if is_fp8(tensor)]
    if keep_fp8 and in_fp8:
        _check_all_fp8(folder.path, group, in_fp8)
        return abstract_blocked(shape)
    if isinstance(variable, RouterBias):
        dtype = jnp.float32
    if dtype is None:
        held = (BF16 if is_fp8(tensor) else tensor.spec.dtype for tensor in stored.values())
        dtype = reduce(jnp.promote_types, held)
    return jax.ShapeDtypeStruct(shape, dtype)


def _check_all_fp8(path: Path, group: Sequence[Entry], in_fp8: Sequence[str]) -> None:
    plain = sorted({entry.hf for entry in group} - set(in_fp8))
    if plain:
        raise ValueError(
            f"{path}: {in_fp8[0]} is in FP8 and {plain[0]} is not ({len(plain)} such in all); "
            "FP8 can be kept where all layers of a kind have it (without keep_fp8 it is expanded)"
        )


def _put(value: Filling, entry: Entry, folder: HFFolder, told: Callable[[int], None]) -> None:
    """One of Hugging Face's tensors into its place in every piece that holds it, whose memory is
    reused.
    """
    tensor = folder.tensors[entry.hf]
    x: Any = tensor.read()
    if is_fp8(tensor):
        x = Blocked(x, folder.tensors[entry.hf + SCALES].read())
    for number, at in value.places(entry.index):
        index = tuple(np.int32(i) for i in at)
        value.pieces[number] = placed(value.pieces[number], x, index, transposed=entry.transposed)
    jax.block_until_ready(value.pieces)  # or tensors under way would add up
    told(tensor.spec.size)


@partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def placed(
    stack: jax.Array | Blocked,
    x: jax.Array | Blocked,
    index: tuple[jax.Array, ...],
    transposed: bool,
) -> jax.Array | Blocked:
    """`stack`, whose memory is reused, with `x` at `index`."""
    if isinstance(x, Blocked) and not isinstance(stack, Blocked):
        x = x.dequantize(stack.dtype)

    def update(stack: jax.Array, x: jax.Array) -> jax.Array:
        # As integers: XLA:CPU widens a whole stack of bfloat16 or FP8 to update a slice of it.
        bits, x = as_bits(stack), as_bits(x.astype(stack.dtype))
        x = x.T if transposed else x
        starts = (*index, *(jnp.int32(0),) * (stack.ndim - len(index)))
        bits = lax.dynamic_update_slice(bits, x.reshape((1,) * len(index) + x.shape), starts)
        return lax.bitcast_convert_type(bits, stack.dtype)

    return jax.tree.map(update, stack, x)


# --- writing -------------------------------------------------------------------------------------


def save_pretrained(
    model: DeepSeekV3,
    path: str | Path,
    fp8: bool = False,
    *,
    dtype: Any = None,
    scale: Literal["float32", "pow2"] = "float32",
    shard_size: int = 5 * 10**9,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a folder that transformers' `DeepseekV3ForCausalLM` loads; it appears when complete.

    Args:
        fp8: the linears of attention and feed-forward in 128x128 FP8 blocks, as released. Those
            that are `Blocked` are written untouched, others are quantised.
        dtype: of all else but the router's bias, which is float32; None: as the model has it, and
            bfloat16 for what was FP8.
        scale: of newly quantised blocks.
        shard_size: bytes of tensors in a file, at most; a larger tensor gets a file of its own.
        tokenizer_from: folder whose tokenizer files are copied; generation_config.json names what
            ends an answer, if the chat template among them has a token of its own for that.
        overwrite: replace a folder that holds a model.

    On a mesh each tensor comes from one device that holds it. ValueError for a path that is in use,
    or a model of which devices of other processes hold a part; OSError for a full disk. Nothing is
    then left behind.
    """
    writing = Writing(model, fp8=fp8, dtype=dtype, scale=scale)
    files = writing.files(shard_size)
    with off_any_mesh(), new_folder(Path(path), writing.size + 2**20, overwrite) as folder:
        with bar("saving", writing.size, shown=progress) as saving:
            for file, names in files.items():
                specs = {name: writing.specs[name] for name in names}
                write_file(folder / file, specs, writing.arrays(names, saving.advance))
        if len(files) > 1:
            file_of = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": writing.size}, "weight_map": file_of}
            _write_json(folder / INDEX, index)
        _write_json(folder / "config.json", writing.config())
        if tokenizer_from is not None:
            copy_tokenizer(Path(tokenizer_from), folder)
            _write_ends(folder, model.cfg)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to text that is there: a tokenizer's files, and which ids end a turn."""
    files = [source / name for name in TOKENIZER_FILES]
    for file in files + sorted(source.glob("tokenization_*.py")):  # beside a tiktoken.model
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def _write_ends(folder: Path, cfg: ModelConfig) -> None:
    """Has generation_config.json name what ends an answer, where the chat template ends it by a
    token of its own: who generates looks there, and would never end.
    """
    file = folder / GENERATION
    with contextlib.suppress(ValueError, OSError):  # of files that were copied as they are
        content = read_table(file) if file.exists() else {"bos_token_id": cfg.bos_id}
        found = content.get("eos_token_id")
        known = found if isinstance(found, list) else [cfg.eos_id if found is None else found]
        ends = AnswerTemplate.of_folder(folder, open_tokenizer(folder)).ends()
        if not ends <= {*known, cfg.eos_id}:
            _write_json(file, content | {"eos_token_id": [*known, *sorted(ends)]})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
