"""Memora: weights on a simplex, bytes of Python source; @170M to @1.3B are the paper's."""

from configs.titans_lmm import TITANS, laptop, paper
from layers.miras import Memora

config = laptop(__doc__, Memora(H=4), 1_308_160)
sizes = paper(__doc__, lambda H: Memora(H=H), TITANS, [148_188_480, 416_139_776, 876_654_336, 1_206_696_448])
