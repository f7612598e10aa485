"""The server, over real sockets, and its page in a real browser where one is installed."""

import gc
import http.client
import json
import random
import re
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from llama_lab import load
from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.inference.load import LoadedRun
from llama_lab.lab.serve.app import MOST_BYTES, build_app
from llama_lab.lab.serve.command import LOOPBACK
from llama_lab.lab.serve.shelf import Shelf

WAITING = 2
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOW = {"beyond_context": "window"}


class Client:
    """What a client sees of a server on a port."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status, and the answer as JSON has it."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=170)
        try:
            connection.request(method, path, content, sent | headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def complete(self, **body: Any) -> dict[str, Any]:
        status, answer = self.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def refused(self, body: Any, **headers: str) -> tuple[int, str]:
        status, answer = self.ask("POST", "/v1/completions", body, **headers)
        return status, answer["error"]["message"]

    def begin(self, **body: Any) -> socket.socket:
        """A connection with a request sent and nothing read."""
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}\r\n"
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=170)
        opened.sendall(head.encode() + b"\r\n" + content)
        return opened


@pytest.fixture(scope="module")
def server(shaped_runs: dict[str, Path]) -> Iterator[Client]:
    """Two runs, served from a thread."""
    shelf = Shelf([shaped_runs["mha"], shaped_runs["gqa"]], loaded=2, running=1, device="cpu", precision="fp32")
    app = build_app(shelf, waiting=WAITING, running=1, hosts=list(LOOPBACK))
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield Client(listener.getsockname()[1])
    running.should_exit = True
    thread.join(30)
    assert not thread.is_alive()
    shelf.close()
    listener.close()


def names(runs: dict[str, Path]) -> list[str]:
    """Ids of all checkpoints that are served, in order."""
    return [f"{runs[run].name}@{update}" for run, update in (("mha", 8), ("mha", 4), ("gqa", 0))]


def test_models_are_the_checkpoints_of_the_runs(server: Client, shaped_runs: dict[str, Path]):
    status, answer = server.ask("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in answer["data"]] == names(shaped_runs)
    assert [model["tokens"] for model in answer["data"]] == [4096, 2048, 0]


def test_a_completion_is_what_generate_gives(server: Client, shaped_runs: dict[str, Path]):
    for name in names(shaped_runs):
        folder = shaped_runs["mha" if name.startswith(shaped_runs["mha"].name) else "gqa"]
        ours = load(folder, int(name.rpartition("@")[2]))
        answer = server.complete(model=name, prompt="the model", max_tokens=8, seed=3, temperature=0.7, top_k=20)
        found = ours.complete(["the model"], seed=3, max_new_tokens=8, temperature=0.7, top_k=20)[0]
        (choice,) = answer["choices"]
        assert (choice["text"], choice["index"], choice["logprobs"]) == (found.text, 0, None)
        assert choice["finish_reason"] == ("length" if found.finish == "length" else "stop")
        assert answer["usage"]["completion_tokens"] == found.new_tokens
        assert (answer["model"], answer["object"]) == (name, "text_completion")
    newest = server.complete(prompt="the", max_tokens=2)["model"]
    assert newest == names(shaped_runs)[0] == server.complete(model=newest.rpartition("@")[0], prompt="the", max_tokens=2)["model"]


def test_several_prompts_and_several_of_each(server: Client, shaped_runs: dict[str, Path]):
    ids = load(shaped_runs["mha"]).tokenizer.encode("the")
    answer = server.complete(prompt=["the", "a"], n=2, max_tokens=4, seed=5, echo=True)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [text[:3] for text in texts[:2]] == ["the", "the"]
    assert texts[2].startswith("a") and texts[0] != texts[1]
    assert server.complete(prompt=ids, max_tokens=4, temperature=0)["usage"]["prompt_tokens"] == len(ids)
    assert len(server.complete(prompt=[ids, ids], max_tokens=1, temperature=0)["choices"]) == 2


def test_a_stream_is_the_completion_in_pieces(server: Client):
    asked = {"prompt": ["the model", "a text"], "max_tokens": 8, "seed": 7}
    whole = server.complete(**asked)
    with server.begin(**asked, stream=True, stream_options={"include_usage": True}) as opened:
        lines = read_events(opened)
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert events.pop()["usage"] == whole["usage"]
    texts, finishes = ["", ""], {}
    for event in events:
        assert event["id"] == events[0]["id"]
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                finishes[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert finishes == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}


def read_events(opened: socket.socket) -> list[str]:
    """The data of all events of a stream."""
    answer = http.client.HTTPResponse(opened)
    answer.begin()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    text = answer.read().decode()
    assert all(block.startswith("data: ") for block in text.split("\n\n")[:-1])
    return [block.removeprefix("data: ") for block in text.split("\n\n")[:-1]]


MISTAKES: dict[str, tuple[Any, int, str]] = {
    "no prompt": ({}, 400, "prompt=null is neither a text nor a list of ids"),
    "an empty prompt": ({"prompt": ""}, 400, "is empty; give it a first word"),
    "ids outside": ({"prompt": [1, 99999]}, 400, "has the id 99999, which is outside the vocabulary"),
    "a long prompt": ({"prompt": "word " * 200}, 400, "context of 32, which leaves no room"),
    "too many tokens": ({"prompt": "a", "max_tokens": 500}, 400, "max_tokens=30 fits"),
    "far too many": ({"prompt": "a", "max_tokens": 10**30, **WINDOW}, 400, "is above 65536"),
    "a model": ({"prompt": "a", "model": "gpt"}, 404, "there is no model 'gpt'"),
    "two mistakes": ({"prompt": "a", "temperature": -1, "n": True}, 400, "n=true is not a whole number; temperature=-1 is below 0"),
    "a typo": ({"prompt": "a", "temprature": 1}, 400, "temprature is no field"),
    "what is not done": ({"prompt": "a", "logprobs": 3}, 400, "logprobs is not done here"),
    "too many choices": ({"prompt": "a", "n": 100}, 400, "outside 1 to 32 continuations"),
    "no object": ([1], 400, "is no JSON object"),
    "half a body": (b'{"prompt": ', 400, "is no JSON"),
    "a number that is none": (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is no number"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "surrogates not allowed"),
    "no text at all": (b'{"prompt": "\xff"}', 400, "is no JSON"),
    "a deep hole": (b"[" * 100_000, 400, "is no JSON"),
    "too large": (b'"' + b"a" * MOST_BYTES + b'"', 413, "is larger than 1,048,576 bytes"),
}


def test_a_mistyped_model_and_an_address_of_another_interface_say_what_there_is(server: Client):
    known = server.ask("GET", "/v1/models")[1]["data"][0]["id"]
    status, said = server.ask("POST", "/v1/completions", {"prompt": "a", "model": known[:-1] + "x"})
    assert (status, f"did you mean {known!r}? GET /v1/models lists them" in said["error"]["message"]) == (404, True)
    there = "is not answered here; there are GET /v1/models and POST /v1/completions, and the page at /"
    status, said = server.ask("POST", "/v1/chat/completions", {"messages": []})
    assert (status, said["error"]["message"]) == (
        404,
        f"POST /v1/chat/completions {there}. These models continue texts and were not trained to chat: send the text as `prompt`",
    )
    assert server.ask("POST", "/v1/embeddings", {})[1]["error"]["message"] == f"POST /v1/embeddings {there}"


@pytest.mark.parametrize("case", MISTAKES)
def test_each_mistake_is_answered(case: str, server: Client):
    body, status, said = MISTAKES[case]
    found = server.refused(body)
    assert found[0] == status
    assert said in found[1]


def test_other_sites_cannot_ask(server: Client):
    assert server.refused({"prompt": "a"}, **{"Content-Type": "text/plain"})[0] == 415
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/v1/models", headers={"Host": "elsewhere.example"})
    answer = connection.getresponse()
    assert answer.status == 400
    assert answer.getheader("access-control-allow-origin") is None
    connection.close()


def test_noise_on_the_line_hurts_nobody(server: Client):
    negative = b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n"
    lines = [b"\x00\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", negative, b"A" * 100_000]
    for line in lines:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as opened:
            opened.sendall(line)
            assert b" 400 " in opened.recv(100)
    assert server.ask("GET", "/../pyproject.toml")[0] == 404
    assert server.ask("GET", "/v1/completions")[0] == 405
    assert server.complete(prompt="the", max_tokens=1)


def test_too_many_are_refused_and_those_who_leave_make_room(server: Client):
    long = {"prompt": "the", "max_tokens": 20_000, "temperature": 0, "stream": True, **WINDOW}
    held = [server.begin(**long) for _ in range(1 + WAITING)]
    assert held[0].recv(12) == b"HTTP/1.1 200"
    wait_for(lambda: server.ask("POST", "/v1/completions", {"prompt": "the", "max_tokens": 1})[0] == 429)
    for opened in held:
        opened.close()
    wait_for(lambda: server.ask("POST", "/v1/completions", {"prompt": "the", "max_tokens": 1})[0] == 200)


def wait_for(holds: Any) -> None:
    """Until something holds, at most half a minute."""
    end = time.monotonic() + 170
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


class Models:
    """What is asked of a shelf, and how many models are in memory whenever one is asked."""

    def __init__(self, runs: dict[str, Path], **bounds: int):
        self.shelf = Shelf([runs["mha"], runs["gqa"]], **bounds, device="cpu", precision="fp32")
        self.entries = self.shelf.entries()
        self.most = 0
        self._seen: list[weakref.ref[torch.nn.Module]] = []
        self._lock = threading.Lock()

    def look(self, run: LoadedRun) -> None:
        """Count those that are there besides this one, and remember this one."""
        with self._lock:
            gc.collect()
            there = {id(model) for seen in self._seen if (model := seen()) is not None} | {id(run.model)}
            self.most = max(self.most, len(there))
            self._seen.append(weakref.ref(run.model))


def test_a_further_model_waits_where_all_that_may_be_loaded_compute(shaped_runs: dict[str, Path]):
    models = Models(shaped_runs, loaded=1, running=2)
    answered: list[int] = []
    began = threading.Event()

    def first(run: LoadedRun) -> None:
        models.look(run)
        began.set()
        wait_for(lambda: models.shelf._line or answered)
        answered.append(0)

    def further(number: int, run: LoadedRun) -> None:
        models.look(run)
        answered.append(number)

    one, other, third = models.entries
    asked = [models.shelf.submit(one, first)]
    assert began.wait(60)
    # The first model is asked again before the third is, but whoever waited for room meanwhile comes before that.
    asked += [models.shelf.submit(entry, partial(further, number)) for number, entry in enumerate((other, one, third), 1)]
    for future in asked:
        future.result(60)
    assert (answered[0], sorted(answered), models.most) == (0, [0, 1, 2, 3], 1)
    assert answered[1] in (1, 3)
    models.shelf.close()


def test_no_more_models_are_loaded_than_may_be_however_they_are_asked(shaped_runs: dict[str, Path]):
    for loaded in (1, 2):
        models = Models(shaped_runs, loaded=loaded, running=3)
        order = random.Random(loaded).choices(models.entries, k=40)
        for future in [models.shelf.submit(entry, models.look) for entry in order]:
            future.result(60)
        assert models.most <= loaded
        models.shelf.close()


def test_a_model_that_cannot_be_loaded_takes_no_room(shaped_runs: dict[str, Path]):
    models = Models(shaped_runs, loaded=1, running=2)
    gone = replace(models.entries[0], id="gone@1", update=1)
    for _ in range(2):
        with pytest.raises(ConfigError):
            models.shelf.submit(gone, models.look).result(60)
    models.shelf.submit(models.entries[0], models.look).result(60)
    assert models.most == 1
    models.shelf.close()


def test_a_port_in_use_and_runs_that_are_none_are_refused(server: Client, shaped_runs: dict[str, Path], tmp_path: Path, capsys):
    assert main(["serve", str(shaped_runs["mha"]), "--port", str(server.port)]) == 2
    assert f"--port {server.port} is in use by another program; try --port {server.port + 1}" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), str(tmp_path / "x*")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} holds no run; name a run's folder" in said and f"{tmp_path / 'x*'} matches no run; name a run's" in said
    empty = shutil.copytree(shaped_runs["mha"], tmp_path / "empty", ignore=shutil.ignore_patterns("tokens-*"))
    assert main(["serve", str(empty), "--port", "0"]) == 2
    assert "its checkpoints are gone" in capsys.readouterr().err
    assert main(["serve", str(shaped_runs["mha"]), "--host", "203.0.113.7", "--port", "0"]) == 2
    assert "is no address of this machine" in capsys.readouterr().err


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")
def test_the_page_in_a_browser(server: Client, shaped_runs: dict[str, Path]):
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with playwright.sync_playwright() as driver:
        # Containers seldom allow what Chromium's own sandbox needs; the page is ours.
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            look_at(browser.new_page(), server, shaped_runs, playwright.expect)
        finally:
            browser.close()


def look_at(page: Any, server: Client, runs: dict[str, Path], expect: Any) -> None:
    """Use the page as a visitor does."""
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    columns = page.locator(".column")
    expect(columns).to_have_count(2)
    expect(columns.nth(0).locator(".run")).to_have_text(runs["mha"].name)
    expect(columns.nth(1).locator(".run")).to_have_text(runs["gqa"].name)
    page.get_by_label("Text to continue").fill("the model")
    page.get_by_text("Options").click()
    page.get_by_label("New tokens").fill("8")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Continue").click()
    for place, name in enumerate(("mha", "gqa")):
        expect(columns.nth(place).locator(".status")).to_have_text(re.compile("tokens"), timeout=30_000)
        expected = "the model" + load(runs[name]).generate("the model", max_new_tokens=8, temperature=0)
        assert columns.nth(place).locator(".text").text_content() == expected
    page.get_by_role("button", name="Add a checkpoint").click()
    expect(columns).to_have_count(3)
    page.get_by_label("New tokens").fill("20000")
    page.get_by_label("Text to continue").press("Control+Enter")
    expect(columns.nth(0).locator(".status")).to_have_text(re.compile("leaves room for"), timeout=30_000)
    page.get_by_label("Read on in a window").check()
    page.get_by_role("button", name="Continue").click()
    expect(columns.nth(0).locator(".status")).to_have_text("writing…", timeout=30_000)
    page.get_by_role("button", name="Stop").click()
    # A text may have come to its end by itself before.
    for place in range(3):
        expect(columns.nth(place).locator(".status")).to_have_text(re.compile("^stopped$|ended by itself"))
    assert "stopped" in columns.locator(".status").all_text_contents()
    columns.nth(2).get_by_role("button", name="Remove this checkpoint").click()
    expect(columns).to_have_count(2)
    assert [text for text in complaints if "400" not in text] == []
