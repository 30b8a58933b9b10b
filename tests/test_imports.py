"""The rules of the layout: which module may import which, and no circle anywhere."""

import ast
import graphlib
import re
from pathlib import Path

import diffusers_perfusion

PACKAGE = Path(diffusers_perfusion.__file__).parent
NAME = PACKAGE.name
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__").replace("__init__", ""): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module):
    """Names of the package's modules that a module imports, anywhere in its code, and all other top-level packages."""
    path = MODULES[module]
    here = [NAME, *module.split(".")] if module else [NAME]
    if path.name != "__init__.py":
        here = here[:-1]
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) + 1 - node.level], *filter(None, [node.module])] if node.level else [node.module]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != NAME:
                outside.add(name.split(".")[0])
                continue
            target = name.removeprefix(NAME).lstrip(".")
            while target not in MODULES:  # a name in a module
                target = target.rpartition(".")[0]
            inside.add(target)
    return inside - {module}, outside


GRAPH = {module: imports(module)[0] for module in MODULES}


def users_of(*packages):
    """Modules outside some packages that import them."""
    return {
        module
        for module, targets in GRAPH.items()
        for target in targets
        if target.split(".")[0] in packages and module.split(".")[0] not in packages
    }


def test_there_is_no_circle():
    """Not through local imports, `TYPE_CHECKING` or the lazy names of a package either.

    A package re-exports names of its own modules, which they do not ask it for.
    """
    graph = {module: {target for target in targets if target} for module, targets in GRAPH.items() if module}
    graphlib.TopologicalSorter(graph).prepare()


def test_leaves():
    for leaf in ("rank_one_edit", "concept_file", "files"):
        assert imports(leaf)[0] == set(), leaf
    assert imports("rank_one_edit")[1] == {"torch"}


def test_the_attention_processor_knows_the_algebra_alone():
    assert GRAPH["attention_processor"] == {"rank_one_edit"}
    assert GRAPH["joint_attention"] == {"attention_processor"}


def test_prompts_are_known_in_one_direction():
    """Tokens do not know who tracks prompts, and neither knows the registry."""
    assert {module.split(".")[0] for module in GRAPH["placeholder_tokens"]} == {"model_families"}
    assert "registry" not in GRAPH["prompt_tracking"] and "placeholder_tokens" in GRAPH["prompt_tracking"]


def test_the_hub_does_not_know_concepts():
    assert "concept" not in GRAPH["hub"] | GRAPH["model_card"]


def test_training_and_evaluation_are_imported_by_the_command_line_alone():
    assert {module.split(".")[0] for module in users_of("training", "evaluation")} == {"cli"}
    assert not any(
        target.startswith("evaluation")
        for module in GRAPH
        if module.startswith("training")
        for target in GRAPH[module]
    )
    assert not any(
        target.startswith("training")
        for module in GRAPH
        if module.startswith("evaluation")
        for target in GRAPH[module]
    )


def test_pipelines_are_known_to_those_who_change_them():
    """Nothing below the loaders imports what changes pipelines."""
    below = {"registry", "prompt_tracking", "placeholder_tokens", "attention_processor", "rank_one_edit", "concept"}
    above = {"loaders", "pipeline_compat", "pipelines"}
    assert not any(GRAPH[module] & above for module in below)


def test_a_family_is_named_in_its_own_file_alone():
    families = r"pixart|sana|sdxl|gemma|\bt5|cosmos|flux|chroma|klein|qwen|z_?image|sd3"
    for module, path in MODULES.items():
        if module.startswith("model_families") or module in ("", "pipelines"):
            continue
        names = {
            getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            for node in ast.walk(ast.parse(path.read_text()))
        }
        assert not [name for name in names if name and re.search(families, name, re.IGNORECASE)], module


def test_every_module_has_its_tests():
    """A file of tests for each module, named after it, for whoever looks for them."""
    tests = Path(__file__).parent
    for module, path in MODULES.items():
        if path.name in ("__init__.py", "__main__.py") or module.startswith(("cli.", "model_families.")):
            continue
        folder, _, name = module.rpartition(".")
        assert (tests / folder.replace(".", "/") / f"test_{name}.py").is_file(), module
