"""A stand-in for an OpenAI-compatible chat-completions endpoint, on the loopback interface. `make demo` and the tests
use the stand-in to run the question-answering example without a model and without a network.

The stand-in is not a language model. The stand-in has a fixed answer to each of seven questions. To any other question,
the stand-in answers "I do not know." One of the seven answers is wrong, so that the scores show an error.

    with serve() as base_url:   # "http://127.0.0.1:41234/v1"
        subprocess.run([sys.executable, "scripts/examples/llm_question_answering.py"],
                       env={**os.environ, **client_environment(base_url)})
"""

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

MODEL = "seven-sentences"
KNOWS = {
    "capital of Australia": "Sydney",  # wrong on purpose
    "symbol Au": "Gold.",
    "walk on the Moon": "In 1969.",
    "Frankenstein": "Mary Shelley",
    "planet": "It is Jupiter.",
    "boiling point of water": "100 °C",
    "photosynthesis": "Carbon dioxide",
}


@contextmanager
def serve() -> Iterator[str]:
    """Run the stand-in on a free port of the loopback interface until the `with` block ends. Yields the base URL for
    clients."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatCompletions)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def client_environment(base_url: str) -> dict[str, str]:
    """Return the environment variables with which an OpenAI client and the example use the stand-in."""
    return {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "the-stand-in-takes-any", "OPENAI_MODEL": MODEL}


class ChatCompletions(BaseHTTPRequestHandler):
    """Answer POST /v1/chat/completions. Responses and errors have the real endpoint's format."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"Unknown request URL: POST {self.path}.")
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            return self.refuse(401, "You didn't provide an API key.")
        try:
            request = json.loads(body)
            model, messages = request["model"], request["messages"]
            question = messages[-1]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return self.refuse(400, f"The request lacks a model or messages: {error!r}.")
        if request.get("stream"):
            return self.refuse(400, "This stand-in does not stream.")
        self.send(200, completion(model, messages, answer(question)))

    def refuse(self, status: int, message: str) -> None:
        self.send(status, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})

    def send(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing, because the calling program uses stdout and stderr."""


def answer(question: str) -> str:
    return next((sentence for about, sentence in KNOWS.items() if about in question), "I do not know.")


def completion(model: str, messages: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """Return the `chat.completion` object. Each word counts as one token."""
    prompt_tokens = sum(len(str(message.get("content", "")).split()) for message in messages)
    completion_tokens = len(text.split())
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
