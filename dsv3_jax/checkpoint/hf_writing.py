"""What a new Hugging Face folder will hold, and each tensor's values when its turn comes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dsv3_jax.checkpoint.boxes import box_of
from dsv3_jax.checkpoint.hf_folder import SINGLE
from dsv3_jax.checkpoint.hf_pieces import held_whole, holder
from dsv3_jax.checkpoint.hf_table import SCALES, Entry, copies, entries
from dsv3_jax.checkpoint.tensor_file import DTYPES, Spec
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.quant.bits import as_bits
from dsv3_jax.quant.fp8 import WEIGHT_BLOCK, Blocked, block_scales, grid, scaled


class Writing:
    """A model, abstract or not, on its way to a folder; arguments as of `hf.save_pretrained`.

    Attributes:
        specs: every tensor by name, in the order of the layers.
        size: bytes of all tensors.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        *,
        fp8: bool,
        dtype: Any,
        scale: Literal["float32", "pow2"] = "float32",
    ) -> None:
        self.cfg, self.fp8, self.scale = model.cfg, fp8, scale
        state = nnx.split(model)[1]
        self._state = dict(nnx.to_flat_state(state))
        _check_held(self._state)
        self._entries = {entry.hf: entry for entry in entries(self.cfg, state)}
        for copy in copies(self.cfg):
            if copy.released:
                self._entries[copy.hf] = self._entries[copy.of]
        self._dtypes = {path: _plain_dtype(v, dtype) for path, v in self._state.items()}
        self._only_pow2 = True
        self._found: dict[str, jax.Array] = {}
        self.specs = dict(self._specs())
        self.size = sum(spec.size for spec in self.specs.values())

    def files(self, largest: int) -> dict[str, list[str]]:
        """Names of tensors by file, in order; `largest` is in bytes."""
        shards: list[list[str]] = [[]]
        size = 0
        for name, spec in self.specs.items():
            if shards[-1] and size + spec.size > largest:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += spec.size
        for names in shards:  # wide dtypes first: readers want each tensor aligned
            names.sort(key=lambda name: -self.specs[name].dtype.itemsize)
        if len(shards) == 1:
            return {SINGLE: shards[0]}
        return {
            f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
            for i, names in enumerate(shards, start=1)
        }

    def arrays(
        self, names: Sequence[str], told: Callable[[int], None]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Names and values on the host, one at a time; `told` hears of their bytes."""
        for name in names:
            yield name, self._array(name)
            told(self.specs[name].size)

    def config(self) -> dict[str, Any]:
        """config.json, once all tensors were written."""
        config = self.cfg.to_hf() | {"torch_dtype": self._dtypes["embed_VD",].name}
        if self.fp8:
            config["quantization_config"] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(WEIGHT_BLOCK),
            }
            if self._only_pow2:
                config["quantization_config"]["scale_fmt"] = "ue8m0"
        return config

    def _in_fp8(self, entry: Entry) -> bool:
        return self.fp8 and entry.kind == "linear"

    def _specs(self) -> Iterator[tuple[str, Spec]]:
        for name, entry in self._entries.items():
            if self._in_fp8(entry):
                yield name, Spec(DTYPES["F8_E4M3"], entry.shape)
                yield name + SCALES, Spec(DTYPES["F32"], grid(entry.shape))
            else:
                yield name, Spec(self._dtypes[entry.path], entry.shape)

    def _array(self, name: str) -> np.ndarray:
        entry = self._entries[name.removesuffix(SCALES)]
        x = self._tensor(entry)
        if not self._in_fp8(entry):
            plain = np.asarray(x.astype(self._dtypes[entry.path]))
            return plain.T if entry.transposed else plain
        scales = x.scales if isinstance(x, Blocked) else self._scales(name.removesuffix(SCALES), x)
        if not name.endswith(SCALES):
            return np.asarray(x.values if isinstance(x, Blocked) else _values(x, scales)).T
        scales = np.asarray(scales).T
        self._only_pow2 &= bool((np.frexp(scales)[0] == 0.5).all())
        return scales

    def _tensor(self, entry: Entry) -> jax.Array | Blocked:
        """On one and the same device for all, or each would compile what converts them."""
        value = jax.tree.map(jnp.asarray, self._state[entry.path].get_value())
        if held := holder(value, entry.index):
            x = _part(*held)
        else:
            x = jax.tree.map(partial(_gathered, index=entry.index), value)
        return jax.device_put(x, jax.tree.leaves(value)[0].addressable_shards[0].device)

    def _scales(self, weight: str, x: jax.Array) -> jax.Array:
        """Of a weight that is quantised here. They are kept from its first part, be that values or
        scales, to its second.
        """
        if weight in self._found:
            return self._found.pop(weight)
        return self._found.setdefault(weight, _scales(x, scale=self.scale))


def _check_held(state: Mapping[tuple, nnx.Variable]) -> None:
    for path, variable in state.items():
        arrays = jax.tree.leaves(variable.get_value())
        if not all(held_whole(x) for x in arrays if isinstance(x, jax.Array)):
            raise ValueError(
                f"{'.'.join(map(str, path))} lies on devices of other processes in part; "
                "allowed: a model that one process holds whole"
            )


def _plain_dtype(variable: nnx.Variable, wanted: Any) -> np.dtype:
    """In which a variable is written where it is not in FP8."""
    if isinstance(variable, RouterBias):
        return np.dtype(np.float32)
    if wanted is not None:
        return jnp.dtype(wanted)
    is_fp8 = isinstance(variable.get_value(), Blocked)
    return jnp.dtype(jnp.bfloat16) if is_fp8 else variable.dtype


@jax.jit
def part(stack: jax.Array | Blocked, index: tuple[jax.Array, ...]) -> jax.Array | Blocked:
    """One of Hugging Face's tensors, in our orientation."""

    def take(stack: jax.Array) -> jax.Array:
        bits = as_bits(stack)
        for i in index:
            bits = lax.dynamic_index_in_dim(bits, i, axis=0, keepdims=False)
        return lax.bitcast_convert_type(bits, stack.dtype)

    return jax.tree.map(take, stack)


def _part(stack: jax.Array | Blocked, index: tuple[int, ...]) -> jax.Array | Blocked:
    return part(stack, tuple(np.int32(i) for i in index))  # whatever the index, one program


def _gathered(x: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """One of Hugging Face's tensors, of which several devices hold parts, on the host."""
    whole = np.empty(x.shape[len(index) :], x.dtype)
    for shard in x.addressable_shards:
        box = box_of(shard.index, x.shape)
        if (at := box.index(index)) is not None:
            starts, sizes = box.starts[len(index) :], box.shape[len(index) :]
            there = tuple(slice(i, i + n) for i, n in zip(starts, sizes, strict=True))
            whole[there] = np.asarray(_part(shard.data, at))
    return whole


@partial(jax.jit, static_argnames="scale")
def _scales(x: jax.Array, scale: Literal["float32", "pow2"]) -> jax.Array:
    return block_scales(x, WEIGHT_BLOCK, scale=scale)


@jax.jit
def _values(x: jax.Array, scales: jax.Array) -> jax.Array:
    return scaled(x, scales, WEIGHT_BLOCK).values
