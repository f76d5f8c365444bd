"""The compiled functions of one pipeline stage on its rank's devices: F, B, b, W (report 3.2.1).

Every array but a step's numbers lies by device: it has a leading dimension spread over all devices
of the rank, so that each has what is its own and no program needs a collective but those of the
experts' exchange. Weights' gradients are summed there in float32, local to each device, until the
step's end. What a program adds to is given back to it.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.data.loader import Batch
from dsv3_jax.model.cross_entropy import cross_entropy, log_probs
from dsv3_jax.parallel.dispatch import Traffic
from dsv3_jax.parallel.mesh import AXES, TOKEN_AXES, varying, varying_axes
from dsv3_jax.parallel.neighbours import PER_DEVICE
from dsv3_jax.plan.cuts import layer_counts
from dsv3_jax.quant.wide import wide
from dsv3_jax.train.programs import batch_of
from dsv3_jax.train.sharding import WHOLE, RunSharding
from dsv3_jax.train.stage import Arrays, Passed, Stage
from dsv3_jax.train.validation import counted


class Told(NamedTuple):
    """What a stage's forward passes tell, summed over micro-batches on each device."""

    losses: jax.Array
    """Total, main, MTP, balance [4]"""
    load_LE: jax.Array
    traffic: Traffic | None


def own(tree: Any) -> Any:
    """A device's part of arrays by device."""
    return jax.tree.map(lambda x: x[0], tree)


def by_device(tree: Any) -> Any:
    """`own` undone."""
    return jax.tree.map(lambda x: varying(x, TOKEN_AXES)[None], tree)


def first_shard(x: jax.Array) -> jax.Array:
    """What the first device of this process has."""
    return x.addressable_shards[0].data


class StagePrograms:
    """Of one stage on one rank. Sums of gradients go by `keys`: local name -> name on the rank,
    where two stages may share a parameter.
    """

    def __init__(
        self,
        stage: Stage,
        sharding: RunSharding,
        keys: Mapping[str, str],
        rows: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`rows` of a micro-batch, all devices together; `options` of the compiler."""
        self.options = options
        self.stage, self.sharding, self.keys, self.rows = stage, sharding, keys, rows
        self._residual_specs: list[PartitionSpec] | None = None

    def names(self, kind: str) -> list[str]:
        """Keys of the sums that a program of this kind adds to."""
        stage = self.stage
        of = {
            "F": [stage.head] if stage.head else [],
            "b": stage.in_backward,
            "W": stage.linears,
            "B": [*stage.in_backward, *stage.linears],
        }[kind]
        return sorted({self.keys[name] for name in of})

    def added_to(self, sums: Arrays, kind: str) -> Arrays:
        """Of a rank's sums those that a program of this kind takes, or their shapes."""
        return {key: sums[key] for key in self.names(kind)}

    # --- bodies: on one device -------------------------------------------------------------------

    def forward(self, weights, biases, x, batch, numbers, told, sums) -> tuple:
        """-> output, residuals, told, sums."""
        passed = self._passed(weights, biases, x, batch, numbers)
        specs, kept = self._residual_specs, passed.residuals
        residuals = [x[None] if spec else x for x, spec in zip(kept, specs, strict=True)]
        found = jnp.stack([passed.total, passed.parts.main, passed.parts.mtp, passed.parts.balance])
        load_LE, traffic = passed.parts.load_LE, passed.parts.traffic
        told = jax.tree.map(jnp.add, told, by_device(Told(found, load_LE, traffic)))
        return passed.h_BTD, residuals, told, self._added(sums, passed.dhead)

    def input_gradients(self, weights, biases, residuals, dh, sums) -> tuple:
        """-> the input's gradient, whether rows are finite, tape, sums."""
        specs = self._residual_specs
        residuals = [x[0] if spec else x for x, spec in zip(residuals, specs, strict=True)]
        returned = self.stage.input_gradients(own(weights), own(biases), residuals, dh)
        sums = self._added(sums, returned.grads)
        return returned.dx_BTD, returned.row_is_finite_B, by_device(returned.tape), sums

    def weight_gradients(self, tape, sums) -> Arrays:
        """-> sums."""
        return self._added(sums, self.stage.weight_gradients(own(tape)))

    def backward(self, weights, biases, residuals, dh, sums) -> tuple:
        """-> the input's gradient, whether rows are finite, sums."""
        some = self.added_to(sums, "b")
        dx, finite, tape, some = self.input_gradients(weights, biases, residuals, dh, some)
        sums = {**sums, **some}
        others = self.added_to(sums, "W")
        return dx, finite, {**sums, **self.weight_gradients(tape, others)}

    def _passed(self, weights, biases, x, batch, numbers) -> Passed:
        return self.stage.forward(own(weights), own(biases), x, batch, numbers)

    def _added(self, sums: Arrays, grads: Arrays) -> Arrays:
        sums = dict(sums)
        for name, grad in grads.items():
            sums[self.keys[name]] = sums[self.keys[name]] + by_device(grad)
        return sums

    # --- programs --------------------------------------------------------------------------------

    def note(self, weights, biases, x, batch, numbers) -> None:
        """Traces a forward pass for what its backward pass will be: before any program is made."""

        def body(*args):
            residuals = self._passed(*args).residuals
            self._residual_specs = [_spec_of(x) for x in residuals]
            return jnp.zeros(())

        specs = self._forward_specs()[:5]
        f = self.sharding.per_device(body, specs, WHOLE)
        jax.eval_shape(f, weights, biases, x, batch, numbers)

    @cached_property
    def F(self) -> Callable:
        """`forward`; told and sums are donated."""
        return self._program(self.forward, self._forward_specs(), self.forward_out, (5, 6))

    @cached_property
    def b(self) -> Callable:
        """`input_gradients`; sums are donated."""
        out = (PER_DEVICE,) * 4
        return self._program(self.input_gradients, self.backward_specs, out, (4,))

    @cached_property
    def W(self) -> Callable:
        """`weight_gradients`; sums are donated."""
        return self._program(self.weight_gradients, (PER_DEVICE,) * 2, PER_DEVICE, (1,))

    @cached_property
    def B(self) -> Callable:
        """`backward`; sums are donated."""
        return self._program(self.backward, self.backward_specs, (PER_DEVICE,) * 3, (4,))

    def FB(self, other: "StagePrograms") -> Callable:
        """This stage's F and another one's B in one program, whose sums are of both:
        (F's weights, biases, x, batch, numbers, told, B's weights, biases, residuals, dh, sums)
        -> (output, residuals, told, the input's gradient, whether rows are finite, sums).
        """

        def body(*args):
            forward, told, backward, sums = args[:5], args[5], args[6:10], args[10]
            some = self.added_to(sums, "F")
            h, residuals, told, some = self.forward(*forward, told, some)
            sums = {**sums, **some}
            others = other.added_to(sums, "B")
            dx, finite, others = other.backward(*backward, others)
            return h, residuals, told, dx, finite, {**sums, **others}

        specs = (*self._forward_specs()[:6], *other.backward_specs)
        out = (*self.forward_out[:3], *(PER_DEVICE,) * 3)
        return self._program(body, specs, out, (5, 10))

    def evaluating(self, byte_lengths_V: np.ndarray) -> Callable:
        """(weights, biases, x, batch) -> what the next stage takes; behind the head, by device,
        nats, labels and bytes over all devices.
        """

        def body(weights, biases, x, batch):
            found = self.stage.evaluate(own(weights), own(biases), x, batch, cross_entropy)
            if not self.stage.cut.head:
                return found
            sums = self.sharding.sum((found, *counted(batch.labels_BT, byte_lengths_V)))
            return by_device(sums)

        return self._program(body, (PER_DEVICE,) * 4, PER_DEVICE, ())

    def scoring(self) -> Callable:
        """(weights, biases, x, batch) -> what the next stage takes; behind the head, by device, log
        p of the labels of all devices, in their order.
        """

        def body(weights, biases, x, batch):
            found = self.stage.evaluate(own(weights), own(biases), x, batch, log_probs)
            if not self.stage.cut.head:
                return found
            return by_device(lax.all_gather(found, TOKEN_AXES, tiled=True))

        return self._program(body, (PER_DEVICE,) * 4, PER_DEVICE, ())

    def _forward_specs(self) -> tuple:
        return (*(PER_DEVICE,) * 4, WHOLE, PER_DEVICE, PER_DEVICE)

    @property
    def forward_out(self) -> tuple:
        """Specs of what F returns, once `note` has seen its residuals."""
        return PER_DEVICE, self._residual_specs, PER_DEVICE, PER_DEVICE

    @property
    def backward_specs(self) -> tuple:
        """Specs of what b and B take."""
        return PER_DEVICE, PER_DEVICE, self._residual_specs, PER_DEVICE, PER_DEVICE

    def _program(self, body: Callable, specs: Any, out: Any, donated: tuple[int, ...]) -> Callable:
        f = self.sharding.per_device(body, specs, out)
        return jax.jit(f, donate_argnums=donated, compiler_options=self.options)

    # --- shapes of their arguments ---------------------------------------------------------------

    def struct(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Of an array by device."""
        place = NamedSharding(self.sharding.mesh, PER_DEVICE)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    @property
    def message(self) -> jax.ShapeDtypeStruct:
        """What stages hand on."""
        return self.struct((*self._parts, self.stage.cfg.model.d_model), self.stage.dtype)

    @property
    def x(self) -> jax.ShapeDtypeStruct | None:
        """The stage's input."""
        return None if self.stage.cut.embed else self.message

    @property
    def batch(self) -> Batch:
        """A micro-batch."""
        return batch_of(self.stage.cfg, partial(self.struct, self._parts))

    @property
    def _parts(self) -> tuple[int, int]:
        """Parts of rows in a micro-batch, and tokens of each."""
        cfg = self.stage.cfg
        return self.rows * cfg.mesh.row_shards, cfg.part_length

    @property
    def told(self) -> Told:
        """Of a step, by device."""
        model, cut = self.stage.cfg.model, self.stage.cut
        routers = layer_counts(model, cut)[1] + cut.num_mtp
        devices = self.sharding.token_shards
        traffic = None
        if self.sharding.plan and routers:
            traffic = Traffic(*[self.struct((devices, routers), jnp.int32)] * len(Traffic._fields))
        return Told(
            self.struct((devices, 4), wide(self.stage.dtype)),
            self.struct((devices, routers, model.num_experts), jnp.int32),
            traffic,
        )


def _spec_of(x: jax.Array) -> PartitionSpec:
    """How a value inside of a `shard_map` leaves it with a leading dimension of devices; as it is
    if it is the same on all.
    """
    axes = tuple(axis for axis in AXES if axis in varying_axes(x))
    return PartitionSpec(axes) if axes else PartitionSpec()
