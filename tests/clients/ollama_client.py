"""The official Ollama package against a running server: python ollama_client.py BASE_URL API_KEY.

Asks for shapes and rules, not for wisdom: the model behind it is a toy.
"""

import asyncio
import json
import sys

import ollama

OPTIONS = {"temperature": 0, "num_predict": 200, "num_ctx": 2048}
SEARCH = [{"role": "user", "content": "Search the web for rain in Bonn."}]
SUM = [{"role": "user", "content": "What is 17 + 25?"}]


def web_search(query: str) -> str:
    """Search the web.

    Args:
      query: What to look for.
    """
    return query


def chat(client, messages=SUM, **extra):
    return client.chat(model="tiny", messages=messages, options=OPTIONS, **extra)


def models(client):
    listed = client.list().models
    # Other names that the server gives it may stand beside this one.
    assert "tiny:latest" in [model.model for model in listed], listed
    assert listed[0].size > 0 and len(listed[0].digest) == 64 and listed[0].modified_at.year > 2000
    assert listed[0].details.parameter_size and listed[0].details.quantization_level
    running = client.ps().models
    assert "tiny:latest" in [model.name for model in running], running
    context = running[0].context_length
    assert context > 0 and running[0].expires_at.year > 2100
    card = client.show("tiny")
    assert card.capabilities == ["completion", "tools", "thinking"]
    assert "<|im_start|>" in card.template and "temperature" in card.parameters
    lengths = [value for key, value in card.modelinfo.items() if key.endswith(".context_length")]
    assert lengths == [context], card.modelinfo


def check_end(answer):
    assert answer.done and answer.done_reason in ("stop", "length"), answer
    assert answer.prompt_eval_count > 0 and answer.prompt_eval_duration > 0
    assert answer.eval_count > 0 and answer.eval_duration > 0
    assert answer.total_duration >= answer.eval_duration and answer.load_duration >= 0


def plain(client):
    answer = chat(client)
    assert answer.model == "tiny" and answer.message.role == "assistant"
    assert answer.message.content is not None and answer.message.tool_calls is None
    check_end(answer)
    assert chat(client, messages=SUM).message == answer.message
    assert client.chat(model="TINY:latest", messages=SUM, options=OPTIONS).message == answer.message


def streamed(client):
    whole = chat(client)
    content, thinking, parts = "", "", list(chat(client, stream=True))
    for part in parts:
        content += part.message.content or ""
        thinking += part.message.thinking or ""
    assert (content, thinking) == (whole.message.content, whole.message.thinking or ""), (content, thinking, whole)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    check_end(parts[-1])
    assert parts[-1].eval_count == whole.eval_count and parts[-1].done_reason == whole.done_reason


def thinking(client):
    off = chat(client, think=False).message
    assert off.thinking is None and off.content, off
    for level in (True, "low", "medium", "high"):
        on = chat(client, think=level).message
        assert on.thinking, on


def tools(client):
    answer = chat(client, messages=SEARCH, tools=[web_search])
    calls = [call for part in chat(client, messages=SEARCH, tools=[web_search], stream=True)
             for call in part.message.tool_calls or []]
    assert calls == list(answer.message.tool_calls or []), (calls, answer)
    history = SEARCH + [answer.message]
    for call in calls:
        assert call.function.name and isinstance(call.function.arguments, dict), call
        history.append({"role": "tool", "tool_name": call.function.name, "content": "It rains."})
    check_end(chat(client, messages=history, tools=[web_search]))


def formats(client):
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["sum"], "additionalProperties": False}
    assert set(json.loads(chat(client, format=schema).message.content)) == {"sum"}
    answer = client.generate(model="tiny", prompt="What is 17 + 25?", format=schema, options=OPTIONS)
    assert set(json.loads(answer.response)) == {"sum"}, answer
    answer = chat(client, format="json", think=False)
    if answer.done_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict), answer


def scores(client):
    answer = chat(client, logprobs=True, top_logprobs=2)
    assert len(answer.logprobs) == answer.eval_count
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in answer.logprobs)


def completions(client):
    ask = {"model": "tiny", "prompt": "What is 17 + 25?", "options": OPTIONS}
    answer = client.generate(**ask)
    check_end(answer)
    assert answer.response + (answer.thinking or ""), answer
    parts = list(client.generate(**ask, stream=True))
    assert "".join(part.response for part in parts) == answer.response
    assert "".join(part.thinking or "" for part in parts) == (answer.thinking or "")
    assert parts[-1].context == answer.context and len(answer.context) > answer.prompt_eval_count
    check_end(client.generate(**{**ask, "prompt": "And 1 more?"}, context=answer.context))
    raw = client.generate(**ask, raw=True)
    assert raw.thinking is None and raw.context is None and raw.prompt_eval_count < answer.prompt_eval_count


def lifecycle(client):
    for keep_alive, reason in ((None, "load"), ("5m", "load"), (-1, "load"), (0, "unload")):
        assert client.generate(model="tiny", keep_alive=keep_alive).done_reason == reason
        assert client.chat(model="tiny", messages=[], keep_alive=keep_alive).done_reason == reason
    assert client.pull("tiny").status == "success"
    assert [part.status for part in client.pull("tiny", stream=True)] == ["success"]


def waits_beside_others(url, headers):
    async def both():
        client = ollama.AsyncClient(host=url, headers=headers)
        first, second = await asyncio.gather(*(
            client.chat(model="tiny", messages=SUM, options=OPTIONS) for _ in range(2)))
        assert first.message == second.message
        async for part in await client.chat(model="tiny", messages=SUM, options=OPTIONS, stream=True):
            last = part
        check_end(last)

    asyncio.run(both())


def refused(status, words, call):
    try:
        call()
    except ollama.ResponseError as error:
        assert error.status_code == status and words in error.error, error
        return
    raise AssertionError(f"expected {status}")


def errors(client, url):
    refused(404, "model 'llama3' not found", lambda: client.chat(model="llama3", messages=SUM))
    refused(404, "model 'llama3' not found", lambda: list(client.chat(model="llama3", messages=SUM, stream=True)))
    refused(404, "not found", lambda: client.show("llama3"))
    refused(400, "options.top_p", lambda: client.chat(model="tiny", messages=SUM, options={"top_p": 7}))
    refused(400, "think", lambda: chat(client, think="loud"))
    refused(400, "format", lambda: chat(client, format={"type": "nonsense"}))
    refused(400, "images", lambda: client.generate(model="tiny", prompt="What is it?", images=[b"x"]))
    refused(400, "maximum context length", lambda: client.generate(model="tiny", prompt="word " * 9000))
    refused(501, "/api/embed", lambda: client.embed(model="tiny", input="x"))
    refused(501, "/api/pull", lambda: client.pull("llama3"))
    refused(501, "/api/copy", lambda: client.copy("tiny", "other"))
    refused(501, "/api/delete", lambda: client.delete("tiny"))
    refused(401, "API key", lambda: ollama.Client(host=url).list())


def main(url, key):
    url, headers = url.removesuffix("/v1"), {"Authorization": f"Bearer {key}"}
    client = ollama.Client(host=url, headers=headers, timeout=120)
    for test in (models, plain, streamed, thinking, tools, formats, scores, completions, lifecycle):
        test(client)
        print("ok", test.__name__)
    waits_beside_others(url, headers)
    errors(client, url)
    print("ok errors")


main(*sys.argv[1:])
