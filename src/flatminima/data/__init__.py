"""Real data sets, read, checked, split and standardised.

Files are looked up in the folder named by the environment variable `FLATMINIMA_DATA`, then in the user's cache
folder, into which the data set's own site (or its official mirror) is downloaded when it has one. Every file with a
known checksum is verified before it is read. Nothing is ever unpickled.
"""

from flatminima.data.domains import DOMAIN_DATASETS, MultiDomain, load_domains
from flatminima.data.incremental import INCREMENTAL_DATASETS, ClassData, load_incremental
from flatminima.data.registry import DATASETS, load, load_pacs_domain
from flatminima.data.splits import DataError, Splits, TensorSplit, validate

__all__ = [
    "DATASETS",
    "DOMAIN_DATASETS",
    "INCREMENTAL_DATASETS",
    "ClassData",
    "DataError",
    "MultiDomain",
    "Splits",
    "TensorSplit",
    "load",
    "load_domains",
    "load_incremental",
    "load_pacs_domain",
    "validate",
]
