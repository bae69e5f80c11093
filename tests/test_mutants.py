"""The list of mutants follows the code."""

from .mutants import MUTANTS, ROOT, place_of, sources


def test_the_text_of_each_mutant_occurs_once() -> None:
    """Else it would plant nothing, which only the run of all of them says."""
    texts = sources(ROOT)
    assert [mutant.old for mutant in MUTANTS if place_of(mutant, texts) is None] == []
