"""What a client may send that nobody would: strategies for it, and what must hold whatever was sent.

`examine` is what happens to a request's formula on its way to the engine, in the order in which it happens.
It needs no vLLM, so that a coverage-guided fuzzer can run it in an environment of its own.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from hypothesis import strategies as st

from vllm_marith.language import FormulaError, Limits, Preset, Presets, Term, parse_request, read_request
from vllm_marith.language.expression import Formula
from vllm_marith.language.limits import TRUSTED
from vllm_marith.language.names import FUNCTIONS
from vllm_marith.language.nodes import Schedule
from vllm_marith.plan import decode, encode, lower

SENTENCE_CHARS = 1500
"""The longest answer that a refusal may be; a sentence, a line of the formula and a caret."""

LIMITS = Limits()
_CHILD, _ADULT = Term("You are a child."), Term("You are an adult.")
_FORMULA = Formula.parse("child - 0.6*adult", {"child": _CHILD, "adult": _ADULT}, "sum")
PRESETS = Presets(
    {"child": _CHILD, "adult": _ADULT},
    {"young": Preset("young", _FORMULA, "child - strength*adult", {"strength": 0.6})},
)


class BrokenError(AssertionError):
    """A request did what no request may do."""


# ---------------------------------------------------------------------------------------------- strategies

_NAMES = [
    "base",
    "child",
    "adult",
    "young",
    "strength",
    "a",
    "b",
    "c",
    "uniform",
    "nobody",
    "__import__",
    "ß",
]
_NUMBERS = [
    "0",
    "1",
    "0.6",
    "2",
    "1e3",
    "1e308",
    "1e999",
    "0.1e-400",
    "1e6",
    "7.",
    ".5",
    "0x1",
    "1_0",
    "9" * 400,
]
_WORDS = st.sampled_from(
    [
        *_NAMES,
        *_NUMBERS,
        *sorted(FUNCTIONS),
        *"+-*/():,.[]{}'\"\\;@#=<>!",
        "\n",
        "\0",
        "\u202e",
        "∪",
        "−",
        "**",
        "//",
    ]
)
_SOUP = st.lists(_WORDS, max_size=40).map(" ".join)
_NUMBER = st.sampled_from(["0", "1", "0.5", "2", "-1", "5", "0.05", "1e-3", "1e6", "3e38"])


def _call(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(_NUMBER, inner).map(":".join)
    arguments = st.lists(st.one_of(inner, inner, _NUMBER, pair), min_size=1, max_size=4).map(", ".join)
    return st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
        st.tuples(_NUMBER, inner).map("*".join),
        inner.map(lambda text: f"({text})"),
        st.tuples(st.sampled_from(sorted(FUNCTIONS)), arguments).map(lambda pair: f"{pair[0]}({pair[1]})"),
    )


_GRAMMATICAL = st.recursive(
    st.sampled_from(["base", "base", "child", "adult", "young", "2*base", "uniform"]), _call, max_leaves=24
)
_LARGE = st.one_of(
    st.tuples(
        st.sampled_from(["(", "-", "union(", "base+", "base*", "normalize(", " ", "é", "1"]),
        st.integers(1, 5000),
    ).map(lambda pair: pair[0] * pair[1]),
    st.tuples(_GRAMMATICAL, st.integers(2, 60), st.sampled_from("+-")).map(
        lambda v: v[2].join([f"({v[0]})"] * v[1])
    ),
    st.integers(1, 70).map(lambda depth: "union(base, " * depth + "child" + ")" * depth),
)


@st.composite
def _mutated(draw: st.DrawFn, source: st.SearchStrategy[str]) -> str:
    """A text with characters removed, doubled or exchanged at a few places."""
    text = draw(source)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        text = (
            text[:at]
            + draw(st.sampled_from(["", "(", ")", ",", "*", "9", "e", "\ud800", '"', "{"]))
            + text[at + 1 :]
        )
    return text


formulas = st.one_of(_GRAMMATICAL, _mutated(_GRAMMATICAL), _SOUP, _LARGE, st.text(max_size=60))

_TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["{input}" * 20, "x" * 40000, "../../etc/passwd", "{0.__class__}"])
)
_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), _TEXTS, st.sampled_from([10**400, -1, 1e400])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
_FIELDS = st.sampled_from(
    [*Term.__dataclass_fields__, "path", "trust_remote_code", "__class__", "revision", "name", "code"]
)
_PATHS = st.sampled_from(
    [
        "small",
        "/etc/passwd",
        "../x",
        "org/model",
        "https://example.org/x",
        "hf://a/b",
        "a" * 65,
        "",
        ".x",
        "a\nb",
    ]
)
_TERM = st.one_of(
    st.fixed_dictionaries({}, optional={"system": _TEXTS, "prompt": _TEXTS}),
    st.dictionaries(_FIELDS, st.one_of(_TEXTS, _PATHS, _JSON), max_size=4),
    _JSON,
)
_PATTERN = st.recursive(
    st.sampled_from(
        [
            *"abc.^$\\|[]()?*+{},",
            "(?:a)",
            "[^a]",
            r"\w",
            r"\b",
            "(?=a)",
            r"\1",
            "(?P<x>a)",
            "a{999}",
            "(?i:é)",
        ]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, st.sampled_from(["+", "*", "?", "{2,}", "{30}", "{1,200}", "++"])).map(
            lambda v: f"(?:{v[0]}){v[1]}"
        ),
    ),
    max_leaves=8,
)
_CONSTRAINTS = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "forbid": st.one_of(
                st.lists(_TEXTS, max_size=4), st.lists(st.text(min_size=200, max_size=256), max_size=3), _JSON
            ),
            "forbid_regex": st.lists(_PATTERN, max_size=3),
            "ignore_case": st.booleans(),
            "whole_words": st.one_of(st.booleans(), _JSON),
            "max_backoffs": st.one_of(st.integers(-1, 2000), _JSON),
            "window": st.one_of(st.integers(-1, 5000), _JSON),
        },
    ),
    _JSON,
)
_REQUEST = st.fixed_dictionaries(
    {"formula": st.one_of(formulas, _GRAMMATICAL)},
    optional={
        "terms": st.one_of(
            st.dictionaries(st.one_of(st.sampled_from(_NAMES), st.text(max_size=8)), _TERM, max_size=4), _JSON
        ),
        "parameters": st.one_of(
            st.dictionaries(st.sampled_from(["strength", "a", "w", "1"]), _JSON, max_size=3), _JSON
        ),
        "normalize": st.one_of(st.sampled_from(["sum", "none"]), _JSON),
        "constraints": _CONSTRAINTS,
        "explain": st.one_of(st.booleans(), _JSON),
        "speculative": st.one_of(st.booleans(), st.integers(-1, 9), _JSON),
        "eval": _JSON,
    },
)
_BODIES = _REQUEST.map(json.dumps)
requests = st.one_of(
    _BODIES, _BODIES, _mutated(_BODIES), formulas, st.integers(1, 3000).map(lambda n: '{"a":' * n)
)
values = st.one_of(requests, _JSON)
"""Of ``vllm_xargs["marith"]``."""


def mutated(rng: random.Random, text: str) -> str:
    """A text with a few spans removed, doubled, or exchanged for others of it or for hostile characters."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(text))
        end = min(len(text), at + rng.choice([0, 1, 1, 2, 5, 20]))
        other = rng.randint(0, len(text))
        piece = rng.choice(
            ["", text[at:end] * rng.choice([2, 2, 30]), text[other : other + 12], rng.choice(_PIECES)]
        )
        text = (text[:at] + piece + text[end:])[:100_000]
    return text


SEEDS = (
    "base - 0.6*child",
    "2*union(base, child) + intersection(child, adult)/2",
    '{"formula": "young", "parameters": {"strength": 0.8}}',
    '{"formula": "base + c", "terms": {"c": {"classifier": "tone", "label": "rude", "top_k": 5}}}',
    '{"formula": "a - b", "terms": {"a": {"system": "x"}, "b": {"prompt": "{input}"}}, "normalize": "none"}',
    '{"formula": "base", "constraints": {"forbid": ["x"], "forbid_regex": ["(a|b)+[^c]{2,3}"]}}',
    "mixture(0.5: base, 0.5: uniform) + schedule(0: 1, 5: 0.5)*topk(normalize(child), 5)",
    "plausible(base, base, 0.1) + 0.1*kl_indicator(child, adult, 0.1, 3, 1, 0)*base + strength(c, 0, 1)*a",
)
"""What a coverage-guided fuzzer begins with."""

_PIECES = [
    *_NAMES,
    *_NUMBERS[:-1],
    *sorted(FUNCTIONS),
    *'+-*/():,.[]{}"\\;\n\0',
    "\ud800",
    "{input}",
    "null",
    '":{',
]


DICTIONARY = [
    *(word for word in [*_NAMES, *_NUMBERS] if word.isascii() and len(word) < 20),
    *sorted(FUNCTIONS),
]


# ------------------------------------------------------------------------------------------- what must hold


def examine(value: object) -> str:
    """Sends one value the way of a request; says what became of it: ``accepted`` or ``refused``.

    Raises:
        BrokenError: a refusal that no client could read, or a path where names belong.
        Exception: any other, which would be HTTP 500.
    """
    try:
        asked = read_request(value, presets=PRESETS, limits=LIMITS)
        plan = lower(asked.formula)
    except FormulaError as error:
        sentence = str(error)
        if not sentence.strip() or len(sentence) > SENTENCE_CHARS or "Traceback" in sentence:
            raise BrokenError(f"no sentence: {sentence[:2000]!r}") from None
        sentence.encode()  # what cannot be encoded cannot be answered
        return "refused"
    wire = encode(plan, range(len(plan.terms)))
    if encode(decode(wire), range(len(plan.terms))) != wire:
        raise BrokenError("the plan does not survive its way to the worker")
    for dial in plan.dials:
        factor = dial.at(3) if isinstance(dial, Schedule) else dial.at(0.25)
        if not math.isfinite(factor):
            raise BrokenError(f"a factor of {factor}")
    if len(plan.terms) > LIMITS.max_terms:
        raise BrokenError(f"{len(plan.terms)} terms")
    for term in asked.formula.terms.values():
        for name in (term.model, term.adapter, term.classifier):
            if name is not None and (not name or set(name) & set("/\\:\n") or name.startswith(".")):
                raise BrokenError(f"a path came in: {name!r}")
    text = asked.formula.explain()
    if parse_request(asked.formula.to_json(), limits=TRUSTED) != asked.formula:
        raise BrokenError(f"another formula comes back from {text!r}")
    return "accepted"


# What Python loads when it is first needed.
for _ in (2, 3):
    examine("base - 0.5*child + schedule(0: 1, 5: 2)*adult")
    examine("{")
    examine('{"formula": "nobody", "terms": {"a": 1}}')
    examine(
        json.dumps(
            {"formula": "base", "constraints": {"forbid": ["ß"], "forbid_regex": ["(?i:é|[a-f])+", "("]}}
        )
    )

# Raised by Python itself, whoever calls: see the table of audit events in its documentation.
_FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "open",
    "os.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "pickle.",
    "marshal.",
)
_watching: list[Counter[str]] = []


def _audit(event: str, arguments: Any) -> None:
    if _watching and event.startswith(_FORBIDDEN):
        _watching[-1][f"{event} {arguments!r:.100}"] += 1


@cache
def _begin_to_watch() -> None:
    sys.addaudithook(_audit)  # which Python never lets go of


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Raises `BrokenError` if code is evaluated, imported or loaded, a file opened or a socket made."""
    _begin_to_watch()
    seen: Counter[str] = Counter()
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.pop()
    if seen:
        raise BrokenError(f"a request led to {dict(seen)}")


class Record:
    """What a run of many requests came to.

    Attributes:
        outcomes: how many of each.
        slowest: CPU seconds of the slowest, and the value.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.slowest: tuple[float, object] = (0.0, None)

    def examine(self, value: object) -> None:
        started = time.process_time()
        with nothing_runs():
            self.outcomes[examine(value)] += 1
        seconds = time.process_time() - started
        if seconds > self.slowest[0]:
            self.slowest = (seconds, value)

    def figures(self) -> Mapping[str, Any]:
        return {
            "inputs": self.outcomes.total(),
            **self.outcomes,
            "slowest_cpu_seconds": round(self.slowest[0], 4),
            "slowest": repr(self.slowest[1])[:120],
        }
