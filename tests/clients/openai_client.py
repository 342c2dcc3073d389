"""The official OpenAI package against a running server: python openai_client.py BASE_URL API_KEY.

Asks for shapes and rules, not for wisdom: the model behind it is a toy.
"""

import json
import sys

import openai

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "web_search",
            "description": "Search the web.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string"}},
                "required": ["query"],
            },
        },
    }
]


def ask(client, text, **extra):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=200, **extra)


def plain(client):
    answer = ask(client, "What is 17 + 25?")
    assert answer.object == "chat.completion" and answer.model == "tiny"
    choice = answer.choices[0]
    assert choice.finish_reason in ("stop", "length"), choice
    assert choice.message.role == "assistant"
    assert choice.message.reasoning == choice.message.reasoning_content
    assert choice.message.tool_calls is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def streamed(client):
    whole = ask(client, "What is 17 + 25?").choices[0]
    content, reasoning, ends, usage = "", "", [], None
    for chunk in ask(client, "What is 17 + 25?", stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert content == (whole.message.content or ""), (content, whole)
    assert reasoning == (whole.message.reasoning or ""), (reasoning, whole)
    assert ends == [whole.finish_reason], ends
    assert usage is not None and usage.completion_tokens > 0


def thinking_off(client):
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = ask(client, "Hello!", extra_body=extra)
    message = answer.choices[0].message
    assert message.reasoning is None and message.content, message
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def tools(client):
    for stream in (False, True):
        answer = ask(client, "Search the web for rain in Bonn.", tools=TOOLS, stream=stream)
        if stream:
            with client.chat.completions.stream(
                model="tiny",
                messages=[{"role": "user", "content": "Search the web for rain in Bonn."}],
                tools=TOOLS,
                temperature=0,
                max_tokens=200,
            ) as events:
                for _ in events:
                    pass
                answer = events.get_final_completion()
        choice = answer.choices[0]
        for call in choice.message.tool_calls or []:
            assert call.type == "function" and call.id and call.function.name
            assert isinstance(__import__("json").loads(call.function.arguments), dict)
        assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls), choice


def completions(client):
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0, logprobs=2)
    assert answer.object == "text_completion" and len(answer.choices) == 1
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens
    parts = client.completions.create(model="tiny", prompt="Hello", max_tokens=4, temperature=0, stream=True)
    text = "".join(choice.text for chunk in parts for choice in chunk.choices)
    assert text == answer.choices[0].text


def formats(client):
    answer = ask(client, "What is 17 + 25?", response_format={
        "type": "json_schema",
        "json_schema": {"name": "sum", "schema": {
            "type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["sum"], "additionalProperties": False,
        }},
    })
    assert set(json.loads(answer.choices[0].message.content)) == {"sum"}, answer


def models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"]
    assert listed[0].max_model_len == 2048
    assert client.models.retrieve("tiny").id == "tiny"


def raises(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}")


def errors(client, url):
    raises(openai.NotFoundError, lambda: client.models.retrieve("gpt-4"))
    raises(openai.BadRequestError, lambda: ask(client, "x", top_p=7))
    nonsense = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    raises(openai.BadRequestError, lambda: ask(client, "x", response_format=nonsense))
    stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, lambda: stranger.models.list())


def main(url, key):
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)
    for test in (plain, streamed, thinking_off, tools, completions, formats, models):
        test(client)
        print("ok", test.__name__)
    errors(client, url)
    print("ok errors")


main(*sys.argv[1:])
