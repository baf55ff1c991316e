"""Titans as context of attention in segments, bytes of Python source; @170M to @1.3B are the paper's."""

from configs.titans_lmm import TITANS, laptop, paper
from layers.memory_as_context import MemoryAsContext
from layers.titans import Titans

config = laptop(__doc__, MemoryAsContext(Titans(H=4), H=4, segment=64, persistent=4), 1_532_128)
sizes = paper(
    __doc__,
    lambda H: MemoryAsContext(Titans(H=H), H=H),
    TITANS,
    [189_413_376, 563_820_800, 1_211_420_928, 1_652_940_640],
)
