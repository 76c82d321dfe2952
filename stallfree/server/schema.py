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
    "annotations": ([],),
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tool_calls": ([],),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Names of refused fields, each with the values that request nothing and are accepted."""

FORBIDDEN_BY = {"functions": "function_call", "tools": "tool_choice"}
"""Names of fields that are also accepted if the field named here is "none": it says that none of them may be called."""

WITHOUT_EFFECT = frozenset(
    {"metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store"}
)
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 128
LEAST_TARGET_MS = 0.001
MOST_TARGET_MS = 3_600_000


class Body(BaseModel):
    """Types are strict: "1" is not a number, 1.0 not an integer, true neither."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = {}
        for name, value in values.items():
            if name in cls.model_fields:
                fields[name] = value
            elif value is None or name in WITHOUT_EFFECT or _requests_nothing(name, value, values):
                continue
            elif name in UNSUPPORTED:
                raise PydanticCustomError(UNSUPPORTED_PARAMETER, "not supported by this server", {"name": name})
            else:
                near = difflib.get_close_matches(name, cls.model_fields, 1)
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


Milliseconds = Annotated[float, Field(ge=LEAST_TARGET_MS, le=MOST_TARGET_MS, allow_inf_nan=False)]


class LatencyTargets(Body):
    """A request's own targets, in place of the server's: from arrival to the first token (`ttft_ms`), and either between any two
    tokens (`tbt_ms`) or as an envelope (`tpot_ms`).
    """

    ttft_ms: Milliseconds | None = None
    tbt_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None


class Generation(Body):
    """Fields of both chat and completions. Numbers out of OpenAI's ranges are refused. vLLM's fields are `top_k`, `min_p`,
    `repetition_penalty`, `min_tokens`, `ignore_eos`, `stop_token_ids`, `include_stop_str_in_output` and `priority` (lower is served
    first). `sanitize_control_tokens` is named as in `transformers`; `slo` is this project's.
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
    user: Text | None = Field(None, max_length=512)


class Part(BaseModel):
    """A part of a message's content. Only the type "text" is served; fields of other types are ignored."""

    model_config = ConfigDict(strict=True)
    type: str
    text: Text | None = None


class Message(Body):
    """A message of a chat. `developer` is a newer name of `system`. Only an assistant's content may be null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    name: Text | None = None
    refusal: Text | None = None


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(Generation):
    """`prompt`: a text, token ids, or a list of either. `logprobs`: how many alternatives to show."""

    prompt: Text | TokenIds | list[Text] | list[TokenIds]
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


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
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


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stallfree"
    max_model_len: int
    default_sampling: dict[str, int | float]


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


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
