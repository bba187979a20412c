"""Weakness: how many ways of going on a set of training labels leaves open, exactly and with proofs.

Three vocabularies, from the definition to networks (M. T. Bennett, "Are Flat Minima an Illusion?", arXiv:2605.05209):

- finite: :class:`FiniteVocabulary` and :class:`Task` count statements, policies and their chances exactly;
- region-class: :func:`region_weakness` counts the activation patterns that no training point falls into;
- feature-classifier: :func:`pair_proxy` decides for every probe and class whether a linear layer on frozen features can
  still put the one on the other; :func:`exact_extension` counts all statements on a few probes; :func:`sample_completions`
  and :func:`version_space_volume` measure by random draws; :func:`leverage` is a cheap rival.

:func:`features` reads the features of any model. What these numbers are not is said in ``docs/weakness.md``.
"""

from flatminima.measures.weakness.completions import Completions, sample_completions
from flatminima.measures.weakness.extension import Extension, exact_extension
from flatminima.measures.weakness.features import FeatureError, features
from flatminima.measures.weakness.leverage import Leverage, leverage
from flatminima.measures.weakness.pair_proxy import PairProxy, pair_proxy
from flatminima.measures.weakness.proofs import Certificate
from flatminima.measures.weakness.regions import RegionWeakness, patterns, region_weakness
from flatminima.measures.weakness.tasks import Task
from flatminima.measures.weakness.verification import Verification
from flatminima.measures.weakness.vocabulary import FiniteVocabulary, VocabularyError
from flatminima.measures.weakness.volume import VersionSpaceVolume, version_space_volume

__all__ = [
    "Certificate",
    "Completions",
    "Extension",
    "FeatureError",
    "FiniteVocabulary",
    "Leverage",
    "PairProxy",
    "RegionWeakness",
    "Task",
    "Verification",
    "VersionSpaceVolume",
    "VocabularyError",
    "exact_extension",
    "features",
    "leverage",
    "pair_proxy",
    "patterns",
    "region_weakness",
    "sample_completions",
    "version_space_volume",
]
