"""LangChain's ChatOpenAI against a running server: python langchain_client.py BASE_URL API_KEY."""

import asyncio

import pydantic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from suite import MODEL, PROMPT, SEARCH, arguments, run

OFF = {"chat_template_kwargs": {"enable_thinking": False}}


class Sum(pydantic.BaseModel):
    """The sum of two numbers."""

    answer: int = pydantic.Field(ge=0, le=99)


@tool
def web_search(query: str) -> str:
    """Search the web."""
    return f"Nothing about {query}."


def invoked(chat):
    answer = chat.invoke(PROMPT)
    assert isinstance(answer.content, str) and not answer.tool_calls
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0


def streamed(chat):
    whole = None
    for piece in chat.stream(PROMPT, stream_usage=True):
        whole = piece if whole is None else whole + piece
    plain = chat.invoke(PROMPT)
    assert whole.content == plain.content
    assert whole.usage_metadata["output_tokens"] == plain.usage_metadata["output_tokens"]


def batched(chat):
    answers = chat.batch([PROMPT] * 3)
    assert len({answer.content for answer in answers}) == 1

    async def together():
        return await asyncio.gather(*[chat.ainvoke(PROMPT) for _ in range(3)])

    assert [answer.content for answer in asyncio.run(together())] == [answers[0].content] * 3


def structured(chat):
    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(Sum, method=method).invoke(PROMPT)
        assert isinstance(answer, Sum), (method, answer)
    whole = chat.with_structured_output(Sum, include_raw=True).invoke(PROMPT)
    assert whole["parsing_error"] is None and isinstance(whole["parsed"], Sum)


def structured_stream(chat):
    *_, last = chat.with_structured_output(Sum, method="function_calling").stream(PROMPT)
    assert isinstance(last, Sum), last


def tools(chat):
    for choice in ("required", "any", "web_search"):
        able = chat.bind_tools([web_search], tool_choice=choice, parallel_tool_calls=False)
        call = able.invoke(SEARCH)
        assert [made["name"] for made in call.tool_calls] == ["web_search"], call
        assert not call.invalid_tool_calls
        whole = None
        for piece in able.stream(SEARCH):
            whole = piece if whole is None else whole + piece
        assert [made["args"] for made in whole.tool_calls] == [made["args"] for made in call.tool_calls]
    result = web_search.invoke(call.tool_calls[0])
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools([web_search]).invoke([HumanMessage(SEARCH), call, result])
    assert answer.response_metadata["finish_reason"]


def main(url, key):
    chat = ChatOpenAI(
        model=MODEL, base_url=url, api_key=key, temperature=0, max_tokens=300, max_retries=0, extra_body=OFF
    )
    run((invoked, streamed, batched, structured, structured_stream, tools), chat)
    thoughtful = chat.model_copy(update={"extra_body": None})
    run((streamed, tools), thoughtful)
    text = OpenAI(model=MODEL, base_url=url, api_key=key, temperature=0, max_tokens=8)
    assert text.invoke("Hello") == "".join(text.stream("Hello"))
    print("ok completions")


main(*arguments())
