"""SwiGLU, whose output low precision rounds and whose arguments it keeps (report 2.1.2, 3.3.3)."""

import jax
import jax.numpy as jnp

from dsv3_jax.quant.wide import wide


@jax.custom_vjp
def swiglu(gate_up_X_FF: jax.Array, factor_X1: jax.Array | None = None) -> jax.Array:
    """silu(gate) * up * factor of [..., 2 F], computed at least in float32, in the input's dtype.

    Kept for the backward pass are the arguments alone (report 3.3.3).
    """
    return _swiglu_fwd(gate_up_X_FF, factor_X1)[0]


def _halves(gate_up_X_FF: jax.Array) -> list[jax.Array]:
    return jnp.split(gate_up_X_FF.astype(wide(gate_up_X_FF.dtype)), 2, axis=-1)


def _swiglu_fwd(gate_up_X_FF, factor_X1):
    gate_XF, up_XF = _halves(gate_up_X_FF)
    h_XF = jax.nn.silu(gate_XF) * up_XF
    h_XF = h_XF if factor_X1 is None else h_XF * factor_X1
    return h_XF.astype(gate_up_X_FF.dtype), (gate_up_X_FF, factor_X1)


def _swiglu_bwd(residuals, dh_XF):
    gate_up_X_FF, factor_X1 = residuals
    gate_XF, up_XF = _halves(gate_up_X_FF)
    dh_XF, dfactor_X1 = dh_XF.astype(gate_XF.dtype), None
    sigmoid_XF = jax.nn.sigmoid(gate_XF)
    silu_XF = gate_XF * sigmoid_XF
    if factor_X1 is not None:
        dfactor_X1 = (dh_XF * silu_XF * up_XF).sum(-1, keepdims=True).astype(factor_X1.dtype)
        dh_XF *= factor_X1
    dgate_XF = dh_XF * up_XF * (sigmoid_XF + silu_XF * (1 - sigmoid_XF))
    dgate_up_X_FF = jnp.concatenate([dgate_XF, dh_XF * silu_XF], -1)
    return dgate_up_X_FF.astype(gate_up_X_FF.dtype), dfactor_X1


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
