"""LiteLLM with its provider for vLLM servers against a running server: python litellm_client.py BASE_URL API_KEY."""

import asyncio
import json
import os

# It would fetch its price list at import.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm  # noqa: E402
import pydantic  # noqa: E402
from suite import MODEL, PROMPT, SEARCH, SLASHED, TOOL, arguments, run  # noqa: E402

litellm.telemetry = False
litellm.suppress_debug_info = True


class Sum(pydantic.BaseModel):
    answer: int = pydantic.Field(ge=0, le=99)


def body(door, text, **extra):
    messages = [{"role": "user", "content": text}]
    model = f"hosted_vllm/{extra.pop('model', MODEL)}"
    return door | {"model": model, "messages": messages, "temperature": 0, "max_tokens": 200} | extra


def ask(door, text, **extra):
    return litellm.completion(**body(door, text, **extra))


def plain(door):
    answer = ask(door, PROMPT)
    assert answer.choices[0].message.reasoning_content, answer
    assert answer.usage.total_tokens > 0
    assert ask(door, PROMPT, model=SLASHED).choices[0].message.content == answer.choices[0].message.content


def streamed(door):
    """What it puts together again is the plain answer, and no thought comes twice though it has two names."""
    plain = ask(door, PROMPT).choices[0].message
    chunks = list(ask(door, PROMPT, stream=True, stream_options={"include_usage": True}))
    reasoning = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks if chunk.choices)
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == plain.content
    assert reasoning == plain.reasoning_content, (reasoning, plain)
    assert whole.usage.completion_tokens == ask(door, PROMPT).usage.completion_tokens


def history(door):
    """It sends thoughts back under the name that it knows."""
    thought = ask(door, PROMPT).choices[0].message
    messages = [{"role": "user", "content": PROMPT}, thought.model_dump(), {"role": "user", "content": "And 1 + 1?"}]
    assert ask(door, "", messages=messages).choices[0].finish_reason


def tools(door):
    call = ask(door, SEARCH, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"query"}
    whole = litellm.stream_chunk_builder(list(ask(door, SEARCH, tools=[TOOL], tool_choice="required", stream=True)))
    assert whole.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def formats(door):
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = ask(door, PROMPT, response_format=Sum, extra_body=off)
    assert Sum.model_validate_json(answer.choices[0].message.content)


def errors(door):
    def raises(kind, **extra):
        try:
            ask(door | extra, extra.pop("text", PROMPT), num_retries=0, max_retries=0)
        except kind:
            return
        raise AssertionError(f"expected {kind.__name__}")

    raises(litellm.AuthenticationError, api_key="wrong")
    # It reads the words of the message to tell this from other mistakes.
    raises(litellm.ContextWindowExceededError, text="word " * 20_000)


def asynchronous(door):
    async def together():
        answers = await asyncio.gather(*[litellm.acompletion(**body(door, PROMPT)) for _ in range(4)])
        stream = await litellm.acompletion(**body(door, PROMPT, stream=True))
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return [answer.choices[0].message.content for answer in answers] + ["".join(pieces)]

    assert len(set(asyncio.run(together()))) == 1


def main(url, key):
    door = {"api_base": url, "api_key": key}
    run((plain, streamed, history, tools, formats, errors, asynchronous), door)


main(*arguments())
