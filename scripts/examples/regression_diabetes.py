"""Predict the progression of diabetes after a year with a random forest, and register the model.

The example downloads no data, because scikit-learn contains the data (442 patients, ten measurements each). Run the
example with the environment variables that `scripts/connect.py` prints:

    eval "$(scripts/connect.py)"
    .venv/bin/python scripts/examples/regression_diabetes.py
"""

import mlflow
import numpy as np
from mlflow.models import infer_signature
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import mean_squared_error, r2_score
from sklearn.model_selection import train_test_split

EXPERIMENT = "diabetes-regression"
REGISTERED_MODEL = "diabetes-progression"
PARAMS = {"n_estimators": 200, "max_depth": 6, "min_samples_leaf": 3, "random_state": 42}
TREES_PER_STEP = 20


def main() -> None:
    features, progression = load_diabetes(return_X_y=True, as_frame=True)
    train_x, test_x, train_y, test_y = train_test_split(features, progression, test_size=0.25, random_state=42)

    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name="random-forest"):
        mlflow.log_params(PARAMS)

        # With warm_start, each step adds twenty trees to the forest, so that the metric has one value per step.
        forest = RandomForestRegressor(**PARAMS, warm_start=True)
        for trees in range(TREES_PER_STEP, PARAMS["n_estimators"] + 1, TREES_PER_STEP):
            forest.set_params(n_estimators=trees).fit(train_x, train_y)
            mlflow.log_metric("mse", mean_squared_error(test_y, forest.predict(test_x)), step=trees)
        predicted = forest.predict(test_x)
        mse, r2 = mean_squared_error(test_y, predicted), r2_score(test_y, predicted)
        mlflow.log_metric("r2", r2)

        logged = mlflow.sklearn.log_model(
            forest,
            name="model",
            signature=infer_signature(test_x, predicted),
            input_example=test_x.head(3),
            registered_model_name=REGISTERED_MODEL,
            skops_trusted_types=["sklearn.tree._tree.Tree"],  # the classes inside a forest
        )
        print(f"mean squared error {mse:.0f}, R² {r2:.3f} with {PARAMS['n_estimators']} trees")

    loaded = mlflow.pyfunc.load_model(f"models:/{REGISTERED_MODEL}/{logged.registered_model_version}")
    np.testing.assert_allclose(loaded.predict(test_x), predicted)
    print(f"{REGISTERED_MODEL} version {logged.registered_model_version}: the loaded model makes the same predictions")


if __name__ == "__main__":
    main()
