"""Hubs that stall, flood and lie: each command ends soon, with one sentence, and nothing where it should not be."""

import gzip
import json
import threading
import time

import pytest
from hub_server import HubServer, Refusal
from huggingface_hub.utils import tqdm

from diffusers_perfusion import bounded_hub
from diffusers_perfusion.bounded_hub import BoundedHub, OddAnswerError
from diffusers_perfusion.cli import main
from diffusers_perfusion.concept_file import WEIGHT_NAME
from diffusers_perfusion.hub import find_concept_file, read_header, search_concepts

TOKEN = "hf_me"


@pytest.fixture
def tasks(hub, make_concept):
    """What a user may ask of a Hub with one concept, by name."""
    concept = make_concept(base_model="me/tiny")
    concept.push_to_hub("me/my-cat", token=TOKEN)
    hub.requests.clear()
    return {
        "load": lambda: find_concept_file("me/my-cat", token=TOKEN),
        "info": lambda: read_header("me/my-cat", token=TOKEN),
        "search": lambda: search_concepts(token=TOKEN),
        "push": lambda: concept.push_to_hub("me/my-cat", token=TOKEN, license="mit"),
    }


TASKS = pytest.mark.parametrize("task", ["load", "info", "search", "push"])


def cached_bytes(home):
    return sum(path.stat().st_size for path in home.rglob("*") if path.is_file())


@TASKS
def test_an_honest_hub_is_left_alone(tasks, task, monkeypatch):
    monkeypatch.setattr(bounded_hub, "SECONDS", 20)
    assert tasks[task]()


@TASKS
@pytest.mark.parametrize("slow", ["headers", "body", "silent"])
def test_no_task_takes_longer_than_its_time(hub, tasks, task, slow, monkeypatch):
    monkeypatch.setattr(bounded_hub, "SECONDS", 0.3)
    hub.fault = lambda handler: setattr(handler, "slow", slow)
    before = time.monotonic()
    with pytest.raises(OSError, match=r"the Hub took longer than 0\.3 seconds") as caught:
        tasks[task]()
    assert time.monotonic() - before < 10
    assert "\n" not in str(caught.value)


@TASKS
@pytest.mark.parametrize("slow", ["body", "silent"])
def test_what_is_left_behind_ends_too(hub, tasks, task, slow, monkeypatch):
    monkeypatch.setattr(bounded_hub, "SECONDS", 0.1)
    hub.fault = lambda handler: setattr(handler, "slow", slow)
    with pytest.raises(OSError, match="the Hub took longer"):
        tasks[task]()
    asked = len(hub.requests)
    for thread in threading.enumerate():
        if thread.name == "BoundedHub":
            thread.join(5)
            assert not thread.is_alive()
    assert len(hub.requests) == asked


def test_an_error_when_the_time_is_over_is_that_it_is_over():
    """The client's own timeout ends at the same moment."""
    hub = BoundedHub(max_bytes=1)

    def time_out(api):
        hub._deadline = time.monotonic()
        raise OSError("timed out")

    with pytest.raises(OSError, match="the Hub took longer than 60 seconds"):
        hub.ask(time_out)


def test_a_file_has_time_by_its_size(monkeypatch):
    monkeypatch.setattr(bounded_hub, "SECONDS", -30)
    over = threading.Event()
    for payload, seconds in ((0, -30), (30 * bounded_hub.BYTES_PER_SECOND, 0)):
        with pytest.raises(OSError, match=f"the Hub took longer than {seconds} seconds"):
            BoundedHub(max_bytes=1, payload=payload).ask(lambda api: over.wait())
    over.set()


@TASKS
def test_no_answer_is_taken_whatever_its_size(hub, tasks, task, monkeypatch, hugging_face_home):
    for name in ("MAX_FILE_BYTES", "_MAX_ANSWER_BYTES"):
        monkeypatch.setattr(f"diffusers_perfusion.hub.{name}", 2**20)
    hub.fault = lambda handler: setattr(handler, "flood", b"[" * 2**16)
    with pytest.raises(OSError, match="the Hub sends more than 1048576 bytes"):
        tasks[task]()
    assert cached_bytes(hugging_face_home) < 2**21  # before huggingface_hub 1 the part that was taken is kept


@TASKS
def test_an_answer_that_says_it_is_too_large_is_not_read(hub, tasks, task, hugging_face_home):
    def claim(handler):
        if handler.command != "HEAD":
            handler.forged = {"Content-Length": str(2**40)}

    hub.fault = claim
    with pytest.raises(OSError, match=r"the Hub sends more than \d+ bytes"):
        tasks[task]()
    assert cached_bytes(hugging_face_home) < 2**16


def test_a_small_answer_that_unpacks_to_a_large_one(hub, tasks, monkeypatch):
    monkeypatch.setattr("diffusers_perfusion.hub._MAX_ANSWER_BYTES", 2**20)

    def pack(handler):
        handler.content, handler.forged = gzip.compress(b" " * 2**21 + b"[]"), {"Content-Encoding": "gzip"}

    hub.fault = pack
    with pytest.raises(OSError, match="the Hub sends more than 1048576 bytes"):
        tasks["search"]()


def test_pages_without_end(hub, tasks, monkeypatch):
    monkeypatch.setattr(bounded_hub, "MAX_REQUESTS", 20)

    def turn(handler):
        handler.content, handler.forged = b"[]", {"Link": f'<{hub.endpoint}/api/models?page=2>; rel="next"'}

    hub.fault = turn
    with pytest.raises(OSError, match="the search failed: the Hub had the client send more than 20 requests"):
        tasks["search"]()
    assert len(hub.requests) == 20


def test_a_wait_that_the_hub_asks_for_is_bounded_too(hub, tasks, monkeypatch):
    """The client sleeps for as long as it is told."""
    over = threading.Event()
    monkeypatch.setattr("time.sleep", over.wait)
    monkeypatch.setattr(bounded_hub, "SECONDS", 0.3)

    def ask_to_wait(handler):
        handler.forged = {"Retry-After": "100000"}
        raise Refusal(429)

    hub.fault = ask_to_wait
    # Before huggingface_hub 1 the client does not wait.
    with pytest.raises(OSError, match=r"the Hub took longer than 0\.3 seconds|\(429\)"):
        tasks["search"]()
    over.set()


@pytest.mark.parametrize("etag", ["{}/evil", "../../../../evil", "..", "", "a/b", "a\\b"])
@pytest.mark.parametrize("name", ["ETag", "X-Linked-ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("first", [1, 2])
def test_no_header_names_a_file_outside_of_the_cache(hub, tasks, etag, name, first, tmp_path, monkeypatch):
    """Neither of the first answer, which this package asks for, nor of the second, for the client's own eyes."""
    monkeypatch.chdir(tmp_path)
    files = set(tmp_path.rglob("*"))

    def forge(handler):
        if handler.command == "HEAD" and len(hub.requests) >= first:
            handler.forged = {name: etag.format(tmp_path) if name == "X-Repo-Commit" else f'"{etag.format(tmp_path)}"'}

    hub.fault = forge
    with pytest.raises(OSError, match=f"the Hub's header {name} is .*, which can name no file"):
        tasks["load"]()
    written = [path for path in set(tmp_path.rglob("*")) - files if "evil" in path.name]
    assert not written


def test_nor_does_the_answer_that_a_file_is_missing(hub, tasks, hugging_face_home, tmp_path):
    """The client keeps that in its cache too, under the commit."""
    hub.fault = lambda handler: setattr(handler, "forged", {"X-Repo-Commit": str(tmp_path / "evil")})
    with pytest.raises(OSError, match="the Hub's header X-Repo-Commit is"):
        find_concept_file("me/my-cat", "dog.safetensors")
    assert not (tmp_path / "evil").exists()


@pytest.fixture
def other(hub):
    """Another server, which sees what it is asked."""
    server = HubServer().start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("token", ["hf_secret\n", " hf_secret", "hf_secret é"])
def test_a_token_that_was_copied_badly_is_not_shown(hub, token):
    for ask in (lambda: find_concept_file("me/my-cat", token=token), lambda: search_concepts(token=token)):
        with pytest.raises(ValueError, match="no access token has; copy it again") as caught:
            ask()
        assert "secret" not in str(caught.value)
    assert not hub.requests


def test_a_page_elsewhere_does_not_get_the_token(hub, other, tasks):
    def lead_away(handler):
        handler.content, handler.forged = b"[]", {"Link": f'<{other.endpoint}/api/models?page=2>; rel="next"'}

    hub.fault = lead_away
    with pytest.raises(OSError, match=f"the search failed: the Hub at {hub.endpoint} asks for the token at another"):
        tasks["search"]()
    assert not other.requests


def test_another_way_to_a_file_is_not_taken(hub, other, tasks, monkeypatch):
    """It is a library of its own, which asks where the Hub says for a token of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    elsewhere = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{other.endpoint}/token"}
    hub.fault = lambda handler: setattr(handler, "forged", elsewhere)
    assert tasks["load"]().read_bytes() == hub.repositories["me/my-cat"].files()[WEIGHT_NAME]
    assert not other.requests


def test_a_download_shows_how_far_it_is(hub, tasks, monkeypatch):
    """The client's own bar moves once in ten megabytes, which is more than most concepts have."""
    pieces = []
    monkeypatch.setattr(tqdm, "update", lambda self, size=1: pieces.append(size))
    repository = hub.repositories["me/my-cat"]
    repository.commit("main", repository.files() | {WEIGHT_NAME: bytes(2**20)})
    tasks["load"]()
    assert sum(pieces) == 2**20 and max(pieces) <= 2**16


def test_a_connection_that_fails_is_reported_at_once(hub, tasks, monkeypatch):
    """The client would try again for half a minute, with a session that checks nothing."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    for module in ("constants", "file_download"):
        template = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(template, nobody + "/{repo_id}/resolve/{revision}/{filename}", raising=False)
    for task in tasks.values():
        with pytest.raises(OSError, match=r"[Cc]onnection"):
            task()
    assert not waits


def test_answers_that_make_no_sense():
    def no_sense(api):
        raise KeyError("id")

    with pytest.raises(OddAnswerError, match=r"the client does not understand the Hub's answer \('id'\)") as caught:
        BoundedHub(max_bytes=1).ask(no_sense)
    assert isinstance(caught.value.__cause__, KeyError)


ODD = [
    b"",
    b"null",
    b"5",
    b'"a"',
    b"[]",
    b"{}",
    b"[5]",
    b"[null]",
    b"[[]]",
    b"{",
    b"\xff",
    b"<html>",
    b"[" * 5000,
    b"1" * 5000,
]


@TASKS
@pytest.mark.parametrize("answer", ODD, ids=range(len(ODD)))
def test_any_other_answer_is_one_sentence_or_none(hub, tasks, task, answer):
    """Some of them are true for some questions: nothing was found."""

    def answer_oddly(handler):
        if handler.command != "HEAD":
            handler.content = answer

    hub.fault = answer_oddly
    try:
        tasks[task]()
    except (OSError, ValueError) as error:
        assert len(str(error)) < 700 and str(error).isprintable()
        assert task in ("info", "load") or "the client does not understand the Hub's answer" in str(error)
    else:
        assert (task, answer) in (("search", b"[]"), ("search", b"{}"))


MODEL = {"id": "me/my-cat", "sha": "a" * 40, "siblings": [], "private": False, "tags": []}


@pytest.mark.parametrize(
    "field",
    [
        *({name: value} for name in MODEL for value in (None, 5, "a", [5], {"a": 5}, [[]])),
        {"id": "me/\x1b[2J"},
        {"id": "../../me"},
        {"siblings": [{"rfilename": 5}]},
        {"siblings": [{"rfilename": "README.md", "size": "large"}]},
        {"siblings": [{"rfilename": WEIGHT_NAME, "lfs": 5}]},
        {"siblings": [{"rfilename": WEIGHT_NAME, "lfs": {"sha256": 5, "size": 5, "pointerSize": 5}}]},
        {"cardData": 5},
        {"cardData": {"self": 5}},
        {"cardData": {"ignore_metadata_errors": 5, "model-index": 5, "license": {}}},
        {"lastModified": "yesterday"},
        {"gated": {}},
    ],
    ids=str,
)
def test_any_other_field_is_one_sentence_or_none(hub, tasks, field):
    def answer_oddly(handler):
        path = handler.path.split("?")[0]
        if path == "/api/models":
            handler.content = json.dumps([MODEL | field]).encode()
        elif path.startswith("/api/models/me/my-cat") and path.count("/") == 4:
            handler.content = json.dumps(MODEL | field).encode()

    hub.fault = answer_oddly
    for task in ("search", "push"):
        try:
            tasks[task]()
        except (OSError, ValueError) as error:
            assert len(str(error)) < 700 and str(error).isprintable()


@pytest.mark.parametrize("answer", [b"5", b"[]", b"{}", b'{"commitUrl": 5}'])
def test_an_odd_answer_to_a_commit_leaves_it_open_whether_it_was_made(hub, tasks, answer):
    hub.fault = lambda handler: setattr(handler, "content", answer) if "/commit/" in handler.path else None
    with pytest.raises(OSError, match="holds either all of this push or nothing of it; push again"):
        tasks["push"]()


def test_one_card_does_not_hide_the_others(hub, tasks):
    """The client takes the metadata of a card for arguments of a function."""
    hub.add("you/evil", {"README.md": b"---\nself: 5\ntags: [perfusion, diffusers, text-to-image]\n---\n"})
    assert [found.id for found in tasks["search"]()] == ["me/my-cat", "you/evil"]


CONTROLS = "\x1b]0;evil\x07\x1b[2J\x9b31m\u202e"


@TASKS
@pytest.mark.parametrize("status", [400, 403, 404, 418, 500])
def test_nothing_that_a_hub_says_controls_the_terminal(hub, tasks, task, status, caplog):
    def say(handler):
        raise Refusal(status, "", CONTROLS)

    hub.fault = say
    with pytest.raises((OSError, ValueError)) as caught:
        tasks[task]()
    assert str(caught.value).isprintable()
    assert "\x1b" not in caplog.text


@TASKS
@pytest.mark.parametrize("name", ["X-Error-Message", "X-HF-Warning", "X-Request-Id", "Link", "Location", "ETag"])
def test_no_header_controls_the_terminal(hub, tasks, task, name, caplog):
    hub.fault = lambda handler: setattr(handler, "forged", {name: f"{task};\x1b]0;evil"})
    with pytest.raises(OSError, match=f"the Hub's header (?i:{name}) is '{task};.*, with characters that") as caught:
        tasks[task]()
    assert str(caught.value).isprintable()
    assert "\x1b" not in caplog.text


def test_nor_do_the_results_of_commands(hub, tasks, tmp_path, make_concept, capsys):
    def lie(handler):
        if handler.path.startswith("/api/models?"):
            handler.content = b'[{"id": "me/\\u001b[2J", "cardData": {"instance_prompt": ["\\u001b[2J"]}}]'
        elif "/commit/" in handler.path:
            address = f"{hub.endpoint}/me/my-cat/commit/\\u001b[2J".encode()
            handler.content = b'{"commitUrl": "%b", "commitOid": "\\u001b"}' % address

    hub.fault = lie
    path = make_concept(bias=0.9).save(tmp_path / WEIGHT_NAME)
    assert main(["search", "--token", TOKEN]) == 0
    assert main(["push", str(path), "me/my-cat", "--token", TOKEN]) == 0
    output = capsys.readouterr()
    assert "[2J" in output.out and "\x1b" not in output.out + output.err
