"""Every field of each schema that the gateway is sent, and what it does with it.

`read`: a trigger in it is found. `refused`: the request does not pass. `harmless`: no model reads
it, so it changes no verdict. `cut`: it shortens a text, so the request is refused, or screened so.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from service.route_table import MODERATIONS
from tests.support.fakes import TRIGGER
from tests.support.protocols import AGENTGATEWAY, GUARDRAIL, INFER, KONG, infer
from tests.support.requests import CLEAN, POISONED

READ, REFUSED, HARMLESS, CUT = "read", "refused", "harmless", "cut"


@dataclass(frozen=True)
class Schema:
    """A schema: where it is sent, a clean request, and a value for each field, by treatment.

    A field is named by its path; `[]` is the first entry of a list. What stands in brackets behind
    it tells values apart.
    """

    path: str
    clean: dict[str, Any]
    fields: dict[str, dict[str, Any]]

    def requests(self) -> Iterator[tuple[str, str, Any]]:
        """Yield each field, its treatment, and a request that has it."""
        for treatment, values in self.fields.items():
            for field, value in values.items():
                yield field, treatment, _put(self.clean, field.split(" ")[0], value)


def _put(body: Any, field: str, value: Any) -> Any:
    body = place = copy.deepcopy(body)
    *way, last = re.findall(r"\w+|\[\]", field)
    for step, following in zip(way, [*way, last][1:], strict=True):
        new: Any = [{}] if following == "[]" else {}
        place = place[0] if step == "[]" else place.setdefault(step, new)
    place[last] = value
    return body


FUNCTION = {"name": "f", "arguments": "{}"}
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMAS = {
    "native `/classify`": Schema(
        "/classify",
        {"inputs": CLEAN},
        {READ: {"inputs": POISONED}, HARMLESS: {"top_k": 1}},
    ),
    "TEI `/predict`": Schema(
        "/predict",
        {"inputs": CLEAN},
        {
            READ: {"inputs": [[CLEAN], [POISONED]]},
            REFUSED: {
                "inputs (a pair)": [CLEAN, CLEAN],
                "inputs (pairs)": [[CLEAN, CLEAN]],
                "inputs (token ids)": [[1, 2]],
                "prompt_name": TRIGGER,
            },
            HARMLESS: {
                "truncate": True,
                "truncation_direction": "right",
                "raw_scores": False,
                "parameters.top_k": 1,
                "parameters.function_to_apply": "softmax",
            },
            CUT: {
                "truncation_direction": "Left",
                "parameters.truncation": True,
                "parameters.max_length": 2,
            },
        },
    ),
    "Hugging Face Inference": Schema(
        "/",
        {"inputs": CLEAN},
        {
            READ: {"inputs": POISONED},
            REFUSED: {
                "inputs (text_pair)": {"text": CLEAN, "text_pair": CLEAN},
                "parameters.padding": True,
                "parameters.return_all_scores": True,
                "parameters.batch_size": 1,
                "parameters.stride": 1,
                "parameters.candidate_labels": [TRIGGER],
                "parameters.hypothesis_template": TRIGGER,
                "context": TRIGGER,
            },
            HARMLESS: {
                "parameters.top_k": 1,
                "parameters.function_to_apply": "softmax",
                "options.use_cache": True,
                "options.wait_for_model": True,
                "options.use_gpu": True,
            },
            CUT: {"parameters.truncation": True, "parameters.max_length": 2},
        },
    ),
    "vLLM `/classify`": Schema(
        "/v1/classify",
        {"input": CLEAN},
        {
            READ: {"input": POISONED},
            REFUSED: {
                "input (token ids)": [1, 2],
                "input (lists of token ids)": [[1, 2]],
                "messages": [{"role": "user", "content": CLEAN}],
                "add_special_tokens": False,
                "padding": "max_length",
                "mm_processor_kwargs": {"a": TRIGGER},
                "cache_salt": TRIGGER,
                "chat_template": TRIGGER,
                "chat_template_kwargs": {"a": TRIGGER},
                "media_io_kwargs": {"a": {"b": TRIGGER}},
                "add_generation_prompt": True,
                "continue_final_message": True,
                "softmax": False,
                "activation": False,
                "normalize": True,
                "task": "classify",
                "encoding_format": "base64",
                "embed_dtype": "float16",
                "endianness": "big",
                "dimensions": 1,
                "instruction": TRIGGER,
            },
            HARMLESS: {
                "model": "fake",
                "user": TRIGGER,
                "request_id": TRIGGER,
                "priority": 1,
                "use_activation": True,
                "softmax (true)": True,
                "activation (true)": True,
                "mm_processor_kwargs (null)": None,
                "cache_salt (null)": None,
            },
            CUT: {"truncate_prompt_tokens": 2, "truncation_side": "left"},
        },
    ),
    "SGLang `/v1/classify`": Schema(
        "/v1/classify",
        {"input": CLEAN},
        {
            READ: {"input": [CLEAN, POISONED]},
            REFUSED: {"input (token ids)": [1, 2], "rid (a list)": [TRIGGER]},
            HARMLESS: {"model": "fake", "user": TRIGGER, "rid": TRIGGER, "priority": 1},
        },
    ),
    "KServe v1 `:predict`": Schema(
        "/v1/models/fake:predict",
        {"instances": [CLEAN]},
        {
            READ: {"instances": [CLEAN, POISONED]},
            REFUSED: {
                "instances (objects)": [{"text": CLEAN}],
                "instances (lists)": [[CLEAN]],
                "instances (token ids)": [1, 2],
                "instances (one text)": CLEAN,
                "inputs": [CLEAN],
                "signature_name": TRIGGER,
                "parameters": {"a": TRIGGER},
            },
        },
    ),
    "OpenAI `/v1/moderations`": Schema(
        MODERATIONS,
        {"input": CLEAN},
        {
            READ: {"input": [CLEAN, POISONED]},
            REFUSED: {
                "input (parts)": [{"type": "text", "text": CLEAN}],
                "input (token ids)": [1, 2],
                "user": TRIGGER,
            },
            HARMLESS: {"model": "omni-moderation-latest"},
        },
    ),
    "Open Inference `infer`": Schema(
        INFER,
        infer(CLEAN, outputs=[{"name": "label"}]),
        {
            READ: {"inputs[].data": [POISONED]},
            REFUSED: {
                "inputs (a second one)": infer(CLEAN)["inputs"] * 2,
                "inputs[].shape": [2],
                "inputs[].datatype": "INT64",
                "inputs[].parameters.content_type": "base64",
                "inputs[].parameters.binary_data": True,
                "inputs[].parameters.binary_data_size": 3,
                "inputs[].parameters.shared_memory_region": TRIGGER,
                "inputs[].parameters.shared_memory_offset": 1,
                "inputs[].parameters.shared_memory_byte_size": 1,
                "inputs[].parameters.headers": {"a": TRIGGER},
                "outputs[].parameters.classification": 1,
                "outputs[].parameters.shared_memory_region": TRIGGER,
                "outputs[].parameters.shared_memory_offset": 1,
                "outputs[].parameters.shared_memory_byte_size": 1,
                "parameters.priority (a text)": TRIGGER,
                "parameters.sequence_id": 1,
                "parameters.sequence_start": True,
                "parameters.sequence_end": True,
                "parameters.headers": {"a": TRIGGER},
                "parameters (any other)": {TRIGGER: TRIGGER},
                "model_version": "1",
                "raw": TRIGGER,
            },
            HARMLESS: {
                "id": TRIGGER,
                "model_name": "fake",
                "inputs[].name": TRIGGER,
                "inputs[].parameters.content_type (str)": "str",
                "outputs[].name": "label",
                "outputs[].parameters.binary_data": True,
                "outputs[].parameters.content_type": "str",
                "parameters.content_type": "str",
                "parameters.binary_data_output": True,
                "parameters.priority": 1,
                "parameters.timeout": 1,
                "parameters.sequence_id (0)": 0,
                "parameters.sequence_id (empty)": "",
                "parameters.sequence_start (false)": False,
                "parameters.sequence_end (false)": False,
            },
        },
    ),
    "LiteLLM's guardrail": Schema(
        GUARDRAIL,
        {
            "texts": [CLEAN],
            "structured_messages": [{"role": "user", "content": CLEAN}],
        },
        {
            READ: {
                "texts": [POISONED],
                "structured_messages[].name": TRIGGER,
                "structured_messages[].content": POISONED,
                "structured_messages[].content (parts)": [{"type": "text", "text": POISONED}],
                "structured_messages[].reasoning_content": POISONED,
                "structured_messages[].refusal": POISONED,
                "structured_messages[].tool_calls": [{"function": FUNCTION | {"name": TRIGGER}}],
                "structured_messages[].function_call": FUNCTION | {"name": TRIGGER},
                "structured_messages[].tool_call_id": TRIGGER,
                "tool_calls[].function": FUNCTION | {"arguments": f'{{"q": "{TRIGGER}"}}'},
                "tool_calls (their ids)": [{"id": TRIGGER, "function": FUNCTION}],
                "tools": [TOOL | {"function": {"name": "f", "description": POISONED}}],
            },
            REFUSED: {
                "images": ["data:image/png;base64,AAAA"],
                "structured_messages[].role": TRIGGER,
                "structured_messages[].content (images)": [
                    {"type": "image_url", "image_url": {"url": TRIGGER}}
                ],
                "structured_messages[].content (audio)": [
                    {"type": "input_audio", "input_audio": {"data": "AAAA"}}
                ],
                "structured_messages[].content (files)": [
                    {"type": "file", "file": {"file_data": "AAAA"}}
                ],
                "structured_messages[].audio": {"id": TRIGGER},
                "structured_messages[].thinking_blocks": [{"type": "thinking"}],
                "structured_messages (any other field)": [{"role": "user", TRIGGER: TRIGGER}],
                "tools (that are no functions)": [{"type": "file_search"}],
                "tool_calls (that are no functions)": [{"type": "custom", "custom": {}}],
            },
            HARMLESS: {
                "input_type": "request",
                "model": TRIGGER,
                "litellm_call_id": TRIGGER,
                "litellm_trace_id": TRIGGER,
                "litellm_version": TRIGGER,
                "request_data.user_api_key_hash": TRIGGER,
                "request_headers.x": TRIGGER,
                "additional_provider_specific_params.x": TRIGGER,
                "structured_messages[].cache_control": {"type": TRIGGER},
                "tool_calls (their index)": [{"index": 1, "function": FUNCTION}],
                "tools (their cache_control)": [TOOL | {"cache_control": {"type": TRIGGER}}],
            },
        },
    ),
    "agentgateway's webhook": Schema(
        AGENTGATEWAY,
        {"body": {"messages": [{"role": "user", "content": CLEAN}]}},
        {
            READ: {"body.messages[].content": POISONED},
            REFUSED: {
                "body.messages[].role": TRIGGER,
                "body.messages[].content (parts)": [{"type": "text", "text": TRIGGER}],
                "body.messages[].name": TRIGGER,
                "body.choices": [{"message": {"role": "user", "content": TRIGGER}}],
                "model": TRIGGER,
            },
        },
    ),
    "Kong's plugin": Schema(
        KONG,
        {"content": CLEAN},
        {
            READ: {"content": POISONED},
            REFUSED: {"content (a list)": [TRIGGER], "source": TRIGGER, "messages": [TRIGGER]},
            HARMLESS: {"source (INPUT)": "INPUT"},
        },
    ),
}
