"""The step's program, which tells besides what gradients it updates with."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.train import step as step_module
from dsv3_jax.train.sharding import ONE_DEVICE, RunSharding
from dsv3_jax.train.step import make_step


class Telling(RunSharding):
    """A run's sharding that gives a step's program one result more."""

    def per_device(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Of the step, with its gradients as they come, each device its shards of them."""

        def telling(*args: Any) -> tuple[Any, nnx.State]:
            seen, gradients = [], step_module.gradients

            def noted(*args: Any) -> tuple:
                seen.append(gradients(*args))
                return seen[-1]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step_module, "gradients", noted)
                result = f(*args)
            ((_, grads, *_),) = seen
            return result, grads

        return super().per_device(telling, in_specs, (out_specs, in_specs[0].params))


def make_telling_step(
    graphdef: nnx.GraphDef, cfg: RunConfig, sharding: RunSharding = ONE_DEVICE
) -> Callable[..., tuple[tuple, jax.Array]]:
    """As `make_step`: `step(state, batch, coefficients) -> ((state, metrics), gradients)`.

    In one program: compiling that of the gradients alone takes most of the step's time once more.
    """
    return make_step(graphdef, cfg, Telling(sharding.mesh, sharding.plan, sharding.specs))
