"""`marith chat`: a conversation with a server's formula, in the terminal, coloured by who chose the words.

A client like any other: it speaks HTTP, and needs neither vLLM nor a model on this machine.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red")
"""Of the terms, in the order of the formula."""

_BOLD_FROM = 0.6
"""Share of all pushes at a token from which its term is said to have chosen it alone."""

_UNBOUNDED = 1e9
_MOST = 50.0
"""A push beyond this says nothing more, and would drown the others."""


class ChatError(Exception):
    """The server's refusal, or that there is none; the sentence is all there is to print."""


@dataclass
class Server:
    """A server's address and what is asked of it.

    Attributes:
        url: without a path.
        api_key: empty for none.
    """

    url: str
    api_key: str = ""

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The open answer to a request.

        Raises:
            ChatError: there is no answer, or a refusal.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(
                urllib.request.Request(f"{self.url.rstrip('/')}{path}", data, headers)
            )
        except urllib.error.HTTPError as error:
            raise ChatError(_refusal(error)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ChatError(f"no server answers at {self.url}: {reason}") from None

    def models(self) -> tuple[str, list[str]]:
        """(the base model, the presets)."""
        with self.ask("/v1/models") as answer:
            listed = json.load(answer)["data"]
        return listed[0]["id"], [model["id"] for model in listed if model["parent"]]


@dataclass
class Conversation:
    """What was said, and how it goes on.

    Attributes:
        formula: the JSON of a request's formula, None for the model as it is.
    """

    server: Server
    model: str
    formula: Mapping[str, Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
        """The answer in pieces: (text, explanation of the token that it is; None without a formula).

        Raises:
            ChatError: the server refuses.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            **self.options,
        }
        if self.formula is not None:
            body["vllm_xargs"] = {"marith": json.dumps(self.formula), "marith_explain": 1}
        answer = ""
        with self.server.ask("/v1/chat/completions", body) as stream:
            for event in _events(stream):
                if "error" in event:
                    raise ChatError(event["error"]["message"])
                for token in event.get("marith", {}).get("tokens", ()):
                    yield token["text"], token
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    answer += piece
                    if self.formula is None and piece:
                        yield piece, None
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def winner(token: Mapping[str, Any]) -> tuple[str | None, float]:
    """(the term that spoke most for a token against its runner-up, its share of all pushes).

    By contributions where the formula has them, else by log-probabilities; None where no term spoke for it.
    """
    pushes = {}
    for name, term in token["terms"].items():
        exact = any(share is not None for share in term["contribution"])
        chosen, other = (
            -_UNBOUNDED if value is None else value  # None is the logarithm of zero
            for value in (term["contribution"] if exact else term["logprob"])
        )
        pushes[name] = max(-_MOST, min(_MOST, chosen - other))
    total = sum(map(abs, pushes.values()))
    name = max(pushes, key=lambda name: pushes[name], default=None)
    if name is None or pushes[name] <= 0:
        return None, 0.0
    return name, pushes[name] / total


def coloured(text: str, token: Mapping[str, Any] | None) -> Text:
    """A piece of an answer as it is shown."""
    if token is None:
        return Text(text)
    name, share = winner(token)
    if name is None:
        return Text(text)
    colour = COLOURS[list(token["terms"]).index(name) % len(COLOURS)]
    return Text(text, f"bold {colour}" if share >= _BOLD_FROM else colour)


def run(
    server: Server,
    formula: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    console: Console | None = None,
) -> None:
    """Talks until the user has had enough.

    Raises:
        ChatError: the server cannot be reached, or refuses the formula.
    """
    console = console or Console(highlight=False)
    base, presets = server.models()
    console.print(Text(f"{base} at {server.url}", "bold"))
    if formula is None:
        told = f"as it is; --formula takes one, or a preset: {', '.join(presets)}" if presets else "as it is"
        console.print(Text(told, "dim"))
    else:
        with server.ask("/v1/marith/explain", formula) as answer:
            plan = json.load(answer)
        legend = [Text(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(plan["terms"])]
        console.print(Text(plan["formula"]), Text("  by"), *legend)
    console.print(Text("an empty line ends the conversation", "dim"))
    conversation = Conversation(server, base, formula, options)
    while text := _line(console):
        try:
            for piece, token in conversation.say(text):
                console.print(coloured(piece, token), end="", soft_wrap=True)
        except ChatError as error:
            console.print(Text(str(error), "red"))
        console.print()


def _line(console: Console) -> str:
    try:
        return console.input("\n> ").strip()
    except EOFError:
        return ""


def _events(stream: Any) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, up to its end."""
    for line in stream:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def _refusal(error: urllib.error.HTTPError) -> str:
    if error.code == 401:
        return "the server wants its API key (--api-key, or OPENAI_API_KEY)"
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered HTTP {error.code}"
