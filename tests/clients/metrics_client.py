"""Prometheus' own parser on the metrics page: python metrics_client.py BASE_URL API_KEY."""

import math
import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from suite import MODEL, PROMPT, arguments, metrics_page, run

# What vLLM's own dashboards draw.
DRAWN = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:cache_config_info": "gauge",
}


def families(url):
    return {family.name: family for family in text_string_to_metric_families(metrics_page(url))}


def drawn_series_are_there(url, _):
    found = families(url)
    for name, kind in DRAWN.items():
        assert name in found, f"no {name}"
        assert found[name].type == kind, found[name]
        assert found[name].documentation, name
        samples = found[name].samples
        assert samples and all(sample.labels["model_name"] == MODEL for sample in samples), name


def every_series_is_there_once(url, _):
    seen = set()
    for family in families(url).values():
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in seen, key
            seen.add(key)
            assert not math.isnan(sample.value), key


def histograms_add_up(url, _):
    for family in families(url).values():
        if family.type != "histogram":
            continue
        buckets, counts = {}, {}
        for sample in family.samples:
            labels = tuple(sorted((name, text) for name, text in sample.labels.items() if name != "le"))
            if sample.name.endswith("_bucket"):
                buckets.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                counts[labels] = sample.value
        for labels, steps in buckets.items():
            bounds, values = zip(*steps)
            assert list(bounds) == sorted(bounds) and bounds[-1] == math.inf, family.name
            assert list(values) == sorted(values) and values[-1] == counts[labels], family.name


def answers_are_counted(url, key):
    def total(name):
        return sum(sample.value for sample in families(url)[name].samples if sample.name.endswith(("_total", "_count")))

    names = ("vllm:generation_tokens", "vllm:prompt_tokens", "vllm:request_success", "vllm:e2e_request_latency_seconds")
    before = {name: total(name) for name in names}
    body = b'{"messages": [{"role": "user", "content": "%s"}], "max_tokens": 5}' % PROMPT.encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url + "/chat/completions", body, headers), timeout=60):
        pass
    # Others ask the same server at the same time, so these only have to rise.
    for name in names:
        assert total(name) > before[name], name


def main(url, key):
    tests = (drawn_series_are_there, every_series_is_there_once, histograms_add_up, answers_are_counted)
    run(tests, url, key)


main(*arguments())
