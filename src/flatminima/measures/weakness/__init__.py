"""Weakness."""
from flatminima.measures.weakness.pair_proxy import PairProxy, pair_proxy
from flatminima.measures.weakness.extension import exact_extension, Extension
from flatminima.measures.weakness.leverage import leverage
from flatminima.measures.weakness.regions import region_weakness, patterns
from flatminima.measures.weakness.features import features, FeatureError
from flatminima.measures.weakness.tasks import Task
from flatminima.measures.weakness.vocabulary import FiniteVocabulary, VocabularyError
