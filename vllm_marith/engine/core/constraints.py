"""Hard constraints in the scheduler: tokens are taken back, and not shown before they are final.

A token that completes something forbidden is seen where vLLM would append it, in `update_from_output`.  Then
every member of the group forgets its tokens from the beginning of the match on and the group is preempted:
vLLM throws away what is in flight for it, and admits it again with most of its KV cache still there.  The
tokens that are banned now travel to the worker with the step in which that position is drawn again.

Outputs are held back here, one per token, until no take-back can reach them.  So the frontend, its
detokenizer, stop strings and log-probabilities only ever see final tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.core.sched.utils import check_sequence_repetition
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.request import Request, RequestStatus

from vllm_marith.language.constraints import Constraints

from ..group import BANS, KEY, Bans, MemberTag
from .backoff import Backoff, Verdict
from .group_state import Group
from .lifecycle import GroupLifecycle

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput

STOP_REASON = "constraints"
"""What a client reads, beside ``finish_reason`` "length", if an answer was cut short for its constraints."""


class AnswerText:
    """An answer's text, by the very code that makes it for the client."""

    def __init__(self, tokenizer: Any, request: Request) -> None:
        assert request.sampling_params is not None
        params = copy.copy(request.sampling_params)
        params.stop = []  # the frontend looks for stop strings, in what is released
        self._request: Any = copy.copy(request)
        self._request.sampling_params = params
        self._tokenizer = tokenizer
        self.reset([])

    def push(self, token: int) -> str:
        before = len(self._detokenizer.output_text)
        self._detokenizer.update([token], False)
        return self._detokenizer.output_text[before:]

    def reset(self, tokens: Sequence[int]) -> None:
        self._detokenizer: Any = IncrementalDetokenizer.from_new_request(self._tokenizer, self._request)
        self._detokenizer.update(list(tokens), False)


@dataclass
class Answer:
    """A constrained answer on its way.

    Attributes:
        group: its requests.
        backoff: decides what becomes of its tokens.
        seed: the client's.
        held: outputs, of one token each, that the client has not been sent.
        num_sent: how many it has been sent.
        events, prefill_stats: what outputs told that are no more; the next one tells it.
    """

    group: Group
    backoff: Backoff
    seed: int | None
    held: list[EngineCoreOutput] = field(default_factory=list)
    num_sent: int = 0
    events: list[Any] = field(default_factory=list)
    prefill_stats: Any = None

    def seed_now(self) -> int | None:
        """The seed for what is drawn after a take-back: the noise that led to it must not come again."""
        if self.seed is None:
            return None
        digest = blake2b(f"{self.seed} {self.backoff.num_backoffs}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1  # vLLM's seeds are signed

    def take_sendable(self, ended: bool) -> list[EngineCoreOutput]:
        """The held outputs that may be sent now."""
        number = len(self.held) if ended else self.backoff.num_released - self.num_sent
        sendable = self.held[:number]
        del self.held[:number]
        self.num_sent += number
        return sendable

    def drop_taken_back(self) -> None:
        """Forgets the outputs of tokens that are no more."""
        number = len(self.backoff.tokens) - self.num_sent
        dropped = self.held[number:]
        del self.held[number:]
        for output in dropped:
            self.events += output.events or []
            self.prefill_stats = self.prefill_stats or output.prefill_stats

    def hold(self, output: EngineCoreOutput) -> None:
        """Takes the output of an accepted token."""
        if self.events:
            output.events = self.events + (output.events or [])
            self.events = []
        if self.prefill_stats is not None:
            output.prefill_stats, self.prefill_stats = self.prefill_stats, None
        self.held.append(output)


class ConstrainedLifecycle(GroupLifecycle):
    """Adds take-back to living groups.  Groups without constraints pass untouched."""

    if TYPE_CHECKING:

        def _preempt_group(self, group: Group, drop_stale_output: bool = False) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._answers: dict[str, Answer] = {}  # of constrained groups, by name
        self.num_backoffs = 0

    @cached_property
    def _tokenizer(self) -> Any:
        return cached_tokenizer_from_config(self.vllm_config.model_config)

    def _add_group(self, group: Group) -> None:
        if group.constraints is not None:
            leader, constraints = group.leader, Constraints.from_json(group.constraints)
            params = leader.sampling_params
            assert params is not None
            backoff = Backoff(
                constraints.searches(),
                AnswerText(self._tokenizer, leader),
                max_backoffs=constraints.max_backoffs,
                window=constraints.window,
                allowed=params.allowed_token_ids and frozenset(params.allowed_token_ids),
            )
            self._answers[group.name] = Answer(group, backoff, params.seed)
        super()._add_group(group)

    def _forget(self, group: Group) -> None:
        self._answers.pop(group.name, None)
        super()._forget(group)

    # -------------------------------------------------------------------- step

    def _tell_bans(self, output: SchedulerOutput) -> None:
        """Sends the V1 worker the tokens that are banned where leaders draw in this step."""
        bans: dict[str, Bans] = {}
        for name, answer in self._answers.items():
            group = answer.group
            if group.joint and name in output.num_scheduled_tokens:
                position = group.leader.num_computed_tokens - group.leader.num_prompt_tokens
                if banned := answer.backoff.banned(position):
                    bans[name] = banned, answer.seed_now()
        if bans:
            setattr(output, BANS, bans)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, before which tokens are judged and after which outputs are held back."""
        if not self._answers:
            return super().update_from_output(scheduler_output, model_runner_output)
        answers = dict(self._answers)
        for answer in answers.values():
            if answer.group.name in scheduler_output.num_scheduled_tokens:
                self._judge(answer, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            client.outputs = [
                sent
                for output in client.outputs
                for sent in _sendable(answers.get(output.request_id), output)
            ]
        return outputs

    def _judge(self, answer: Answer, model_runner_output: ModelRunnerOutput) -> None:
        leader = answer.group.leader
        if leader.is_finished() or (leader.num_stale_output_tokens and leader.drop_stale_output):
            return
        sampled = model_runner_output.sampled_token_ids
        for token in sampled[model_runner_output.req_id_to_index[leader.request_id]] if sampled else ():
            ends, shown = self._ends(leader, token)
            verdict = answer.backoff.offer(token, ends=ends, shown=shown)
            if verdict == Verdict.TAKEN_BACK:
                self._take_back(answer)
            elif verdict == Verdict.GAVE_UP:
                answer.held.clear()
                self._end(leader, RequestStatus.FINISHED_LENGTH_CAPPED, STOP_REASON)

    def _ends(self, request: Request, token: int) -> tuple[bool, bool]:
        """Whether vLLM will end a request with a token, and whether its text is shown; see `check_stop`."""
        params = request.sampling_params
        assert params is not None
        if token == params.eos_token_id or token in (params.stop_token_ids or ()):
            return True, params.include_stop_str_in_output
        number = request.num_output_tokens + 1
        if request.num_tokens + 1 >= self.max_model_len or number >= request.max_tokens:
            return True, True
        repetition = params.repetition_detection
        if repetition is None or number < params.min_tokens:
            return False, True
        return check_sequence_repetition([*request.output_token_ids, token], repetition), True

    def _take_back(self, answer: Answer) -> None:
        """Cuts all members to the tokens that are left, and has the next one drawn again."""
        self.num_backoffs += 1
        answer.drop_taken_back()
        group, number = answer.group, len(answer.backoff.tokens)
        if group.released:
            self._preempt_group(group, drop_stale_output=True)
        else:  # preempted before, and this is one of the tokens that were in flight then
            for member in group.members:
                member.drop_stale_output = True
        # Workers that sample asynchronously are sent the tokens of resumed requests, unless vLLM takes
        # the step before for one of theirs; `Scheduler.reset_prefix_cache` has the same.
        self.prev_step_scheduled_req_ids.difference_update(group.ids)
        for member in group.members:
            del member._output_token_ids[number:]
            del member._all_token_ids[member.num_prompt_tokens + number :]
            # Every block's hash is that of all tokens up to its end.
            member.block_hashes.clear()
            member.update_block_hashes()

        leader = group.leader
        params = copy.copy(leader.sampling_params)
        assert params is not None
        assert params.extra_args is not None
        tag = replace(
            MemberTag.from_wire(params.extra_args[KEY]),
            banned=answer.backoff.banned(number),
            banned_at=leader.num_prompt_tokens + number,
        )
        params.extra_args = {**params.extra_args, KEY: tag.to_wire()}
        params.seed = answer.seed_now()
        leader.sampling_params = params


def _sendable(answer: Answer | None, output: EngineCoreOutput) -> list[EngineCoreOutput]:
    """What a client is sent in place of an output."""
    if answer is None:
        return [output]
    if output.new_token_ids:
        answer.hold(output)
        return answer.take_sendable(ended=output.finished)
    # An end without a token: an error, or the process gave up.
    return [output]
