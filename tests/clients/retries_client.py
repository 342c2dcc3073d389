"""The official OpenAI package at a server of one place and one seat to wait: python retries_client.py BASE_URL API_KEY.

A full server says when to come again, and the package does.
"""

import openai
from suite import MODEL, PROMPT, arguments, eventually, metric

LONG = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}


def main(url, key):
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    running = client.chat.completions.create(**body, **LONG, stream=True)
    next(iter(running))
    waiting = client.chat.completions.create(**body, **LONG, stream=True)
    eventually("the only seat is taken", lambda: metric(url, "vllm:num_requests_waiting{") == 1)

    turned_away = []

    def make_room(answer):
        if answer.status_code == 429:
            turned_away.append(answer.headers["retry-after"])
            running.close()
            waiting.close()

    patient = client.with_options(max_retries=2)
    patient._client.event_hooks["response"].append(make_room)
    answer = patient.chat.completions.create(**body, max_tokens=4)
    assert answer.choices[0].finish_reason and turned_away == ["1"], turned_away
    print("ok retries")


main(*arguments())
