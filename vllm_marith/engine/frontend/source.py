"""What a rendered prompt was rendered from.

vLLM hands the engine token ids; a formula's terms are rendered from the text or the messages of the
request.  So every prompt that a renderer returns carries its `Source`, under a key that vLLM does
not read, and each term is rendered by the same renderer with the same options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_marith.language import Term

SOURCE = "marith_source"
"""Key of an engine input that holds its `Source`."""


@dataclass(frozen=True)
class Completion:
    """A completion prompt: text, or token ids where the client sent ids."""

    prompt: Mapping[str, Any]
    tok_params: Any

    def render(self, renderer: Any, term: Term, kept: list[int] | None = None) -> list[int]:
        """Token ids of a term's prompt: ``system + "\\n" + input``, or the template with its input.

        The beginning-of-sequence token is added once, as the tokenizer does for any prompt, even
        where a template spells it out.

        Args:
            kept: token ids of the client's text, if the term's prompt must contain just these.
        """
        text = self.prompt.get("prompt")
        if isinstance(text, str) and kept is not None:
            return self._around_ids(renderer, term, kept)
        if isinstance(text, str):
            (engine_input,) = renderer.render_cmpl([{"prompt": _fill(term, text)}], self.tok_params)
            return _single_bos(renderer, engine_input["prompt_token_ids"])
        return self._around_ids(renderer, term, list(self.prompt["prompt_token_ids"]))

    def text(self, renderer: Any, term: Term) -> str:
        """What a classifier reads in front of the answer; token ids are decoded for it."""
        text = self.prompt.get("prompt")
        if not isinstance(text, str):
            ids = list(self.prompt["prompt_token_ids"])
            text = renderer.get_tokenizer().decode(ids, skip_special_tokens=True)
        return _fill(term, text)

    def _around_ids(self, renderer: Any, term: Term, ids: list[int]) -> list[int]:
        # The client's own token ids are kept; only what the term puts around them is tokenized.
        around = [f"{term.system}\n", ""] if term.prompt is None else term.prompt.split("{input}")
        encode = renderer.get_tokenizer().encode
        found = encode(around[0])
        if len(around) > 1 and found[:1] == ids[:1] == [renderer.get_bos_token_id()]:
            ids = ids[1:]
        for text in around[1:]:
            found += ids
            found += encode(text, add_special_tokens=False) if text else []
        return _single_bos(renderer, found)


@dataclass(frozen=True)
class Chat:
    """A conversation and how it is turned into a prompt."""

    messages: Sequence[Mapping[str, Any]]
    chat_params: Any
    tok_params: Any

    def render(self, renderer: Any, term: Term, kept: list[int] | None = None) -> list[int]:
        """Token ids of the conversation with the term's system message, through the chat template.

        A term with a ``prompt`` template rewrites the last user message instead.

        Raises:
            ValueError: the template has no user message of text to rewrite, or the conversation's token ids
                must be kept, which a chat template cannot promise.
        """
        if kept is not None:
            raise ValueError("log-probabilities of the prompt are for completions, not for conversations")
        messages = [dict(message) for message in self.messages]
        if term.system is not None:
            if messages and messages[0].get("role") in ("system", "developer"):
                messages[0]["content"] = term.system
            else:
                messages.insert(0, {"role": "system", "content": term.system})
        elif term.prompt is not None:
            users = [m for m in messages if m.get("role") == "user"]
            if not users:
                raise ValueError("its prompt template needs a user message to rewrite, and there is none")
            users[-1]["content"] = term.render(_text(users[-1].get("content")))
        _, (engine_input,) = renderer.render_chat([messages], self.chat_params, self.tok_params)
        return list(engine_input["prompt_token_ids"])

    def text(self, renderer: Any, term: Term) -> str:
        """What a classifier reads in front of the answer.

        The input of its template is the last user message; a term without one reads that message and a
        line break.

        Raises:
            ValueError: it needs that message, and there is none of text.
        """
        if term.prompt is not None and "{input}" not in term.prompt:
            return term.prompt
        users = [message for message in self.messages if message.get("role") == "user"]
        if not users:
            raise ValueError("its classifier reads the user's message, and there is none")
        text = _fill(term, _text(users[-1].get("content")))
        return text if term.prompt is not None else f"{text}\n"


Source = Completion | Chat


def _fill(term: Term, text: str) -> str:
    return f"{term.system}\n{text}" if term.system is not None else term.render(text)


def _text(content: Any) -> str:
    """The text of a message, whose content is a string or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    if not parts or any(not isinstance(p, Mapping) or p.get("type") != "text" for p in parts):
        raise ValueError("its prompt template can only be filled with a user message of text")
    return "\n".join(str(part["text"]) for part in parts)


def _single_bos(renderer: Any, ids: Sequence[int]) -> list[int]:
    bos = renderer.get_bos_token_id()
    doubled = bos is not None and len(ids) > 1 and ids[0] == bos == ids[1]
    return list(ids[1:] if doubled else ids)
