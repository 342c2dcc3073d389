"""Schemathesis asks a running server whatever its own OpenAPI document allows and forbids, and holds the answers to it:
python schema_client.py BASE_URL API_KEY."""

import os
import pathlib
import subprocess
import sys
import tempfile

from suite import arguments

HERE = pathlib.Path(__file__).resolve().parent
# What the document allows may still not be: a tool choice without tools, a prompt that is too long.
UNDECIDABLE = "positive_data_acceptance"
# Routes that load, unload or keep something for the suites beside this one; their own tests ask them.
WITH_EFFECTS = "^/(models|simulate|sleep|wake_up|is_sleeping|reset_prefix_cache|api/|invocations|v1/(files|batches|responses|messages|chat/completions/batch))"


def main(url, key):
    command = [
        pathlib.Path(sys.executable).with_name("st"), "run", url.removesuffix("/v1") + "/openapi.json",
        "--header", f"Authorization: Bearer {key}",
        "--phases", "examples,coverage,fuzzing",
        "--exclude-checks", UNDECIDABLE,
        "--exclude-path-regex", WITH_EFFECTS,
        "--max-examples", "20", "--seed", "6", "--no-shrink", "--no-color",
        # How fast it answers is not the question here.
        "--request-timeout", "300",
    ]  # fmt: skip
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schema_hooks", "PYTHONPATH": str(HERE)}
    # It leaves its own notes where it runs.
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run(command, cwd=folder, env=environment).returncode)


main(*arguments())
