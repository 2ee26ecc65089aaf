"""How proxies ask about conversations: LiteLLM, agentgateway and Kong."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from service.protocols.base import Wire
from service.protocols.guardrails.base import Guardrail
from service.protocols.guardrails.litellm import GuardrailRequest, Message, Question

FORBIDDEN = 403


class LiteLlm(Guardrail):
    """LiteLLM's generic guardrail API."""

    route = "/beta/litellm_basic_guardrail_api"
    request_type = GuardrailRequest

    def is_answer(self, data: object) -> bool:
        """Return whether a body holds a model's answer."""
        return isinstance(data, dict) and data.get("input_type") == "response"

    def passes(self) -> Any:
        """Return the JSON that lets a request pass as it is."""
        return {"action": "NONE"}

    def blocks(self, reason: str) -> Any:
        """Return the JSON that blocks a request."""
        return {"action": "BLOCKED", "blocked_reason": reason}

    def masks(self, asked: GuardrailRequest, cleaned: Mapping[str, str]) -> Any:
        """Return all texts, in their places: LiteLLM knows them by their order."""
        texts = [cleaned.get(text, text) for text in asked.given]
        return {"action": "GUARDRAIL_INTERVENED", "texts": texts}


class PromptMessage(Wire):
    """A message; agentgateway sends its text alone."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str


class Prompt(Wire):
    """The messages of a request."""

    messages: Annotated[list[PromptMessage], Field(min_length=1)]


class PromptRequest(Question):
    """agentgateway's question about a request."""

    body: Prompt

    @property
    def conversation(self) -> GuardrailRequest:
        """The messages, each of which can be taken back."""
        messages = [Message(role=m.role, content=m.content) for m in self.body.messages]
        texts = [message.content for message in self.body.messages]
        return GuardrailRequest.of(texts, messages)


class Agentgateway(Guardrail):
    """agentgateway's guardrail webhook, for requests."""

    route = "/request"
    request_type = PromptRequest

    def passes(self) -> Any:
        """Return the JSON that lets a request pass as it is."""
        return {"action": {"reason": "PSIM finds no trigger"}}

    def blocks(self, reason: str) -> Any:
        """Return the JSON that blocks a request; its caller reads the body."""
        return {"action": {"body": reason, "status_code": FORBIDDEN, "reason": reason}}

    def masks(self, asked: GuardrailRequest, cleaned: Mapping[str, str]) -> Any:
        """Return all messages, in their places."""
        messages = [
            {"role": message.role, "content": message.content}
            for message in asked.replacing(cleaned).structured_messages
        ]
        reason = "PSIM took a backdoor trigger out of it"
        return {"action": {"body": {"messages": messages}, "reason": reason}}


class AgentgatewayAnswers(Agentgateway):
    """agentgateway's webhook for a model's answers, all of which pass."""

    route = "/response"

    def is_answer(self, data: object) -> bool:
        """Return that it is one."""
        return True


class KongRequest(Question):
    """What Kong's plugin asks, if it is set up as docs/proxies.md says."""

    content: str
    source: Literal["INPUT"] = "INPUT"

    @property
    def conversation(self) -> GuardrailRequest:
        """The text, which Kong has put together of messages."""
        return GuardrailRequest.of([self.content])


class Kong(Guardrail):
    """Kong's plugin `ai-custom-guardrail`, whose schema has no field for a text to take back."""

    route = "/guardrails/kong"
    request_type = KongRequest
    takes_texts = False

    def is_answer(self, data: object) -> bool:
        """Return whether a body holds a model's answer."""
        return isinstance(data, dict) and data.get("source") == "OUTPUT"

    def passes(self) -> Any:
        """Return the JSON that lets a request pass."""
        return {"block": False, "block_message": ""}

    def blocks(self, reason: str) -> Any:
        """Return the JSON that blocks a request."""
        return {"block": True, "block_message": reason}


GUARDRAILS: tuple[Guardrail, ...] = (LiteLlm(), Agentgateway(), AgentgatewayAnswers(), Kong())
