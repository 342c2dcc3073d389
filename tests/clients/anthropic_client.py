"""The official Anthropic package against a running server: python anthropic_client.py BASE_URL API_KEY.

Asks for shapes and rules, not for wisdom: the model behind it is a toy.
"""

import sys

import anthropic

TOOLS = [
    {
        "name": "web_search",
        "description": "Search the web.",
        "input_schema": {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
        },
        "cache_control": {"type": "ephemeral"},
    }
]
QUESTION = "What is 17 + 25?"
SEARCH = "Search the web for rain in Bonn."


def asked(text, **extra):
    messages = [{"role": "user", "content": text}]
    # The package no longer has a name for the temperature; the API has.
    fields = {"model": "tiny", "messages": messages, "max_tokens": 200, "extra_body": {"temperature": 0}}
    return fields | extra


def ask(client, text, **extra):
    return client.messages.create(**asked(text, **extra))


def stream(client, text, **extra):
    """What the package makes of a stream, and the names of its events."""
    with client.messages.stream(**asked(text, **extra)) as events:
        names = [event.type for event in events]
        return events.get_final_message(), names


def blocks(message):
    """The content without names and signatures."""
    return [block.model_dump(exclude={"id", "signature", "citations", "parsed_output"}) for block in message.content]


def same(whole, streamed):
    assert blocks(whole) == blocks(streamed), (whole, streamed)
    assert whole.stop_reason == streamed.stop_reason and whole.stop_sequence == streamed.stop_sequence
    prompt = [usage.input_tokens + usage.cache_read_input_tokens for usage in (whole.usage, streamed.usage)]
    assert prompt[0] == prompt[1] and whole.usage.output_tokens == streamed.usage.output_tokens


def plain(client):
    answer = ask(client, QUESTION)
    assert answer.type == "message" and answer.role == "assistant" and answer.model == "tiny"
    assert answer.id.startswith("msg_") and answer._request_id
    assert answer.stop_reason in ("end_turn", "max_tokens"), answer
    assert answer.content and answer.usage.output_tokens > 0
    again = ask(client, QUESTION)
    assert blocks(again) == blocks(answer)
    assert again.usage.cache_read_input_tokens > 0 and again.usage.input_tokens > 0, again.usage


def streamed(client):
    message, names = stream(client, QUESTION)
    same(ask(client, QUESTION), message)
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"], names
    raw = client.messages.create(**asked(QUESTION), stream=True)
    indices = [event.index for event in raw if event.type == "content_block_start"]
    assert indices == list(range(len(indices))), indices


def stops(client):
    cut = ask(client, QUESTION, max_tokens=3)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3, cut
    stopped = ask(client, QUESTION, stop_sequences=["e", "a", "i", "o"])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence in "eaio", stopped
    # As agents ask, whatever the model's context is; so much is streamed, or the package expects to wait too long.
    message, _ = stream(client, QUESTION, max_tokens=64000)
    assert message.stop_reason in ("end_turn", "max_tokens")


def thinking(client):
    off = ask(client, "Hello!", thinking={"type": "disabled"})
    assert [block.type for block in off.content] == ["text"], off
    on = ask(client, QUESTION, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    thought = on.content[0]
    assert thought.type == "thinking" and thought.thinking and thought.signature, on
    history = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": on.content},
        {"role": "user", "content": "And 1 more?"},
    ]
    assert client.messages.create(model="tiny", max_tokens=50, messages=history).content


def tools(client):
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "web_search"}):
        extra = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400}
        answer = ask(client, SEARCH, **extra)
        same(answer, stream(client, SEARCH, **extra)[0])
        calls = [block for block in answer.content if block.type == "tool_use"]
        assert (answer.stop_reason == "tool_use") == bool(calls), answer
        assert calls or choice["type"] == "auto", answer
        for call in calls:
            assert call.id.startswith("toolu_") and call.name == "web_search"
            assert isinstance(call.input, dict) and isinstance(call.input["query"], str), call
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "It rains."} for call in calls]
    history = [
        {"role": "user", "content": SEARCH},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "Briefly, please."}]},
    ]
    assert client.messages.create(model="tiny", max_tokens=50, messages=history, tools=TOOLS).content


def counts(client):
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ]
    extra = {"system": system, "tools": TOOLS}
    usage = ask(client, QUESTION, **extra).usage
    messages = [{"role": "user", "content": QUESTION}]
    count = client.messages.count_tokens(model="tiny", messages=messages, **extra)
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens, (count, usage)
    # The first line changes at every request of Claude Code's, and nothing else may change by that.
    system[0]["text"] = "x-anthropic-billing-header: cc_version=3; cch=a-longer-one-than-before;"
    assert client.messages.count_tokens(model="tiny", messages=messages, **extra) == count


def formats(client):
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    answer = ask(client, QUESTION, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=400)
    assert answer.content[-1].text.startswith('{"sum"'), answer


def names(client):
    for model in ("claude-large", "claude-small-20990101"):
        assert ask(client, "Hello!", model=model, max_tokens=5).model == model
    assert "tiny" in [model.id for model in client.models.list()]


def raises(kind, error_type, call):
    try:
        call()
    except kind as error:
        assert error.body["type"] == "error" and error.body["error"]["type"] == error_type, error.body
        assert error.body["request_id"] == error.request_id, error.body
        return
    raise AssertionError(f"expected {kind.__name__}")


def errors(client, url):
    raises(anthropic.NotFoundError, "not_found_error", lambda: ask(client, "x", model="gpt-4"))
    raises(anthropic.BadRequestError, "invalid_request_error", lambda: ask(client, "x", extra_body={"top_p": 7}))
    raises(anthropic.BadRequestError, "invalid_request_error", lambda: ask(client, "x", max_tokens=0))
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    raises(anthropic.BadRequestError, "invalid_request_error", lambda: ask(client, [image]))
    stranger = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
    raises(anthropic.AuthenticationError, "authentication_error", lambda: ask(stranger, "x"))
    # Claude Code shows its key either way.
    bearer = anthropic.Anthropic(base_url=url, auth_token=client.api_key, max_retries=0)
    assert ask(bearer, "Hello!", max_tokens=5).content


def main(url, key):
    # The package adds the version to the address by itself.
    url = url.removesuffix("/v1")
    client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=120)
    for test in (plain, streamed, stops, thinking, tools, counts, formats, names):
        test(client)
        print("ok", test.__name__)
    errors(client, url)
    print("ok errors")


main(*sys.argv[1:])
