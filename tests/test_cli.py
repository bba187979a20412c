"""The command line as its users meet it: what it says, where, and with which exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from torch.nn import functional as F

import flatminima
from conftest import TINY_ARGUMENTS, Comparison, Outcome
from flatminima.measures import MEASURES, resolve

Run = Callable[..., Outcome]

TARGET = """
import torch
from torch import nn

def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, generator=generator), torch.randint(0, 2, (40,), generator=generator)

def build():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), nn.functional.cross_entropy, data()

class OwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, pixels, labels):
        return {"loss": nn.functional.cross_entropy(self.body(pixels), labels)}

def own_loss():
    x, y = data()
    return OwnLoss(), None, [{"pixels": x[:30], "labels": y[:30]}, {"pixels": x[30:], "labels": y[30:]}]

def regression():
    x, y = data()
    return nn.Linear(3, 2), lambda output, target: (output - target[:, None]).abs().pow(3).mean(), (x, y)

def no_rows():
    x, y = data()
    return nn.Linear(3, 2), nn.functional.cross_entropy, (x[:0], y[:0])

def nan_input():
    x, y = data()
    x[17, 1] = float("nan")
    return nn.Linear(3, 2), nn.functional.cross_entropy, (x, y)

def label():
    x, y = data()
    y[11] = 2
    return nn.Linear(3, 2), nn.functional.cross_entropy, (x, y)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(TARGET)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    save_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), str(tmp_path / "w.safetensors"))
    return tmp_path / "w.safetensors"


def refused(outcome: Outcome, *texts: str) -> None:
    """Exit status 2 and one line of error that says all of this."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for text in texts:
        assert text in lines[0]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--data", "digit"), ["unknown data set 'digit': expected one of digits, "]),
        (("--data", "cifar-10"), ["unknown data set 'cifar-10': expected one of cifar10, cifar100, "]),
        (("--model", "resnet"), ["unknown model 'resnet': expected one of resnet18, "]),
        (("--methods", "sgd,sam-swad"), ["unknown method 'sam-swad': expected one of sam+swad, "]),
        (("--methods", " , "), ["--methods is empty", "sgd, sam, asam", "or all"]),
        (("--methods", "sgd,assam"), ["unknown method 'assam': expected one of asam, "]),
        (("--methods", "sgd,sam+asam"), ["'sam+asam' names 2 optimisers"]),
        (
            ("--methods", "sgd,sam-on"),
            ["model 'mlp' has none: choose --model convnet-bn, resnet18, resnet20, mnist-cnn, "],
        ),
        (("--seeds", "0"), ["--seeds must be at least 1, got 0"]),
        (("--rho", "-0.05"), ["--rho must be finite and >= 0, got -0.05"]),
        (("--rho", "nan"), ["--rho must be finite and >= 0, got nan"]),
        (("--steps", "10", "--epochs", "2"), ["--epochs 2 and --steps 10 were both given"]),
        (("--device", "tpu"), ["--device 'tpu' cannot be used"]),
        (("--train-size", "2000"), ["train_size is 2000: expected at most 1079"]),
        (("--workers", "0"), ["workers must be at least 1, got 0"]),
    ],
)
def test_a_bad_setting_is_refused_before_any_work(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], texts: list[str]
) -> None:
    refused(run("compare", *arguments, "--out", tmp_path / "new"), *texts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b truncated"])
def test_a_corrupt_data_file_is_named_with_both_checksums(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.parent.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "mnist" / f"{name}-ubyte.gz").write_bytes(content)
    monkeypatch.setenv("FLATMINIMA_DATA", str(tmp_path))
    outcome = run("compare", "--data", "mnist", "--out", tmp_path / "new")
    refused(outcome, str(path), "corrupt")
    assert len(set(re.findall(r"\b[0-9a-f]{32,64}\b", outcome.err))) == 2
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("FLATMINIMA_DATA", str(path))
    refused(run("compare", "--data", "mnist", "--out", tmp_path / "new"), "FLATMINIMA_DATA", "not a folder")


def test_an_output_directory_that_cannot_be_used_is_refused(run: Run, tmp_path: Path, comparison: Comparison) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(run("compare", "--out", tmp_path), str(tmp_path), "is not empty and holds no comparison")
    refused(run("compare", "--out", tmp_path / "notes.txt"), "notes.txt is a file")
    refused(run("compare", "--out", tmp_path / "notes.txt" / "x"), "cannot use", "Not a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    changed = run(*TINY_ARGUMENTS, "--seeds", 3, "--out", comparison.directory)
    refused(changed, "other settings", "seeds: 2 there, 3 now", "another --out")


def test_the_terminal_and_the_page_show_the_numbers_of_the_file(
    run: Run, tmp_path: Path, comparison: Comparison
) -> None:
    directory = tmp_path / "a [bold] name"  # square brackets are no markup
    shutil.copytree(comparison.directory, directory)
    outcome = run(*TINY_ARGUMENTS, "--out", directory)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-2:] == [str(directory / "results.json"), str(directory / "report.html")]
    results = json.loads((directory / "results.json").read_text())
    assert results == comparison.results
    assert " ".join(results["answer"].split()) in " ".join(outcome.out.split())
    page = (directory / "report.html").read_text()
    for heading, key, factor in (
        ("Test accuracy", lambda m: m["test_accuracy"], 100.0),
        ("Hessian trace", lambda m: m["measures"]["trace"], 1.0),
        ("parameter norm", lambda m: m["measures"]["parameter_norm"], 1.0),
    ):
        section = outcome.out[re.search(rf"^ +{heading}", outcome.out, re.M).start() :]
        for method in results["methods"]:
            line = re.search(rf"^ +{re.escape(method['method'].upper())} +(\d[\d.]*)(?: ± (\S+))?", section, re.M)
            assert line is not None, section
            mean, error = line.groups()
            decimals = len(mean.partition(".")[2])
            zeros = len(error) - len(error.rstrip("0")) if error and "." not in error else 0
            unit = 10.0 ** (zeros - decimals)
            assert abs(float(mean) - factor * key(method)["mean"]) <= 0.51 * unit
            assert (f"{mean} ± {error}" if error else mean) in page


def test_measure_gives_the_users_numbers(run: Run, target: Path, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    outcome = run("measure", f"{target}:build", "--checkpoint", weights, "--json", path)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == str(path)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert list(content["measures"]) == [m.name for m in resolve()]
    for measure in resolve():
        assert measure.label.split()[0][:8] in outcome.out

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    torch.manual_seed(3)
    model.load_state_dict(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict())
    space: dict[str, Any] = {}
    exec(TARGET, space)
    x, y = space["data"]()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(theta: torch.Tensor) -> torch.Tensor:
        pieces = theta.split([shape.numel() for shape in shapes.values()])
        state = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, state, (x.double(),)), y)

    hessian = torch.autograd.functional.hessian(loss, w)
    found = {name: m["value"] for name, m in content["measures"].items()}
    assert content["loss"] == pytest.approx(float(loss(w)), rel=1e-5)
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    assert found["lambda_max"] == pytest.approx(top, abs=4 * content["measures"]["lambda_max"]["error"] + 1e-5)
    assert found["trace"] == pytest.approx(float(hessian.trace()), abs=5 * content["measures"]["trace"]["error"] + 1e-5)
    assert found["w_hessian_w"] == pytest.approx(float(w @ hessian @ w), rel=1e-3)
    assert found["parameter_norm"] == pytest.approx(float(w.norm()), rel=1e-5)


def test_measure_takes_some_measures_and_no_others(run: Run, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    assert run("measure", f"{target}:build", "--measures", "trace, lambda_max", "--json", path).status == 0
    assert list(json.loads(path.read_text())["measures"]) == [n for n in MEASURES if n in ("trace", "lambda_max")]
    refused(
        run("measure", f"{target}:build", "--measures", "lamda_max"), "unknown measure 'lamda_max'", "of lambda_max"
    )


def test_measure_gives_curvature_with_errors_on_a_page(run: Run, target: Path, weights: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "deep" / "out", tmp_path / "numbers.json"
    arguments = (
        "measure", f"{target}:build", "--checkpoint", weights, "--top", 3, "--density", "--trace", "--layers", "--runs", 3,
        "--steps", 10, "--rows", 32, "--out", out, "--json", path,
    )  # fmt: skip
    outcome = run(*arguments)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-3:] == [str(p) for p in (out / "measure.json", out / "report.html", path)]
    found = json.loads((out / "measure.json").read_text(), parse_constant=pytest.fail)
    assert found == json.loads(path.read_text())
    assert found["command"] == " ".join(["flatminima", *map(str, arguments)])
    assert found["data"]["rows"] == 32
    assert list(found["measures"]) == [m.name for m in resolve()]
    assert [pair["rank"] for pair in found["eigenvalues"]] == [1, 2, 3]
    assert [row["name"] for row in found["layers"]] == ["0", "2"]
    assert found["density"]["runs"] == 3
    assert re.search(r"^top 3: \d+ products, residual \d\.\de-\d\d \(asked 1\.0e-03\)$", outcome.err, re.M), outcome.err
    assert re.search(r"^density: \d+ products$", outcome.err, re.M)
    assert re.search(r"^layers: 2, \d+ products$", outcome.err, re.M)
    for words in (found["answer"], *found["details"], *found["cautions"]):
        assert " ".join(words.split()) in " ".join(outcome.out.split())
    assert found["answer"] in (out / "report.html").read_text()
    again = run(*arguments)
    assert again.status == 0  # its own files are replaced
    second = json.loads((out / "measure.json").read_text())
    assert {k: v for k, v in second.items() if k != "times"} == {k: v for k, v in found.items() if k != "times"}


def test_measure_takes_other_matrices_and_leaves_the_measures_out(
    run: Run, target: Path, weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "numbers.json"
    values = {}
    for matrix in ("hessian", "ggn", "fisher", "empirical-fisher"):
        outcome = run(
            "measure", f"{target}:build", "--checkpoint", weights, "--measures", "none", "--top", 1, "--matrix", matrix,
            "--rtol", 1e-5, "--json", path,
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        content = json.loads(path.read_text())
        assert content["measures"] == {}
        assert content["matrix"]["name"] == matrix
        values[matrix] = content["eigenvalues"][0]["value"]
    assert values["ggn"] == pytest.approx(values["fisher"])
    assert values["ggn"] != pytest.approx(values["hessian"], rel=1e-6)
    assert values["ggn"] != pytest.approx(values["empirical-fisher"], rel=1e-6)


def test_measure_takes_models_that_compute_their_own_loss(run: Run, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    outcome = run("measure", f"{target}:own_loss", "--top", 2, "--layers", "--rows", 35, "--json", path)
    assert outcome.status == 0, outcome.err
    content = json.loads(path.read_text())
    assert content["model"]["name"] == "OwnLoss"
    assert content["data"]["rows"] == 35
    assert [row["name"] for row in content["layers"]] == ["body"]
    refused(run("measure", f"{target}:own_loss", "--matrix", "ggn", "--top", 1), "loss_fn")


def test_how_products_are_formed_can_be_chosen(run: Run, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    outcome = run(
        "measure", f"{target}:own_loss", "--measures", "none", "--top", 1, "--second-order", "finite-difference",
        "--max-memory", "64M", "--json", path,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert "note: finite differences" in outcome.out
    assert any("finite differences" in note for note in json.loads(path.read_text())["notes"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--top", "27"), "--top 27: the Hessian has only 26 eigenvalues, one for each of the 26 parameters"),
        (("--smallest", "27"), "--smallest 27: the Hessian has only 26 eigenvalues"),
        (("--top", "0"), "--top must be at least 1, got 0"),
        (("--top", "2", "--rtol", "nan"), "rtol must be positive and finite, got nan"),
        (("--trace", "--trace-rtol", "-1"), "--trace-rtol must be positive and finite, got -1.0"),
        (("--trace-rtol", "0.1"), "--trace-rtol 0.1 is of the traces; add --trace or --layers"),
        (("--top", "1", "--matrix", "ggm"), "unknown matrix 'ggm': expected one of ggn, "),
        (("--matrix", "ggn"), "--matrix ggn says of which matrix, not what; add --top"),
        (("--top", "2", "--runs", "3"), "--runs 3 is of the density; add --density"),
        (("--steps", "3"), "--steps 3 is of the density; add --density"),
        (("--density", "--runs", "1"), "--runs must be at least 2 (one run has no error band), got 1"),
        (("--measures", "none"), "--measures none leaves nothing; add --top"),
        (("--second-order", "third"), "second_order must be one of auto, graph, traced, calibrate, finite-difference"),
        (("--max-memory", "much"), "--max-memory must be a number of bytes such as 512M or 2G, got 'much'"),
        (("--max-memory", "0"), "--max-memory must be a number of bytes such as 512M or 2G, got '0'"),
        (("--rows", "0"), "--rows must be at least 1, got 0"),
        (("--rows", "41"), "--rows 41: the data have 40 rows"),
    ],
)
def test_bad_requests_for_curvature_are_refused(run: Run, target: Path, arguments: tuple[str, ...], text: str) -> None:
    refused(run("measure", f"{target}:build", *arguments), text)


def test_a_matrix_that_the_loss_does_not_have_is_refused(run: Run, target: Path) -> None:
    refused(
        run("measure", f"{target}:regression", "--top", 1, "--matrix", "fisher"), "needs a loss that is a likelihood"
    )


def test_an_output_directory_is_checked_before_the_users_code_runs(run: Run, target: Path, tmp_path: Path) -> None:
    target.write_text("raise RuntimeError('reached')")
    (tmp_path / "file").write_text("mine")
    refused(run("measure", f"{target}:build", "--top", 1, "--out", tmp_path / "file"), "is a file; --out must name")
    refused(
        run("measure", f"{target}:build", "--top", 1, "--out", tmp_path / "file" / "x"), "cannot use", "Not a directory"
    )


def test_symmetries_are_listed_layer_by_layer(run: Run, target: Path, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "symmetries.json"
    outcome = run("symmetries", f"{target}:build", "--checkpoint", weights, "--json", path)
    assert outcome.status == 0, outcome.err
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    kinds = {entry["kind"]: entry for entry in content["found"]}
    assert kinds["relu-unit-rescaling"]["sites"] == ["0 -> 2"]
    assert kinds["relu-unit-rescaling"]["proof"]["status"] == "proved"
    assert kinds["relu-unit-rescaling"]["proof"]["max_change"] < 1e-9
    assert kinds["temperature"]["preserves"] == "predictions"
    assert "no law" in kinds["temperature"]["hessian_law"]
    lines = outcome.out.splitlines()
    assert lines.index("0") < lines.index("2")  # the layers, in their order
    for entry in content["found"]:
        assert any(line.startswith(f"  {entry['kind']} ") and entry["preserves"] in line for line in lines)
    few = run("symmetries", f"{target}:build", "--kinds", "temperature", "--rows", 3)
    assert "temperature" in few.out
    assert "unit-permutation" not in few.out


def test_symmetries_of_models_that_take_dictionaries(run: Run, target: Path) -> None:
    outcome = run("symmetries", f"{target}:own_loss", "--mode", "train")
    assert outcome.status == 0, outcome.err
    assert "temperature: no layer scales all outputs alike" in " ".join(outcome.out.split())  # a loss is no logit


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--kinds", "permutation"), "unknown kind of symmetry 'permutation': expected one of"),
        (("--mode", "test"), "--mode must be one of eval, train, got 'test'"),
        (("--rows", "0"), "--rows must be at least 1, got 0"),
    ],
)
def test_bad_requests_for_symmetries_are_refused(run: Run, target: Path, arguments: tuple[str, ...], text: str) -> None:
    target.write_text("raise RuntimeError('reached')")  # before the user's own code runs
    refused(run("symmetries", f"{target}:build", *arguments), text)


def test_a_pickle_checkpoint_is_refused_with_the_reason(run: Run, target: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "w.pt")
    for job in ("measure", "audit", "symmetries"):
        outcome = run(job, f"{target}:build", "--checkpoint", tmp_path / "w.pt")
        refused(outcome, str(tmp_path / "w.pt"), "reading a pickle can run any code", "safetensors.torch.save_model")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    refused(run("measure", f"{target}:build", "--checkpoint", tmp_path / "w.pt"), "does not fit", "missing 0.weight")
    refused(run("measure", f"{target}:build", "--checkpoint", tmp_path / "x.pt"), "no checkpoint at")


@pytest.mark.parametrize("job", ["measure", "audit"])
@pytest.mark.parametrize(
    ("function", "texts"),
    [
        ("biuld", ["has no function 'biuld'; it has build"]),
        ("no_rows", ["empty"]),
        ("nan_input", ["nan", "row 17"]),
        ("label", ["row 11", "got 2", "expected 0..1"]),
    ],
)
def test_what_is_wrong_with_the_users_data_is_named(
    run: Run, target: Path, job: str, function: str, texts: list[str]
) -> None:
    outcome = run(job, f"{target}:{function}")
    refused(outcome)
    for text in texts:
        assert text in outcome.err.lower()


@pytest.mark.parametrize("job", ["measure", "audit"])
def test_other_bad_arguments_are_refused(run: Run, target: Path, tmp_path: Path, job: str) -> None:
    refused(run(job, target), "expected path/to/file.py:function, got")
    refused(run(job, f"{tmp_path / 'absent.py'}:build"), "no file", "absent.py")
    refused(run(job, f"{target}:build", "--device", "tpu"), "--device 'tpu' cannot be used")
    target.write_text("raise RuntimeError('reached')")
    for path in (tmp_path, tmp_path / "no" / "x.json"):  # before the user's own code runs
        refused(run(job, f"{target}:build", "--json", path), f"--json {path} cannot be written")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("measure", "--rho", "-1"), "rho must be positive and finite, got -1.0"),
        (("measure", "--max-probes", "1"), "max_probes must be at least 10, got 1"),
        (("audit", "--members", "0"), "--members must be at least 1, got 0"),
        (("audit", "--max-scale", "1"), "--max-scale must be finite and above 1, got 1.0"),
    ],
)
def test_bad_accuracies_are_refused_by_name(run: Run, target: Path, arguments: tuple[str, ...], text: str) -> None:
    job, *rest = arguments
    refused(run(job, f"{target}:build", *rest), text)


def test_version_and_help(run: Run) -> None:
    assert run("--version") == Outcome(0, f"flatminima {flatminima.__version__}\n", "")
    for job in ("compare", "measure", "audit", "symmetries"):
        outcome = run(job, "--help")
        assert outcome.status == 0
        assert "Usage:" in outcome.out
    assert run("comparr").status == 2


def test_as_a_program_an_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from flatminima.cli import main; main()", "compare", "--data", "digts"],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(flatminima.__file__).parents[1])},
    )  # fmt: skip
    refused(Outcome(done.returncode, done.stdout, done.stderr), "unknown data set 'digts': expected one of digits, ")
    assert list(tmp_path.iterdir()) == []
