"""The known data sets: their files, checksums, addresses and class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flatminima.data.files import DataFile, data_folder, locate, missing, verify
from flatminima.data.formats import idx_images, image_folder, in_memory, read_cifar_archive, read_parquet
from flatminima.data.splits import DataError, IntArray, LabelledImages, PixelArray
from flatminima.names import unknown

PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
PACS_DOMAINS = {
    "art_painting": "sha256:2db7a877a2ed4c65da0e4325442d26a210a9af1a77dfaaab34cc7929323a709b",
    "cartoon": "sha256:2c4be018996d8bad4307d96bb46660e5e0d4a081fe5d63a3aac7897ba75ff66e",
    "photo": "sha256:759407a1cf785a3318b4fb8301d628659f1cff09e576ac95b65b6a557f9bfd55",
    "sketch": "sha256:98430d73fa35627ad81315ba1a96979dce47e897fded03fee58ae529b8e2bc68",
}
PACS_SIZE = (64, 64)

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MNIST_SITES = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
FASHION_SITES = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
IDX_NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MNIST_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
FASHION_SHA256 = (
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
CIFAR_SITE = "https://www.cs.toronto.edu/~kriz/"
# (JPEG parquet, official binary archive); the site publishes md5 only.
CIFAR_FILES = {
    "cifar10": (
        DataFile("cifar10/cifar10.parquet", "sha256:8b84f5ce124fd477543311223a2884152a5aab1cde92306ef80598b2dcf36b8d"),
        DataFile(
            "cifar10/cifar-10-binary.tar.gz",
            "md5:c32a1d4ab5d03f1284b67883e8d87530",
            (f"{CIFAR_SITE}cifar-10-binary.tar.gz",),
        ),
    ),
    "cifar100": (
        DataFile(
            "cifar100/cifar100.parquet", "sha256:a10b9bbc596be5b8118247521104753a9a94a869550c19e7019491d2a059a446"
        ),
        DataFile(
            "cifar100/cifar-100-binary.tar.gz",
            "md5:03b5dce01913d631647c71ecec9e9cb8",
            (f"{CIFAR_SITE}cifar-100-binary.tar.gz",),
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Source:
    """A data set before it is cut: `test` is None where there is no official one.

    `strata` is what a split keeps in proportion, for the rows of `train`: the class, or the class within a domain.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages | None
    strata: IntArray
    note: str


def digits() -> Source:
    """Scikit-learn's embedded digits: 1,797 gray 8x8 images of 17 levels, no file needed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = in_memory(bunch.images.astype(np.uint8)[:, None], bunch.target)
    note = "scikit-learn's digits (test part of the UCI optical recognition data), 8x8 gray."
    return Source("digits", tuple("0123456789"), images, None, images.labels, note)


def mnist() -> Source:
    """MNIST, 28x28 gray."""
    return _idx("mnist", MNIST_SHA256, MNIST_SITES, tuple("0123456789"))


def fashion_mnist() -> Source:
    """Fashion-MNIST, 28x28 gray."""
    return _idx("fashion-mnist", FASHION_SHA256, FASHION_SITES, FASHION_CLASSES)


def _idx(name: str, sha256: Sequence[str], sites: Sequence[str], classes: tuple[str, ...]) -> Source:
    paths = [
        locate(
            DataFile(f"{name}/{file}-ubyte.gz", f"sha256:{digest}", tuple(f"{site}{file}-ubyte.gz" for site in sites))
        )
        for file, digest in zip(IDX_NAMES, sha256, strict=True)
    ]
    train, test = idx_images(paths[0], paths[1]), idx_images(paths[2], paths[3])
    return Source(name, classes, train, test, train.labels, "The official files, 28x28 gray; official test set.")


def cifar10() -> Source:
    """CIFAR-10, 32x32 RGB."""
    return _cifar("cifar10")


def cifar100() -> Source:
    """CIFAR-100 with its 100 fine labels, 32x32 RGB."""
    return _cifar("cifar100")


def _cifar(name: str) -> Source:
    path = locate(*CIFAR_FILES[name])
    if path.suffix != ".parquet":
        archive = read_cifar_archive(path)
        note = "The official binary version, 32x32 RGB; official test set."
        return Source(name, archive.classes, archive.train, archive.test, archive.train.labels, note)
    parquet = read_parquet(path, (32, 32))
    split = np.asarray(parquet.split)
    train, test = (parquet.images.subset(np.flatnonzero(split == part)) for part in ("train", "test"))
    note = "JPEG-recompressed 32x32 RGB, so accuracies are slightly below those on lossless pixels; official test set."
    return Source(name, parquet.classes, train, test, train.labels, note)


def pacs(domains: Sequence[str] = tuple(PACS_DOMAINS)) -> Source:
    """PACS, the given domains pooled in the given order, 64x64 RGB; only a folder named by the user holds it.

    Each domain is `pacs/<domain>.parquet` or a folder `pacs/<domain>/<class>/<file>` in `FLATMINIMA_DATA`.
    """
    parts = [_pacs_domain(domain) for domain in domains]
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])
    labels = np.concatenate([part.labels for part in parts])
    domain_of = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])

    def pixels(rows: IntArray) -> PixelArray:
        out = np.empty((len(rows), 3, *PACS_SIZE), dtype=np.uint8)
        for index, part in enumerate(parts):
            here = domain_of[rows] == index
            out[here] = part.pixels(rows[here] - starts[index])
        return out

    name = "pacs" if len(parts) == len(PACS_DOMAINS) else f"pacs/{'+'.join(domains)}"
    note = (
        f"PACS, {', '.join(domain.replace('_', ' ') for domain in domains)}, 64x64 RGB; no official test set is used."
    )
    strata = domain_of * len(PACS_CLASSES) + labels
    return Source(name, PACS_CLASSES, LabelledImages(labels, pixels), None, strata, note)


def _pacs_domain(domain: str) -> LabelledImages:
    if domain not in PACS_DOMAINS:
        raise DataError(unknown("PACS domain", domain, PACS_DOMAINS))
    folder = data_folder()
    parquet, images = f"pacs/{domain}.parquet", f"pacs/{domain}"
    if folder is not None and (folder / parquet).is_file():
        verify(folder / parquet, PACS_DOMAINS[domain])
        return read_parquet(folder / parquet, PACS_SIZE).images
    if folder is not None and (folder / images).is_dir():
        return image_folder(folder / images, PACS_CLASSES, PACS_SIZE)
    raise DataError(missing([parquet, f"{images}/<class>/<file>"]))
