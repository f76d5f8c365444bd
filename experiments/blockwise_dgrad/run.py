"""Gradients in 128x128 blocks instead of 1x128 tiles: error of each layer's gradient, and the loss.

    python experiments/blockwise_dgrad/run.py [--folder FOLDER]

Takes the runs `bf16` and `fp8` of fp8_vs_bf16 from the folder, or trains them, and trains another
of that configuration with `--quant.recipe fp8_square_gradients`: 10 to 25 minutes on two CPU cores.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from captured import Trained, trained, with_recipe
from curves import command, main_losses, relative_error, smoothed, train

from dsv3_jax.checkpoint.names import to_layers
from dsv3_jax.cli import run
from dsv3_jax.model.precision import class_of
from dsv3_jax.train.step import gradients

RECIPES = ("fp8", "fp8_square_gradients")
STEPS = (500, 1000)


def tell(folder: Path) -> None:
    """Trains what is missing and prints both tables."""
    runs = {
        recipe: train(folder, recipe, "--quant.recipe", recipe) for recipe in ("bf16", *RECIPES)
    }
    print("| run | smoothed loss at the end | relative error to bf16, mean of the last half |")
    print("| --- | --- | --- |")
    for name, path in runs.items():
        error = 100 * relative_error(path, runs["bf16"])
        print(
            f"| `{name}` | {smoothed(main_losses(path))[-1]:.4f} "
            f"| {error[len(error) // 2 :].mean():+.3f} % |"
        )
    for step in STEPS:
        print(f"\nError of the gradient over its norm, weights of step {step} of `bf16`\n")
        errors(trained(runs["bf16"], step))


def errors(of: Trained) -> None:
    """Of the gradients of every layer's quantised weights, all together, against float32's."""
    exact = layers(of, "f32")
    found = {recipe: layers(of, recipe) for recipe in RECIPES}
    print(f"| layer | {' | '.join(RECIPES)} | ratio |")
    print("| --- | --- | --- | --- |")
    for layer in dict.fromkeys(map(layer_of, exact)):
        names = [name for name in exact if layer_of(name) == layer]
        norm = np.sqrt(sum(np.sum(np.square(exact[name])) for name in names))
        share = [
            np.sqrt(sum(np.sum(np.square(got[name] - exact[name])) for name in names)) / norm
            for got in found.values()
        ]
        shown = " | ".join(f"{value:.2%}" for value in share)
        print(f"| {layer} | {shown} | {share[1] / share[0]:.2f} |")


def layers(of: Trained, recipe: str) -> dict[str, np.ndarray]:
    """Gradients of a recipe, activations in float32, of the weights that recipes quantise."""
    cfg = with_recipe(of.cfg, recipe, "float32")
    step = jax.jit(lambda state, batch: gradients(of.graphdef, state, batch, jnp.float32(0), cfg))
    grads = to_layers(step(of.state, of.batch)[1], cfg.model.num_dense_layers)
    return {name: g.astype(float) for name, g in grads.items() if class_of(name)}


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


if __name__ == "__main__":
    run(command(tell, __doc__))
