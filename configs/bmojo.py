"""B'MOJO-F: attention continued by what a recurrence made of the past, bytes of Python source; @1.4B as the paper's."""

from configs.titans_lmm import laptop, paper
from layers.bmojo import BMojoFading
from layers.gated_deltanet import GatedDeltaNet
from layers.mamba2 import Mamba2

config = laptop(__doc__, BMojoFading(GatedDeltaNet(H=4), H=4, window=64), 1_322_592)

# The paper (arXiv 2407.06324) goes up to 1.4B; the shapes and rates of its models were not at hand. Blocks, width,
# heads, peak learning rate, billions of tokens and pod are ours: 16 blocks of width 2,048 come to that size. Its
# recurrence is Mamba; this house has Mamba-2, which the authors' later code offers too.
PAPER = {"1.4B": (16, 2048, 16, 7e-4, 100, "v6e:4x4")}
sizes = paper(__doc__, lambda H: BMojoFading(Mamba2(), H=H, window=512), PAPER, [1_354_195_968], T=2048)
