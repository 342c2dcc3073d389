"""What the Python suites share: the model's names, a tool, the metrics page, and running the tests of a file in turn."""

import sys
import time
import urllib.request

MODEL = "tiny"
# A name with a slash, as hub ids have; the same model.
SLASHED = "toys/tiny"
PROMPT = "What is 17 + 25?"
SEARCH = "Search the web for rain in Bonn."

TOOL = {
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


def run(tests, *arguments):
    for test in tests:
        test(*arguments)
        print("ok", test.__name__, flush=True)


def arguments():
    """Base URL (ending in /v1) and API key, as the caller gave them."""
    url, key = sys.argv[1:3]
    return url, key


def metrics_page(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30) as answer:
        return answer.read().decode()


def metric(url, name, label=""):
    """The sum of the series `name` that hold `label`."""
    lines = [line for line in metrics_page(url).splitlines() if line.startswith(name) and label in line]
    assert lines, name
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def eventually(what, done):
    """Waits until `done()` is true. The bound only ends a test that has failed already."""
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.02)
