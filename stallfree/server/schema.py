"""The bodies and answers of OpenAI's API. It does not know what is done with them.

A field is served, refused or unknown, and the answer says which. Served fields are declared here. A field of OpenAI's API that this
server lacks (`UNSUPPORTED`) is refused, unless its value requests nothing, or another field forbids its use (`FORBIDDEN_BY`). A
field that concerns only OpenAI's own service (`WITHOUT_EFFECT`) is accepted, because it changes no token. Any other name is
refused: a misspelt `max_token` must not become a completion of unlimited length. `null` is the same as leaving a field out.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from stallfree.server.errors import UNKNOWN_PARAMETER, UNSUPPORTED_PARAMETER

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),  # vLLM
    "allowed_callers": (["direct"],),  # Anthropic
    "allowed_token_ids": (),  # vLLM
    "annotations": ([],),
    "audio": (),
    "background": (False,),
    "bad_words": ([],),  # vLLM
    "conversation": (),
    "container": (),  # Anthropic
    "continue_final_message": (False,),  # vLLM
    "defer_loading": (False,),  # Anthropic
    "dry_multiplier": (0,),  # llama.cpp
    "function_call": ("none",),
    "functions": ([],),
    "input_examples": ([],),  # Anthropic
    "length_penalty": (1,),  # vLLM
    "mcp_servers": ([],),  # Anthropic
    "mirostat": (0,),  # llama.cpp, Ollama
    "modalities": (["text"],),
    "prediction": (),
    "previous_response_id": (),
    "return_token_ids": (False,),  # vLLM
    "return_tokens_as_token_ids": (False,),  # vLLM
    "skip_special_tokens": (True,),  # vLLM, TGI
    "spaces_between_special_tokens": (True,),  # vLLM
    "suffix": ("",),
    "tfs_z": (1,),  # Ollama
    "truncate_prompt_tokens": (),  # vLLM
    "typical_p": (1,),  # llama.cpp
    "use_beam_search": (False,),  # vLLM
    "web_search_options": (),
}
"""Names of refused fields, each with the values that request nothing and are accepted. OpenAI's, unless another server is named."""

FORBIDDEN_BY = {"functions": "function_call"}
"""Names of fields that are also accepted if the field named here is "none": it says that none of them may be called."""

WITHOUT_EFFECT = frozenset(
    {
        "eager_input_streaming",  # Anthropic
        "guided_decoding_backend",  # vLLM
        "inference_geo",  # Anthropic
        "keep_alive",  # Ollama
        "max_tool_calls",  # limits tools that OpenAI runs
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",  # vLLM
        "speed",  # Anthropic
        "store",
        "verbosity",
    }
)
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_SALT_CHARS = 512
MAX_CHOICES = 128
MAX_TOOLS = 256
LEAST_TARGET_MS = 0.001
MOST_TARGET_MS = 3_600_000
LONGEST_CLASS = 64


class Body(BaseModel):
    """Types are strict: "1" is not a number, 1.0 not an integer, true neither."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = {}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in values.items():
            if name in known:
                fields[name] = value
            elif value is None or name in WITHOUT_EFFECT or _requests_nothing(name, value, values):
                continue
            elif name in UNSUPPORTED:
                raise PydanticCustomError(UNSUPPORTED_PARAMETER, "not supported by this server", {"name": name})
            else:
                near = difflib.get_close_matches(name, known, 1)
                printable = name[:80].encode(errors="backslashreplace").decode()  # without halves of surrogate pairs
                raise PydanticCustomError(UNKNOWN_PARAMETER, "unknown field", {"name": printable, "near": near})
        return fields


def _requests_nothing(name: str, value: Any, values: dict[str, Any]) -> bool:
    return value in UNSUPPORTED.get(name, ()) or (name in FORBIDDEN_BY and values.get(FORBIDDEN_BY[name]) == "none")


def _encodable(text: str) -> str:
    """Refuse half a surrogate pair: JSON can express it, but no encoding can, so no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text may not hold half a surrogate pair") from None
    return text


def _not_empty(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty", "a stop string needs at least one character")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenIds = list[int]
Stop = Annotated[Text, Field(max_length=MAX_STOP_CHARS), AfterValidator(_not_empty)]


class StreamOptions(Body):
    """Options of a stream. `include_obfuscation` has no effect: no padding is added to events."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


Salt = Annotated[Text, Field(max_length=MAX_SALT_CHARS)]
ClassName = Annotated[Text, Field(min_length=1, max_length=LONGEST_CLASS)]
"""The name of a service class. `service_tier` has one too; "auto" and "default" there are the default class."""
Milliseconds = Annotated[float, Field(ge=LEAST_TARGET_MS, le=MOST_TARGET_MS, allow_inf_nan=False)]


class LatencyTargets(Body):
    """The class of a request, and its own targets, in place of those of the class: from arrival to the first token (`ttft_ms`), and
    either between any two tokens (`tbt_ms`) or as an envelope (`tpot_ms`); or from arrival to the last token (`ttlt_ms`).
    """

    class_: ClassName | None = Field(None, alias="class")
    ttft_ms: Milliseconds | None = None
    tbt_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    ttlt_ms: Milliseconds | None = None
    on_late: Literal["refuse", "serve"] | None = None
    """What happens if the first token would come too late. By default what `--on-late` says."""


class JsonSchema(Body):
    """A schema for an answer. `strict` changes nothing: every schema is held. `name`, `description`: for the client's own use."""

    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of these. `json`: a schema, or its text. `grammar`: in Lark's form, or GBNF."""

    json_: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class Generation(Body):
    """Fields of both chat and completions. Numbers out of OpenAI's ranges are refused. vLLM's fields are `top_k`, `min_p`,
    `repetition_penalty`, `min_tokens`, `ignore_eos`, `stop_token_ids`, `include_stop_str_in_output`, `priority` (lower is served
    first), `cache_salt` (only requests with the same one share cached prefixes), `prompt_logprobs`, `structured_outputs` and the
    older `guided_*`. `sanitize_control_tokens` is named as in `transformers`; `slo` is this project's. `safety_identifier` is a
    newer name of `user`.
    """

    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_CHOICES)] | None = None
    ignore_eos: bool | None = None
    sanitize_control_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    slo: LatencyTargets | None = None
    service_tier: ClassName | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None
    guided_grammar: Text | None = None
    cache_salt: Salt | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    user: Text | None = Field(None, max_length=512)
    safety_identifier: Text | None = Field(None, max_length=512)


class Part(BaseModel):
    """A part of a message's content. Only the type "text" is served; fields of other types are ignored."""

    model_config = ConfigDict(strict=True)
    type: str
    text: Text | None = None


class FunctionCall(Body):
    name: Text
    arguments: Text


class ToolCall(Body):
    """A call that the assistant made earlier. `index` is that of a stream's chunk, which some clients keep."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """A message of a chat. `developer` is a newer name of `system`. Only an assistant's content may be null. A `tool` message is
    the result of the call named by `tool_call_id`. `reasoning_content` is what the assistant thought before its answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: Text | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None


class Function(Body):
    """A function that the model may call. `parameters`: the JSON schema of its arguments. With `strict` it is held where a call is
    required."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Text


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """The tools that may be called, of all that the model is shown. `mode` is as `tool_choice` itself."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatRequest(Generation):
    """`chat_template_kwargs` are further values for the model's template. `documents` are for templates that show some. After
    `max_reasoning_tokens` a reasoning section ends. `include_reasoning` false leaves its text out of the answer."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    max_reasoning_tokens: int | None = Field(None, ge=1)
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None


class CompletionRequest(Generation):
    """`prompt`: a text, token ids, or a list of either. `logprobs`: how many alternatives to show; with `echo`, also for the
    prompt. `max_tokens` may be 0 with `echo`: then the answer is the prompt alone."""

    prompt: Text | TokenIds | list[Text] | list[TokenIds]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


class TokenizeRequest(Body):
    """Either a `prompt` or `messages`."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    sanitize_control_tokens: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class MadeCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(BaseModel):
    """`content` is null if the message is calls alone. `reasoning_content` and `tool_calls` are there only if there are any."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    service_tier: str | None = None


class Model(BaseModel):
    """`parent`: of an adapter, the model that it changes, and `root` its folder."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stallfree"
    parent: str | None = None
    root: str | None = None
    max_model_len: int
    default_sampling: dict[str, int | float]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Deleted(BaseModel):
    id: str
    object: Literal["adapter"] = "adapter"
    deleted: bool = True


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Prompt(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Version(BaseModel):
    version: str
