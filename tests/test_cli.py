import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LENGTH, make_flux, make_pixart, random_concept
from diffusers import FluxPipeline, PixArtSigmaPipeline, StableDiffusionXLPipeline
from PIL import Image

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.cli import main
from diffusers_perfusion.cli.common import place
from diffusers_perfusion.evaluation import ConceptMetrics, Scores, Sweep
from diffusers_perfusion.evaluation.sweep import PROMPTS
from diffusers_perfusion.model_families import edited_model
from diffusers_perfusion.training import TrainingConfig
from diffusers_perfusion.training.trainer import PerfusionTrainer


@pytest.fixture
def training_arguments(training_settings, model_folder):
    settings = training_settings | {"pretrained_model_name_or_path": str(model_folder)}
    return ["train", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


@pytest.fixture
def concepts(tmp_path, make_concept):
    """Paths of two concept files of the tiny model."""
    return [
        str(make_concept(word, seed=seed).save(tmp_path / f"{seed}" / "perfusion.safetensors"))
        for seed, word in enumerate(["<my-cat>", "<my-dog>"])
    ]


@pytest.fixture
def generate(tmp_path, model_folder, concepts):
    """Run `perfusion generate` into a folder, by default a new one, and give its files by name."""
    runs = []

    def run(*arguments, concepts=concepts, prompts=("a <my-cat> on the beach",), folder=None):
        runs.append(1)
        folder = folder or tmp_path / f"generated-{len(runs)}"
        command = ["generate", "--pretrained_model_name_or_path", str(model_folder), "--num_inference_steps", "2"]
        command += [text for concept in concepts for text in ("--concept", concept)]
        command += [text for prompt in prompts for text in ("--prompt", prompt)]
        assert main([*command, f"--output_dir={folder}", *arguments]) == 0
        return {path.name: path.read_bytes() for path in sorted(Path(folder).expanduser().iterdir())}

    return run


def failed(arguments, capsys):
    """The sentence that bad input is answered with."""
    capsys.readouterr()
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    before, sentence = output.err.split("perfusion: ", 1)
    assert before == "" or before.endswith("\n")
    assert sentence.count("\n") == 1
    return sentence.strip()


def test_train(training_arguments, training_settings, capsys):
    assert main([*training_arguments, "--no-random_flip", "--checkpointing_steps", "2"]) == 0
    path = Path(training_settings["output_dir"]) / "perfusion.safetensors"
    concept = PerfusionConcept.load(path)
    assert (concept.placeholder_token, concept.base_model) == ("<my-cat>", "tiny")
    assert (concept.training["random_flip"], concept.training["steps"]) == (False, 4)
    assert (path.parent / "checkpoint-2").is_dir()
    assert capsys.readouterr().out == f"{path} ({path.stat().st_size:,} bytes): <my-cat>\n"


@pytest.mark.parametrize("family", ["xl", "pixart"])
def test_train_and_generate_know_the_family(family, request, training_settings, tmp_path, capsys):
    parts = request.getfixturevalue(f"{family}_components")
    if family == "pixart":
        parts["transformer"] = make_pixart(32)  # the smallest that its pipeline generates with by default
    kind = StableDiffusionXLPipeline if family == "xl" else PixArtSigmaPipeline
    kind(**parts).save_pretrained(tmp_path / "base")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base")]
    settings = training_settings | {"max_train_steps": 2, "resolution": 16}
    del settings["pretrained_model_name_or_path"]
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    if family == "xl":  # many images of PixArt take long
        flags += ["--validation_prompt", "a <my-cat>", "--validation_steps", "2", "--num_validation_images", "1"]
    assert main(["train", *base, *flags]) == 0
    assert (Path(training_settings["output_dir"]) / "validation" / "step-000002.png").is_file() == (family == "xl")
    generated = ["--concept", training_settings["output_dir"], "--prompt", "a <my-cat>", "--num_inference_steps", "1"]
    images = []
    for bias in ("0.1", "2"):
        folder = tmp_path / bias
        assert main(["generate", *base, *generated, "--bias", bias, "--output_dir", str(folder)]) == 0
        images.append(next(folder.iterdir()).read_bytes())
    assert images[0] != images[1]


def test_every_setting_is_a_flag_with_its_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    help = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens too
    for field in dataclasses.fields(TrainingConfig):
        assert f"--{field.name}" in help
        assert "".join(field.metadata["help"].split())[:40] in help
        if field.default not in (None, dataclasses.MISSING):
            assert f"Default:{field.default}." in help


def test_a_table_of_concepts_is_trained(training_settings, model_folder, tmp_path, capsys):
    table = tmp_path / "concepts.csv"
    table.write_text(f"placeholder_token,instance_data_dir\n<my-cat>,{training_settings['instance_data_dir']}\n")
    settings = training_settings | {"pretrained_model_name_or_path": str(model_folder)}
    del settings["placeholder_token"], settings["instance_data_dir"]
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    assert main(["train", *flags, "--concepts", str(table)]) == 0
    path = Path(training_settings["output_dir"]) / "my-cat" / "perfusion.safetensors"
    assert capsys.readouterr().out == f"{path} ({path.stat().st_size:,} bytes): <my-cat>\n"


def test_flags_are_parsed_into_their_types(monkeypatch):
    seen = []

    def stop(config):
        seen.append(config)
        raise RuntimeError("far enough")

    monkeypatch.setattr("diffusers_perfusion.training.training_loop.make_accelerator", stop)
    required = "--pretrained_model_name_or_path m --instance_data_dir d --placeholder_token <x>".split()
    assert main(["train", *required, "--superclass", "teddy bear"]) == 1
    flags = (
        "--resolution 64 --snr_gamma 0 --center_crop --no-random_flip --mixed_precision bf16 --superclass cat".split()
    )
    assert main(["train", *required, *flags, "--validation_prompt", "a <x>", "--validation_prompt", "<x> b"]) == 1
    given = {"pretrained_model_name_or_path": "m", "instance_data_dir": "d", "placeholder_token": "<x>"}
    assert seen[0] == TrainingConfig(**given, superclass="teddy bear")
    assert seen[1] == TrainingConfig(
        **given,
        superclass="cat",
        resolution=64,
        snr_gamma=0.0,
        center_crop=True,
        random_flip=False,
        mixed_precision="bf16",
        validation_prompt=["a <x>", "<x> b"],
    )
    for wrong in (["--resolution", "big"], ["--mixed_precision", "int3"], ["--unknown", "1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["train", *required, "--superclass", "cat", *wrong])
    with pytest.raises(SystemExit, match="2"):
        main(["train", *required])
    assert len(seen) == 2


def test_ctrl_c_exits_with_130_and_training_can_be_resumed(
    training_arguments, training_settings, monkeypatch, caplog, capsys
):
    step = PerfusionTrainer.step

    def interrupted(self, index):
        if index == 3:
            raise KeyboardInterrupt
        return step(self, index)

    monkeypatch.setattr(PerfusionTrainer, "step", interrupted)
    assert main([*training_arguments, "--checkpointing_steps", "2"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert "checkpoint-2 with --resume_from_checkpoint latest" in caplog.text
    monkeypatch.setattr(PerfusionTrainer, "step", step)
    assert main([*training_arguments, "--resume_from_checkpoint", "latest"]) == 0
    path = Path(training_settings["output_dir"]) / "perfusion.safetensors"
    assert PerfusionConcept.load(path).training["steps"] == 4


def test_generate_makes_images_of_each_prompt_with_all_concepts(generate, concepts, capsys):
    prompts = ("a <my-cat> on the beach", "a <my-dog> & <my-cat>!")
    files = generate(prompts=prompts)
    assert list(files) == ["00-a-my-cat-on-the-beach.png", "01-a-my-dog-my-cat.png"]
    assert capsys.readouterr().out.count(".png (") == 2
    assert generate(prompts=prompts) == files
    plain = generate(prompts=prompts, concepts=concepts[1:])
    assert all(plain[name] != files[name] for name in files)


def test_generated_images_replace_no_others(generate, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("41-a-cat.jpg", "notes.txt", "7.png"):
        (folder / name).touch()
    generate(prompts=("a <my-cat>", "a <my-dog>"), folder=folder)
    first = {path.name: path.read_bytes() for path in folder.glob("0*.png")}
    assert sorted(first) == ["00-a-my-cat.png", "01-a-my-dog.png"]
    generate("--seed", "1", "--num_images_per_prompt", "2", prompts=("a <my-cat>",), folder=folder)
    generate(prompts=("a <my-cat>",), folder=folder)
    second = {path.name: path.read_bytes() for path in folder.glob("0*.png")}
    assert sorted(second.keys() - first.keys()) == ["02-a-my-cat-0.png", "02-a-my-cat-1.png", "03-a-my-cat.png"]
    assert second.items() >= first.items()
    assert second["03-a-my-cat.png"] == first["00-a-my-cat.png"]


def test_the_home_folder_in_a_flag_is_that_of_the_user(generate, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = generate(folder="~/pictures")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == list(files) == ["00-a-my-cat-on-the-beach.png"]


def test_a_long_prompt_in_any_script_names_an_image(generate):
    (name,) = generate(prompts=("<my-cat> " + "猫" * 200,))
    assert name.startswith("00-my-cat-猫") and len(name.encode()) < 100


@pytest.mark.parametrize(
    ("distilled", "flags", "expected"),
    [
        (True, [], [("a <my-cat>", 3.5, LENGTH)]),
        (True, ["--guidance_scale", "2"], [("a <my-cat>", 2.0, LENGTH)]),
        (False, [], [("a <my-cat>", 3.5, LENGTH)]),
        (False, ["--guidance_scale", "2"], [("a <my-cat>", 3.5, LENGTH), ("", 3.5, LENGTH)]),
    ],
)
def test_the_guidance_of_joint_attention_is_the_pipeline_s_own(
    flux_pipeline, tmp_path, monkeypatch, distilled, flags, expected
):
    """Models that are not distilled from guidance are guided by an empty negative prompt."""
    flux_pipeline.register_modules(transformer=make_flux(distilled))
    flux_pipeline.save_pretrained(tmp_path / "flux")
    path = random_concept(flux_pipeline).save(tmp_path / "cat.safetensors")
    seen, encode = [], FluxPipeline._get_t5_prompt_embeds

    def see(self, prompt, *args, max_sequence_length, **kwargs):
        seen.append((prompt if isinstance(prompt, str) else prompt[0], self.guidance_scale, max_sequence_length))
        return encode(self, prompt, *args, max_sequence_length=max_sequence_length, **kwargs)

    monkeypatch.setattr(FluxPipeline, "_get_t5_prompt_embeds", see)
    command = ["generate", "--pretrained_model_name_or_path", str(tmp_path / "flux"), "--num_inference_steps", "1"]
    command += ["--concept", str(path), "--prompt", "a <my-cat>", "--output_dir", str(tmp_path / "images")]
    assert main([*command, *flags]) == 0
    assert seen == expected  # and texts are as long as the tokenizer allows


@pytest.mark.parametrize("distilled", [True, False])
def test_a_negative_prompt_without_guidance_is_refused(flux_pipeline, tmp_path, capsys, distilled):
    flux_pipeline.register_modules(transformer=make_flux(distilled))
    flux_pipeline.save_pretrained(tmp_path / "flux")
    path = random_concept(flux_pipeline).save(tmp_path / "cat.safetensors")
    command = ["generate", "--pretrained_model_name_or_path", str(tmp_path / "flux"), "--num_inference_steps", "1"]
    command += ["--concept", str(path), "--prompt", "a <my-cat>", "--output_dir", str(tmp_path / "images")]
    assert "ignores a negative prompt without guidance" in failed([*command, "--negative_prompt", "dark"], capsys)
    guided = [*command, "--negative_prompt", "dark", "--guidance_scale", "3"]
    if distilled:
        assert "ignores a negative prompt without guidance" in failed(guided, capsys)
        return
    assert main([*command, "--guidance_scale", "3"]) == main(guided) == 0
    empty, dark = (path.read_bytes() for path in sorted((tmp_path / "images").iterdir()))
    assert empty != dark


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pipeline", torch.float16), ("xl_pipeline", torch.float16), ("flux_pipeline", torch.bfloat16)],
)
def test_a_pipeline_is_placed_in_a_precision_that_its_family_stands(request, name, expected):
    pipe = request.getfixturevalue(name)
    place(pipe, torch.device("meta"))
    assert edited_model(pipe).dtype == pipe.text_encoder.dtype == expected
    assert edited_model(pipe).device.type == "meta"


def test_a_pipeline_whose_first_argument_is_an_image_gets_the_prompt(klein_pipeline, tmp_path, capsys):
    klein_pipeline.save_pretrained(tmp_path / "klein")
    path = random_concept(klein_pipeline).save(tmp_path / "cat.safetensors")
    command = ["generate", "--pretrained_model_name_or_path", str(tmp_path / "klein"), "--num_inference_steps", "1"]
    command += ["--concept", str(path), "--prompt", "a <my-cat>", "--output_dir", str(tmp_path / "images")]
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["00-a-my-cat.png"]
    message = "Flux2KleinPipeline takes no negative prompt; leave --negative_prompt out"
    assert message in failed([*command, "--negative_prompt", "a dog"], capsys)


def test_settings_of_generate_change_the_image(generate):
    def image(*arguments):
        (data,) = generate(*arguments).values()
        return data

    plain = image()
    assert image("--seed", "0", "--guidance_scale", "6", "--locking", "local") == plain
    images = {
        plain,
        image("--bias", "1.1"),
        image("--temperature", "0.5"),
        image("--locking", "global"),
        image("--guidance_scale", "2"),
        image("--num_inference_steps", "3"),
        image("--seed", "1"),
    }
    assert len(images) == 7


def test_a_token_that_is_taken_gets_a_number(generate, concepts, capsys):
    twice = [concepts[0], concepts[0], concepts[0]]
    files = generate(concepts=twice, prompts=("a <my-cat>", "a <my-cat-2>", "a <my-cat-3>"))
    errors = capsys.readouterr().err
    assert f"perfusion: <my-cat> is loaded already; {concepts[0]} is <my-cat-2>\n" in errors
    assert "is <my-cat-3>\n" in errors
    assert "none of the placeholder tokens" not in errors
    assert len({*files.values()}) == 1


def test_a_prompt_without_a_placeholder_token_gets_a_line(generate, capsys):
    generate(prompts=("a cat",))
    assert "the prompt 'a cat' has none of the placeholder tokens <my-cat>, <my-dog>\n" in capsys.readouterr().err


def test_negative_prompts_and_several_images_per_prompt(generate):
    (plain,) = generate().values()
    files = generate("--num_images_per_prompt", "2")
    assert list(files) == ["00-a-my-cat-on-the-beach-0.png", "00-a-my-cat-on-the-beach-1.png"]
    assert len({*files.values()}) == 2
    (negative,) = generate("--negative_prompt", "a dog").values()
    assert negative != plain


def test_a_trained_concept_is_loaded_from_its_folder(training_arguments, training_settings, generate):
    assert main(training_arguments) == 0
    (data,) = generate(concepts=[training_settings["output_dir"]]).values()
    assert data != next(iter(generate().values()))


@pytest.fixture
def sweep_arguments(model_folder, concepts, images_folder, clip_folder, identity_folders, tmp_path, fresh_accelerate):
    flags = {
        "pretrained_model_name_or_path": model_folder,
        "concept": concepts[0],
        "instance_data_dir": images_folder,
        "clip_model": clip_folder,
        "identity_model": identity_folders["vit"],
        "num_inference_steps": 2,
        "output_dir": tmp_path / "sweep",
    }
    given = [str(text) for name, value in flags.items() for text in (f"--{name}", value)]
    prompts = ["--prompt", "a <my-cat>", "--prompt", "a <my-cat> on the beach"]
    return ["sweep", *given, *prompts, "--bias", "0.6", "0.9", "--seed", "5", "6"]


def test_sweep(sweep_arguments, concepts, tmp_path, capsys):
    before = Path(concepts[0]).read_bytes()
    assert main(sweep_arguments) == 0
    output = capsys.readouterr()
    found = Sweep.read(tmp_path / "sweep" / "sweep.json")
    assert {image["seed"] for image in found.images} == {5, 6}
    assert found.settings["clip_model"].startswith("clip")
    assert "Images: 100%" in output.err
    header, *lines = output.out.splitlines()
    assert header.split() == ["β", "τ", "identity", "text", "alignment", "harmonic", "mean"]
    for line, row in zip(lines, found.table(), strict=False):
        assert line.split() == " ".join(map(str, row.values())).split()
    assert all(
        f"{tmp_path}/sweep/{name} (" in output.out for name in ("sweep.json", "pareto_front.png", "contact_sheet.png")
    )
    assert Path(concepts[0]).read_bytes() == before


def test_a_sweep_can_set_the_concept_s_default(sweep_arguments, concepts, monkeypatch, capsys):
    monkeypatch.setattr(ConceptMetrics, "score", lambda self, images, prompts: [Scores(0.5, 0.4)] * len(images))
    assert main([*sweep_arguments, "--temperature", "0.3", "--write_default"]) == 0
    assert "best: β 0.6, τ 0.3\n" in capsys.readouterr().out
    concept = PerfusionConcept.load(concepts[0])
    assert (concept.bias, concept.temperature) == (0.6, 0.3)


def test_a_sweep_over_checkpoints_can_choose_the_training_step(
    sweep_arguments, training_arguments, training_settings, monkeypatch, capsys
):
    folder = Path(training_settings["output_dir"])
    assert main([*training_arguments, "--checkpointing_steps", "1", "--max_train_steps", "3"]) == 0
    seen = []

    def score(self, images, prompts):
        seen.append(images)
        return [Scores(0.5, 0.1 * len(seen) if len(seen) < 4 else 0.1)] * len(images)

    monkeypatch.setattr(ConceptMetrics, "score", score)
    assert main([*sweep_arguments, "--concept", str(folder), "--checkpoints", "--write_default"]) == 0
    output = capsys.readouterr().out
    assert output.count("checkpoint-") == 7  # a row for each and bias, and the best
    assert "best: checkpoint-2, β 0.6, τ 0.15\n" in output
    written, chosen = (
        PerfusionConcept.load(path / "perfusion.safetensors") for path in (folder, folder / "checkpoint-2")
    )
    assert (written.bias, written.training["steps"]) == (0.6, 2)
    assert torch.equal(written.superclass_input, chosen.superclass_input)


def test_a_sweep_over_checkpoints_needs_some(sweep_arguments, concepts, capsys):
    nowhere = str(Path(concepts[0]).parent)
    assert "has no checkpoints; expected the output folder of a training" in failed(
        [*sweep_arguments, "--concept", nowhere, "--checkpoints"], capsys
    )


def test_a_sweep_without_a_best_sets_no_default(sweep_arguments, concepts, monkeypatch, capsys):
    before = Path(concepts[0]).read_bytes()
    monkeypatch.setattr(ConceptMetrics, "score", lambda self, images, prompts: [Scores(0.5, -0.4)] * len(images))
    assert main([*sweep_arguments, "--write_default"]) == 1
    output = capsys.readouterr()
    assert "best: none" in output.out
    assert "no settings have both scores above 0, so" in output.err
    assert Path(concepts[0]).read_bytes() == before


def test_a_sweep_in_two_processes_is_that_of_one(sweep_arguments, environment, tmp_path):
    assert main(sweep_arguments) == 0
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    command = [sys.executable, *launch.split(), "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["-m", "diffusers_perfusion.cli", *sweep_arguments, "--output_dir", str(tmp_path / "together")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best: ") == 1  # one process speaks
    alone, together = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "sweep", tmp_path / "together")
    )
    assert together == alone


def test_a_sweep_without_matplotlib_fails_before_any_work(sweep_arguments, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "diffusers_perfusion.evaluation.plots", raising=False)
    monkeypatch.delattr("diffusers_perfusion.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib" in failed(sweep_arguments, capsys)


def test_bad_input_of_sweep(sweep_arguments, concepts, capsys, tmp_path):
    assert "'a cat' does not contain the placeholder token <my-cat>" in failed(
        [*sweep_arguments, "--prompt", "a cat"], capsys
    )
    assert "bias is 5.0" in failed([*sweep_arguments, "--bias", "5"], capsys)
    assert "nowhere is not a folder" in failed([*sweep_arguments, "--instance_data_dir", "nowhere"], capsys)
    assert not (tmp_path / "sweep").exists()
    remote = [*sweep_arguments, "--concept", "me/my-cat", "--write_default"]
    assert "`perfusion pull me/my-cat` downloads it" in failed(remote, capsys)


def test_what_is_pushed_can_have_a_sweep(sweep_arguments, concepts, monkeypatch, capsys, tmp_path):
    pushed = []

    def push(concept, repo_id, *, sweep, **options):
        pushed.append(sweep)
        return SimpleNamespace(pr_url=None, commit_url="done")

    monkeypatch.setattr(PerfusionConcept, "push_to_hub", push)
    assert main(sweep_arguments) == 0
    path = tmp_path / "sweep" / "sweep.json"
    assert main(["push", concepts[0], "me/my-cat"]) == 0
    assert main(["push", concepts[0], "me/my-cat", "--sweep", str(path)]) == 0
    assert pushed == [[], Sweep.read(path).table()]
    other = failed(["push", concepts[1], "me/my-dog", "--sweep", str(path)], capsys)
    assert "the sweep is of another concept than this <my-dog>" in other
    path.write_text("{}")
    assert "sweep.json is not a sweep's" in failed(["push", concepts[0], "me/my-cat", "--sweep", str(path)], capsys)
    assert len(pushed) == 2


def test_info_needs_no_model(concepts, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline", None)
    path = Path(concepts[0])
    concept = PerfusionConcept.load(path)
    concept.training = {"steps": 42}
    concept.save(path)
    for source in (path, path.parent):
        assert main(["info", str(source)]) == 0
        output = capsys.readouterr().out
        assert output.startswith(f"{path} ({path.stat().st_size:,} bytes)\n")
        rows = dict(line.split(maxsplit=1) for line in output.splitlines()[1:])
        assert (rows["placeholder_token"], rows["superclass"], rows["base_model"]) == ("<my-cat>", "cat", "tiny")
        assert rows["training.steps"] == "42"
        assert rows["dtype"] == "float16"
        assert rows["bias"].startswith(f"{concept.bias} ")
        assert f"{len(concept.target_outputs)}, " in rows["layers"]


def test_info_prints_little_of_a_long_description(concepts, capsys):
    concept = PerfusionConcept.load(concepts[0])
    concept.training = {f"{number:03}\x1b[2J": "x\x07" * 100 for number in range(120)}
    concept.training["000\x1b[2J"] = "x" * 1000
    concept.save(concepts[0])
    assert main(["info", concepts[0]]) == 0
    output = capsys.readouterr().out
    assert output.endswith("  training                           … and 70 more entries\n")
    assert "training.049�[2J" in output and len(output) < 15_000
    assert output.replace("\n", "").isprintable()


def test_bad_input_of_train(training_arguments, capsys, tmp_path, images_folder):
    assert "nowhere is not a folder" in failed([*training_arguments, "--instance_data_dir", "nowhere"], capsys)
    assert "train_batch_size is 0" in failed([*training_arguments, "--train_batch_size", "0"], capsys)
    assert "'cat' is already a" in failed([*training_arguments, "--placeholder_token", "cat"], capsys)
    assert "no checkpoint 'c'" in failed([*training_arguments, "--resume_from_checkpoint", "c"], capsys)
    nowhere = str(tmp_path / "no-model")
    assert nowhere in failed([*training_arguments, "--pretrained_model_name_or_path", nowhere], capsys)
    for path in images_folder.iterdir():
        path.unlink()
    assert "has no image" in failed(training_arguments, capsys)


def test_the_output_folder_of_a_training_is_checked_before_the_base_model_is_loaded(
    training_arguments, training_settings, make_concept, monkeypatch, capsys, full_disk
):
    monkeypatch.setattr("diffusers_perfusion.cli.train.load_pipeline", None)
    with full_disk():
        assert f"File too large: '{training_settings['output_dir']}'" in failed(training_arguments, capsys)
    make_concept("<my-dog>").save(Path(training_settings["output_dir"]) / "perfusion.safetensors")
    assert "is of <my-dog>, and this training is of <my-cat>; choose another" in failed(training_arguments, capsys)


def test_the_output_folder_of_images_is_checked_before_any_work(concepts, capsys, full_disk, tmp_path):
    command = ["generate", "--pretrained_model_name_or_path", "nowhere", "--concept", concepts[0], "--prompt", "a"]
    command += ["--output_dir", str(tmp_path / "images")]
    with full_disk():
        assert f"File too large: '{tmp_path}/images'" in failed(command, capsys)
    (tmp_path / "images").touch()
    assert f"Not a directory: '{tmp_path}/images'" in failed(command, capsys)


@pytest.mark.parametrize("command", ["train", "generate", "sweep"])
@pytest.mark.parametrize("part", ["model_index.json", "text_encoder/model.safetensors", "tokenizer/*.json"])
def test_a_base_model_with_a_damaged_file_is_named(
    command, part, training_arguments, sweep_arguments, model_folder, concepts, capsys
):
    for path in model_folder.glob(part):
        path.write_bytes(path.read_bytes()[:-2])
    generate = ["generate", "--pretrained_model_name_or_path", str(model_folder), "--prompt", "a <my-cat>"]
    generate += ["--concept", concepts[0]]
    arguments = {"train": training_arguments, "generate": generate, "sweep": sweep_arguments}[command]
    assert str(model_folder) in failed(arguments, capsys)


def test_bad_input_of_generate(model_folder, concepts, capsys, tmp_path):
    command = ["generate", "--pretrained_model_name_or_path", str(model_folder), "--prompt", "a <my-cat>"]
    for name in ("num_inference_steps", "num_images_per_prompt"):
        assert f"{name} is 0; expected at least 1" in failed(
            [*command, "--concept", concepts[0], f"--{name}", "0"], capsys
        )
    for scale in ("inf", "nan"):
        assert f"guidance_scale is {scale}; expected a finite number" in failed(
            [*command, "--concept", concepts[0], "--guidance_scale", scale], capsys
        )
    for seed in (-1, 2**64):
        assert f"seed is {seed}; expected 0 to" in failed(
            [*command, "--concept", concepts[0], "--seed", str(seed)], capsys
        )
    assert "bias is 5.0" in failed([*command, "--concept", concepts[0], "--bias", "5"], capsys)
    assert "temperature is 0.0" in failed([*command, "--concept", concepts[0], "--temperature", "0"], capsys)
    assert "has no perfusion.safetensors" in failed([*command, "--concept", str(model_folder)], capsys)
    (tmp_path / "text.safetensors").write_text("no concept")
    assert "not a safetensors file" in failed([*command, "--concept", str(tmp_path / "text.safetensors")], capsys)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_written_in_another_way(tmp_path, make_concept, monkeypatch, encoding):
    make_concept("<猫>").save(tmp_path / "perfusion.safetensors")
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert main(["info", str(tmp_path)]) == 0
    sys.stdout.flush()
    assert rb"<\u732b>" in shown.getvalue()


def test_bad_input_of_info(tmp_path, capsys):
    assert "is neither a file, a folder nor" in failed(["info", str(tmp_path / "nowhere")], capsys)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "1.png")
    assert "1.png" in failed(["info", str(tmp_path / "1.png")], capsys)


def test_bad_input_of_push(tmp_path, concepts, capsys):
    renamed = Path(concepts[0]).rename(tmp_path / "my-cat.safetensors")
    assert "it holds my-cat.safetensors, " in failed(["push", str(renamed.parent), "me/my-cat"], capsys)


def test_no_error_reaches_the_terminal_with_control_characters(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("of a library:\n  \x1b]0;a title\x07 \u202e" + "x" * 5000)

    monkeypatch.setattr("diffusers_perfusion.cli.sharing.find_local_file", fail)
    sentence = failed(["info", "cat"], capsys)
    assert sentence.startswith("of a library: �]0;a title� �xx") and len(sentence) == 2000


def test_a_command_must_be_given(capsys):
    for arguments in ([], ["dream"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    assert "train" in capsys.readouterr().err


def test_an_unknown_flag_shows_the_usage_of_its_command(concepts, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["info", concepts[0], "--colour", "red"])
    error = capsys.readouterr().err
    assert error.startswith("usage: perfusion info ")
    assert "unrecognized arguments: --colour red" in error


@pytest.mark.parametrize("command", ["train", "generate", "sweep", "info", "push", "pull", "search"])
def test_the_help_of_each_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"  perfusion {command} " in capsys.readouterr().out.partition("example")[2]


def test_the_help_of_sweep_names_its_default_prompts(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", "--help"])
    help = " ".join(capsys.readouterr().out.split())
    assert f"Default: {len(PROMPTS)} such as '{PROMPTS[0].format('<token>')}'." in help


def test_help_and_info_do_not_import_torch(concepts, environment):
    code = """
import sys
from contextlib import suppress
from diffusers_perfusion.cli import main
from diffusers_perfusion.cli.common import place
for arguments in (["--help"], ["train", "--help"], ["generate", "--help"], ["sweep", "--help"]):
    with suppress(SystemExit):
        main(arguments)
assert main(["info", sys.argv[1]]) == 0
print({"torch", "diffusers", "transformers", "huggingface_hub"} & {*sys.modules})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, concepts[0]], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("set()\n") and done.stderr == ""


def test_no_line_of_other_libraries_is_shown(concepts, model_folder, environment, tmp_path):
    command = ["generate", "--pretrained_model_name_or_path", str(model_folder), "--concept", concepts[0]]
    command += ["--prompt", "a <my-cat>", "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "diffusers_perfusion.cli", *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if line and not line.startswith("Prompts: ")] == []
