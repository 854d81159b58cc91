#!/usr/bin/env python3
"""Bake the image, launch it and log the example experiments, all on this machine. `make demo` runs this script.

Finished work is skipped. The script bakes a new image only if packer/ or provisioning/ changed, and changes the server
only if the server differs from the stack. An example runs only if the server has no finished run of this example. The
server stays up until you run `scripts/rehearse.py down`.

If OPENAI_API_KEY is set, the question-answering example uses the model and the endpoint from OPENAI_MODEL and
OPENAI_BASE_URL. Without OPENAI_API_KEY, the example uses scripts/stand_ins/chat_completions.py, a stand-in server on
loopback.
"""

if __name__ == "__main__":
    import enter_venv  # noqa: F401 - this import restarts the script with the packages of .venv

# isort: split
import argparse
import base64
import json
import os
import shlex
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts import invoker
from scripts.stand_ins import chat_completions

SCRIPTS = Path(__file__).resolve().parent
EXAMPLES = sorted((SCRIPTS / "examples").glob("*.py"))


def main() -> None:
    arguments = read_arguments()
    image = run_script("bake.py", "--local", "--if-changed", "--base", arguments.base, "--json")
    server = run_script("rehearse.py", "up", "--ami", image["ami_id"], "--json")
    client = client_environment()
    logged = finished_runs(server)
    with chat_completions.serve() as model_url:
        for example in EXAMPLES:
            if example.name not in logged:
                run_example(example, {**model_environment(model_url), **client})
    print(summary(server, finished_runs(server)))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="debian12", help="source image to bake on (default: %(default)s)")
    return parser.parse_args()


def run_script(name: str, *arguments: str) -> Any:
    """Run one of this project's scripts and return its JSON output. The script's log goes to the terminal. If the
    script fails, this process exits with the same status."""
    say(f"scripts/{name} {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, SCRIPTS / name, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        say(f"scripts/{name} failed (exit status {done.returncode}); its error is above")
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def client_environment() -> dict[str, str]:
    """The environment variables that `scripts/connect.py` prints for the rehearsal."""
    connect = [sys.executable, str(SCRIPTS / "connect.py")]
    person = invoker.as_person(dict(os.environ))
    exports = subprocess.run(connect, stdout=subprocess.PIPE, text=True, check=True, **person).stdout
    words = shlex.split(exports, comments=True)
    return dict(word.split("=", 1) for word in words if "=" in word)


def model_environment(stand_in_url: str) -> dict[str, str]:
    if "OPENAI_API_KEY" in os.environ:
        return {}
    return chat_completions.client_environment(stand_in_url)


def run_example(example: Path, environment: Mapping[str, str]) -> None:
    say(f"scripts/examples/{example.name}")
    person = invoker.as_person({**os.environ, **environment})
    done = subprocess.run([sys.executable, example], stdout=sys.stderr, **person)
    if done.returncode:
        say(f"scripts/examples/{example.name} failed (exit status {done.returncode}); its error is above")
        sys.exit(done.returncode)


def finished_runs(server: Mapping[str, Any]) -> dict[str, str]:
    """A dict from the file name of each example to the URL of its newest finished run."""
    experiments = post(server, "experiments/search", {"max_results": 1000}).get("experiments", [])
    found = post(
        server,
        "runs/search",
        {
            "experiment_ids": [experiment["experiment_id"] for experiment in experiments],
            "filter": "attributes.status = 'FINISHED'",
            "order_by": ["attributes.start_time ASC"],
            "max_results": 1000,
        },
    )
    pages = {}
    for run in found.get("runs", []):
        source = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}.get("mlflow.source.name", "")
        info = run["info"]
        page = f"{server['url']}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}"
        pages[Path(source).name] = page
    return pages


def post(server: Mapping[str, Any], call: str, document: Mapping[str, Any]) -> dict[str, Any]:
    credentials = base64.b64encode(f"{server['username']}:{server['password']}".encode()).decode()
    request = urllib.request.Request(
        f"{server['url']}/api/2.0/mlflow/{call}",
        data=json.dumps(document).encode(),
        headers={"Authorization": f"Basic {credentials}", "Content-Type": "application/json"},
    )
    trusted = ssl.create_default_context(cafile=server["server_certificate"])
    with urllib.request.urlopen(request, timeout=60, context=trusted) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def summary(server: Mapping[str, Any], pages: Mapping[str, str]) -> str:
    trust = f"""
The certificate is signed by this server's own authority, so the browser shows a warning. To avoid the warning, import
the authority into the browser: {server["server_certificate"]}
"""
    trust = trust if server["server_certificate"] else ""
    runs = "\n".join(f"  {example.stem:<24} {pages[example.name]}" for example in EXAMPLES)
    return f"""
MLflow {server["mlflow_version"]} is up: open it in a browser.

  URL       {server["url"]}
  username  {server["username"]}
  password  {server["password"]}
{trust}
What the examples logged:

{runs}

Log your own:    eval "$(scripts/connect.py)"    then run any program that uses MLflow
Take it down:    make demo-down"""


def say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
