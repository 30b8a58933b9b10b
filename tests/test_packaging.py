"""The package works from a wheel, an editable install and a bare checkout, and imports libraries at first use."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from hub_server import HubServer

import diffusers_perfusion

ROOT = Path(__file__).resolve().parents[1]
CONCEPT = ROOT / "examples" / "hub" / "my-bear" / "perfusion.safetensors"

PUSH = f"""
import sys
import diffusers_perfusion
from diffusers_perfusion.hub import push_concept_file
push_concept_file({str(CONCEPT)!r}, "me/my-bear", license="mit", token="hf_me")
print(diffusers_perfusion.__file__)
"""


@pytest.fixture
def hub():
    server = HubServer().start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(hub, tmp_path):
    """Environment variables of a process that finds no other copy of the package and no other Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHONPATH"))}
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return kept | settings | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def new_python(tmp_path):
    """The Python of a fresh environment, which sees the packages of this one but not an editable install of ours."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # A path in a .pth file comes after the environment's own, and the .pth files in it are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def pip(python, *arguments):
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, arguments[0], *options, *map(str, arguments[1:])], check=True)


def check_push(python, hub, environment, folder, package):
    """Push a concept from another folder, and compare the card with the example."""
    told = subprocess.run(
        [python, "-c", PUSH], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert Path(told.stdout.strip()) == package / "__init__.py"
    card = hub.repositories["me/my-bear"].files()["README.md"].decode()
    expected = (ROOT / "hub_cards" / "example.md").read_text()
    assert card.split("---\n")[-1] == expected.split("---\n")[-1].replace("<Gallery />\n\n", "")


def test_a_wheel(hub, environment, new_python, tmp_path):
    shutil.copytree(ROOT / "diffusers_perfusion", tmp_path / "source" / "diffusers_perfusion")
    shutil.copytree(ROOT / "hub_cards", tmp_path / "source" / "hub_cards")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    pip(sys.executable, "wheel", "--wheel-dir", tmp_path, tmp_path / "source")
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(tmp_path / "source")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"diffusers_perfusion/py.typed", "diffusers_perfusion/hub_cards/example.md"} <= names
    for module in (ROOT / "diffusers_perfusion").rglob("*.py"):
        assert module.relative_to(ROOT).as_posix() in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"diffusers_perfusion"}
    pip(new_python, "install", wheel)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    check_push(new_python, hub, environment, tmp_path, site / "diffusers_perfusion")
    assert (new_python.parent / "perfusion").is_file()


def test_an_editable_install(hub, environment, new_python, tmp_path):
    pip(new_python, "install", "-e", ROOT)
    check_push(new_python, hub, environment, tmp_path, ROOT / "diffusers_perfusion")


def test_a_bare_checkout(hub, environment, new_python, tmp_path):
    environment["PYTHONPATH"] = str(ROOT)
    check_push(new_python, hub, environment, tmp_path, ROOT / "diffusers_perfusion")


def test_importing_the_package_imports_nothing_else(tmp_path):
    code = (
        "import sys, diffusers_perfusion as package; "
        "assert set(package.__all__) <= set(dir(package)); "
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub', 'safetensors'}; "
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys(); "
        "import diffusers_perfusion.hub; "
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_every_public_name_is_there():
    for name in diffusers_perfusion.__all__:
        value = getattr(diffusers_perfusion, name)
        assert value.__qualname__ == name
        assert vars(diffusers_perfusion)[name] is value
    with pytest.raises(AttributeError, match="module 'diffusers_perfusion' has no attribute 'PerfusionPipe'"):
        _ = diffusers_perfusion.PerfusionPipe
