"""Verdicts for proxies that ask about conversations: LiteLLM, agentgateway and Kong.

They do not send a request as its classifier gets it, but the texts in it. What cannot be screened
is blocked.
"""

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import APIRouter, Request, Response

from service.errors import Invalid, NotInspected
from service.http.exchange import Completed, Exchange, Parsed
from service.http.parsing import read_json, valid
from service.http.responses import json_response, rejected_reason
from service.http.routing import add_route, prefixed_model
from service.lifecycle.registry import Registry
from service.pipeline.gateway import ConversationResult, Gateway
from service.protocols.guardrails.base import Guardrail
from service.protocols.guardrails.dialects import GUARDRAILS
from service.protocols.guardrails.litellm import GuardrailRequest
from service.settings import RequestLimits

TURNS = "x-psim-turns"


class ConversationRoutes:
    """Tells proxies whether a conversation may go on, and what to replace in it."""

    def __init__(self, models: Registry, exchange: Exchange) -> None:
        self._models, self._exchange = models, exchange

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        for guardrail in GUARDRAILS:
            add_route(router, guardrail.route, self._endpoint(guardrail))
        return router

    def _endpoint(self, guardrail: Guardrail) -> Callable[[Request], Awaitable[Response]]:
        read, respond = partial(self._read, guardrail), partial(_respond, guardrail)
        work = (
            Gateway.sanitize_conversation if guardrail.takes_texts else Gateway.judge_conversation
        )

        async def judge(request: Request) -> Response:
            """Tell whether a conversation may go on; one that cannot be screened may not."""
            try:
                answer = partial(respond, request)
                return await self._exchange.run(request, guardrail.route, read, work, answer)
            except NotInspected as error:
                return json_response(200, guardrail.blocks(str(error)))

        return judge

    async def _read(
        self, guardrail: Guardrail, request: Request, settings: RequestLimits
    ) -> Parsed[GuardrailRequest] | Response:
        _, data = await read_json(request, settings)
        if guardrail.is_answer(data):
            return json_response(200, guardrail.passes())
        try:
            asked = valid(data, guardrail.request_type).conversation
        except Invalid as error:
            raise NotInspected(f"not all of the request can be screened: {error}") from None
        request.state.asked = asked
        screened = asked.latest_turn() if _latest_turn_alone(request) else asked
        _check_size(screened, settings)
        if not screened.texts:
            return json_response(200, guardrail.passes())  # nothing but blanks
        # Proxies have their own names for models; a single model is meant by all of them.
        by_name = len(self._models) > 1 and prefixed_model(request) is None
        return Parsed(screened, (screened.model,) if by_name else ())


def _latest_turn_alone(request: Request) -> bool:
    """Return whether earlier turns are not to be screened, which a header says.

    It is the proxy's own: parameters in the body can be those of its users.
    """
    turns = request.headers.getlist(TURNS)
    if turns not in ([], ["all"], ["latest"]):
        raise Invalid(f"the header {TURNS} must be all or latest")
    return turns == ["latest"]


def _check_size(conversation: GuardrailRequest, settings: RequestLimits) -> None:
    """Raise `NotInspected` if a text or all texts together are too long."""
    lengths = [*map(len, conversation.passages)]
    for found, limit, name in (
        (max(lengths, default=0), settings.max_chars, "a text has"),
        (sum(lengths), settings.max_conversation_chars, "the conversation has"),
    ):
        if found > limit:
            raise NotInspected(f"{name} {found} characters, over the limit of {limit}")


def _respond(
    guardrail: Guardrail, request: Request, done: Completed[GuardrailRequest, ConversationResult]
) -> Response:
    if done.answer.rejected:
        return json_response(200, guardrail.blocks(rejected_reason(done.record)))
    if done.answer.cleaned:
        return json_response(200, guardrail.masks(request.state.asked, done.answer.cleaned))
    return json_response(200, guardrail.passes())
