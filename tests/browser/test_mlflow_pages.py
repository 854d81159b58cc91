"""After the examples have run, each of MLflow's pages works in a browser that is logged in."""

import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.servers import Server, client_of

pytestmark = pytest.mark.machine

PATIENCE_SECONDS = 30

EXPECTED_ERRORS = (
    # The page requests the current user from MLflow's basic-auth app, but the server runs without that app.
    "/mlflow/users/current - Failed to load resource: the server responded with a status of 404",
    # The URL of the login returns no HTML page with a link to an icon, so the browser requests /favicon.ico.
    "/favicon.ico - Failed to load resource: the server responded with a status of 404",
)


def open_page(browser: Chrome, server: Server, place: str, *wanted: str) -> str:
    """Open the page at `place` of MLflow's UI, wait until the page shows all `wanted` texts, and return its text."""
    browser.get("about:blank")  # the browser does not reload a page if only the part after # changes
    browser.get(f"{server.url}/{place}")
    shown = ""

    def shows_all(driver: Chrome) -> bool:
        nonlocal shown
        shown = driver.find_element(By.TAG_NAME, "body").text
        return all(text in shown for text in wanted)

    WebDriverWait(browser, PATIENCE_SECONDS, ignored_exceptions=[]).until(
        shows_all, f"{place} does not show all of {wanted}"
    )
    assert_no_complaints(browser)
    return shown


def assert_no_complaints(browser: Chrome) -> None:
    """Assert that no request of the page failed and that no script threw an error."""
    entries: list[dict[str, str]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    errors = [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
    errors = [error for error in errors if not any(expected in error for expected in EXPECTED_ERRORS)]
    assert errors == []


def run_page(server: Server, run_id: str, tab: str = "") -> str:
    with client_of(server) as client:
        experiment_id = client.get_run(run_id).info.experiment_id
    return f"#/experiments/{experiment_id}/runs/{run_id}{tab}"


def wait_for(browser: Chrome, script: str, what: str) -> Any:
    return WebDriverWait(browser, PATIENCE_SECONDS).until(lambda driver: driver.execute_script(script), what)


def test_experiments(browser: Chrome, server: Server, example_runs: Mapping[str, str]) -> None:
    open_page(browser, server, "#/experiments", "diabetes-regression", "iris-classification", "question-answering")


def test_run_overview(browser: Chrome, server: Server, example_runs: Mapping[str, str]) -> None:
    run_id = example_runs["classification_iris.py"]
    open_page(browser, server, run_page(server, run_id), "iris-train", "accuracy", "max_depth", run_id)


def test_confusion_matrix(browser: Chrome, server: Server, example_runs: Mapping[str, str]) -> None:
    run_id = example_runs["classification_iris.py"]
    open_page(browser, server, run_page(server, run_id, "/artifacts/confusion_matrix.png"), "confusion_matrix.png")
    wait_for(
        browser,
        "return Array.from(document.images).some(image => image.naturalWidth === 600 && image.naturalHeight === 500)",
        "the picture of 600 by 500 pixels is not shown",
    )
    assert_no_complaints(browser)


def test_metric_curve(browser: Chrome, server: Server, example_runs: Mapping[str, str]) -> None:
    run_id = example_runs["regression_diabetes.py"]
    open_page(browser, server, run_page(server, run_id, "/model-metrics"), "mse", "r2")
    points = "return document.querySelectorAll('.js-plotly-plot .scatterlayer .point').length"
    assert wait_for(browser, points, "there is no curve") >= 10
    assert_no_complaints(browser)


def test_registered_model(browser: Chrome, server: Server, example_runs: Mapping[str, str]) -> None:
    open_page(browser, server, "#/models/diabetes-progression", "diabetes-progression", "Version 1")


def test_example_answers_are_shown_as_a_table(browser: Chrome, server: Server, example_runs: Mapping[str, str]) -> None:
    run_id = example_runs["llm_question_answering.py"]
    open_page(
        browser,
        server,
        run_page(server, run_id, "/artifacts/results.json"),
        "View as table", "Mary Shelley", "I do not know.",
    )  # fmt: skip


def test_traces_of_the_questions(browser: Chrome, server: Server, example_runs: Mapping[str, str]) -> None:
    run_id = example_runs["llm_question_answering.py"]
    open_page(browser, server, run_page(server, run_id, "/traces"), "Who wrote the novel Frankenstein?")


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Run a second web server, and yield its address and the list of the requested paths."""
    asked: list[str] = []

    class Recorded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            return

    web = ThreadingHTTPServer(("127.0.0.1", 0), Recorded)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{web.server_address[1]}", asked
    web.shutdown()
    web.server_close()


def test_a_note_loads_no_picture_of_another_host(
    browser: Chrome, server: Server, example_runs: Mapping[str, str], elsewhere: tuple[str, list[str]]
) -> None:
    """If the page loaded a picture from another host, that host could see who reads the note."""
    address, asked = elsewhere
    run_id = example_runs["classification_iris.py"]
    with client_of(server) as client:
        client.set_tag(run_id, "mlflow.note.content", f"A picture: ![]({address}/read.png)")
        browser.get("about:blank")
        browser.get(f"{server.url}/{run_page(server, run_id)}")
        there = f"return Array.from(document.images).some(image => image.src === '{address}/read.png')"
        wait_for(browser, there, "the note does not name its picture")
        wait_for(browser, "return document.readyState === 'complete'", "the page does not finish")
        complaints = [each["message"] for each in browser.get_log("browser")]  # type: ignore[no-untyped-call]
        client.delete_tag(run_id, "mlflow.note.content")
    assert [each for each in complaints if "Content Security Policy" in each and "read.png" in each], complaints
    assert asked == []


def test_a_page_that_a_run_logged_is_shown_and_its_script_runs(
    browser: Chrome, server: Server, example_runs: Mapping[str, str]
) -> None:
    """MLflow shows an HTML artifact in a frame that cannot access the server, like a figure of Plotly."""
    run_id = example_runs["classification_iris.py"]
    page = "<p id=said>nothing</p><script>document.getElementById('said').textContent = 'the script ran'</script>"
    with client_of(server) as client:
        client.log_text(run_id, page, "figure.html")
    browser.get("about:blank")
    browser.get(f"{server.url}/{run_page(server, run_id, '/artifacts/figure.html')}")
    frame = WebDriverWait(browser, PATIENCE_SECONDS).until(lambda driver: driver.find_element(By.TAG_NAME, "iframe"))
    browser.switch_to.frame(frame)
    WebDriverWait(browser, PATIENCE_SECONDS).until(
        lambda driver: "the script ran" in driver.find_element(By.TAG_NAME, "body").text, "the script did not run"
    )
    browser.switch_to.default_content()
    assert_no_complaints(browser)
