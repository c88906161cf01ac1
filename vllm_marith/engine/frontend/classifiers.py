"""Classifier terms at admission: what this server does not know or do is refused, the rest is decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_marith.language import FormulaError, Term

from ..classifiers import Card, ClassifierError, find_card
from ..group import ClassifierTerm


def check_classifiers(
    names: Sequence[str], terms: Mapping[str, Term], cards: Mapping[str, Card], most: int
) -> None:
    """Refuses terms that this server's classifiers cannot serve.

    Args:
        names: of the terms that have classifiers.
        terms: of the formula.
        cards: of the server's classifiers.
        most: texts that classifiers may read for one token.

    Raises:
        FormulaError: naming the term.
    """
    for name in names:
        term = terms[name]
        assert term.classifier is not None
        try:
            card = find_card(cards, term.classifier)
            card.index(term.label)
            card.check_top_k(term.top_k)
        except ClassifierError as error:
            raise FormulaError(f"term '{name}': {error}") from None
    texts = sum(1 + terms[name].top_k for name in names)
    if texts > most:
        raise FormulaError(
            f"the formula's classifiers would read {texts} texts for one token, 1 + top_k for each term; "
            f"{most} is the most"
        )


def classifier_term(name: str, term: Term, card: Card, prefix: str) -> ClassifierTerm:
    """What the worker is told of a term that `check_classifiers` let through.

    prefix: the text in front of the answer.
    """
    return ClassifierTerm(
        name=name,
        classifier=card.name,
        prefix=prefix,
        label=card.index(term.label),
        minimize=term.minimize,
        form=term.form,
        top_k=term.top_k,
        every=term.every,
    )
