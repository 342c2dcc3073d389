"""The recipes of README.md against a running server, as written but for its address and key:
python recipes_client.py BASE_URL API_KEY.

What needs a container or an account is replayed: the calls that it makes, with the values that its recipe sets.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.error
import urllib.request

from suite import MODEL, PROMPT, arguments, run

README = (pathlib.Path(__file__).resolve().parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def recipe(name):
    found = re.search(rf"<!-- recipe:{name} -->\n```\w+\n(.*?)```", README, re.S)
    assert found, f"README.md has no block after <!-- recipe:{name} -->"
    return found[1]


def as_here(text, url, key):
    base = url.removesuffix("/v1")
    assert "none" in text, "the place of the key"
    return text.replace(ADDRESS, base).replace("none", key)


def output(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(url, key):
    assert output([sys.executable, "-c", as_here(recipe("python"), url, key)]).strip()


def curl(url, key):
    answer = json.loads(output(["bash", "-euc", as_here(recipe("curl"), url, key)]))
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"sum"}, answer


def settings(name, pattern):
    found = dict(re.findall(pattern, recipe(name), re.M))
    assert found, recipe(name)
    return found


def call(address, headers, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"} | headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def claude(url, key):
    """What Claude Code sends first: a short question for a title, then its tools and a long system prompt, streamed."""
    variables = settings("claude", r"^export (\w+)=(\S+)$")
    assert variables["ANTHROPIC_BASE_URL"] == ADDRESS and "ANTHROPIC_AUTH_TOKEN" in variables
    address = variables["ANTHROPIC_BASE_URL"].replace(ADDRESS, url.removesuffix("/v1")) + "/v1/messages?beta=true"
    headers = {"Authorization": f"Bearer {key}", "anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 32000,
        "stream": True,
        "metadata": {"user_id": "user_of_the_test"},
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2;"},
            {"type": "text", "text": "You are a toy.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "tools": [{"name": "Read", "description": "Reads a file.", "input_schema": {
            "type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"],
        }}],
    }  # fmt: skip
    try:
        events = call(address, headers, body)
    except urllib.error.HTTPError as error:
        if error.code not in (404, 501):
            raise
        print("NOT RUN: the recipe for Claude Code, because this server has no /v1/messages", file=sys.stderr)
        return
    assert "event: message_start" in events and "event: message_stop" in events, events
    small = body | {"model": "claude-haiku-4-5", "stream": False, "max_tokens": 32, "tools": []}
    assert json.loads(call(address, headers, small))["type"] == "message"


def open_webui(url, key):
    """Its list of models, a chat as it streams it, and the title that it asks for afterwards."""
    variables = settings("open-webui", r"-e (\w+)=(\S+)")
    assert variables["OPENAI_API_BASE_URL"] == "http://host.docker.internal:8000/v1"
    headers = {"Authorization": f"Bearer {key}", "X-OpenWebUI-User-Name": "a", "X-OpenWebUI-User-Role": "user"}
    names = [model["id"] for model in json.loads(call(url + "/models", headers))["data"]]
    assert MODEL in names
    chat = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "temperature": 0}
    streamed = call(url + "/chat/completions", headers, chat | {"stream": True, "stream_options": {"include_usage": True}})
    assert streamed.rstrip().endswith("data: [DONE]") and '"reasoning_content"' in streamed
    title = chat | {"stream": False, "max_completion_tokens": 1000, "metadata": {"task": "title_generation"}}
    answer = json.loads(call(url + "/chat/completions", headers, title))
    assert answer["choices"][0]["message"]["role"] == "assistant"


def main(url, key):
    # A recipe is run in the environment of its reader, who has none of these.
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "ANTHROPIC_BASE_URL"):
        os.environ.pop(name, None)
    run((python, curl, claude, open_webui), url, key)


main(*arguments())
