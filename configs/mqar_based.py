"""Associative recall (MQAR), 4 pairs in 64 tokens: a gated convolution, then Based's Taylor map."""

from configs.mqar import experiment
from layers.linear import LinearAttention

config = experiment("Based's Taylor map", LinearAttention(H=1, K=16, feature_map="taylor"), 31_232)
