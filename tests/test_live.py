"""`unvanish live`: follows a folder that grows, survives half a file, and shows itself to nobody else."""

import csv
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

import unvanish as uv
from tests.test_compare import call
from unvanish.report.following import Following, read_log
from unvanish.report.live import LiveServer


def write_stream(folder: Path, steps: int = 3) -> None:
    lstm = nn.LSTM(2, 4, bidirectional=True)
    with uv.watch(lstm, stream=folder):
        for _ in range(steps):
            lstm(torch.randn(6, 2, 2))[0].square().sum().backward()


def write_log(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = ["step", "epoch", "train_loss", "gradient_flow/rnn.l0/reach"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return folder / "metrics.csv"


def asked(url: str, host: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_stream_is_followed_and_half_a_file_is_waited_for(tmp_path: Path) -> None:
    write_stream(tmp_path / "flows")
    following = Following(tmp_path / "flows")
    found = following.state()
    assert [record["step"] for record in found["records"]] == [1, 2, 3]
    assert (found["waiting"], found["warnings"]) == (0, [])
    layers = found["records"][0]["layers"]
    assert list(layers) == ["l0", "l0.reverse"]
    assert [layer["reverse"] for layer in layers.values()] == [False, True]
    for layer in layers.values():
        assert len(layer["strip"]) == layer["steps"] == 6
        assert max(layer["strip"]) == 0
        assert layer["memory"] > 0
    whole = sorted((tmp_path / "flows").glob("*.flow"))[0].read_bytes()
    half = tmp_path / "flows" / "00000004-step-4.flow"
    half.write_bytes(whole[: len(whole) // 2])
    assert (len(following.state()["records"]), following.state()["waiting"]) == (3, 1)
    half.write_bytes(whole)
    assert (len(following.state()["records"]), following.state()["waiting"]) == (4, 0)
    half.unlink()
    assert len(following.state()["records"]) == 3
    json.dumps(found, allow_nan=False)


def test_a_log_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = write_log(
        tmp_path / "logs" / "version_0", [{"step": 9, "train_loss": 0.5}, {"step": 19, "train_loss": "nan"}]
    )
    with path.open("a") as file:
        file.write("29,0,0.25")
    assert read_log(path) == {"train_loss": [[9.0, 0.5]]}
    with path.open("a") as file:
        file.write("125,\n")
    assert Following(tmp_path).state()["figures"] == {"train_loss": [[9.0, 0.5], [29.0, 0.25125]]}
    assert read_log(tmp_path / "none.csv") == {}


def test_a_loss_that_stays_with_a_short_reach_is_warned_of(tmp_path: Path) -> None:
    def said(last: float, reach: float) -> list[str]:
        rows = [
            {"step": i, "train_loss": 2.0 if i < 20 else last, "gradient_flow/rnn.l0/reach": reach} for i in range(30)
        ]
        write_log(tmp_path, rows)
        return Following(tmp_path).state()["warnings"]

    assert said(1.0, 4) == said(2.0, 40) == []
    (warning,) = said(2.0, 4)
    assert warning.startswith("The loss has not fallen (2 → 2), and the gradient at rnn.l0 has reach 4;")


def test_only_the_token_opens_it_and_only_on_this_machine(tmp_path: Path) -> None:
    write_stream(tmp_path / "flows", 1)
    (tmp_path / "flows" / "secret.txt").write_text("mine")
    with LiveServer(Following(tmp_path / "flows")) as server:
        assert server.url.startswith("http://127.0.0.1:")
        root, token = server.url.split("/?token=")
        status, page = asked(server.url)
        assert status == 200
        assert b"Live: flows" in page
        status, state = asked(f"{root}/state?token={token}")
        assert (status, len(json.loads(state)["records"])) == (200, 1)
        for path in ("/", "/state", "/?token=", f"/state?token={token}x", "/?token=%C3%A9"):
            assert asked(f"{root}{path}")[0] == 403
        assert asked(f"{root}/state?token={token}", host="evil.example")[0] == 403
        for path in ("/secret.txt", "/../secret.txt", "/00000001-step-1.flow"):
            assert asked(f"{root}{path}?token={token}")[0] == 404
        request = urllib.request.Request(server.url, data=b"x")
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(request)
        assert server._server.server_address[0] == "127.0.0.1"


def test_a_folder_that_is_none_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["live", str(tmp_path / "none")], monkeypatch) == 2
    assert "FOLDER: expected a folder" in " ".join(capsys.readouterr().err.split())
    assert call(["live", str(tmp_path), "--port", "70000"], monkeypatch) == 2
    assert "--port: 70000 can't be used" in " ".join(capsys.readouterr().err.split())


@pytest.mark.browser
def test_the_page_follows_by_itself_and_outlives_its_server(browser, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    (tmp_path / "flows").mkdir()
    with LiveServer(Following(tmp_path / "flows")) as server:
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        expect(page.locator("#now")).to_have_text("0 records.", timeout=60000)
        assert page.locator("#layers").is_hidden()
        write_log(tmp_path / "flows" / "logs", [{"step": 9, "train_loss": 0.5, "gradient_flow/rnn.l0/reach": 7}])
        expect(page.locator("#headline")).to_have_text("rnn.l0: reach 7 steps", timeout=60000)
        assert page.locator("#loss svg").count() == 1
        write_stream(tmp_path / "new")
        for file in sorted((tmp_path / "new").iterdir()):
            file.rename(tmp_path / "flows" / file.name)
        page.wait_for_selector("#strips svg", timeout=60000)
        assert page.locator("#strips text.strong").all_text_contents() == ["l0", "l0.reverse"]
        assert "→ " in page.locator("#strips").text_content()
    expect(page.locator("#now")).to_contain_text("has ended", timeout=60000)
    assert page.locator("#strips svg").count() == 1
    assert said == []
    page.close()
