"""Trains MaxText's DeepSeek model on one batch, a step for every line read.

Run by train_cpu.py with an interpreter that has MaxText (0.2.5); the one argument is JSON. Model,
loss, train step, clipping, optimiser and compilation are MaxText's own, set up as its train loop
does; only the loop around them, with its logs and checkpoints, is left out. Dropless: copies are
sorted by expert and multiplied by `jax.lax.ragged_dot` (sparse_matmul without megablox, whose
Pallas kernel would be interpreted on a CPU). Recomputed is nothing.

Sizes, routing (sigmoid, groups, bias moved at 0.001) and the number of parameters are ours. Not as
in ours: no balance loss, as transformers has none; attention is its plain dot product over whole
rows, logits and one-hot targets those of the whole batch; weight decay acts on every parameter;
both moments are float32; a step also takes the norm of all parameters.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from typing import Any

import jax
from answering import answer
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR


def main() -> None:
    options = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        settings = model_settings(options["model"]) | run_settings(options, folder)
        arguments = [f"{name}={value}" for name, value in settings.items()]
        config, recorder = train.initialize(["", f"{MAXTEXT_CONFIGS_DIR}/base.yml", *arguments])
        mesh, step, state, batch = set_up(config, recorder)
        parameters = jax.tree.leaves(nnx.filter_state(state.model, nnx.Param))

        def work() -> None:
            nonlocal state
            with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
                state, metrics = jax.block_until_ready(step(state, batch))
            if not jax.numpy.isfinite(metrics["scalar"]["learning/loss"]):
                raise SystemExit("the loss is not finite")

        answer(
            work,
            warm_up=options["warm_up"],
            versions=f"MaxText {version('maxtext')}, jax {jax.__version__}",
            parameters=sum(parameter.size for parameter in parameters),
        )


def model_settings(model: dict[str, Any]) -> dict[str, Any]:
    """MaxText's names for the sizes of a ModelConfig."""
    return {
        "decoder_block": "deepseek",
        "attention_type": "mla",
        "mlp_activations": '["silu","linear"]',
        "vocab_size": model["vocab_size"],
        "base_emb_dim": model["d_model"],
        "base_num_decoder_layers": model["num_layers"],
        "first_num_dense_layers": model["num_dense_layers"],
        "base_num_query_heads": model["num_heads"],
        "base_num_kv_heads": model["num_heads"],
        "q_lora_rank": model["q_latent"],
        "kv_lora_rank": model["kv_latent"],
        "qk_nope_head_dim": model["nope_dim"],
        "qk_rope_head_dim": model["rope_dim"],
        "v_head_dim": model["v_dim"],
        "base_mlp_dim": model["dense_hidden"],
        "base_moe_mlp_dim": model["expert_hidden"],
        "num_experts": model["num_experts"],
        "num_experts_per_tok": model["experts_per_token"],
        "shared_experts": model["num_shared_experts"],
        "n_routing_groups": model["num_groups"],
        "topk_routing_group": model["num_kept_groups"],
        "routed_scaling_factor": model["gate_scale"],
        "routed_score_func": "sigmoid",
        "routed_bias": True,
        "routed_bias_update_rate": 1e-3,
        "rope_type": "default",
        "rope_max_timescale": int(model["rope_theta"]),
        "normalization_layer_epsilon": model["rms_eps"],
        "logits_via_embedding": model["tied_head"],
        "enable_dropout": False,
    }


def run_settings(options: dict[str, Any], folder: str) -> dict[str, Any]:
    """One device, synthetic tokens, the fastest exact form on a CPU, and nothing written."""
    return {
        "run_name": "benchmark",
        "base_output_directory": folder,
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "enable_goodput_recording": False,
        "jax_cache_dir": "",
        "log_config": False,
        "dataset_type": "synthetic",
        "packing": False,
        "per_device_batch_size": options["rows"],
        "max_target_length": options["length"],
        "steps": 1_000_000,
        "learning_rate": 1e-3,
        "dtype": options["dtype"],
        "weight_dtype": "float32",
        "attention": "dot_product",
        "sparse_matmul": True,
        "megablox": False,
        "capacity_factor": -1.0,
        "remat_policy": "none",
        # Layers stacked in front, as in ours. With its default, 1, the update of the routers'
        # biases fails in 0.2.5: [L, E] is added to [E, L].
        "param_scan_axis": 0,
    }


def set_up(config: Any, recorder: Any) -> tuple:
    """Mesh, compiled step, state and batch, as MaxText's `train_loop` makes them."""
    made = train_utils.setup_train_loop(config, recorder)
    _, _, shardings, _, mesh, _, batches, _, _, _, state = made
    graphdef, state = nnx.split(state)
    params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config,
        graphdef,
        mesh,
        state,
        shardings,
        train.train_step,
        train.eval_step,
        None,
        params,
    )
    return mesh, step, state, next(batches)


if __name__ == "__main__":
    main()
