"""Ask a language model questions with known answers, score the model's answers, and log the answers and the scores.

Two Python functions compare each answer with the expected answer, so that no second model is needed as a judge. The
example needs the environment variables that `scripts/connect.py` prints, and an endpoint with OpenAI's
chat-completions API, such as OpenAI, vLLM, Ollama or LiteLLM:

    eval "$(scripts/connect.py)"
    export OPENAI_API_KEY=…                             # the endpoint's key
    export OPENAI_BASE_URL=http://localhost:11434/v1    # default: OpenAI's endpoint
    export OPENAI_MODEL=llama3.2                        # default: gpt-4o-mini
    .venv/bin/python scripts/examples/llm_question_answering.py
"""

import os
import re
from collections import Counter

import mlflow
import openai
import pandas as pd
from mlflow.genai.scorers import scorer

EXPERIMENT = "question-answering"
MODEL = os.environ.get("OPENAI_MODEL", "gpt-4o-mini")
SYSTEM_PROMPT = "Answer in as few words as possible, without explanation."
GROUND_TRUTH = {
    "What is the capital of Australia?": "Canberra",
    "Which element has the chemical symbol Au?": "gold",
    "In which year did people first walk on the Moon?": "1969",
    "Who wrote the novel Frankenstein?": "Mary Shelley",
    "Which planet of the solar system is the largest?": "Jupiter",
    "What is the boiling point of water at sea level, in degrees Celsius?": "100",
    "Which gas do plants take from the air for photosynthesis?": "carbon dioxide",
    "How many strings does a violin have?": "four",
}


def main() -> None:
    client = openai.OpenAI()

    @mlflow.trace
    def answer(question: str) -> str:
        completion = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}],
        )
        return completion.choices[0].message.content or ""

    mlflow.set_experiment(EXPERIMENT)
    mlflow.openai.autolog()  # adds the model's requests and responses, and the numbers of tokens, to each trace
    with mlflow.start_run(run_name=MODEL):
        mlflow.log_params({"model": MODEL, "system_prompt": SYSTEM_PROMPT, "questions": len(GROUND_TRUTH)})
        evaluation = mlflow.genai.evaluate(
            data=[
                {"inputs": {"question": question}, "expectations": {"expected_response": truth}}
                for question, truth in GROUND_TRUTH.items()
            ],
            predict_fn=answer,
            scorers=[contains_ground_truth, word_overlap],
        )
        results = results_table(evaluation.result_df)
        mlflow.log_table(results, "results.json")
        print(results.to_string(index=False))
        print(", ".join(f"{name} {value:.3f}" for name, value in sorted(evaluation.metrics.items())))


@scorer
def contains_ground_truth(outputs: str, expectations: dict[str, str]) -> bool:
    """Whether the model's answer contains the words of the expected answer, in the same order and without gaps."""
    given, truth = words(outputs), words(expectations["expected_response"])
    return any(given[start : start + len(truth)] == truth for start in range(len(given)))


@scorer
def word_overlap(outputs: str, expectations: dict[str, str]) -> float:
    """The F1 score of the shared words (0 to 1), as in the SQuAD benchmark."""
    given, truth = words(outputs), words(expectations["expected_response"])
    shared = (Counter(given) & Counter(truth)).total()
    return 2 * shared / (len(given) + len(truth)) if shared else 0.0


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in {"a", "an", "the"}]


def results_table(evaluated: pd.DataFrame) -> pd.DataFrame:
    """A table with one row per question: the question, the expected answer, the model's answer and the scores."""
    questions = evaluated["request"].map(lambda request: request["question"])
    return pd.DataFrame(
        {
            "question": questions,
            "ground_truth": questions.map(GROUND_TRUTH),
            "answer": evaluated["response"],
            "contains_ground_truth": evaluated["contains_ground_truth/value"],
            "word_overlap": evaluated["word_overlap/value"],
        }
    )


if __name__ == "__main__":
    main()
