"""The official OpenAI package's responses against a running server: python responses_client.py BASE_URL API_KEY.

Asks for shapes and rules, not for wisdom: the model behind it is a toy.
"""

import json
import sys
import time

import openai

TOOLS = [
    {
        "type": "function",
        "name": "web_search",
        "description": "Search the web.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}},
            "required": ["query"],
        },
        "strict": False,
    }
]


def raises(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}")


def respond(client, text, **extra):
    return client.responses.create(model="tiny", input=text, temperature=0, max_output_tokens=200, **extra)


def plain(client):
    answer = respond(client, "What is 17 + 25?", metadata={"a": "b"}, instructions="Be brief.")
    assert answer.object == "response" and answer.status in ("completed", "incomplete"), answer
    kinds = [item.type for item in answer.output]
    assert set(kinds) <= {"reasoning", "message"} and kinds, kinds
    said = [part.text for item in answer.output if item.type == "message" for part in item.content]
    assert answer.output_text == "".join(said)
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens >= 0 and usage.output_tokens_details.reasoning_tokens >= 0
    assert client.responses.retrieve(answer.id) == answer
    more = respond(client, "And 1 more?", previous_response_id=answer.id)
    assert more.previous_response_id == answer.id and more.usage.input_tokens > usage.input_tokens - 10
    client.responses.delete(answer.id)
    raises(openai.NotFoundError, lambda: client.responses.retrieve(answer.id))
    raises(openai.BadRequestError, lambda: respond(client, "x", previous_response_id=answer.id))
    raises(openai.BadRequestError, lambda: client.responses.cancel(more.id))


def streamed(client):
    for extra in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}):
        asked = {"input": "Search the web for rain in Bonn.", "temperature": 0, "max_output_tokens": 200}
        whole = client.responses.create(model="tiny", **asked, **extra)
        with client.responses.stream(model="tiny", **asked, **extra) as events:
            kinds = [event.type for event in events]
            answer = events.get_final_response()
        assert kinds[:2] == ["response.created", "response.in_progress"], kinds
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") > 0
        assert answer.status == whole.status and answer.output_text == whole.output_text
        calls = lambda answer: [(i.name, i.arguments) for i in answer.output if i.type == "function_call"]
        assert calls(answer) == calls(whole)
        for _, arguments in calls(whole):
            assert isinstance(json.loads(arguments), dict)
        assert bool(calls(whole)) or "tool_choice" not in extra or whole.status == "incomplete", whole


def tools(client):
    asked = [{"role": "user", "content": "Search the web for rain in Bonn."}]
    first = client.responses.create(
        model="tiny", input=asked, tools=TOOLS, tool_choice={"type": "function", "name": "web_search"}, temperature=0
    )
    calls = [item for item in first.output if item.type == "function_call"]
    assert len(calls) == 1 and calls[0].call_id, first
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "rain"}
    # Both ways to go on: all items again, or the response's name.
    again = client.responses.create(
        model="tiny", input=[*asked, *first.output, result], tools=TOOLS, temperature=0, max_output_tokens=50
    )
    named = client.responses.create(
        model="tiny", input=[result], previous_response_id=first.id, tools=TOOLS, temperature=0, max_output_tokens=50
    )
    assert again.usage.input_tokens == named.usage.input_tokens, (again, named)
    assert again.output_text == named.output_text


def background(client):
    answer = respond(client, "What is 17 + 25?", background=True)
    assert answer.status == "queued"
    for _ in range(600):
        answer = client.responses.retrieve(answer.id)
        if answer.status not in ("queued", "in_progress"):
            break
        time.sleep(0.1)
    assert answer.status in ("completed", "incomplete") and answer.output, answer
    assert client.responses.cancel(answer.id) == answer


def formats(client):
    answer = client.responses.create(model="tiny", input="What is 17 + 25?", temperature=0, text={"format": {
        "type": "json_schema", "name": "sum", "strict": True, "schema": {
            "type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["sum"], "additionalProperties": False,
        },
    }})
    assert set(json.loads(answer.output_text)) == {"sum"}, answer


def main(url, key):
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)
    for test in (plain, streamed, tools, background, formats):
        test(client)
        print("ok", test.__name__)


main(*sys.argv[1:])
