"""Loaded by schemathesis: what it makes up stays answerable in a moment, and inside a vocabulary that it cannot know."""

import schemathesis

TOKENS_MAX = 8
# What each dialect calls the most tokens of an answer.
LIMITS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/invocations": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}
# The toy's ids of text begin below this.
IDS = 1000


def small(ids):
    """Lists of ids stay lists of ids; what is none is meant to be refused."""
    if isinstance(ids, list):
        return [small(one) for one in ids]
    return ids % IDS if isinstance(ids, int) and ids >= IDS else ids


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        limit = LIMITS.get(context.operation.path)
        if limit and body.get(limit) is None:
            body[limit] = TOKENS_MAX
        for name in ("prompt", "tokens", "stop_token_ids", "allowed_token_ids"):
            if isinstance(body.get(name), list):
                body[name] = small(body[name])
    return body
