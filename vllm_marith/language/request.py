"""The formula of one request, as it arrives in `vllm_xargs["marith"]`.

Either a bare formula over what the server defines, or JSON:

    {"formula": "child - 0.6*adult", "terms": {"child": {"system": "You are a child."}}, "normalize": "sum"}
    {"formula": "preadd", "parameters": {"strength": 0.8}}
    {"formula": "base", "constraints": {"forbid": ["damn"]}}
    {"formula": "superseded(small, large)", "speculative": 4}

A name means, in this order: a parameter of the request, i.e. a number; a term of the request; a term of the
server's presets; a preset, i.e. its formula in parentheses, with the request's values for those of its
parameters that the request names; `base`, the request as it is.  Nothing here trusts its input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_marith.language.building import number
from vllm_marith.language.constraints import Constraints
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import REQUEST_KEY, Formula, Term
from vllm_marith.language.limits import Limits
from vllm_marith.language.names import BASE, UNIFORM, check_term_name, is_identifier
from vllm_marith.language.naming import as_number
from vllm_marith.language.nodes import Node
from vllm_marith.language.parser import parse
from vllm_marith.language.speculative import Speculative, check_speculative
from vllm_marith.language.validation import describe, did_you_mean, sentence, shown

_STRICT: Final = ConfigDict(extra="forbid", strict=True, frozen=True)
# Defined names listed in a refusal; a server may have hundreds.
_LISTED_NAMES: Final = 20


class TermSpec(BaseModel):
    """The JSON and YAML form of a term; `Term` says what the fields mean."""

    model_config = _STRICT

    system: str | None = None
    prompt: str | None = None
    model: str | None = None
    adapter: str | None = None
    classifier: str | None = None
    label: str | int = 1
    minimize: bool = False
    form: Literal["bayes", "plain"] = "bayes"
    top_k: int = Field(default=50, ge=1)
    every: int = Field(default=1, ge=1)
    speculative_factor: int = Field(default=1, ge=1)


class RequestSpec(BaseModel):
    """The JSON form of a request's formula.  The terms are validated one by one, to name the one at fault."""

    model_config = _STRICT

    formula: str
    terms: dict[str, Any] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)
    normalize: Literal["sum", "none"] | None = None
    constraints: dict[str, Any] | None = None
    explain: bool = False
    speculative: Any = None


@dataclass(frozen=True)
class FormulaRequest:
    """What a request carries.

    Attributes:
        formula: checked.
        constraints: what the answer must not contain.
        explain: whether the answer comes with what each term said about its tokens.
        speculative: whether and how far to draft, by the request or by the preset that its formula is; None
            for what the server does by default.
        demands_drafts: the request itself gives the number of tokens, and is refused where that cannot be.
    """

    formula: Formula
    constraints: Constraints | None = None
    explain: bool = False
    speculative: Speculative | None = None
    demands_drafts: bool = False


class NamedFormula(Protocol):
    """What this module needs of `vllm_marith.language.presets.Preset`."""

    @property
    def parameters(self) -> Mapping[str, float]: ...

    @property
    def speculative(self) -> Speculative | None: ...


class PresetTable(Protocol):
    """What this module needs of `vllm_marith.language.presets.Presets`."""

    @property
    def terms(self) -> Mapping[str, Term]: ...

    @property
    def presets(self) -> Mapping[str, NamedFormula]: ...

    def formula(self, name: str, parameters: Mapping[str, float]) -> Formula: ...


def parse_request(
    value: object, *, presets: PresetTable | None = None, limits: Limits | None = None
) -> Formula:
    """The formula of a request, as `read_request` finds it."""
    return read_request(value, presets=presets, limits=limits).formula


def read_request(
    value: object, *, presets: PresetTable | None = None, limits: Limits | None = None
) -> FormulaRequest:
    """A request, checked: its formula is within the limits and defines a distribution for every input.

    Args:
        value: what the request carries under "marith".
        presets: the terms and formulas that the server defines.
        limits: bounds; `Limits()` by default.

    Raises:
        FormulaError: whose text is the answer to give to the client.
    """
    limits = limits or Limits()
    if not isinstance(value, str):
        raise FormulaError(
            f"'{REQUEST_KEY}' must be a string, a formula or the JSON of one, not {describe(value)}"
        )
    if len(value) > limits.max_request_chars:
        raise FormulaError(
            f"'{REQUEST_KEY}' has {len(value)} characters; {limits.max_request_chars} is the most"
        )
    spec = _decode(value) if value.lstrip().startswith("{") else RequestSpec(formula=value)
    if len(spec.terms) > limits.max_terms:
        raise FormulaError(f"the request defines {len(spec.terms)} terms; {limits.max_terms} is the most")
    own = {check_term_name(name): term_from_json(name, term, limits) for name, term in spec.terms.items()}
    parameters = check_parameters(spec.parameters)
    both = [name for name in parameters if name in own]
    if both:
        raise FormulaError(f"'{both[0]}' is a term and a parameter of one request")
    formula = resolve_formula(spec.formula, own, presets, spec.normalize, limits, parameters)
    constraints = None if spec.constraints is None else Constraints.from_json(spec.constraints)
    whole = _whole_preset(spec.formula, {*own, *parameters}, presets)
    speculative = whole.speculative if whole else None
    if spec.speculative is not None:
        speculative = check_speculative(spec.speculative)
    demands_drafts = isinstance(spec.speculative, int)
    return FormulaRequest(formula, constraints, spec.explain, speculative, demands_drafts)


def _whole_preset(text: str, own: Set[str], presets: PresetTable | None) -> NamedFormula | None:
    """The preset that the formula is, if it is nothing else; own: names that mean something else here."""
    name = text.strip(" \t\r\n()")
    return None if presets is None or name in own else presets.presets.get(name)


def resolve_formula(
    text: str,
    own: Mapping[str, Term],
    presets: PresetTable | None,
    normalize: Literal["sum", "none"] | None,
    limits: Limits,
    parameters: Mapping[str, float] | None = None,
) -> Formula:
    """Parse `text`, every name of which must be defined: by `parameters`, `own`, `presets`, or as `base`."""
    names = _Names(own, presets, parameters or {})
    root = parse(text, names.resolve, limits)
    names.check_parameters()
    whole = names.presets.get(text.strip(" \t\r\n()"))
    if normalize is None:
        normalize = whole.normalize if whole else "sum"
    for name, formula in names.presets.items():
        if formula.normalize != normalize:
            raise FormulaError(
                f"the preset '{name}' has normalize: {formula.normalize} and cannot be part of a formula "
                f"with normalize: {normalize}; ask for normalize: {formula.normalize}, for the whole formula"
            )
    formula = Formula(root, names.terms, normalize)
    if len(formula.terms) > limits.max_terms:
        raise FormulaError(f"the formula has {len(formula.terms)} terms; {limits.max_terms} is the most")
    return formula.check()


def term_from_json(name: str, value: Term | Mapping[str, Any] | object, limits: Limits) -> Term:
    """The term called `name` from its JSON form (or from a Term), labelled with that name.

    Raises:
        FormulaError: naming the key at fault.
    """
    if isinstance(value, Term):
        fields = value.to_dict()
    else:
        try:
            spec = TermSpec.model_validate(dict(value) if isinstance(value, Mapping) else value)
        except ValidationError as error:
            reason = sentence(error, "a term", tuple(TermSpec.model_fields))
            raise FormulaError(f"the term '{name}': {reason}") from None
        fields = spec.model_dump()
    for key in ("system", "prompt"):
        length = len(fields.get(key) or "")
        if length > limits.max_template_chars:
            raise FormulaError(
                f"the term '{name}': '{key}' has {length} characters; {limits.max_template_chars} is the most"
            )
    try:
        return Term(**fields, name=name)
    except FormulaError as error:
        raise FormulaError(f"the term '{name}': {error.message}") from None


def check_parameters(values: Mapping[str, Any]) -> dict[str, float]:
    """Name -> number, checked.

    Raises:
        FormulaError: a name that formulas cannot use, or a value that is no finite number.
    """
    checked = {}
    for name, value in values.items():
        if not is_identifier(name) or name == UNIFORM:
            raise FormulaError(
                f"'{shown(name)}' cannot name a parameter; names have letters, digits and underscores, and "
                "no digit first"
            )
        found = as_number(value)
        if found is None or not math.isfinite(found):
            raise FormulaError(f"the parameter '{name}' must be a number, not {describe(value)}")
        checked[name] = found
    return checked


class _Names:
    """What the names of one formula stand for, and which of them it used."""

    def __init__(
        self, own: Mapping[str, Term], presets: PresetTable | None, parameters: Mapping[str, float]
    ) -> None:
        self._own = own
        self._table = presets
        self._preset_terms: Mapping[str, Term] = presets.terms if presets else {}
        self._presets: Mapping[str, NamedFormula] = presets.presets if presets else {}
        self._parameters = parameters
        self._used_parameters: set[str] = set()
        self.terms: dict[str, Term] = {}  # used so far, by name
        self.presets: dict[str, Formula] = {}  # used so far, by name

    def resolve(self, name: str) -> Node:
        if name in self._parameters:
            self._used_parameters.add(name)
            return number(self._parameters[name])
        check_term_name(name)
        for table in (self._own, self._preset_terms):
            if name in table:
                return self._use(name, table[name])
        if name in self._presets:
            assert self._table is not None
            own = {p: value for p, value in self._parameters.items() if p in self._presets[name].parameters}
            self._used_parameters.update(own)
            formula = self.presets[name] = self._table.formula(name, own)
            for inner, term in formula.terms.items():
                self._use(inner, term)
            return formula.root
        if name == BASE:
            return self._use(name, Term(name=BASE))
        raise FormulaError(f"'{name[:64]}' is not defined{self._hint(name)}")

    def check_parameters(self) -> None:
        """Refuse a parameter that nothing read: it is misspelt, or the formula is not the one meant."""
        for name in self._parameters:
            if name not in self._used_parameters:
                known = sorted({p for preset in self.presets for p in self._presets[preset].parameters})
                told = (
                    f"; the parameters of {', '.join(self.presets)} are: {', '.join(known)}" if known else ""
                )
                raise FormulaError(f"the formula has no parameter '{shown(name)}'{told}")

    def _use(self, name: str, term: Term) -> Node:
        if self.terms.setdefault(name, term) != term:
            raise FormulaError(
                f"the term '{name}' has two definitions in this formula, the request's own and that of a "
                "preset it names; give the request's own term another name"
            )
        return term.leaf(name)

    def _hint(self, name: str) -> str:
        defined = sorted({*self._own, *self._preset_terms, *self._presets, BASE})
        meant = did_you_mean(name, defined)
        listed = ", ".join(defined[:_LISTED_NAMES]) + (", …" if len(defined) > _LISTED_NAMES else "")
        return (f"; did you mean '{meant}'?" if meant else ";") + f" defined are: {listed}"


def _decode(text: str) -> RequestSpec:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise FormulaError(
            f"'{REQUEST_KEY}' starts with '{{' and is not valid JSON: {error.msg} at line {error.lineno}, "
            f"column {error.colno}"
        ) from None
    except RecursionError:
        raise FormulaError(f"the JSON in '{REQUEST_KEY}' is nested too deep") from None
    except FormulaError:
        raise
    except ValueError:  # a whole number of thousands of digits
        raise FormulaError(f"the JSON in '{REQUEST_KEY}' has a number that is too long") from None
    try:
        return RequestSpec.model_validate(value)
    except ValidationError as error:
        raise FormulaError(sentence(error, f"'{REQUEST_KEY}'", tuple(RequestSpec.model_fields))) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise FormulaError(f"the key '{shown(key)}' appears twice in the JSON of '{REQUEST_KEY}'")
        found[key] = value
    return found


def _refuse_constant(constant: str) -> Any:
    raise FormulaError(f"the JSON of '{REQUEST_KEY}' has {constant}, which is no number")
