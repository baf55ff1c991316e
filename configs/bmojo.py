"""B'MOJO-F: a window of attention, and the one before it as Gated DeltaNet remembers it, bytes of Python source."""

from configs.titans_lmm import laptop
from layers.bmojo import BMojoFading
from layers.gated_deltanet import GatedDeltaNet

config = laptop(__doc__, BMojoFading(GatedDeltaNet(H=4), H=4, window=64), 1_322_592)
