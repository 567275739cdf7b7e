"""Settings for all tests."""

import shutil

import pytest
import torch
from hypothesis import settings

# No test is timed, so hypothesis measures no deadline either; derandomised, so that CI means the same twice.
settings.register_profile("unvanish", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("unvanish")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser():
    """Chromium, for pages as a reader sees them."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: the page is not rendered")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(autouse=True)
def engine_at_any_length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers run on the engine also where torch's are faster, but in tests that are marked `by_cost`: most sequences of
    the tests are short."""
    if request.node.get_closest_marker("by_cost") is None:
        monkeypatch.setattr("unvanish.engine.cost.CALLS", {})
        monkeypatch.setattr("unvanish.engine.cost.LOW", {})


@pytest.fixture
def compiler():
    """torch.compile of a whole graph, allowed to compile recurrent layers."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
