"""The OpenAI Agents SDK against a running server: python agents_client.py BASE_URL API_KEY.

A toy does not end its loop of calls by itself, so the agents stop at their first tool.
"""

import asyncio
import sys

import openai
import pydantic
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from suite import MODEL, PROMPT, SEARCH, arguments

SETTINGS = ModelSettings(temperature=0, max_tokens=300, parallel_tool_calls=False, store=False, include_usage=True)
SEARCHED = []


class Sum(pydantic.BaseModel):
    answer: int = pydantic.Field(ge=0, le=99)


@function_tool
def web_search(query: str) -> str:
    """Search the web."""
    SEARCHED.append(query)
    return f"Nothing about {query}."


def agent(model, settings=SETTINGS, **extra):
    return Agent(name="toy", instructions="You are a toy.", model=model, model_settings=settings, **extra)


async def plain(model):
    result = await Runner.run(agent(model), PROMPT)
    assert isinstance(result.final_output, str)
    usage = result.context_wrapper.usage
    assert usage.requests == 1 and usage.total_tokens == usage.input_tokens + usage.output_tokens > 0
    again = result.to_input_list() + [{"role": "user", "content": PROMPT}]
    assert (await Runner.run(agent(model), again)).final_output is not None


async def streamed(model):
    result = Runner.run_streamed(agent(model), PROMPT)
    deltas = [event.data.delta async for event in result.stream_events() if is_text(event)]
    assert "".join(deltas) == result.final_output == (await Runner.run(agent(model), PROMPT)).final_output
    assert result.context_wrapper.usage.output_tokens > 0


def is_text(event):
    return event.type == "raw_response_event" and event.data.type == "response.output_text.delta"


async def tools(model):
    settings = SETTINGS.resolve(ModelSettings(tool_choice="required"))
    able = agent(model, settings, tools=[web_search], tool_use_behavior="stop_on_first_tool")
    SEARCHED.clear()
    plain = await Runner.run(able, SEARCH)
    result = Runner.run_streamed(able, SEARCH)
    names = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
    assert "tool_called" in names and "tool_output" in names, names
    assert len(SEARCHED) == 2 and SEARCHED[0] == SEARCHED[1], SEARCHED
    assert result.final_output == plain.final_output == f"Nothing about {SEARCHED[0]}."


async def typed(model):
    off = SETTINGS.resolve(ModelSettings(extra_body={"chat_template_kwargs": {"enable_thinking": False}}))
    result = await Runner.run(agent(model, off, output_type=Sum), PROMPT)
    assert isinstance(result.final_output, Sum), result.final_output


async def serves_responses(client):
    try:
        await client.responses.create(model=MODEL, input="Hello", max_output_tokens=4)
    except openai.APIStatusError as error:
        if error.status_code in (404, 501):
            return False
        raise
    return True


async def main(url, key):
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
    models = [OpenAIChatCompletionsModel(model=MODEL, openai_client=client)]
    if await serves_responses(client):
        models.append(OpenAIResponsesModel(model=MODEL, openai_client=client))
    else:
        print("NOT RUN: the agents over /v1/responses, which this server does not have", file=sys.stderr)
    for model in models:
        for test in (plain, streamed, tools, typed):
            await test(model)
            print("ok", type(model).__name__, test.__name__, flush=True)


asyncio.run(main(*arguments()))
