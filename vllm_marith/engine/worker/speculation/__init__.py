"""Speculative sampling with partial formulas: draft some tokens, check them all in one step.

A round, for a group whose formula is P and whose partial formula is P_0 (`vllm_marith.plan.speculation`)::

    draft     x_1 ~ P_0(. | text), x_2 ~ P_0(. | text x_1), ... x_k           the drafting members, k passes
    check     P(. | text), P(. | text x_1), ... P(. | text x_1 .. x_k)        all members, one step
    settle    x_t stands with probability min(1, P(x_t) / P_0(x_t)); the first that does not is replaced by
              a sample of max(0, P - P_0), normalised; if all stand, one more token is drawn from P

What a round leaves is distributed as P, token by token (Lemma 1 of arXiv 2311.14479; Leviathan et al., arXiv
2211.17192), whatever P_0 is, as long as the tokens were drawn from the very P_0 that the check sees.

Partial formulas nest: P_1, with more terms than P_0, may check P_0's drafts before P sees them, by the same
rule, and what it leaves is distributed as P_1.
"""
