"""The plain data of a group, as it travels frontend -> core -> worker.

A *group* is the set of engine requests that serve one formula: one *member* per distinct
term, where two terms are the same when base model, adapter and prompt token ids are the same.  Member 0
is the *leader*, the request that the client sees; the others are *followers*.

Both forms below cross process boundaries inside ``SamplingParams.extra_args["marith"]`` and are
therefore dictionaries of strings, numbers and lists (vLLM encodes them with msgspec).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from vllm_marith.language.names import NGRAM, SUFFIX
from vllm_marith.plan import without_rows

KEY = "marith"
"""The entry of ``SamplingParams.extra_args`` (and of a request's ``vllm_xargs``) that is ours."""

BANS = "marith_bans"
"""An attribute of a step's ``SchedulerOutput`` if leaders must not draw certain tokens in it: leader's id ->
`Bans`.  For the V1 model runner, which keeps the parameters that a request first came with."""

DRAFTS = "marith_drafts"
"""An attribute of a step's ``SchedulerOutput`` where groups draft: leader's id -> `Wanted`, what the worker
proposes at the end of the step."""


class Wanted(NamedTuple):
    """How far a group drafts at the end of a step.

    Attributes:
        number: tokens at the most.
        left: tokens that its answer lacks before the step.
    """

    number: int
    left: int

    def after(self, sampled: int) -> int:
        """Tokens to draft when the step has given so many: the step that checks them gives one itself."""
        return max(0, min(self.number, self.left - sampled - 1))


Bans = tuple[list[int], int | None]
"""(token ids, seed for the leader's generator from this step on, None for a request without a seed)."""

EXPLAIN = "marith_explain"
"""The entry of ``vllm_xargs`` that asks for the terms' log-probabilities of every token."""

EVIDENCE = "__marith_evidence__"
"""The ``collective_rpc`` method that fetches them.  Names with underscores, because of all others vLLM lets a
worker class have only one of each: a second engine of a process could not bring another extension."""

FIGURES = "__marith_figures__"
"""The ``collective_rpc`` method that asks engine core and workers for their figures."""

FAILURES = "marith_failures"
"""An attribute of a step's ``ModelRunnerOutput``: group -> `Failure`, where the worker could not compute its
formula.  A mapping, which must not be read before the step's tokens are on the host."""


class Cause(StrEnum):
    """Why a group failed; the label of the figure that counts it."""

    CLASSIFIER = "classifier"  # a classifier could not read, or said what is no probability
    LOGITS = "logits"  # NaN or infinite logits or energies
    FORBIDDEN = "forbidden"  # the formula leaves no token
    TORN = "torn"  # vLLM did not keep the members together
    REFUSED = "refused"  # it came past admission, or can never fit
    ERROR = "error"  # anything else


Failure = tuple[str, str]
"""(a `Cause`, a sentence for the log)."""

OWN_FORMULA = "custom"
"""Label of the figures of every formula that is not a preset."""

MemberAdapter = list[Any]
"""A LoRA adapter: vLLM's ``LoRARequest``, as msgspec writes it."""

Drafter = Literal["", "formula", "ngram", "suffix"]


class Private(str):
    """A client's text, of which logs show the length; vLLM logs what a step was sent when it fails."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} characters>"


@dataclass(frozen=True)
class ClassifierTerm:
    """A classifier term, ready to be read: everything that a request could choose is decided.

    Attributes:
        name: the term's.
        classifier: its name in the server's settings.
        prefix: the text in front of the answer, i.e. the term's template with the request's input in it.
        label: index of the class.
        minimize: whether the class's complement is meant.
        form: ``bayes`` or ``plain``, see `vllm_marith.engine.worker.classifiers.rows`.
        top_k: number of candidates.
        every: it reads at positions of the answer that are divisible by this.
    """

    name: str
    classifier: str
    prefix: str
    label: int
    minimize: bool
    form: str
    top_k: int
    every: int


@dataclass(frozen=True)
class GroupSpec:
    """frontend -> core: everything the engine core needs to build the followers.

    Attributes:
        prompts: token ids of each *follower's* prompt, in member order.  The leader's prompt is
            the request's own, so a group of one member has no prompts here.
        routine: what a worker does with the members' logits, see `vllm_marith.plan.encode`; member i is
            row i.
        classifiers: the classifier terms that the routine counts.
        label: under which figures count this request: the preset's name.
        names: under which they count each member's calls: a preset's terms, or the models of other formulas.
        explain: key under which workers keep the terms' log-probabilities; empty for none.
        scored: whether the formula's log-probabilities of the leader's prompt are asked for; every member's
            prompt then ends with the leader's but for its first token.
        constraints: what the answer must not contain, `Constraints.to_dict()`, or None.
        adapters: of each follower, None for the base model; empty where no follower has one.  The leader's is
            the request's own.
        constituents: of each member, leader first, the number of the base model that it runs on; empty when
            all run on the model that the server was started with, number 0.
        drafts: routines of the levels that draft, from the cheapest on, see `vllm_marith.plan.speculation`;
            member i is row i in them, too.
        only_draft: how many of the members only draft; they come last, and `routine` does not read them.
        draft_lengths: how many tokens each level drafts before the next one, or the formula, tests them.
            The last is K, the most that one step of the formula tests.
        drafter: what drafts first: "" for nothing, i.e. one token a step; "formula" for the first of
            `drafts`; "ngram" and "suffix" for text that is copied, which has the first of `draft_lengths`;
            there is then one more of these than there are `drafts`.
        adaptive: the lengths are upper bounds, and drafting happens where it pays.
    """

    prompts: list[list[int]]
    routine: str
    classifiers: list[ClassifierTerm] = field(default_factory=list)
    label: str = OWN_FORMULA
    names: list[str] = field(default_factory=list)
    explain: str = ""
    scored: bool = False
    constraints: dict[str, Any] | None = None
    adapters: list[MemberAdapter | None] = field(default_factory=list)
    constituents: list[int] = field(default_factory=list)
    drafts: list[str] = field(default_factory=list)
    draft_lengths: list[int] = field(default_factory=list)
    drafter: Drafter = ""
    adaptive: bool = False
    only_draft: int = 0

    @property
    def size(self) -> int:
        return 1 + len(self.prompts)

    @property
    def members(self) -> list[int]:
        """Of each member, leader first, its constituent."""
        return self.constituents or [0] * self.size

    def without_drafts(self) -> GroupSpec:
        """The group of a request that does not draft, without the members that have no other purpose."""
        kept = self.size - self.only_draft
        routine = without_rows(self.routine, kept)
        assert routine is not None, "the formula reads a member that only drafts"
        return replace(
            self,
            prompts=self.prompts[: kept - 1],
            routine=routine,
            names=self.names[:kept],
            adapters=self.adapters[: kept - 1],
            constituents=self.constituents[:kept],
            drafts=[],
            draft_lengths=[],
            drafter="",
            adaptive=False,
            only_draft=0,
        )

    def kept_apart(self) -> GroupSpec:
        """The group of a request that has nothing to do with the answers of others.

        n-grams, of its own text alone, take the place of suffixes.
        """
        return replace(self, drafter=NGRAM) if self.drafter == SUFFIX else self

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> GroupSpec:
        return cls(**_with_classifiers(wire))


@dataclass(frozen=True)
class MemberTag:
    """core -> worker: which member of which group a request is.

    Attributes:
        group: id of the leader's request; names the group.
        index: the member's index, 0 for the leader.
        size: number of members.
        prompt_length: tokens of the leader's prompt; 0 for followers of groups that are not scored.
        routine, classifiers, explain, drafts, draft_lengths, drafter, adaptive: as in `GroupSpec`; empty for
            followers.
        scored: as in `GroupSpec`.
        banned: tokens that the leader must not draw ...
        banned_at: ... when its sequence, prompt included, has this length.  For the V2 model runner, which
            is sent the tag again after every preemption; see `BANS` for the other.
        constituent: the number of the base model that the member runs on.
        label, names: as in `GroupSpec`, where the group drafts; empty for followers.
    """

    group: str
    index: int
    size: int
    prompt_length: int = 0
    routine: str = ""
    classifiers: list[ClassifierTerm] = field(default_factory=list)
    explain: str = ""
    scored: bool = False
    banned: list[int] = field(default_factory=list)
    banned_at: int = -1
    constituent: int = 0
    drafts: list[str] = field(default_factory=list)
    draft_lengths: list[int] = field(default_factory=list)
    drafter: Drafter = ""
    adaptive: bool = False
    label: str = ""
    names: list[str] = field(default_factory=list)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> MemberTag:
        return cls(**_with_classifiers(wire))


def member_tags(group: str, spec: GroupSpec, prompt_length: int) -> list[MemberTag]:
    """The tags of a group's members; only the leader's carries what the worker does with them.

    Args:
        prompt_length: of the leader's prompt.
    """
    own, *others = spec.members
    leader = MemberTag(
        group,
        0,
        spec.size,
        prompt_length,
        spec.routine,
        [replace(term, prefix=Private(term.prefix)) for term in spec.classifiers],
        spec.explain,
        spec.scored,
        constituent=own,
        drafts=spec.drafts,
        draft_lengths=spec.draft_lengths,
        drafter=spec.drafter,
        adaptive=spec.adaptive,
        label=spec.label if spec.drafter else "",
        names=spec.names if spec.drafter else [],
    )
    told = prompt_length if spec.scored else 0
    followers = (
        MemberTag(group, i, spec.size, told, scored=spec.scored, constituent=j)
        for i, j in enumerate(others, 1)
    )
    return [leader, *followers]


def constituent_of(extra_args: Mapping[str, Any] | None) -> int:
    """The constituent of a request with these ``extra_args``; a plain request runs on number 0."""
    tag = (extra_args or {}).get(KEY)
    return tag.get("constituent", 0) if isinstance(tag, Mapping) else 0


def _with_classifiers(wire: Mapping[str, Any]) -> dict[str, Any]:
    return {**wire, "classifiers": [ClassifierTerm(**term) for term in wire["classifiers"]]}
