"""What a finished run leaves to look at: the loss beside compressors, loss by position, and a sample."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from models.decode import Sampling, generate, printable
from training.experiment import Experiment
from training.figures import loss_curve, position_curve
from training.run import Outcome

SAMPLE_TOKENS = 600


def report(experiment: Experiment, outcome: Outcome, run: Path, console: Console | None = None) -> None:
    """Writes figures/ and samples.txt, and says where; `outcome` is of a run that is done."""
    console = console or Console()
    dataset, held_out = outcome["dataset"], outcome["evaluation"]
    written = []
    references = dataset.references() if "bits_per_byte" in held_out else {}
    if references:
        table = Table("held-out text", "bits a byte", title_justify="left")
        rows = {**references, f"{run.name}, step {outcome['step']:,}": held_out["bits_per_byte"]}
        for name, bits in sorted(rows.items(), key=lambda row: -row[1]):
            ours = name not in references
            table.add_row(name, f"{bits:.3f}", style="bold" if ours else None)
        console.print(table)
    written.append(loss_curve(run, references=references))
    if "bits_per_byte" in held_out:
        written.append(position_curve(run))
    if experiment.sample is not None:
        path = run / "samples.txt"
        text = sample(outcome, experiment.sample)
        path.write_text(f"step {outcome['step']}, temperature 0.7\n{'-' * 40}\n{text}\n")
        # A model of bytes may write what moves a terminal's cursor.
        shown = printable(text[:400])
        console.print(f"\n{shown}\n", markup=False, highlight=False)
        written.append(path)
    console.print("written: " + ", ".join(map(str, written)), markup=False, highlight=False, soft_wrap=True)


def sample(outcome: Outcome, prompt: str, tokens: int = SAMPLE_TOKENS) -> str:
    """The prompt and its continuation by the trained model, at temperature 0.7."""
    dataset = outcome["dataset"]
    ids = dataset.encode(prompt)
    if dataset.doc_start is not None:
        ids = np.concatenate([[dataset.doc_start], ids])
    words = generate(outcome["model"], [ids], tokens, Sampling(temperature=0.7), prefix=dataset.prefix)
    return prompt + dataset.decode(words[0])
