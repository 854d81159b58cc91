"""The stand-in for a chat-completions endpoint returns responses and errors that OpenAI's client accepts."""

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletion

from scripts.stand_ins import chat_completions


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with chat_completions.serve() as base_url:
        settings = chat_completions.client_environment(base_url)
        yield openai.OpenAI(base_url=settings["OPENAI_BASE_URL"], api_key=settings["OPENAI_API_KEY"], max_retries=0)


def ask(client: openai.OpenAI, question: str) -> ChatCompletion:
    return client.chat.completions.create(
        model=chat_completions.MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
    )


def test_answer_is_a_complete_chat_completion(client: openai.OpenAI) -> None:
    completion = ask(client, "Who wrote the novel Frankenstein?")
    # OpenAI's client does not validate responses, so the test does, with the client's class for a response.
    ChatCompletion.model_validate(completion.model_dump(warnings="error"), strict=True)
    assert completion.choices[0].message.content == "Mary Shelley"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 7
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_unknown_question_gets_an_honest_answer(client: openai.OpenAI) -> None:
    assert ask(client, "What is the airspeed of a swallow?").choices[0].message.content == "I do not know."


def test_refusals_are_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not stream"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hello"}], stream=True)
    with pytest.raises(openai.BadRequestError, match="lacks a model or messages"):
        client.chat.completions.create(model="any", messages=[])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="text")
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(default_headers={"Authorization": "no key"}), "Hello")
