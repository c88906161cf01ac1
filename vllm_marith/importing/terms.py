"""The models and classifiers that a file names -> terms, which a server can find by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, Literal

from vllm_marith.importing.saved import Saved
from vllm_marith.language.expression import Term
from vllm_marith.language.names import BASE, FUNCTIONS, NGRAM, UNIFORM
from vllm_marith.language.validation import shown

# What every model of the reference is saved with that says how it ran there, and not what it computes.
RUNNING: Final = ("run_priority", "group", "outputs_logprobs", "batch_size")
PROMPT: Final = ("system_prompt", "prompt_template", "model", "speculative_factor")

_SYSTEM: Final = "{{system_prompt}}"
_INPUT: Final = "{{input_string}}"
_OUR_INPUT: Final = "{input}"
_RESERVED: Final = frozenset({*FUNCTIONS, UNIFORM, BASE})
_NAME_WORDS: Final = 4
_NAME_LENGTH: Final = 32


@dataclass(frozen=True)
class Source:
    """A model as the file has it.

    Attributes:
        model: a hub id or a path, None for the default model.
        term: all but the model.
        system: its system prompt, by which the term is called.
        is_classifier: whether it is none of the language models.
    """

    model: str | None
    term: Term
    system: str
    is_classifier: bool


NGRAMS: Final = Source(None, Term(model=NGRAM), "", False)
"""What drafts where the reference has an Autocomplete."""


def language_model(saved: Saved) -> Source:
    """A PromptedLLM."""
    ran = ("enable_cache", "dim_keys_past", "dim_values_past", "run_eager", "model_name")
    saved.only(*PROMPT, *RUNNING, *ran)
    factor = saved.whole("speculative_factor", 1, 1)
    term = Term(prompt=_prompt(saved), speculative_factor=factor)
    return Source(_model(saved), term, saved.text("system_prompt"), False)


def classifier(saved: Saved) -> Source:
    """A Classifier, or the classifier of a ClassifierStrength."""
    model = _model(saved)
    if model is None:
        raise saved.refusal("a classifier is a model of its own", "model")
    form: Literal["bayes", "plain"] = "bayes" if saved.flag("use_bayes", True) else "plain"
    term = Term(
        prompt=_prompt(saved),
        classifier="unnamed",
        label=saved.whole("index", 1, 0),
        minimize=saved.flag("minimize", False),
        form=form,
        top_k=saved.whole("n_runs_per_sample", 50, 1),
    )
    return Source(model, term, saved.text("system_prompt"), True)


def _model(saved: Saved) -> str | None:
    return None if saved.settings.get("model") is None else saved.text("model")


def _prompt(saved: Saved) -> str | None:
    """The term's `prompt`, None where it is the input and nothing else.

    The reference's templates are functions; it saves what they make of two placeholders, and loads that by
    replacing first one and then the other.
    """
    template, system = saved.text("prompt_template"), saved.text("system_prompt")
    for key, text in (("prompt_template", template), ("system_prompt", system)):
        if _OUR_INPUT in text.replace(_INPUT, ""):
            raise saved.refusal(f"has a literal {_OUR_INPUT}, which stands for the request's text here", key)
    prompt = template.replace(_SYSTEM, system).replace(_INPUT, _OUR_INPUT)
    return None if prompt == _OUR_INPUT else prompt


@dataclass(frozen=True)
class Named:
    """The terms of a formula under names of their own.

    Attributes:
        terms: name -> term, `base` included.
        names: name in the tree -> name in `terms`.
        notes: what a server must provide, and what was left out; for a reader.
    """

    terms: Mapping[str, Term]
    names: Mapping[str, str]
    notes: list[str]


def name_terms(sources: Mapping[str, Source], base: str | None, taken: Iterable[str]) -> Named:
    """Give every model of the file, by its name in the tree, a term with a name that says something.

    Args:
        base: the file's name of the server's base model; models without a name are that one as well.
        taken: names that no term can have.
    """
    notes = []
    known: dict[tuple[bool, str], str] = {}  # file's name -> the server's, of models and of classifiers
    for source in sources.values():
        if source.model is not None and (source.is_classifier or source.model != base):
            key = source.is_classifier, source.model
            if key not in known:
                known[key] = _unique(_server_name(source.model), known.values())
                what = "classifier" if source.is_classifier else "constituent model"
                notes.append(f"Needs a {what} '{known[key]}' on the server: {shown(source.model)}.")
    models = [source for source in sources.values() if not source.is_classifier]
    drafted = any(source.term.speculative_factor == 1 for source in models)
    if not drafted:
        notes.append("Every model had a speculative factor above 1, so that none could draft: left out.")
    terms: dict[str, Term] = {}
    names: dict[str, str] = {}
    reserved = {*_RESERVED, *taken}
    for name, source in sources.items():
        term = source.term if drafted or source.is_classifier else replace(source.term, speculative_factor=1)
        server_name = known.get((source.is_classifier, source.model or ""))
        if source.is_classifier:
            term = replace(term, classifier=server_name)
        elif server_name:
            term = replace(term, model=server_name)
        for found, other in terms.items():
            if other == term:
                names[name] = found
                break
        else:
            own = _identifier(source, server_name or term.model)
            own = BASE if term == Term() else _unique(own, [*reserved, *terms])
            names[name], terms[own] = own, term
    return Named(terms, names, notes)


def _server_name(model: str) -> str:
    """meta-llama/Llama-2-7b-hf -> Llama-2-7b-hf."""
    last = model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).lstrip(".")[:_NAME_LENGTH] or "model"


def _identifier(source: Source, model: str | None) -> str:
    """A word for a term: of its system prompt, or else of its model."""
    words = re.findall(r"[a-z0-9]+", source.system.lower()) or re.findall(
        r"[a-z0-9]+", (model or "plain").lower()
    )
    name = "_".join(words[:_NAME_WORDS])[:_NAME_LENGTH].strip("_")
    return name if name and not name[0].isdigit() else f"term_{name}".rstrip("_")


def _unique(name: str, taken: Iterable[str]) -> str:
    used = set(taken)
    if name not in used:
        return name
    return next(other for number in count(2) if (other := f"{name}_{number}") not in used)
