"""Bytes of a model's parameters on one device of a pipeline rank: as masters and moments, as the
step computes with them, and as sums of gradients (report 3.2.3, 3.3.3).
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.model.precision import class_of, is_linear
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import STACKS, is_stacked, parameter_name, weight_spec
from dsv3_jax.parallel.stages import Cut
from dsv3_jax.parallel.zero import stored_spec
from dsv3_jax.plan.cuts import layer_counts
from dsv3_jax.plan.kept import stored
from dsv3_jax.plan.traffic import ITEM_BYTES
from dsv3_jax.quant.recipes import RECIPES

MASTER_BYTES = GRADIENT_BYTES = 4  # float32
SHARED = ("embed_VD", "head_DV")  # what several stages may compute with


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model; layers are a dimension of their own."""

    name: str
    shape: tuple[int, ...]

    @property
    def layers(self) -> int:
        return self.shape[0] if is_stacked(self.name) else 1

    @property
    def one(self) -> tuple[int, ...]:
        """The shape of one layer's."""
        return self.shape[1:] if is_stacked(self.name) else self.shape


def parameters_of(params: nnx.State) -> tuple[Parameter, ...]:
    """Of a model's weights, abstract or not."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return tuple(Parameter(parameter_name(path), x.shape) for path, x in leaves)


def traced(model: ModelConfig) -> tuple[Parameter, ...]:
    """Of a model, from its shapes: nothing is computed."""

    def shapes(key: jax.Array) -> nnx.State:
        return nnx.split(DeepSeekV3(model, rngs=nnx.Rngs(key)), nnx.Param, ...)[1]

    return parameters_of(jax.eval_shape(shapes, jax.random.key(0)))


class Parameters:
    """Of one run's model. Sizes depend on model, mesh and number formats alone: runs that differ in
    other things can share them.
    """

    def __init__(self, cfg: RunConfig, known: tuple[Parameter, ...] = ()) -> None:
        """`known`: `parameters_of` the model, which is traced for them otherwise."""
        self.cfg, self.sizes = cfg, cfg.mesh.sizes
        self.all = known or traced(cfg.model)
        self._of: dict[Cut, list[tuple[Parameter, int]]] = {}

    def of(self, cut: Cut) -> list[tuple[Parameter, int]]:
        """What a stage computes with, and how many layers of it."""
        if cut not in self._of:
            self._of[cut] = list(self._those_of(cut))
        return self._of[cut]

    def _those_of(self, cut: Cut) -> Iterator[tuple[Parameter, int]]:
        model = self.cfg.model
        stacks = dict(zip(STACKS, layer_counts(model, cut), strict=True))
        for parameter in self.all:
            first, _, rest = parameter.name.partition(".")
            if first in stacks:
                count = stacks[first]
            elif first == "mtp":
                count = int(cut.first_mtp <= int(rest.partition(".")[0]) < cut.end_mtp)
            elif first == "embed_VD":
                tied = model.tied_head and cut.head
                count = int(cut.embed or cut.has_mtp or tied)
            elif first == "head_DV":
                count = int(cut.head or cut.has_mtp)
            else:  # the final norm
                count = int(cut.head)
            if count:
                yield parameter, count

    def owned(self, cut: Cut) -> Iterator[tuple[Parameter, int]]:
        """Those whose masters the stage keeps."""
        for parameter, count in self.of(cut):
            if parameter.name not in SHARED or (cut.embed, cut.head)[SHARED.index(parameter.name)]:
                yield parameter, count

    # --- bytes on one device ---------------------------------------------------------------------

    def state(self, cut: Cut) -> Mapping[str, int]:
        """Masters and moments of what a stage owns, as ZeRO-1 spreads them."""
        moment = 2 * ITEM_BYTES[self.cfg.optimizer.moment_dtype]
        numbers = sum(count * self._stored[p.name] for p, count in self.owned(cut))
        return {"masters": MASTER_BYTES * numbers, "moments": moment * numbers}

    def weights(self, cuts: tuple[Cut, ...]) -> int:
        """As a step computes with them: linears in the recipe's format, all else as masters; of the
        stages of one rank, which share embedding and head.
        """
        return self._on_rank(cuts, self._weights)

    def gathered(self, cuts: tuple[Cut, ...]) -> int:
        """What a step without a pipeline computes with beside the masters that lie here: those that
        it gathers, float32, and linears in the recipe's format. On one device blocks alone.
        """
        return self._on_rank(cuts, self._gathered)

    def gradients(self, cuts: tuple[Cut, ...]) -> int:
        """Each device's own sums over micro-batches, float32."""
        return self._on_rank(cuts, self._gradients)

    def _on_rank(self, cuts: tuple[Cut, ...], size: Mapping[str, int]) -> int:
        shared, total = Counter(), 0
        for cut in cuts:
            for parameter, count in self.of(cut):
                if parameter.name in SHARED:
                    shared[parameter.name] = size[parameter.name]
                else:
                    total += count * size[parameter.name]
        return total + shared.total()

    @cached_property
    def _stored(self) -> Mapping[str, int]:
        """Numbers of one layer's shard of each master."""
        return {p.name: self._shard_of_master(p) for p in self.all}

    @cached_property
    def _weights(self) -> Mapping[str, int]:
        return {p.name: self._computed(p) for p in self.all}

    @cached_property
    def _gathered(self) -> Mapping[str, int]:
        return {p.name: self._copied(p) + self._blocks(p) for p in self.all}

    @cached_property
    def _gradients(self) -> Mapping[str, int]:
        return {p.name: GRADIENT_BYTES * math.prod(self._local(p)) for p in self.all}

    def _local(self, parameter: Parameter) -> tuple[int, ...]:
        """One layer's shape on a device that computes with it."""
        return self._shard(parameter, tuple(weight_spec(parameter.name)))

    def _shard_of_master(self, parameter: Parameter) -> int:
        spec = stored_spec(parameter.name, parameter.shape, self.sizes)
        return math.prod(self._shard(parameter, tuple(spec)))

    def _shard(self, parameter: Parameter, spec: tuple) -> tuple[int, ...]:
        spec = spec[is_stacked(parameter.name) :] + (None,) * len(parameter.shape)
        axes = [(one,) if isinstance(one, str) else one or () for one in spec]
        return tuple(
            size // math.prod(self.sizes[axis] for axis in group)
            for size, group in zip(parameter.one, axes, strict=False)
        )

    def _computed(self, parameter: Parameter) -> int:
        numbers = math.prod(self._local(parameter))
        if not is_linear(parameter.name):
            return MASTER_BYTES * numbers
        return self._blocks(parameter) or ITEM_BYTES[self.cfg.train.dtype] * numbers

    def _blocks(self, parameter: Parameter) -> int:
        """In the recipe's format; 0 of what it has no rule for."""
        shape, name = self._local(parameter), parameter.name
        rule = RECIPES[self.cfg.quant.recipe].get(class_of(name)) if is_linear(name) else None
        if rule is None:
            return 0
        rounded = replace(rule.weight, scale="float32")  # scales of a `Blocked` are, in any recipe
        return math.prod(shape[:-2]) * stored(rounded, *shape[-2:])

    def _copied(self, parameter: Parameter) -> int:
        """A gathered master; 0 if all that the device computes with lies there anyway."""
        numbers = math.prod(self._local(parameter))
        return MASTER_BYTES * numbers if numbers > self._stored[parameter.name] else 0
