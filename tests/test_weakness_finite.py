"""Finite vocabularies against plain enumeration over all subsets, and against the recorded vectors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatminima.measures.weakness import FiniteVocabulary, Task, VocabularyError

VECTORS = json.loads((Path(__file__).parent / "vectors" / "weakness_finite.json").read_text())


def letters(text: str) -> frozenset[str]:
    return frozenset(text)


def vocabulary(case: dict, **more: list[int]) -> FiniteVocabulary:
    return FiniteVocabulary(case["Phi"], {**case["v"], **more})


def by_subsets(states: Iterable[int], programs: dict[str, Iterable[int]]) -> set[frozenset[str]]:
    """The embodied language from its definition: every subset of the programs, tested for a common state."""
    language = set()
    for size in range(len(programs) + 1):
        for chosen in itertools.combinations(programs, size):
            if set(states).intersection(*(programs[name] for name in chosen)):
                language.add(frozenset(chosen))
    return language


@pytest.mark.parametrize("name", ["V1", "V2", "V5_vocabulary_dependence"])
def test_size_of_the_language(name: str) -> None:
    assert vocabulary(VECTORS[name]).size == VECTORS[name]["size_L"]


@pytest.mark.parametrize("name", [n for n in VECTORS if isinstance(VECTORS[n], dict) and "w" in VECTORS[n]])
def test_weakness_vectors(name: str) -> None:
    v = vocabulary(VECTORS[name])
    for statement, weakness in VECTORS[name]["w"].items():
        assert v.weakness(letters(statement)) == weakness == len(v.extension(letters(statement)))


def test_statements_that_are_none() -> None:
    v = vocabulary(VECTORS["V1"])
    for text in VECTORS["V1"]["not_in_L"]:
        assert letters(text) not in v
        with pytest.raises(VocabularyError, match="no state satisfies all of it"):
            v.weakness(letters(text))


def test_policies_of_states() -> None:
    v = vocabulary(VECTORS["V1"])
    for state, (policy, weakness) in VECTORS["V1"]["policy_of_state"].items():
        assert v.policy_of_state(int(state)) == letters(policy)
        assert v.weakness(letters(policy)) == weakness


def test_complement_closed_vocabulary_leaves_every_policy_of_a_state_at_weakness_one() -> None:
    case = VECTORS["V4_complement_closed"]
    v = vocabulary(case)
    assert v.size == case["size_L"]
    assert {v.weakness(v.policy_of_state(s)) for s in case["Phi"]} == {case["w_policy_of_every_state"]}


def test_one_more_program_flips_a_ranking() -> None:
    case = VECTORS["V5_vocabulary_dependence"]
    v = vocabulary(case, **case["add"])
    assert v.size == case["size_L_after"]
    assert {p: v.weakness([p]) for p in case["w_after"]} == case["w_after"]


def test_region_class_vocabulary_from_its_definition() -> None:
    case = VECTORS["V3_region_class"]
    states = list(itertools.product(range(case["K"]), repeat=case["R"]))  # one class per region
    programs = {
        f"{r}{c}": [s for s in states if s[r] == c] for r, c in itertools.product(range(case["R"]), range(case["K"]))
    }
    v = FiniteVocabulary(states, programs)
    assert v.size == case["size_L"] == v.weakness([])
    assert v.weakness(["00"]) == case["w_one_region"]
    assert v.weakness(["00", "11"]) == case["w_two_regions"]
    assert v.weakness(["00", "11", "20"]) == case["w_total_function"]


def test_larger_truth_set_is_not_weaker_and_longer_is_not_stronger() -> None:
    v = vocabulary(VECTORS["V6_truthset_vs_weakness"])
    assert len(v.truth_set(["D"])) > len(v.truth_set(["A"]))
    assert v.weakness(["D"]) < v.weakness(["A"])
    v = vocabulary(VECTORS["V7_length_vs_weakness"])
    assert v.description_length("B") < v.description_length(["A", "C"])
    assert v.weakness("B") < v.weakness(["A", "C"])


def test_task_vectors() -> None:
    case = VECTORS["V2"]["task"]
    task = Task(vocabulary(VECTORS["V2"]), [letters(t) for t in case["I"]], [letters(t) for t in case["O"]])
    assert set(task.correct_policies) == {letters(t) for t in case["correct"]}
    assert task.weakest_policies == (letters("A"),)
    assert task.unseen == {letters(t) for t in case["U"]}
    for policy in case["correct"]:
        names = letters(policy)
        assert len(task.buffer(names)) == case["buffer_size"][policy]
        assert task.vocabulary.weakness(names) == len(task.outputs) + len(task.buffer(names))
        assert task.survival_probability(names) == case["survival_uniform"][policy]
        assert task.survival_probability(names, {1: 1.0}) == case["survival_k1"][policy]
        assert task.survival_probability(names, [0, 0, 1.0]) == case["survival_k2"][policy]


vocabularies = st.integers(1, 6).flatmap(
    lambda states: st.lists(
        st.frozensets(st.integers(0, states - 1)), min_size=0, max_size=6, unique=True
    ).map(lambda sets: (states, {"ABCDEF"[i]: sorted(s) for i, s in enumerate(sets)}))
)  # fmt: skip


@given(vocabularies)
def test_enumeration_equals_the_definition(case: tuple[int, dict[str, list[int]]]) -> None:
    states, programs = case
    v = FiniteVocabulary(range(states), programs)
    language = by_subsets(range(states), programs)
    assert set(v.statements()) == language
    assert v.size == len(language)
    for statement in language:
        extension = {y for y in language if statement <= y}
        assert v.extension(statement) == extension
        assert v.weakness(statement) == len(extension)
        for smaller in statement:  # fewer programs never make a stronger statement
            assert v.weakness(statement - {smaller}) >= v.weakness(statement)


@given(st.integers(0, 12), st.integers(0, 12))
def test_weakness_collapses_to_length_when_everything_is_satisfiable(programs: int, chosen: int) -> None:
    names = [f"p{i}" for i in range(programs)]
    v = FiniteVocabulary([*range(programs), "all"], {name: [i, "all"] for i, name in enumerate(names)})
    chosen = min(chosen, programs)
    assert v.weakness(names[:chosen]) == 2 ** (programs - chosen)


@settings(max_examples=30)
@given(vocabularies, st.data())
def test_survival_is_the_share_of_demand_sets_inside_the_buffer(case, data) -> None:
    states, programs = case
    v = FiniteVocabulary(range(states), programs)
    language = sorted(v.statements(), key=sorted)
    inputs = [data.draw(st.sampled_from(language))]
    demands = sorted({y for i in inputs for y in v.extension(i)}, key=sorted)
    policy = data.draw(st.sampled_from(language))
    task = Task(v, inputs, [y for y in demands if policy <= y])
    assert task.is_correct(policy)
    assert policy in task.correct_policies
    assert v.weakness(policy) == len(task.outputs) + len(task.buffer(policy))
    unseen, buffer = sorted(task.unseen, key=sorted), task.buffer(policy)
    if len(unseen) <= 8:
        sets = [s for k in range(len(unseen) + 1) for s in itertools.combinations(unseen, k)]
        inside = sum(set(s) <= buffer for s in sets)
        assert task.survival_probability(policy) == float(Fraction(inside, len(sets)))
        for k in range(len(unseen) + 1):
            of_size = [s for s in sets if len(s) == k]
            assert task.survival_probability(policy, {k: 1.0}) == pytest.approx(
                sum(set(s) <= buffer for s in of_size) / len(of_size), rel=1e-15
            )


def test_survival_mixes_sizes_exactly() -> None:
    task = Task(vocabulary(VECTORS["V2"]), [["B"]], [["A", "B"]])
    expected = 0.25 + 0.5 * 2 / 6 + 0.25 * comb(2, 2) / comb(6, 2)
    assert task.survival_probability("A", [0.25, 0.5, 0.25]) == pytest.approx(expected, rel=1e-15)


def test_child_tasks() -> None:
    v = vocabulary(VECTORS["V2"])
    parent = Task(v, [["B"], ["C"]], [["A", "B"], ["B", "C"]])
    assert Task(v, [["B"]], [["A", "B"]]).is_child_of(parent)
    assert not parent.is_child_of(parent)
    assert not Task(v, [["B"]], [["B"]]).is_child_of(parent)


def test_long_vocabularies_are_counted_without_listing_or_recursion() -> None:
    names = [f"p{i}" for i in range(3000)]
    programs = {name: ["all", i] for i, name in enumerate(names)}
    v = FiniteVocabulary(["all", *range(3000)], programs, limit=20_000)
    small = FiniteVocabulary(["all", *range(40)], {f"p{i}": ["all", i] for i in range(40)})
    assert small.size == 2**40
    with pytest.raises(VocabularyError, match=r"1099511627776 statements .* weakness\(\) counts them"):
        next(small.statements())
    with pytest.raises(VocabularyError, match="more than 20000 search nodes"):
        _ = v.size


@pytest.mark.parametrize(
    ("states", "programs", "message"),
    [
        ([], {}, "no states"),
        ([0, 0], {}, "a state is given twice"),
        ([0], {"A": [1]}, "program 'A' holds in state 1, which the environment has not"),
        ([0, 1], {"A": [0], "B": [0]}, "programs 'A' and 'B' hold in the same states"),
    ],
)
def test_what_is_no_vocabulary(states, programs, message) -> None:
    with pytest.raises(VocabularyError, match=message):
        FiniteVocabulary(states, programs)


def test_what_is_no_statement_task_or_distribution() -> None:
    v = vocabulary(VECTORS["V2"])
    with pytest.raises(VocabularyError, match="unknown program 'AB': expected one of A, B, C, D"):
        v.weakness("AB")
    with pytest.raises(VocabularyError, match=r"\{A, C\} of the inputs is no statement"):
        Task(v, [["A", "C"]], [])
    with pytest.raises(VocabularyError, match=r"output \{A\} completes none"):
        Task(v, [["B"]], [["A"]])
    task = Task(v, [["B"]], [["A", "B"]])
    with pytest.raises(VocabularyError, match=r"policy \{C\} is not correct"):
        task.survival_probability("C")
    with pytest.raises(VocabularyError, match=r"sum of 0\.5"):
        task.survival_probability("A", [0.5])
    with pytest.raises(VocabularyError, match=r"outside 0, \.\.\., 6"):
        task.survival_probability("A", {7: 1.0})
    with pytest.raises(VocabularyError, match="limit must be"):
        FiniteVocabulary([0], {}, limit=0)
