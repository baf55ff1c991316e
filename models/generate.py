"""The door to generation: `python -m models.generate RUN --prompt "import "`."""

import dataclasses
import sys
import time

import numpy as np
import tyro


@dataclasses.dataclass
class Options:
    """Continues a prompt with the model of a run, streaming to the terminal.

    Bounded memories decode in constant memory at constant speed, however many steps.
    """

    run: tyro.conf.Positional[str]
    """Folder of a run, such as runs/quickstart."""
    prompt: str = ""
    """What to continue; empty for the start of a document."""
    steps: int = 400
    """New tokens."""
    temperature: float = 0.8
    """0 for the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest tokens whose probabilities reach p."""
    seed: int = 0
    step: int | None = None
    """The checkpoint to use; the newest by default."""


def main() -> None:
    options = tyro.cli(Options, prog="python -m models.generate")
    from models.decode import Decoder, Sampling
    from training.run import load_model

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        model, _, dataset = load_model(options.run, options.step)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    ids = dataset.encode(options.prompt)
    if dataset.doc_start is not None:
        ids = np.concatenate([[dataset.doc_start], ids])
    print(options.prompt, end="", flush=True)
    text, words, begun = "", [], time.perf_counter()
    try:
        for new in Decoder(model).generate([list(ids)], options.steps, sampling, seed=options.seed):
            words.extend(new[0])
            # A character may be complete only with the next token.
            whole = dataset.decode(np.array(words)).rstrip("\ufffd")
            print(whole[len(text) :], end="", flush=True)
            text = whole
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    rate = len(words) / (time.perf_counter() - begun)
    print(f"\n[{len(words)} tokens, {rate:.0f} a second, reading the prompt and compiling included]", file=sys.stderr)


if __name__ == "__main__":
    main()
