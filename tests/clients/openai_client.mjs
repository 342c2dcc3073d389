// The official OpenAI package for JavaScript against a running server: node openai_client.mjs BASE_URL API_KEY
//
// Asks for shapes and rules, not for wisdom: the model behind it is a toy.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 120_000 });
const MODEL = "tiny";
const PROMPT = "What is 17 + 25?";
const SEARCH = "Search the web for rain in Bonn.";
const TOOL = {
  type: "function",
  function: {
    name: "web_search",
    description: "Search the web.",
    parameters: { type: "object", properties: { query: { type: "string" } }, required: ["query"] },
  },
};

const request = (text, extra = {}) => ({
  model: MODEL, messages: [{ role: "user", content: text }], temperature: 0, max_tokens: 200, ...extra,
});
const ask = (text, extra) => client.chat.completions.create(request(text, extra));

async function aborted() {
  const page = await (await fetch(new URL("/metrics", baseURL))).text();
  const line = page.split("\n").find((line) => /^vllm:request_success_total.*finished_reason="abort"/.test(line));
  return Number(line.split(" ").at(-1));
}

const tests = {
  async plain() {
    const { data, response, request_id } = await client.chat.completions.create(request(PROMPT)).withResponse();
    assert.equal(data.object, "chat.completion");
    assert.equal(data.model, MODEL);
    assert.ok(["stop", "length"].includes(data.choices[0].finish_reason));
    assert.equal(data.choices[0].message.tool_calls, undefined);
    assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + data.usage.completion_tokens);
    assert.equal(response.headers.get("x-request-id"), request_id);
    assert.ok(request_id);
  },

  async streamed() {
    const { message, finish_reason } = (await ask(PROMPT)).choices[0];
    let content = "", reasoning = "", usage = null;
    const ends = [];
    const stream = await ask(PROMPT, { stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      usage = chunk.usage ?? usage;
      for (const { delta, finish_reason: end } of chunk.choices) {
        // Careless code adds the field as it is: a null would show.
        if ("content" in delta) content += delta.content;
        if ("reasoning" in delta) reasoning += delta.reasoning;
        if (end) ends.push(end);
      }
    }
    assert.equal(content, message.content ?? "");
    assert.equal(reasoning, message.reasoning ?? "");
    assert.deepEqual(ends, [finish_reason]);
    assert.ok(usage.completion_tokens > 0);
  },

  async stream_helper() {
    for (const extra of [{}, { tools: [TOOL], tool_choice: "required" }]) {
      const whole = (await ask(SEARCH, extra)).choices[0];
      let heard = "";
      const runner = client.chat.completions.stream(request(SEARCH, extra)).on("content", (text) => (heard += text));
      const final = (await runner.finalChatCompletion()).choices[0];
      assert.equal(final.finish_reason, whole.finish_reason);
      assert.equal(final.message.content ?? "", whole.message.content ?? "");
      assert.equal(heard, whole.message.content ?? "");
      const calls = (message) => (message.tool_calls ?? []).map((call) => [call.type, call.function.name, call.function.arguments]);
      assert.deepEqual(calls(final.message), calls(whole.message));
    }
  },

  async tools_run_by_the_helper() {
    const queries = [];
    const search = {
      type: "function",
      function: {
        ...TOOL.function,
        parse: JSON.parse,
        function: ({ query }) => { queries.push(query); return `Nothing about ${query}.`; },
      },
    };
    // One turn of calls: a toy does not end the conversation by itself.
    const runner = client.chat.completions.runTools(
      request(SEARCH, { tools: [search] }), { maxChatCompletions: 2 },
    );
    await runner.done().catch(() => {});
    const called = runner.messages.filter((message) => message.role === "tool");
    assert.equal(queries.length, called.length);
    assert.ok(called.every((message, index) => message.content === `Nothing about ${queries[index]}.`));
  },

  async parsed() {
    const schema = {
      type: "object", properties: { answer: { type: "integer", minimum: 0, maximum: 99 } },
      required: ["answer"], additionalProperties: false,
    };
    const answer = await client.chat.completions.parse(request(PROMPT, {
      response_format: { type: "json_schema", json_schema: { name: "sum", schema, strict: true } },
      chat_template_kwargs: { enable_thinking: false },
    }));
    assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)), ["answer"]);
  },

  async logprobs_and_choices() {
    const scored = await ask(PROMPT, { logprobs: true, top_logprobs: 2 });
    assert.equal(scored.choices[0].logprobs.content.length, scored.usage.completion_tokens);
    assert.ok(scored.choices[0].logprobs.content.every((entry) => entry.top_logprobs.length === 2));
    const drawn = await ask(PROMPT, { n: 2, temperature: 1, seed: 5, max_tokens: 8 });
    const again = await ask(PROMPT, { n: 2, temperature: 1, seed: 5, max_tokens: 8 });
    assert.deepEqual(drawn.choices, again.choices);
  },

  async completions() {
    const body = { model: MODEL, prompt: "Hello", max_tokens: 4, temperature: 0 };
    const answer = await client.completions.create(body);
    let text = "";
    for await (const chunk of await client.completions.create({ ...body, stream: true })) text += chunk.choices[0]?.text ?? "";
    assert.equal(text, answer.choices[0].text);
  },

  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.deepEqual(ids, ["tiny", "toys/tiny"]);
    for (const id of ids) assert.equal((await client.models.retrieve(id)).id, id);
  },

  async errors() {
    await assert.rejects(ask("x", { top_p: 7 }), (error) =>
      error instanceof OpenAI.BadRequestError && error.param === "top_p" && Boolean(error.requestID));
    await assert.rejects(ask("x", { model: "gpt-4" }), OpenAI.NotFoundError);
    await assert.rejects(ask("word ".repeat(20_000)), /maximum context length/);
    await assert.rejects(client.withOptions({ apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
  },

  async closing_cancels() {
    const before = await aborted();
    const stream = await ask("x", { stream: true, max_tokens: 8_000, ignore_eos: true });
    // Leaving the loop aborts the stream.
    for await (const _ of stream) break;
    const controller = new AbortController();
    const plain = client.chat.completions.create(
      request("x", { max_tokens: 8_000, ignore_eos: true }), { signal: controller.signal },
    );
    setTimeout(() => controller.abort(), 50);
    await assert.rejects(plain, OpenAI.APIUserAbortError);
    for (const end = Date.now() + 60_000; (await aborted()) < before + 2; ) {
      assert.ok(Date.now() < end, "closed streams are aborted");
      await new Promise((wake) => setTimeout(wake, 20));
    }
  },
};

for (const [name, test] of Object.entries(tests)) {
  await test();
  console.log("ok", name);
}
