"""Pipecat's OpenAI services in a pipeline, against a running server: python pipecat_client.py BASE_URL API_KEY."""

import asyncio
import sys

from loguru import logger
from pipecat.adapters.llm.schemas.function_schema import FunctionSchema
from pipecat.frames.frames import (
    ErrorFrame,
    LLMContextFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    LLMThoughtTextFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.nvidia.llm import NvidiaLLMService
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.tests.utils import run_test
from suite import MODEL, PROMPT, SEARCH, arguments, eventually, metric

OFF = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
# Importing took its time; on a machine that does much else starting does, too.
START_SECONDS = 60
SEARCHED = []


def service(door, kind=OpenAILLMService, **settings):
    settings = {"model": MODEL, "temperature": 0, "max_tokens": 200, "extra": OFF} | settings
    return kind(**door, settings=kind.Settings(**settings))


async def search(params):
    SEARCHED.append((params.function_name, params.arguments))
    await params.result_callback("Nothing.")


def context(text, tools=(), **extra):
    return LLMContext([{"role": "user", "content": text}], list(tools), **extra) if tools else LLMContext(
        [{"role": "user", "content": text}]
    )


async def frames(processor, *contexts):
    sent = [LLMContextFrame(one) for one in contexts]
    down, up = await run_test(processor, frames_to_send=sent, start_timeout=START_SECONDS)
    errors = [frame for frame in [*down, *up] if isinstance(frame, ErrorFrame)]
    assert not errors, errors
    return down


def text(down):
    return "".join(frame.text for frame in down if isinstance(frame, LLMTextFrame))


async def spoken(door, _):
    """A turn begins, speaks and ends; what is spoken is the answer and never the thought."""
    down = await frames(service(door), context(PROMPT), context(PROMPT))
    assert sum(isinstance(frame, LLMFullResponseStartFrame) for frame in down) == 2
    assert sum(isinstance(frame, LLMFullResponseEndFrame) for frame in down) == 2
    half = text(down)[: len(text(down)) // 2]
    assert half and text(down) == half * 2, text(down)
    whole = await service(door).run_inference(context(PROMPT))
    assert whole == half, (whole, half)
    thoughtful = await frames(service(door, extra={}), context(PROMPT))
    thought = await service(door, extra={}).run_inference(context(PROMPT))
    assert text(thoughtful) == (thought or "") and "</think>" not in text(thoughtful)


async def thoughts(door, _):
    """NVIDIA's service takes the thought out of its own field."""
    down = await frames(service(door, NvidiaLLMService, extra={}), context(PROMPT))
    assert "".join(frame.text for frame in down if isinstance(frame, LLMThoughtTextFrame))
    assert "".join(frame.text for frame in down if isinstance(frame, LLMThoughtTextFrame)) not in text(down)


async def tools(door, _):
    schema = FunctionSchema(
        name="web_search", description="Search the web.",
        properties={"query": {"type": "string"}}, required=["query"],
    )  # fmt: skip
    able = service(door)
    able.register_function("web_search", search)
    SEARCHED.clear()
    await frames(able, context(SEARCH, [schema], tool_choice="required"))
    assert len(SEARCHED) == 1 and SEARCHED[0][0] == "web_search" and set(SEARCHED[0][1]) == {"query"}, SEARCHED


class BargeIn(FrameProcessor):
    """The user speaks as soon as the model does."""

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)
        if isinstance(frame, LLMTextFrame):
            await self.broadcast_interruption()


async def interrupted(door, url):
    def aborted():
        return metric(url, "vllm:request_success_total", 'finished_reason="abort"')

    before = aborted()
    endless = {"extra_body": OFF["extra_body"] | {"ignore_eos": True}}
    await frames(Pipeline([service(door, max_tokens=8_000, extra=endless), BargeIn()]), context(PROMPT))
    eventually("an interrupted turn is aborted", lambda: aborted() > before)


async def main(url, key):
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    for test in (spoken, thoughts, tools, interrupted):
        await test({"base_url": url, "api_key": key}, url)
        print("ok", test.__name__, flush=True)


asyncio.run(main(*arguments()))
