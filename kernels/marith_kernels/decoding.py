"""The doors to sampling and speculative decoding: draw a token, check drafted ones, correct one.

One step of speculative decoding for N requests, of which request n has drafted k_n tokens:

    verified = verify(target, draft, tokens, start, uniform, max_drafted=K)   how many of them stand
    logits = residual(target, draft, start, verified)                         what comes after them is drawn
    next_token, _ = sample(logits, uniform2)                                  from these

which leaves k tokens and one more, distributed as if each had been drawn from `target` (Leviathan et al.,
arXiv 2211.17192; Lemma 1 of arXiv 2311.14479). Rows lie as vLLM lays them out: request n owns the rows
start[n] .. start[n + 1] - 1 of `target`, one for each drafted token and one beyond, and the rows from
start[n] - n of `draft`, `tokens` and `uniform`, which lack that one.

`draft` must be the very numbers that the drafted tokens were sampled from, at the same temperature: with
draft probabilities that are merely close, the result is not distributed as the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .backends import DECODING_BACKENDS, check_logits, module_of, resolve

SAMPLE_BLOCK = 4096  # tokens among which `sample` chooses together


class Sampled(NamedTuple):
    token: torch.Tensor  # int64 [N]
    logprob: torch.Tensor  # float32 [N] log-probability of the token under what it was drawn from


class Verified(NamedTuple):
    accepted: torch.Tensor  # int64 [N] drafted tokens before the first rejected one
    # of every row at its temperature, kept for `residual`; T = 0 has none, its rows are decided by the argmax
    target_lse: torch.Tensor  # float32 [P]
    target_argmax: torch.Tensor  # int64 [P]
    draft_lse: torch.Tensor  # float32 [P - N]


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Sampled:
    """Draw a token from softmax(logits / temperature) for every row, by inversion in two levels.

        p = exp(logits[n] / T - max)
        block = first b with sum(p over blocks 0 .. b)        > uniform[n, 0] * sum(p)
        token = first t of it with sum(p of the block up to t) > uniform[n, 1] * sum(p of the block)

    A block has SAMPLE_BLOCK tokens. Two random numbers a row instead of one a token, and the row is read
    once but for one block. T = 0 takes the first largest token, with log-probability 0. A token of
    probability 0 is never drawn; a row of nothing but -inf gives token 0 and log-probability -inf.

    logits: [N, >= vocab_size] float32, bfloat16 or float16. uniform: float32 [N, 2] in [0, 1).
    temperature: float32 [N] >= 0, default 1.
    """
    vocab_size = check_logits(logits, vocab_size)
    name = resolve(backend, logits.device, DECODING_BACKENDS)
    _check_shape("uniform", uniform, (logits.shape[0], 2))
    _check_temperature(temperature, logits.shape[0])
    return Sampled(*module_of("decoding", name).sample(logits, uniform, temperature, vocab_size))


def verify(
    target: torch.Tensor,
    draft: torch.Tensor,
    tokens: torch.Tensor,
    start: torch.Tensor,
    uniform: torch.Tensor,
    *,
    max_drafted: int,
    temperature: torch.Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Verified:
    """Accept drafted tokens, each with probability min(1, p / q), up to the first that is rejected.

        for t in range(k_n):
            p = softmax(target[start[n] + t] / T);  q = softmax(draft[start[n] - n + t] / T);  x = tokens[...]
            if not uniform[...] * q[x] < p[x]: break
        accepted[n] = t          T = 0: accept while x is the first largest token of the target's row

    target: [P, >= vocab_size], draft: [P - N, >= vocab_size], both float32, bfloat16 or float16, -inf where a
    filter or a mask forbids the token. tokens: int64 [P - N]. start: int32 [N + 1] on the device. uniform:
    float32 [P - N].
    max_drafted: no request has drafted more (a number the host knows, so that nothing has to wait for the
    device).
    """
    vocab_size = _check_pair(target, draft, vocab_size)
    n_requests, n_drafted = start.numel() - 1, draft.shape[0]
    if target.shape[0] != n_drafted + n_requests:
        rows = n_drafted + n_requests
        raise ValueError(
            f"{n_requests} requests with {n_drafted} drafted tokens have {rows} target rows, "
            f"not {len(target)}."
        )
    if start.dtype != torch.int32:
        raise ValueError(f"start is int32, not {start.dtype}.")
    _check_shape("tokens", tokens, (n_drafted,))
    _check_shape("uniform", uniform, (n_drafted,))
    _check_temperature(temperature, n_requests)
    name = resolve(backend, target.device, DECODING_BACKENDS)
    return Verified(
        *module_of("decoding", name).verify(
            target, draft, tokens, start, uniform, max_drafted, temperature, vocab_size
        )
    )


def residual(
    target: torch.Tensor,
    draft: torch.Tensor,
    start: torch.Tensor,
    verified: Verified,
    *,
    temperature: torch.Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """float32 [N, vocab_size]: logits that the token after the accepted ones is drawn from, at temperature 1.

        a = accepted[n];  p = softmax(target[start[n] + a] / T)
        a < k_n:   log max(0, p - q), q = softmax(draft[start[n] - n + a] / T)     unnormalised
        a == k_n:  log p                                                           all were accepted
        T = 0:     0 at the first largest token of that row, -inf elsewhere

    Where rounding leaves nothing of max(0, p - q), p and q are the same but for rounding, and log p is used.
    """
    vocab_size = _check_pair(target, draft, vocab_size)
    _check_temperature(temperature, start.numel() - 1)
    name = resolve(backend, target.device, DECODING_BACKENDS)
    return module_of("decoding", name).residual(target, draft, start, verified, temperature, vocab_size)


def _check_pair(target: torch.Tensor, draft: torch.Tensor, vocab_size: int | None) -> int:
    vocab_size = check_logits(target, vocab_size)
    check_logits(draft, vocab_size)
    if draft.dtype != target.dtype:
        raise ValueError(f"target and draft are of one dtype, not {target.dtype} and {draft.dtype}.")
    return vocab_size


def _check_shape(what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{what} has shape {list(shape)}, not {list(tensor.shape)}.")


def _check_temperature(temperature: torch.Tensor | None, n: int) -> None:
    if temperature is not None:
        _check_shape("temperature", temperature, (n,))
