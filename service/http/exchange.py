"""The life of a request whose texts are screened, from its first byte to its answer.

Routes differ in how they read a request, in the method of the gateway that works on it, and in how
they respond. All else is here.
"""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request, Response

from service.http.deadline import Deadline, WhileConnected
from service.http.routing import prefixed_model
from service.lifecycle.registry import Registry
from service.pipeline.gateway import Gateway
from service.pipeline.request_record import Recorder, RequestRecord
from service.protocols.base import ModelInfo
from service.security.access import Caller, caller_of
from service.settings import RequestLimits

Body = TypeVar("Body")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Body]):
    """A request that has been read."""

    body: Body
    models: Sequence[str | None] = ()
    """Names that it gives to its model, beside the prefix of the path."""


@dataclass(frozen=True, slots=True)
class Completed(Generic[Body, Answer]):
    """A request that the gateway has worked on."""

    body: Body
    answer: Answer
    record: RequestRecord
    model_info: ModelInfo


Read = Callable[[Request, RequestLimits], Awaitable[Parsed[Body] | Response]]
Work = Callable[[Gateway, RequestRecord, Caller, Body], Coroutine[Any, Any, Answer]]
Respond = Callable[[Completed[Body, Answer]], Response]


class Exchange:
    """Takes requests through their lives."""

    def __init__(self, models: Registry, recorder: Recorder, settings: RequestLimits) -> None:
        self._models, self._recorder, self._settings = models, recorder, settings

    async def run(
        self,
        request: Request,
        route: str,
        read: Read[Body],
        work: Work[Body, Answer],
        respond: Respond[Body, Answer],
    ) -> Response:
        """Read a request, work on it while its caller is connected, record it, and respond.

        Args:
            request: its body has not been read.
            route: its name in metrics, logs, traces and audit.
            read: returns the parsed request, or the response if there is nothing to screen.
            work: a method of `Gateway`.
            respond: packs the answer of `work`.

        Raises:
            ServiceError: there is no answer; the request is recorded.
            ClientDisconnect: the caller hung up; the work is dropped, and the request recorded.
        """
        caller = caller_of(request)
        with self._recorder.record(route, request.state.request_id, caller.name) as record:
            async with Deadline(self._settings.request_timeout_s):
                parsed = await read(request, self._settings)
                if isinstance(parsed, Response):
                    return parsed
                model = self._models.get(prefixed_model(request), *parsed.models)
                with model.lease() as gateway:
                    record.context = gateway.context_of(caller)
                    async with WhileConnected(request):
                        answer = await work(gateway, record, caller, parsed.body)
        return respond(Completed(parsed.body, answer, record, gateway.model_info))
