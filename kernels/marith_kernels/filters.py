"""Which tokens of a distribution count: filters over rows, in plain torch.

Every parameter may differ by row and lies on the device, so nothing waits for the device. A row is given as
energies and its log-sum-exp: log-probabilities are rows - lse[:, None].
"""

from __future__ import annotations

import torch

EPSILON = 1e-12  # of `kl_indicator`


def top_k(
    rows: torch.Tensor, lse: torch.Tensor, k: torch.Tensor, *, largest: int | None = None
) -> torch.Tensor:
    """-inf, in place, for all but the k most likely tokens; returns the new log-sum-exp.

    Tokens as likely as the last one kept stay too, as in vLLM.

    rows: float32 [n, V]. lse: float32 [n], 0 for a row of -inf. k: int64 [n], at least 1.
    largest: no k is larger (a number the host knows; default V).
    """
    return _keep(rows, lse, rows >= _kth_largest(rows, k, largest))


def top_p(rows: torch.Tensor, lse: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """-inf, in place, for all but the fewest most likely tokens whose probabilities reach p together.

    The token that crosses p stays, so at least one does; of equally likely tokens the first ones stay.
    Returns the new log-sum-exp.

    rows: float32 [n, V]. lse: float32 [n], 0 for a row of -inf. p: float32 or float64 [n] in (0, 1].
    """
    ordered, tokens = rows.sort(dim=-1, descending=True, stable=True)
    mass = (ordered - lse[:, None]).exp_()
    before = mass.cumsum(-1, dtype=torch.float64) - mass
    p = p[:, None]
    # with p = 1 rounding must not decide; and the first token stays whatever its rounded mass
    kept = (before < p) | (p >= 1)
    return _keep(rows, lse, torch.zeros_like(kept).scatter_(-1, tokens, kept))


def plausible(rows: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """float32 [n, V]: 0 where a token is at least alpha times as likely as the likeliest, else -inf.

    A weightless row: added to energies, it bans what is not plausible (Li et al., arXiv 2210.15097). In a
    row of nothing but -inf all tokens are as likely as the likeliest.

    rows: float32 [n, V] energies. alpha: float32 or float64 [n] in (0, 1].
    """
    threshold = rows.amax(-1, keepdim=True).double() + alpha.double().log()[:, None]
    return torch.zeros_like(rows).masked_fill_(rows < threshold, -torch.inf)


def kl_indicator(
    rows: torch.Tensor,
    constraint: torch.Tensor,
    divergence: torch.Tensor,
    include_max: torch.Tensor,
    minimize: torch.Tensor,
    k: torch.Tensor | None = None,
    *,
    largest: int | None = None,
) -> torch.Tensor:
    """float32 [n, V]: 0 where the indicator is one and -1 where it is zero, a weightless row for `pop_gate`.

    The indicator of arXiv 2311.14479, as its authors' implementation has it, asks how the divergence of two
    distributions would change if a token were removed. For p = softmax(rows), q = softmax(constraint):

        d(x) = p(x) (ln p(x) - ln q(x))         KL = sum of d         e = 1e-12
        Z(x) = ln((1 - q(x) + e) / (1 - p(x) + e)) + (1 + e) / (1 - p(x) + e) * (KL - d(x))
        minimize:  Z, KL := -Z, -KL

    It is one where Z - KL > divergence and, with include_max, p < q; with k only among the k tokens of the
    largest Z - KL (and those equal to the last of them). 0 * -inf is 0; where Z and KL are both infinite
    their difference counts as -inf, so the indicator is zero.

    Computed in float64 from the rows. 1 - p(x) and KL - d(x) lose all digits where p(x) is near 1, for one
    token at most: there they are the sums over the other tokens.

    rows, constraint: float32 [n, V] energies. divergence: float64 [n]. include_max, minimize: bool [n].
    k: int64 [n], 0 for all tokens. largest: no k is larger (a number the host knows; default V).
    """
    log_p, log_q = _log_probs(rows), _log_probs(constraint)
    p, q = log_p.exp(), log_q.exp()
    d = torch.where(p == 0, 0.0, p * (log_p - log_q))
    top_p, top_q = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)
    rest = _others(p, top_p) + EPSILON
    z = ((_others(q, top_q) + EPSILON) / rest).log() + (1 + EPSILON) / rest * _others(d, top_p)
    change = z - d.sum(-1, keepdim=True)
    change = torch.where(minimize[:, None], -change, change)
    change = torch.where(change.isnan(), -torch.inf, change)
    one = (change > divergence[:, None]) & ((p < q) | ~include_max[:, None])
    if k is not None:
        one &= (change >= _kth_largest(change, k.clamp_min(1), largest)) | (k == 0)[:, None]
    return one.float() - 1


def _kth_largest(rows: torch.Tensor, k: torch.Tensor, largest: int | None) -> torch.Tensor:
    """[n, 1]: the k-th largest of each row, or its smallest where the row is shorter."""
    size = rows.shape[-1]
    best = rows.topk(size if largest is None else min(largest, size)).values
    return best.gather(-1, (k.clamp_max(best.shape[-1]) - 1)[:, None])


def _keep(rows: torch.Tensor, lse: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    rows.masked_fill_(~kept, -torch.inf)
    mass = (rows - lse[:, None]).exp_().sum(-1)
    return torch.where(mass > 0, lse + mass.log(), 0.0)


def _log_probs(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    lse = rows.logsumexp(-1, keepdim=True)
    return rows - torch.where(lse == -torch.inf, 0.0, lse)


def _others(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """For each token, the sum of all values but its own, which at the token `largest` is summed anew.

    Values may be +inf: a token that is the only infinite one has a finite sum beside it.
    """
    infinite = values == torch.inf
    finite = values.masked_fill(infinite, 0.0)
    but_largest = finite.scatter(-1, largest, 0.0).sum(-1, keepdim=True)
    total = but_largest + finite.gather(-1, largest)
    others = (total - finite).scatter(-1, largest, but_largest)
    return others.masked_fill(infinite.sum(-1, keepdim=True) > infinite.long(), torch.inf)
