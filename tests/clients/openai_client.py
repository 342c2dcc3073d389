"""The official OpenAI package against a running server: python openai_client.py BASE_URL API_KEY.

Asks for shapes and rules, not for wisdom: the model behind it is a toy.
"""

import asyncio
import json

import openai
import pydantic
from suite import MODEL, PROMPT, SEARCH, SLASHED, TOOL, arguments, eventually, metric, run

LONG = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}


def request(text, **extra):
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 200} | extra


def ask(client, text, **extra):
    return client.chat.completions.create(**request(text, **extra))


def plain(client, _):
    answer = ask(client, PROMPT)
    assert answer.object == "chat.completion" and answer.model == MODEL
    choice = answer.choices[0]
    assert choice.finish_reason in ("stop", "length"), choice
    assert choice.message.role == "assistant"
    assert choice.message.reasoning == choice.message.reasoning_content
    assert choice.message.tool_calls is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def streamed(client, _):
    whole = ask(client, PROMPT).choices[0]
    content, reasoning, ends, usage = "", "", [], None
    for chunk in ask(client, PROMPT, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert content == (whole.message.content or ""), (content, whole)
    assert reasoning == (whole.message.reasoning or ""), (reasoning, whole)
    assert ends == [whole.finish_reason], ends
    assert usage is not None and usage.completion_tokens > 0


def raw_headers(client, _):
    raw = client.chat.completions.with_raw_response.create(
        **request(PROMPT), extra_headers={"X-Request-Id": "seen-by-the-client"}
    )
    assert raw.headers["x-request-id"] == "seen-by-the-client"
    assert raw.headers["content-type"].startswith("application/json")
    answer = raw.parse()
    assert answer._request_id == "seen-by-the-client" and "seen-by-the-client" in answer.id
    assert ask(client, PROMPT)._request_id
    with client.chat.completions.with_streaming_response.create(**request(PROMPT, stream=True)) as events:
        assert events.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in events.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith(("data: ", ":")) for line in lines)


def thinking_off(client, _):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = ask(client, "Hello!", extra_body=extra)
    message = answer.choices[0].message
    assert message.reasoning is None and message.content, message
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def tools(client, _):
    whole = ask(client, SEARCH, tools=[TOOL]).choices[0]
    for call in whole.message.tool_calls or []:
        assert call.type == "function" and call.id and call.function.name
        assert isinstance(json.loads(call.function.arguments), dict)
    assert (whole.finish_reason == "tool_calls") == bool(whole.message.tool_calls), whole
    forced = ask(client, SEARCH, tools=[TOOL], tool_choice="required").choices[0]
    assert forced.finish_reason == "tool_calls" and forced.message.tool_calls[0].function.name == "web_search"
    named = {"type": "function", "function": {"name": "web_search"}}
    named = ask(client, SEARCH, tools=[TOOL], tool_choice=named).choices[0]
    assert set(json.loads(named.message.tool_calls[0].function.arguments)) == {"query"}


def streamed_tools(client, _):
    """An id and a name once, then arguments whose pieces are the plain answer's."""
    forced = {"tools": [TOOL], "tool_choice": "required"}
    whole = ask(client, SEARCH, **forced).choices[0].message.tool_calls
    starts, arguments = [], {}
    for chunk in ask(client, SEARCH, stream=True, **forced):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            if call.id:
                starts.append((call.index, call.function.name, call.type))
            else:
                assert call.function.name is None and call.type is None, call
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert starts == [(index, call.function.name, "function") for index, call in enumerate(whole)], starts
    assert list(arguments.values()) == [call.function.arguments for call in whole]


def tool_turns(client, _):
    """A call and its result go back as the package hands them out."""
    call = ask(client, SEARCH, tools=[TOOL], tool_choice="required").choices[0].message
    history = [
        {"role": "user", "content": SEARCH},
        call,
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "Rain until noon."},
    ]
    answer = ask(client, "", tools=[TOOL], messages=history)
    assert answer.usage.prompt_tokens > ask(client, SEARCH, tools=[TOOL]).usage.prompt_tokens


def stream_helper(client, _):
    """The accumulator of `.stream()` ends with what the plain answer is, calls and their parsed arguments included."""
    for extra in ({}, {"tools": [TOOL], "tool_choice": "required"}):
        whole = ask(client, SEARCH, **extra).choices[0]
        seen = []
        strict = {"tools": [openai.pydantic_function_tool(WebSearch, name="web_search")]} if extra else {}
        with client.chat.completions.stream(**request(SEARCH, **(extra | strict))) as events:
            seen += [event.type for event in events]
            final = events.get_final_completion().choices[0]
        assert final.finish_reason == whole.finish_reason and "chunk" in seen
        assert (final.message.content or "") == (whole.message.content or "")
        for call in final.message.tool_calls or []:
            assert isinstance(call.function.parsed_arguments, WebSearch), call
        assert bool(final.message.tool_calls) == bool(extra)


class WebSearch(pydantic.BaseModel):
    """Search the web."""

    query: str


class Step(pydantic.BaseModel):
    explanation: str = pydantic.Field(max_length=12)
    result: int = pydantic.Field(ge=0, le=99)


class Sum(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(max_length=2)
    answer: int = pydantic.Field(ge=0, le=99)


def parsed(client, _):
    body = request(PROMPT, max_tokens=600, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    answer = client.chat.completions.parse(**body, response_format=Sum)
    message = answer.choices[0].message
    assert isinstance(message.parsed, Sum) and Sum.model_validate_json(message.content) == message.parsed
    with client.chat.completions.stream(**body, response_format=Sum) as events:
        assert events.get_final_completion().choices[0].message.parsed == message.parsed
    raises(
        openai.LengthFinishReasonError,
        lambda: client.chat.completions.parse(**(body | {"max_tokens": 2}), response_format=Sum),
    )
    tool = openai.pydantic_function_tool(WebSearch, name="web_search")
    called = client.chat.completions.parse(**request(SEARCH, tools=[tool], tool_choice="required"))
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, WebSearch)


def logprobs(client, _):
    answer = ask(client, PROMPT, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        top = [candidate.logprob for candidate in entry.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and entry.logprob <= 0
    # Greedy: the best of each place is the one that was drawn.
    assert all(entry.token == entry.top_logprobs[0].token for entry in entries)
    pieces = []
    for chunk in ask(client, PROMPT, logprobs=True, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            pieces += choice.logprobs.content if choice.logprobs else []
    assert pieces == entries


def choices_and_seeds(client, _):
    wild = {"n": 3, "temperature": 2, "top_p": 1, "max_tokens": 12}

    def draw(seed):
        answer = ask(client, "Tell me something.", seed=seed, **wild)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [(choice.message.content, choice.message.reasoning) for choice in answer.choices]

    first = draw(7)
    assert first == draw(7)
    assert any(first != draw(seed) for seed in (8, 9, 10))
    streamed = {index: "" for index in range(3)}
    for chunk in ask(client, "Tell me something.", seed=7, stream=True, **wild):
        for choice in chunk.choices:
            streamed[choice.index] += getattr(choice.delta, "reasoning", None) or choice.delta.content or ""
    assert list(streamed.values()) == [(reasoning or "") + (content or "") for content, reasoning in first]


def completions(client, _):
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0, logprobs=2)
    assert answer.object == "text_completion" and len(answer.choices) == 1
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens
    parts = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0, stream=True)
    text = "".join(choice.text for chunk in parts for choice in chunk.choices)
    assert text == answer.choices[0].text
    many = client.completions.create(model=MODEL, prompt=["Hello", [5, 6]], n=2, temperature=1, max_tokens=3, echo=True)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text.startswith("Hello") and many.choices[1].text.startswith("Hello")


def models(client, _):
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL, SLASHED]
    assert all(model.max_model_len == 8192 for model in listed)
    for name in (MODEL, SLASHED):
        assert client.models.retrieve(name).id == name
    assert ask(client, PROMPT, model=SLASHED).model == SLASHED


def fields_of_others(client, _):
    """What OpenAI's own service knows and we do not is no reason to refuse."""
    answer = ask(
        client, PROMPT, store=True, user="u", service_tier="auto", metadata={"a": "b"}, verbosity="low",
        prompt_cache_key="k", safety_identifier="s", parallel_tool_calls=True, reasoning_effort="low",
    )
    assert answer.choices[0].finish_reason


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}")


def errors(client, url):
    raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"))
    raises(openai.NotFoundError, lambda: ask(client, "x", model="gpt-4"))
    error = raises(openai.BadRequestError, lambda: ask(client, "x", top_p=7))
    assert (error.param, error.code, error.type) == ("top_p", 400, "BadRequestError"), error.body
    assert error.request_id
    nonsense = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    raises(openai.BadRequestError, lambda: ask(client, "x", response_format=nonsense))
    too_long = raises(openai.BadRequestError, lambda: ask(client, "word " * 20_000))
    assert "maximum context length" in too_long.message
    stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, lambda: stranger.models.list())


def not_repeated(client, _):
    """A mistake and a time that is up come once: neither is better the second time."""
    eager = client.with_options(max_retries=2)
    sent = []
    eager._client.event_hooks["request"].append(sent.append)
    try:
        raises(openai.BadRequestError, lambda: ask(eager, "x", top_p=7))
        assert len(sent) == 1, sent
        slow = LONG | {"extra_body": {"ignore_eos": True, "timeout": 0.01}}
        late = raises(openai.InternalServerError, lambda: ask(eager, "x", **slow))
        assert late.status_code == 504 and len(sent) == 2, (late, sent)
    finally:
        eager._client.event_hooks["request"].remove(sent.append)


def closing_cancels(client, url):
    def aborted():
        return metric(url, "vllm:request_success_total", 'finished_reason="abort"')

    before = aborted()
    stream = ask(client, "x", stream=True, **LONG)
    next(iter(stream))
    stream.close()
    eventually("a closed stream is aborted", lambda: aborted() >= before + 1)


def cancelled_tasks(client, url):
    """The asynchronous client: a task that is cancelled in the middle of its stream, as a voice that is interrupted."""

    async def interrupted():
        async with openai.AsyncOpenAI(base_url=url, api_key=client.api_key, max_retries=0) as asynchronous:
            started = asyncio.Event()

            async def speak():
                async with await asynchronous.chat.completions.create(**request("x", stream=True, **LONG)) as stream:
                    async for _ in stream:
                        started.set()

            task = asyncio.create_task(speak())
            await started.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            answers = [asynchronous.chat.completions.create(**request(PROMPT)) for _ in range(8)]
            answers = await asyncio.gather(*answers)
            assert len({answer.choices[0].message.content for answer in answers}) == 1

    before = metric(url, "vllm:request_success_total", 'finished_reason="abort"')
    asyncio.run(interrupted())
    eventually(
        "a cancelled task is aborted",
        lambda: metric(url, "vllm:request_success_total", 'finished_reason="abort"') > before,
    )


def main(url, key):
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)
    tests = (
        plain, streamed, raw_headers, thinking_off, tools, streamed_tools, tool_turns, stream_helper, parsed, logprobs,
        choices_and_seeds, completions, models, fields_of_others, errors, not_repeated, closing_cancels,
        cancelled_tasks,
    )  # fmt: skip
    run(tests, client, url)


main(*arguments())
