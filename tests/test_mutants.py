"""The list of mutants follows the code."""

import ast

from .mutants import MUTANTS, ROOT, place_of, sources


def test_each_mutant_is_planted_once_and_is_a_program() -> None:
    """Else it would plant nothing, or an error that every test meets: only the run of all of them would say so."""
    texts = sources(ROOT)
    places = [place_of(mutant, texts) for mutant in MUTANTS]
    assert [mutant.old for mutant, place in zip(MUTANTS, places, strict=True) if place is None] == []
    planted = dict(texts)
    for mutant, place in zip(MUTANTS, places, strict=True):
        planted[place] = planted[place].replace(mutant.old, mutant.new)
    for place in set(places):
        ast.parse(planted[place], place)  # with all of its faults at once
