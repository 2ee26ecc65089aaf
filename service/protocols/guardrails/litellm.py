"""LiteLLM's guardrail request: what a model reads of a conversation.

LiteLLM takes `texts` out of a request, and sends its messages and tools beside them. All of it is
read: a field that is not known here, or that is not text, is refused, since a model may read it.
"""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from service.protocols.base import Wire
from service.schemas import TextsRequest

JOINTS = ("", " ", "\n")
"""What chat templates, and LiteLLM itself, put between texts that a model reads as one."""
PART_CHARS, OVERLAP_CHARS, WORD_CHARS = 2000, 500, 100
"""Lengths of the parts of a joined text, of what two of them share, and of a long word."""


class _Given(Wire):
    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class TextPart(_Given):
    """A part of a message; images, audio and files are refused."""

    type: Literal["text"]
    text: str
    cache_control: Any = None


class CalledFunction(_Given):
    """A function that a model called; its arguments are JSON in a string, by OpenAI's API."""

    name: str | None = None
    arguments: Any = None

    @property
    def passage(self) -> str:
        """The name and the arguments, as they stand and as a template that parses them reads them.

        Raises:
            ValueError: the arguments nest too deeply, or hold half a character.
        """
        found = [self.name or "", *strings(self.arguments)]
        if isinstance(self.arguments, str):
            found += strings(_parsed(self.arguments))
        return " ".join(found)


class ToolCall(_Given):
    """A call of a tool, with its result's id."""

    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    @property
    def passage(self) -> str:
        """All that a model reads of it."""
        return f"{self.function.passage} {self.id or ''}"


class Tool(_Given):
    """A function that a model may call; tools that read texts elsewhere are refused."""

    type: Literal["function"]
    function: dict[str, Any]
    cache_control: Any = None

    @property
    def passage(self) -> str:
        """All that a model reads of it."""
        return " ".join(strings(self.function))


class Message(_Given):
    """A message of a conversation, in OpenAI's format."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    name: str | None = None
    reasoning_content: str | None = None
    content: str | list[TextPart] = ""
    refusal: str | None = None
    tool_calls: Sequence[ToolCall] = ()
    function_call: CalledFunction | None = None
    tool_call_id: str | None = None
    cache_control: Any = None

    @property
    def parts(self) -> list[str]:
        """The texts of its content."""
        content = self.content
        return [content] if isinstance(content, str) else [part.text for part in content]

    def replacing(self, cleaned: Mapping[str, str]) -> "Message":
        """Return the same message with other texts in its content."""
        content = self.content
        if isinstance(content, str):
            return self.model_copy(update={"content": cleaned.get(content, content)})
        parts = [
            part.model_copy(update={"text": cleaned.get(part.text, part.text)}) for part in content
        ]
        return self.model_copy(update={"content": parts})

    @property
    def passages(self) -> list[str]:
        """All that a model reads of it, in order."""
        calls: list[ToolCall | CalledFunction] = [*self.tool_calls]
        if self.function_call:
            calls.append(self.function_call)
        before, after = (self.name, self.reasoning_content), (self.refusal, self.tool_call_id)
        found = [*before, *self.parts, *(call.passage for call in calls), *after]
        return [passage for passage in found if passage]


class Question(TextsRequest):
    """What a proxy asks about."""

    @property
    @abstractmethod
    def conversation(self) -> "GuardrailRequest":
        """The conversation; of a proxy that takes texts back, those in its `given`."""

    @property
    def texts(self) -> list[str]:
        """Everything that a model would read."""
        return self.conversation.texts


class GuardrailRequest(_Given, Question):
    """LiteLLM's question about a request; without a note, a field is LiteLLM's own and no text."""

    given: Sequence[str] = Field(alias="texts", default=())
    structured_messages: Sequence[Message] = ()
    tools: Sequence[Tool] = ()
    tool_calls: Sequence[ToolCall] = ()
    images: Sequence[Any] = ()
    """Refused if there are any."""
    model: str | None = None
    """LiteLLM's name for the model."""
    input_type: Literal["request"] = "request"
    litellm_call_id: Any = None
    litellm_trace_id: Any = None
    litellm_version: Any = None
    request_data: Any = None
    request_headers: Any = None
    additional_provider_specific_params: Any = None

    @field_validator("images")
    @classmethod
    def _no_images(cls, images: Sequence[Any]) -> Sequence[Any]:
        if images:
            raise ValueError("images cannot be screened")
        return images

    @model_validator(mode="after")
    def _readable(self) -> "GuardrailRequest":
        if not self.passages:
            raise ValueError("there is no text to be screened")
        return self

    @property
    def conversation(self) -> "GuardrailRequest":
        """The request itself: the others are written in its terms."""
        return self

    @cached_property
    def passages(self) -> list[str]:
        """The parts of the conversation, in the order in which a model reads them."""
        found = [tool.passage for tool in self.tools]
        found += [passage for message in self.structured_messages for passage in message.passages]
        beside = [*self.given, *(call.passage for call in self.tool_calls)]
        known = set(found)
        return found + [passage for passage in beside if passage not in known]

    @cached_property
    def texts(self) -> list[str]:
        """Each passage by itself, and all of them as one text, joined in each way; none is blank.

        A long text that is joined comes in parts. Contents are joined without the rest too, since
        many templates leave out names and calls.
        """
        contents = [part for message in self.structured_messages for part in message.parts]
        read_as_one = (self.passages, contents, self.given)
        wholes = dict.fromkeys(joint.join(parts) for parts in read_as_one for joint in JOINTS)
        long = [passage for passage in self.passages if len(passage) > PART_CHARS]
        parts = [
            part
            for whole in wholes
            for part in overlapping_parts(whole)
            if not any(part in passage for passage in long)
        ]
        return [text for text in dict.fromkeys([*self.passages, *parts]) if text.strip()]

    @property
    def replaceable(self) -> set[str]:
        """Texts that can be taken back: LiteLLM puts `texts` into the messages that have them.

        A text that messages have more often than `texts` would stay in one of them.
        """
        given = Counter(self.given)
        read = Counter(part for message in self.structured_messages for part in message.parts)
        return {text for text, times in given.items() if read[text] <= times}

    def replacing(self, cleaned: Mapping[str, str]) -> "GuardrailRequest":
        """Return the same request with other texts, as a model would read it."""
        texts = [cleaned.get(text, text) for text in self.given]
        messages = [message.replacing(cleaned) for message in self.structured_messages]
        return self._copy(texts, messages)

    def latest_turn(self) -> "GuardrailRequest":
        """Return the same request without messages up to the last answer, and without their texts.

        Texts of no message stay, since their turn is not known. So do tools.
        """
        messages, begin = self.structured_messages, 0
        for number in range(1, len(messages)):
            if messages[number - 1].role == "assistant" != messages[number].role:
                begin = number
        earlier, latest = messages[:begin], messages[begin:]
        said = {part for message in earlier for part in message.parts}
        return self._copy([text for text in self.given if text not in said], latest)

    def _copy(self, texts: Sequence[str], messages: Sequence[Message]) -> "GuardrailRequest":
        """Return the same request with other texts and messages."""
        beside = {"tools": self.tools, "tool_calls": self.tool_calls, "model": self.model}
        return GuardrailRequest.of(texts, messages, **beside)

    @classmethod
    def of(
        cls, texts: Sequence[str], messages: Sequence[Message] = (), **fields: Any
    ) -> "GuardrailRequest":
        """Return a request for what has been checked already; there may be no text in it."""
        fields |= {"texts": texts, "structured_messages": messages}
        return cls.model_construct(**fields)


def overlapping_parts(text: str) -> list[str]:
    """Return parts of a text, which begin and end between words if words are not very long.

    What is not longer than the overlap lies whole in one of them. A text that grows at its end
    keeps its parts, but for the last one.
    """
    found, start = [], 0
    while len(text) - start > PART_CHARS:
        end = _between_words(text, start + PART_CHARS)
        found.append(text[start:end])
        start = _between_words(text, end - OVERLAP_CHARS)
    return [*found, text[start:]]


def _between_words(text: str, place: int) -> int:
    """Return the last place behind a blank, not far before a place; else that place."""
    near = range(place, place - WORD_CHARS, -1)
    return next((one for one in near if text[one - 1].isspace()), place)


def strings(value: Any) -> list[str]:
    """Return every key and every value in JSON, in order."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [part for pair in reversed(one.items()) for part in reversed(pair)]
        elif isinstance(one, list):
            waiting += reversed(one)
        elif one is not None:
            found.append(one if isinstance(one, str) else json.dumps(one))
    return found


def _parsed(arguments: str) -> Any:
    """Return JSON; None if it is none, which no template can parse either."""
    try:
        found = json.loads(arguments)
        json.dumps(found, ensure_ascii=False).encode()
    except (RecursionError, UnicodeEncodeError):
        raise ValueError("arguments nest too deeply, or hold half a character") from None
    except ValueError:
        return None
    return found
