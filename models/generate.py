"""The door to generation: `python -m models.generate RUN --prompt "import "`."""

import dataclasses
import resource
import sys
import time
from typing import Any

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
    read_twice: bool = False
    """Read the prompt twice before going on, as recurrent models like it (JRT-prompt, arXiv 2407.05483)."""
    prefix: int | None = None
    """Tokens of the prompt that layers with an encoder (JRT-RNN) read ahead; as many as in training by default."""
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
    from models.decode import Decoder, Sampling, printable
    from training.run import load_model

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        model, _, dataset = load_model(options.run, options.step)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    ids = prompt_ids(dataset, options.prompt, options.read_twice)
    print(options.prompt, end="", flush=True)
    text, words, stamps, held = "", [], [time.perf_counter()], 0
    prefix = dataset.prefix if options.prefix is None else options.prefix
    try:
        for new in Decoder(model).generate([ids], options.steps, sampling, seed=options.seed, prefix=prefix):
            words.extend(new[0])
            stamps.append(time.perf_counter())
            held = held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            # A character may be complete only with the next token.
            whole = dataset.decode(np.array(words)).rstrip("\ufffd")
            print(printable(whole[len(text) :]), end="", flush=True)
            text = whole
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"\n[{_account(len(words), stamps, held)}]", file=sys.stderr)


def prompt_ids(dataset: Any, text: str, twice: bool = False) -> list[int]:
    """The words of a document that begins with a text, or with the text and the text again."""
    ids = dataset.encode(text).tolist()
    start = [] if dataset.doc_start is None else [dataset.doc_start]
    return start + ids * (2 if twice else 1)


def _account(tokens: int, stamps: list[float], held: int) -> str:
    """Tokens a second at first and at last, and what memory grew by in between. stamps: before and after each burst."""
    start = f"{tokens} tokens; {stamps[1] - stamps[0]:.1f} s to compile, read the prompt and draw the first"
    bursts, part = len(stamps) - 2, (len(stamps) - 2) // 4
    if part == 0:
        return start
    burst = tokens / (bursts + 1)
    first = burst * part / (stamps[1 + part] - stamps[1])
    last = burst * part / (stamps[-1] - stamps[-1 - part])
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    return f"{start}; then {first:.0f} tokens a second in the first quarter, {last:.0f} in the last, {more:.1f} MB more"


if __name__ == "__main__":
    main()
