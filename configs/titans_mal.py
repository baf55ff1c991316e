"""Titans as layer before a window of attention, bytes of Python source; @170M to @1.3B are the paper's."""

from configs.titans_lmm import TITANS, laptop, paper
from layers.attention import Attention
from layers.memory_as_layer import MemoryAsLayer
from layers.titans import Titans

config = laptop(__doc__, MemoryAsLayer(Titans(H=4, persistent=4), Attention(H=4, window=64, persistent=4)), 1_401_952)
sizes = paper(
    __doc__,
    lambda H: MemoryAsLayer(Titans(H=H, persistent=128), Attention(H=H, window=2048, persistent=128)),
    TITANS,
    [176_418_240, 516_584_192, 1_102_817_280, 1_506_585_952],
)
