"""Associative recall (MQAR), 4 pairs in 64 tokens: a gated convolution, then the delta rule."""

from configs.mqar import experiment
from layers.deltanet import DeltaNet

config = experiment("the delta rule", DeltaNet(H=2), 38_304)
