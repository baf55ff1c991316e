"""Moneta: the loss |.|^3 and 4-norm of the weights, bytes of Python source; @170M to @1.3B are the paper's."""

from configs.titans_lmm import TITANS, laptop, paper
from layers.miras import Moneta

config = laptop(__doc__, Moneta(H=4), 1_308_160)
sizes = paper(__doc__, lambda H: Moneta(H=H), TITANS, [148_188_480, 416_139_776, 876_654_336, 1_206_696_448])
