from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flatminima.names import nearest_first, unknown


@given(st.lists(st.text("abAB-1", max_size=8), min_size=1, max_size=6), st.data())
def test_an_exact_match_comes_first_and_nothing_is_lost(valid: list[str], data: st.DataObject) -> None:
    given_name = data.draw(st.sampled_from(valid))
    ordered = nearest_first(given_name, valid)
    assert ordered[0].casefold() == given_name.casefold()
    assert sorted(ordered) == sorted(valid)


def test_case_and_small_slips_are_forgiven_in_the_order() -> None:
    assert nearest_first("MNSIT", ["digits", "cifar10", "mnist"])[0] == "mnist"
    assert nearest_first("cifar-100", ["cifar10", "cifar100", "pacs"])[0] == "cifar100"


def test_the_sentence_names_kind_given_and_valid() -> None:
    assert unknown("model", "vitt", ["mlp", "vit"]) == "unknown model 'vitt': expected one of vit, mlp (nearest first)"
