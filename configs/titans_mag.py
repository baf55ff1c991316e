"""Titans as gate of a window of attention, bytes of Python source; @170M to @1.3B are the paper's."""

from configs.titans_lmm import TITANS, laptop, paper
from layers.attention import Attention
from layers.memory_as_gate import MemoryAsGate
from layers.titans import Titans

config = laptop(__doc__, MemoryAsGate(Attention(H=4, window=64, persistent=4), Titans(H=4, persistent=4)), 1_402_464)
sizes = paper(
    __doc__,
    lambda H: MemoryAsGate(Attention(H=H, window=2048, persistent=128), Titans(H=H, persistent=128)),
    TITANS,
    [176_427_456, 516_608_768, 1_102_854_144, 1_506_622_816],
)
