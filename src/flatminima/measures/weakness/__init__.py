"""Weakness."""
from flatminima.measures.weakness.tasks import Task
from flatminima.measures.weakness.vocabulary import FiniteVocabulary, VocabularyError
