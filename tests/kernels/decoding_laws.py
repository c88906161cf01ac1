"""What sampling and speculative decoding must obey on every backend; used by the tests and on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from marith_kernels import Verified, residual, sample, verify
from marith_kernels.reference_decoding import probabilities

EPS = 4e-6  # room for float32: probabilities of a few hundred or thousand tokens, of logits up to about 100


@dataclass
class Requests:
    """N requests that drafted differently many tokens, with masked and greedy ones among them."""

    target: torch.Tensor
    draft: torch.Tensor
    tokens: torch.Tensor
    start: torch.Tensor
    uniform: torch.Tensor
    temperature: torch.Tensor | None
    drafted: list[int]

    @classmethod
    def draw(
        cls,
        drafted: list[int],
        vocab_size: int,
        seed: int,
        dtype=torch.float32,
        tempered=True,
        device="cpu",
        near=1.0,
    ) -> Requests:
        g = torch.Generator().manual_seed(seed)
        n = len(drafted)
        start = [0]
        for k in drafted:
            start.append(start[-1] + k + 1)
        target = torch.randn(start[-1], vocab_size, generator=g) * 3
        draft_rows = [start[i] + t for i, k in enumerate(drafted) for t in range(k)]
        draft = target[draft_rows] + torch.randn(len(draft_rows), vocab_size, generator=g) * near
        for logits in (target, draft):  # a tenth of every row is forbidden, differently
            logits.masked_fill_(torch.rand(logits.shape, generator=g) < 0.1, -math.inf)
        target[:, 0], draft[:, 0] = 1.0, 1.0  # never all of it
        temperature = None
        if tempered:
            temperature = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(0, 4, (n,), generator=g)]
        target, draft = target.to(dtype), draft.to(dtype)
        tokens = torch.tensor(
            [
                int(
                    torch.multinomial(
                        probabilities(draft[start[i] - i + t], _t(temperature, i)), 1, generator=g
                    )
                )
                for i, k in enumerate(drafted)
                for t in range(k)
            ],
            dtype=torch.int64,
        )
        to = {"device": device}
        return cls(
            target.to(**to),
            draft.to(**to),
            tokens.to(**to),
            torch.tensor(start, dtype=torch.int32, **to),
            torch.rand(len(tokens), generator=g).to(**to),
            None if temperature is None else temperature.to(**to),
            drafted,
        )

    def verify(self, backend: str) -> Verified:
        return verify(
            self.target,
            self.draft,
            self.tokens,
            self.start,
            self.uniform,
            max_drafted=max(self.drafted, default=0),
            temperature=self.temperature,
            backend=backend,
        )

    def residual(self, verified: Verified, backend: str) -> torch.Tensor:
        return residual(
            self.target, self.draft, self.start, verified, temperature=self.temperature, backend=backend
        )


def _t(temperature: torch.Tensor | None, n: int) -> float:
    return 1.0 if temperature is None else float(temperature[n])


def check_sample(logits, uniform, temperature, backend, vocab_size=None) -> None:
    """The token's interval of the cumulated probability holds the uniform number, but for rounding."""
    got = sample(logits, uniform, temperature=temperature, vocab_size=vocab_size, backend=backend)
    block = 4096
    for n in range(len(logits)):
        t = _t(temperature, n)
        p = probabilities(logits[n, :vocab_size], t)
        token = int(got.token[n])
        if not p.any():
            assert token == 0
            assert got.logprob[n] == -math.inf
            continue
        assert p[token] > 0, f"row {n}: token {token} has probability 0"
        assert abs(got.logprob[n] - p[token].log()) < 2e-5, f"row {n}: {got.logprob[n]}, not {p[token].log()}"
        if t == 0:
            assert token == int(p.argmax())
            continue
        mass = torch.stack([part.sum() for part in p.split(block)])
        b = token // block
        u, v = uniform[n].tolist()
        assert mass[:b].sum() - EPS <= u <= mass[: b + 1].sum() + EPS, (
            f"row {n}: block {b} is not that of {u}"
        )
        inside = p[b * block : (b + 1) * block] / mass[b]
        at = token - b * block
        assert inside[:at].sum() - EPS <= v <= inside[: at + 1].sum() + EPS, f"row {n}: token {token} not {v}"


def check_verify(requests: Requests, backend: str) -> Verified:
    """Accepted are the tokens before the first with u >= p / q; where u is that but for rounding, either."""
    got = requests.verify(backend)
    start = requests.start.tolist()
    for n, k in enumerate(requests.drafted):
        t = _t(requests.temperature, n)
        accepted = int(got.accepted[n])
        assert 0 <= accepted <= k
        for i in range(min(accepted + 1, k)):
            row = start[n] - n + i
            x = requests.tokens[row]
            p = probabilities(requests.target[start[n] + i], t)[x]
            q = 1.0 if t == 0 else probabilities(requests.draft[row], t)[x]
            threshold = float(p / q)
            u = float(requests.uniform[row])
            if i < accepted:
                assert u < threshold * (1 + 20 * EPS), f"request {n} accepts at {i}: u {u}, p / q {threshold}"
                assert p > 0
            else:
                assert u >= threshold * (1 - 20 * EPS), (
                    f"request {n} rejects at {i}: u {u}, p / q {threshold}"
                )
    return got


def check_residual(requests: Requests, verified: Verified, backend: str) -> None:
    got = requests.residual(verified, backend)
    start = requests.start.tolist()
    for n, k in enumerate(requests.drafted):
        t, a = _t(requests.temperature, n), int(verified.accepted[n])
        p = probabilities(requests.target[start[n] + a], t)
        q = torch.zeros_like(p)
        if a < k and t > 0:
            q = probabilities(requests.draft[start[n] - n + a], t)
        left = (p - q).clamp_min(0)
        if not left.any():
            left = p
        row = got[n].double()
        assert not row.isnan().any()
        assert torch.all(row[p == 0] == -math.inf), f"request {n}: a forbidden token may be drawn"
        error = (row.exp() - left).abs() / torch.maximum(p, q).clamp_min(1e-30)
        assert error.max() < 20 * EPS, f"request {n}: token {int(error.argmax())} is off by {error.max():.1e}"


def output_distribution(target: torch.Tensor, draft: torch.Tensor, backend: str) -> torch.Tensor:
    """The distribution of the first token that one drafted token leads to, every path weighed: float64 [V].

    All drafted tokens are verified at once, each as a request of its own, at a u just below and just above
    p / q; that both do what they should is asserted, so the path weights are q(x) min(1, p/q) and the rest.
    """
    p, q = probabilities(target, 1.0), probabilities(draft, 1.0)
    vocab_size = len(p)
    candidates = q.nonzero()[:, 0].tolist()
    ratio = (p / q)[candidates]
    result = torch.zeros(vocab_size, dtype=torch.float64)

    def run(uniform: torch.Tensor):
        n = len(candidates)
        requests = Requests(
            target.expand(2 * n, -1).contiguous(),
            draft.expand(n, -1).contiguous(),
            torch.tensor(candidates),
            torch.arange(0, 2 * n + 1, 2, dtype=torch.int32),
            uniform.float().clamp(0, 1 - 2**-24),
            None,
            [1] * n,
        )
        verified = requests.verify(backend)
        return verified.accepted, requests.residual(verified, backend)

    below, _ = run(ratio * (1 - 1e-4) - 1e-12 * (ratio == 0))
    above, corrected = run(ratio * (1 + 1e-4))
    for i, x in enumerate(candidates):
        chance = min(1.0, float(ratio[i]))
        if chance > 0:
            assert below[i] == 1, f"token {x} is rejected below its ratio {ratio[i]}"
        result[x] += q[x] * chance
        if chance < 1:
            assert above[i] == 0, f"token {x} is accepted above its ratio {ratio[i]}"
            result += q[x] * (1 - chance) * torch.softmax(corrected[i].double(), -1)
    return result
