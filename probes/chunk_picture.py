"""Draws what a chunk does to a key that repeats: python -m probes.chunk_picture writes docs/test_time_memory.png."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from layers.ops import fast_weights as fw
from layers.ops.memory_forms import Rule
from layers.ops.test_time import Gate, test_time_memory

T, C = 12, 4


def answers(lr: float, rule: Rule) -> np.ndarray:
    """What a memory of one number says to the key 1, whose value is 1, after each token."""
    ones = jnp.ones((1, T, 1, 1))
    gates = {"w0": Gate(lr * ones)}
    pos = jnp.arange(T, dtype=jnp.int32)[None]
    y, _ = test_time_memory(rule, ones, ones, ones, gates, ({"w0": jnp.zeros((1, 1, 1))}, None), pos=pos)
    return np.concatenate([[0.0], np.asarray(y)[0, :, 0, 0]])


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    linear = fw.network("mlp", 1)
    exact, frozen = Rule(linear, fw.l2, chunk=C, exact="l2"), Rule(linear, fw.l2, chunk=C)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    for ax, lr in zip(axes, (0.1, 0.3, 0.6), strict=True):
        for start in range(0, T, C):
            ax.axvspan(start, start + C, color="0.93" if start // C % 2 else "white", zorder=0)
        ax.axhline(1, color="0.6", linewidth=1, linestyle="--")
        ax.plot(
            range(T + 1), answers(lr, exact), "o-", markersize=4, label="exact: gradient at the last token's weights"
        )
        ax.plot(range(T + 1), answers(lr, frozen), "s-", markersize=4, label="frozen: gradient at the chunk's start")
        ax.set(title=f"lr {lr}: lr · chunk = {lr * C:.1f}", xlabel="tokens", xlim=(0, T))
        ax.set_xticks(range(0, T + 1, C))
    axes[0].set(ylabel="answer to a key of value 1", ylim=(-2.2, 4.2))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).parents[1] / "docs" / "test_time_memory.png")
