"""Averaging the weights of one training run: the mean itself, when to start and stop it, and BatchNorm afterwards."""

from flatminima.averaging.average import Mean, WeightAverage
from flatminima.averaging.batchnorm import reestimate_batchnorm
from flatminima.averaging.swad import SWAD, SWADResult, SWADStatus

__all__ = ["SWAD", "Mean", "SWADResult", "SWADStatus", "WeightAverage", "reestimate_batchnorm"]
