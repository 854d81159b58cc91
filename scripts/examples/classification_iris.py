"""Classify three species of iris with a random forest, and log the dataset and the confusion matrix.

The example downloads no data, because scikit-learn contains the data (150 flowers, four measurements each). Run the
example with the environment variables that `scripts/connect.py` prints:

    eval "$(scripts/connect.py)"
    .venv/bin/python scripts/examples/classification_iris.py
"""

import mlflow
from matplotlib.figure import Figure
from mlflow.data.pandas_dataset import from_pandas
from mlflow.models import infer_signature
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score
from sklearn.model_selection import train_test_split

EXPERIMENT = "iris-classification"
PARAMS = {"n_estimators": 50, "max_depth": 3, "random_state": 7}


def main() -> None:
    iris = load_iris(as_frame=True)
    flowers = iris.data.assign(species=iris.target.map(dict(enumerate(iris.target_names))))
    train, test = train_test_split(flowers, test_size=0.4, stratify=flowers["species"], random_state=7)
    measurements = iris.feature_names

    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name="random-forest"):
        mlflow.log_input(from_pandas(train, name="iris-train", targets="species"), context="training")
        mlflow.log_input(from_pandas(test, name="iris-test", targets="species"), context="testing")
        mlflow.log_params(PARAMS)

        classifier = RandomForestClassifier(**PARAMS).fit(train[measurements], train["species"])
        predicted = classifier.predict(test[measurements])
        accuracy = accuracy_score(test["species"], predicted)
        mlflow.log_metric("accuracy", accuracy)

        figure = Figure(figsize=(6, 5), layout="constrained")
        ConfusionMatrixDisplay.from_predictions(test["species"], predicted, ax=figure.subplots(), cmap="Blues")
        mlflow.log_figure(figure, "confusion_matrix.png")

        mlflow.sklearn.log_model(
            classifier,
            name="model",
            signature=infer_signature(test[measurements], predicted),
            skops_trusted_types=["sklearn.tree._tree.Tree"],  # the classes inside a forest
        )
        print(
            f"accuracy {accuracy:.3f} on {len(test)} flowers that were not in the training data; logged "
            f"confusion_matrix.png"
        )


if __name__ == "__main__":
    main()
