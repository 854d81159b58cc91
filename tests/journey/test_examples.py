"""The client can read the results that the three examples log to a launched server: figures, pictures, tables, data
sets, models."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.image
import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from sklearn.datasets import load_diabetes, load_iris
from sklearn.metrics import accuracy_score, mean_squared_error
from sklearn.model_selection import train_test_split

from tests.support.servers import SCRIPTS

pytestmark = pytest.mark.machine


def constant(example: str, name: str) -> Any:
    """Return the value of a module-level literal of an example, without running the example."""
    for statement in ast.parse((SCRIPTS / "examples" / example).read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise LookupError(f"{example} has no constant {name}")


def test_every_example_leaves_one_finished_run(example_runs: Mapping[str, str], client: MlflowClient) -> None:
    assert sorted(example_runs) == [
        "classification_iris.py",
        "llm_question_answering.py",
        "regression_diabetes.py",
    ]
    for example, run_id in example_runs.items():
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert client.get_experiment(run.info.experiment_id).name == constant(example, "EXPERIMENT")


def test_regression_figures_and_curve(example_runs: Mapping[str, str], client: MlflowClient) -> None:
    run = client.get_run(example_runs["regression_diabetes.py"])
    params = constant("regression_diabetes.py", "PARAMS")
    assert run.data.params == {name: str(value) for name, value in params.items()}
    curve = client.get_metric_history(run.info.run_id, "mse")
    assert [point.step for point in curve] == list(range(20, params["n_estimators"] + 1, 20))
    assert curve[-1].value == run.data.metrics["mse"]


def test_registered_model_predicts_as_it_did(example_runs: Mapping[str, str], client: MlflowClient) -> None:
    name = constant("regression_diabetes.py", "REGISTERED_MODEL")
    run = client.get_run(example_runs["regression_diabetes.py"])
    [version] = client.search_model_versions(f"name = '{name}'")
    assert (version.run_id, version.status) == (run.info.run_id, "READY")

    model = mlflow.pyfunc.load_model(f"models:/{name}/{version.version}")
    assert len(model.metadata.signature.inputs) == 10
    features, progression = load_diabetes(return_X_y=True, as_frame=True)
    _, test_x, _, test_y = train_test_split(features, progression, test_size=0.25, random_state=42)
    assert mean_squared_error(test_y, model.predict(test_x)) == pytest.approx(run.data.metrics["mse"])


def test_classification_data_sets_and_accuracy(example_runs: Mapping[str, str], client: MlflowClient) -> None:
    run = client.get_run(example_runs["classification_iris.py"])
    assert run.inputs and run.outputs
    data_sets = {
        tag.value: each.dataset
        for each in run.inputs.dataset_inputs
        for tag in each.tags
        if tag.key == "mlflow.data.context"
    }
    assert {context: each.name for context, each in data_sets.items()} == {
        "training": "iris-train",
        "testing": "iris-test",
    }
    assert '"num_rows": 90' in str(data_sets["training"].profile)
    assert '"species"' in str(data_sets["testing"].schema)

    [model_output] = run.outputs.model_outputs
    iris = load_iris(as_frame=True)
    species = iris.target.map(dict(enumerate(iris.target_names)))
    _, test_x, _, test_y = train_test_split(iris.data, species, test_size=0.4, stratify=species, random_state=7)
    predicted = mlflow.pyfunc.load_model(f"models:/{model_output.model_id}").predict(test_x)
    assert accuracy_score(test_y, predicted) == pytest.approx(run.data.metrics["accuracy"])


def test_confusion_matrix_is_a_picture(example_runs: Mapping[str, str], client: MlflowClient, tmp_path: Path) -> None:
    picture = client.download_artifacts(
        example_runs["classification_iris.py"], "confusion_matrix.png", dst_path=str(tmp_path)
    )
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (500, 600)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10


def test_answers_and_scores_of_the_language_model(example_runs: Mapping[str, str], client: MlflowClient) -> None:
    run = client.get_run(example_runs["llm_question_answering.py"])
    truths = constant("llm_question_answering.py", "GROUND_TRUTH")
    table = client.load_table(run.info.experiment_id, "results.json", run_ids=[run.info.run_id]).set_index("question")
    assert table["ground_truth"].to_dict() == truths
    assert table.loc["Who wrote the novel Frankenstein?", "answer"] == "Mary Shelley"
    assert run.data.metrics["contains_ground_truth/mean"] == table["contains_ground_truth"].mean() == 0.75
    assert run.data.metrics["word_overlap/mean"] == pytest.approx(table["word_overlap"].mean())

    traces = mlflow.search_traces(
        locations=[run.info.experiment_id], run_id=run.info.run_id, return_type="list", include_spans=True
    )
    assert {trace.data.spans[0].inputs["question"] for trace in traces} == set(truths)
    for trace in traces:
        assert {each.name for each in trace.info.assessments} >= {"contains_ground_truth", "word_overlap"}
        assert trace.info.token_usage["total_tokens"] > 0
