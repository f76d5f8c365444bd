"""DeepSeek-V3's training system in JAX and Flax.

The public names below are loaded at first use (PEP 562), so that `import dsv3_jax` and every
command's `--help` start without importing JAX.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "DeepSeekV3": "dsv3_jax.model.transformer",
    "Engine": "dsv3_jax.inference.engine",
    "EngineConfig": "dsv3_jax.inference.settings",
    "Handover": "dsv3_jax.inference.handover",
    "ModelConfig": "dsv3_jax.config",
    "Request": "dsv3_jax.inference.requests",
    "RunConfig": "dsv3_jax.config",
    "load_pretrained": "dsv3_jax.checkpoint.hf",
    "save_pretrained": "dsv3_jax.checkpoint.hf",
}

__all__ = [
    "DeepSeekV3",
    "Engine",
    "EngineConfig",
    "Handover",
    "ModelConfig",
    "Request",
    "RunConfig",
    "__version__",
    "load_pretrained",
    "save_pretrained",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
