"""Groups that draft: how many tokens they propose, and that their members always check the same ones.

The worker drafts (`engine.worker.speculation`), and every member then computes the drafted tokens in vLLM's
own verification step.  What has to be seen to here:

- a group drafts as many tokens as its leader still may generate and as all its members have room for;
- a grammar shortens the leader's drafts only: the followers' are cut alike;
- the step's tokens are shared such that a joint group still has one for every row and the same drafts
  in all of them;
- vLLM counts one drafted sequence a group, not one a member.

Plain requests are never drafted on account of formulas; an operator's own ``--speculative-config`` drafts
for them, and for groups as for their leaders.  Scheduling is synchronous: what is proposed next depends on
what was kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import Request

from ..group import DRAFTS, GroupSpec, Wanted, constituent_of
from ..settings import Settings
from .constraints import ConstrainedLifecycle
from .costs import Work
from .group_state import Group
from .pacing import Pacing, Rows

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

_SENT = "marith_sent"
"""An attribute of a step's ``SchedulerOutput``: when it was made, seconds on the monotonic clock, and its
`Work`."""


class SpeculativeLifecycle(ConstrainedLifecycle):
    """Adds drafts to living groups.  Without speculation every call is the base class's own."""

    _num_late: int  # members of one token that enter with this step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drafts_formulas = Settings.of(self.vllm_config).speculates
        if self._drafts_formulas:
            # The drafting terms keep what they compute on their way in the cache.
            self.num_lookahead_tokens = max(self.num_lookahead_tokens, self.num_spec_tokens)
        self._num_constituents = 1 + len(Settings.of(self.vllm_config).constituents)
        self._pacing = Pacing(self._num_constituents)
        self._last_update = 0.0

    def _with_drafts_that_pay(self, spec: GroupSpec) -> GroupSpec:
        """What is there for drafts alone costs something in every step, drafting or not:

        a row of each member that only drafts, and to be a group in the first place.
        """
        for_drafts_alone = spec.only_draft or spec.size == 1
        if not spec.adaptive or not for_drafts_alone or self._pacing.wants_drafters(spec.routine):
            return spec
        return spec.without_drafts()

    # ---------------------------------------------------------------- before a step

    def _fit_drafts(self, decoding: list[Request]) -> None:
        """Cuts drafts until the step has a token for every row and room for them all, groups alike.

        decoding: the running requests that take part in the step with their last token, in order.
        """
        if not self.num_spec_tokens:
            return
        left = self.max_num_scheduled_tokens - len(decoding) - self._num_late
        threshold = self.scheduler_config.long_prefill_token_threshold
        seen: set[str] = set()
        for request in decoding:
            group = self._group_of.get(request.request_id)
            members = [request] if group is None else group.members
            if not request.spec_token_ids or members[0].request_id in seen:
                continue
            seen.add(members[0].request_id)
            # vLLM keeps a place for the token that follows.
            fitting = min(self.max_model_len - 2 - m.num_computed_tokens for m in members)
            number = min(len(members[0].spec_token_ids), fitting, left // len(members))
            if threshold > 0:
                number = min(number, threshold - 1)
            number = max(0, number)
            left -= number * len(members)
            for member in members:
                if len(member.spec_token_ids) > number:
                    member.spec_token_ids = member.spec_token_ids[:number]

    @contextmanager
    def _unpadded(self) -> Iterator[None]:
        """vLLM pads a request that enters with one token to the length of drafts; late members may not be.

        Nor is a plain request where only formulas draft: it would draw other noise than without them.
        """
        number = self.num_spec_tokens
        if self._drafts_formulas or self._num_late:
            self.num_spec_tokens = 0
        try:
            yield
        finally:
            self.num_spec_tokens = number

    # ----------------------------------------------------------------- after a step

    def _tell_drafts(self, output: SchedulerOutput) -> None:
        """Tells the worker how many tokens each group of the step drafts next."""
        if not self._drafts_formulas:
            return
        drafts: dict[str, Wanted] = {}
        stepping = [g for g in self._released.values() if g.joint and g.name in output.num_scheduled_tokens]
        rows = self._rows(stepping)
        may_draft = self._may_draft()
        for group in stepping:
            self.figures.step(group.name)
            number = self._number_of_drafts(group, rows) if may_draft else 0
            if number:
                leader = group.leader
                drafts[group.name] = Wanted(number, leader.max_tokens - leader.num_output_tokens)
        setattr(output, DRAFTS, drafts)
        setattr(output, _SENT, (time.monotonic(), self._work(output, drafts)))

    def _rows(self, stepping: Iterable[Group]) -> np.ndarray:
        """Of each constituent the rows that run now, and those that only draft; ``[2, constituents]``."""
        rows = np.zeros((2, self._num_constituents))
        for group in stepping:
            rows[:, : group.rows.shape[1]] += group.rows[:2]
        rows[0, 0] += max(0.0, len(self.running) - rows[0].sum())  # plain requests, and members on their way
        return rows

    def _work(self, output: SchedulerOutput, drafts: Mapping[str, Wanted]) -> Work:
        """What a step computes; drafts: what each group drafts in it."""
        tokens, passes = np.zeros((2, self._num_constituents))
        if len(tokens) == 1:
            tokens[0] = output.total_num_scheduled_tokens
        else:
            for name, number in output.num_scheduled_tokens.items():
                request = self.requests.get(name)  # None where the step has just failed its group
                params = request.sampling_params if request else None
                tokens[constituent_of(params.extra_args if params else None)] += number
        for name, wanted in drafts.items():
            rates = self.groups[name].rows[2]
            # Groups draft beside each other, in the same passes.
            passes[: len(rates)] = np.maximum(passes[: len(rates)], wanted.number * rates)
        return Work(tokens, passes, bool(drafts or output.scheduled_spec_decode_tokens))

    def _may_draft(self) -> bool:
        """vLLM gives no log-probabilities of chosen tokens beside drafts, and a request may ask for some."""
        return not any(r.sampling_params and r.sampling_params.logprob_token_ids for r in self.running)

    def _number_of_drafts(self, group: Group, rows: np.ndarray) -> int:
        leader = group.leader
        # This step gives a token at least, and so does the one that checks the drafts.
        wanted = leader.max_tokens - leader.num_output_tokens - 2
        room = self.max_model_len - 1 - max(m.num_computed_tokens for m in group.members)
        longest = min(group.longest_draft, self.num_spec_tokens, wanted, room)
        if longest <= 0:
            return 0
        if not group.adaptive:
            return longest
        rates = np.zeros(rows.shape[1])
        rates[: group.rows.shape[1]] = group.rows[2]
        return self._pacing.length(group.routine, Rows(rows[0], rows[1], rates), longest)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """As vLLM's, after which a group's members have their leader's drafts."""
        super().update_draft_token_ids(draft_token_ids)
        for request_id in draft_token_ids.req_ids:
            group = self.groups.get(request_id)
            if group is None:
                continue
            drafts = group.leader.spec_token_ids if group.joint else []
            if group.constraints is not None:
                drafts = []  # tokens are taken back one by one
            for member in group.members:
                member.spec_token_ids = list(drafts)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        found: tuple[float, Work] | None = getattr(scheduler_output, _SENT, None)
        if found is not None and scheduler_output.total_num_scheduled_tokens:
            now, (sent, work) = time.monotonic(), found
            self._pacing.costs.observe(now - max(sent, self._last_update), work)
            self._last_update = now
        return outputs

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        """As vLLM's, which would count a group's drafts once for every member."""
        if request_id in self._followers:
            return spec_decoding_stats
        group = self.groups.get(request_id)
        if group is not None:
            self._pacing.observe_round(group.routine, num_draft_tokens, num_accepted_tokens)
            self.figures.check(request_id, num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        )
