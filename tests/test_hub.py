"""Where a concept file is found, and the error when it is not. The Hub is a server in this file."""

import http.server
import threading
from pathlib import Path

import pytest

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.concept_file import WEIGHT_NAME
from diffusers_perfusion.hub import find_concept_file

COMMIT = "0" * 39 + "1"


@pytest.fixture
def folder(tmp_path, make_concept):
    """A folder with a concept, a subfolder with another concept, and a file of another kind."""
    folder = tmp_path / "folder"
    make_concept().save(folder / WEIGHT_NAME)
    make_concept().save(folder / "step-100" / "cat.safetensors")
    (folder / "notes.txt").write_text("")
    return folder


def test_a_file_is_itself(folder):
    assert find_concept_file(folder / WEIGHT_NAME) == folder / WEIGHT_NAME
    assert find_concept_file(str(folder / WEIGHT_NAME)) == folder / WEIGHT_NAME
    assert find_concept_file(folder / "step-100" / "cat.safetensors").name == "cat.safetensors"


def test_a_folder_holds_it(folder, monkeypatch):
    assert find_concept_file(folder) == folder / WEIGHT_NAME
    assert find_concept_file(str(folder)) == folder / WEIGHT_NAME
    found = find_concept_file(folder, "cat.safetensors", "step-100")
    assert found == folder / "step-100" / "cat.safetensors"
    monkeypatch.chdir(folder.parent)
    assert find_concept_file("folder").samefile(folder / WEIGHT_NAME)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"weight_name": "dog.safetensors"}, "folder has no dog.safetensors; it holds perfusion.safetensors, "),
        ({"subfolder": "step-100"}, "step-100 has no perfusion.safetensors; it holds cat.safetensors .*weight_name="),
        ({"subfolder": "step-200"}, "step-200 has no perfusion.safetensors; it holds no safetensors file"),
    ],
)
def test_a_folder_without_it_says_what_it_holds(folder, arguments, match):
    with pytest.raises(FileNotFoundError, match=match):
        find_concept_file(folder, **arguments)


@pytest.mark.parametrize("source", ["./nothing/here.safetensors", "a/b/c", "/no/such/folder", "what is this?"])
def test_neither_a_path_nor_a_repository_id(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is neither a file, a folder nor the id of a Hub repository") as caught:
        find_concept_file(source)
    assert repr(source) in str(caught.value)


def test_a_file_missing_in_the_cache_is_reported():
    """So it is without a network, when the Hub was not reached."""
    with pytest.raises(
        FileNotFoundError, match=r"'me/my-cat' is not a local file or folder, .* not in the cache, and the"
    ):
        find_concept_file("me/my-cat", local_files_only=True)


class Hub:
    """A Hugging Face Hub with a few files, or one that answers every request with an error."""

    def __call__(self, files, status=404, code=None):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append((self.command, self.headers.get("authorization")))
                content = files.get(self.path)
                self.send_response(status if content is None else 200)
                if content is None and code:
                    self.send_header("X-Error-Code", code)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", '"1"')
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}", requests


@pytest.fixture
def hub(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_repository_is_downloaded_once(hub, folder, tmp_path):
    content = (folder / WEIGHT_NAME).read_bytes()
    endpoint, requests = hub({f"/me/my-cat/resolve/main/{WEIGHT_NAME}": content})
    path = find_concept_file("me/my-cat", endpoint=endpoint, token="hf_secret", cache_dir=tmp_path / "cache")
    assert path.read_bytes() == content
    assert path.is_relative_to(tmp_path / "cache")
    assert PerfusionConcept.load(path).superclass == "cat"
    assert requests and {token for _, token in requests} == {"Bearer hf_secret"}
    requests.clear()
    again = find_concept_file("me/my-cat", cache_dir=tmp_path / "cache", local_files_only=True)
    assert again == path
    assert not requests


def test_subfolder_name_and_revision_are_those_asked_for(hub):
    endpoint, _ = hub({"/me/my-cat/resolve/v2/step-100/cat.safetensors": b"content"})
    path = find_concept_file(Path("me/my-cat"), "cat.safetensors", "step-100", revision="v2", endpoint=endpoint)
    assert path.read_bytes() == b"content"
    assert path.parts[-2:] == ("step-100", "cat.safetensors")


@pytest.mark.parametrize(
    ("status", "code", "error", "match"),
    [
        (404, "RepoNotFound", ValueError, "'me/my-cat' is neither a file or folder here nor a Hub .*pass token="),
        (401, "RepoNotFound", ValueError, "'me/my-cat' is neither a file or folder here nor a Hub .*pass token="),
        (403, "GatedRepo", ValueError, "me/my-cat is gated; accept its conditions"),
        (404, "RevisionNotFound", ValueError, "me/my-cat has no revision 'v9'"),
        (404, "EntryNotFound", FileNotFoundError, f"me/my-cat has no {WEIGHT_NAME}; choose .*weight_name="),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(hub, status, code, error, match):
    endpoint, requests = hub({}, status, code)
    with pytest.raises(error, match=match):
        find_concept_file("me/my-cat", endpoint=endpoint, revision="v9")
    assert requests


def test_a_pipeline_loads_from_the_hub(hub, folder, pipeline, monkeypatch, tmp_path):
    endpoint, requests = hub({"/me/my-cat/resolve/v1/step-1/cat.safetensors": (folder / WEIGHT_NAME).read_bytes()})
    for module in ("constants", "file_download"):  # before huggingface_hub 1 in the second
        monkeypatch.setattr(
            f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            raising=False,
        )
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    options = {"subfolder": "step-1", "revision": "v1", "weight_name": "cat.safetensors", "cache_dir": tmp_path / "c"}
    pipeline.load_perfusion("me/my-cat", "rex", token="hf_secret", **options)
    assert pipeline.list_perfusion() == ["rex"]
    assert len(list((tmp_path / "c").rglob("cat.safetensors"))) == 1
    assert requests and {token for _, token in requests} == {"Bearer hf_secret"}
    requests.clear()
    pipeline.delete_perfusion("rex")
    pipeline.load_perfusion("me/my-cat", local_files_only=True, **options)
    assert not requests
    for force in (False, True):
        pipeline.delete_perfusion("my-cat")
        pipeline.load_perfusion("me/my-cat", force_download=force, **options)
        assert any(method == "GET" for method, _ in requests) == force
