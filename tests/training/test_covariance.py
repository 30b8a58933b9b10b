import errno
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_perfusion.files import temporary_beside
from diffusers_perfusion.model_families.stable_diffusion import StableDiffusion
from diffusers_perfusion.training import covariance as module
from diffusers_perfusion.training.covariance import (
    RIDGE,
    cached_covariance,
    check_covariance,
    invert,
    load_covariance,
    read_captions,
    second_moment,
)

CAPTIONS = [
    "a cat",
    "a dog on the beach",
    "a good picture of the teddy bear in an image",
    "the",
    "a photo of " + "a cat " * 40,  # longer than the text encoder takes
]


@pytest.fixture
def text(components):
    return StableDiffusion(SimpleNamespace(**components))


@pytest.fixture
def captions_file(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS))
    return path


@pytest.fixture
def covariance(text):
    return second_moment(text, CAPTIONS).float()


def count_runs(text_encoder):
    """A list that grows with each run of the text encoder."""
    runs = []
    text_encoder.register_forward_hook(lambda *_: runs.append(1))
    return runs


@torch.no_grad()
def test_second_moment_is_over_bos_words_and_eos(text):
    (tokenizer,), (text_encoder,) = text.tokenizers, text.text_encoders
    tokens = []
    for caption in CAPTIONS:  # one at a time there is no padding to leave out
        ids = tokenizer(caption).input_ids[: tokenizer.model_max_length]
        if len(ids) == tokenizer.model_max_length:
            ids[-1] = tokenizer.eos_token_id
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        tokens.append(text_encoder(torch.tensor([ids])).last_hidden_state[0].double())
    e = torch.cat(tokens)
    torch.testing.assert_close(second_moment(text, CAPTIONS), e.T @ e / len(e), rtol=1e-5, atol=1e-6)
    assert second_moment(text, CAPTIONS).dtype == torch.float64


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_make_no_difference(text, monkeypatch, size):
    whole = second_moment(text, CAPTIONS)
    monkeypatch.setattr(module, "BATCH_SIZE", size)
    runs = count_runs(text.text_encoders[0])
    torch.testing.assert_close(second_moment(text, iter(CAPTIONS)), whole, rtol=1e-5, atol=1e-6)
    assert len(runs) == -(-len(CAPTIONS) // size)


def test_no_captions(text, tmp_path):
    with pytest.raises(ValueError, match="no captions"):
        second_moment(text, [])
    (tmp_path / "captions.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"captions\.txt has no captions"):
        read_captions(tmp_path / "captions.txt")


def test_captions_are_the_lines_that_are_not_empty(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "captions.txt").write_text("a café \n\n\ta cat\r\n", encoding=encoding)
        assert read_captions(tmp_path / "captions.txt") == ["a café", "a cat"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_captions_in_another_encoding_are_named(tmp_path, encoding):
    (tmp_path / "captions.txt").write_text("a café", encoding=encoding)
    with pytest.raises(
        ValueError, match=r"captions\.txt is not UTF-8 text; expected captions, one per line, saved as"
    ):
        read_captions(tmp_path / "captions.txt")


def test_a_broken_text_encoder_is_an_error(text):
    text.text_encoders[0].get_input_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        second_moment(text, CAPTIONS)


def test_the_covariance_is_computed_once(text, captions_file, hugging_face_home):
    runs = count_runs(text.text_encoders[0])
    first = cached_covariance(text, captions_file)
    assert len(runs) == 1
    assert torch.equal(cached_covariance(text, captions_file), first)
    assert len(runs) == 1
    torch.testing.assert_close(first, second_moment(text, CAPTIONS).float())
    (path,) = hugging_face_home.rglob("*.safetensors")
    assert path.parent == hugging_face_home / "perfusion"


def test_other_weights_tokenizer_or_captions_are_another_covariance(text, captions_file, hugging_face_home):
    (tokenizer,), (text_encoder,) = text.tokenizers, text.text_encoders

    def files():
        cached_covariance(text, captions_file)
        return len(list(hugging_face_home.rglob("*.safetensors")))

    assert files() == 1
    captions_file.write_text("\n".join(CAPTIONS[:-1]))
    assert files() == 2
    next(parameter for name, parameter in text_encoder.named_parameters() if "fc1" in name).data[0, 0] += 1e-3
    assert files() == 3
    tokenizer.add_tokens("dog")
    text_encoder.resize_token_embeddings(len(tokenizer))
    assert files() == 4
    assert files() == 4


def test_captions_are_generated_where_none_are_given(text, monkeypatch):
    monkeypatch.setattr(module, "generate_captions", lambda: iter(CAPTIONS[:2]))
    torch.testing.assert_close(cached_covariance(text), second_moment(text, CAPTIONS[:2]).float())


@pytest.mark.parametrize("damage", ["cut", "empty", "nan"])
def test_a_damaged_cache_file_is_recomputed(text, captions_file, hugging_face_home, caplog, damage):
    first = cached_covariance(text, captions_file)
    (path,) = hugging_face_home.rglob("*.safetensors")
    if damage == "nan":
        save_file({"covariance": first * torch.nan}, path)
    else:
        path.write_bytes(path.read_bytes()[: -100 if damage == "cut" else 0])
    assert torch.equal(cached_covariance(text, captions_file), first)
    assert path.name in caplog.text and "recomputed" in caplog.text
    assert torch.equal(load_covariance(path), first)


def test_a_cache_that_cannot_be_written_is_none_and_told(
    text, captions_file, hugging_face_home, monkeypatch, caplog, full_disk
):
    (hugging_face_home.parent / "file").touch()
    monkeypatch.setattr(module, "HF_HOME", str(hugging_face_home.parent / "file"))
    nowhere = cached_covariance(text, captions_file)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("The covariance is not kept for the next training (") and "/file/perfusion'" in line
    monkeypatch.setattr(module, "HF_HOME", str(hugging_face_home))
    with full_disk():
        full = cached_covariance(text, captions_file)
    assert caplog.text.count("The covariance is not kept for the next training (") == 2
    assert [path for path in hugging_face_home.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert torch.equal(cached_covariance(text, captions_file), full)
    assert torch.equal(nowhere, full)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_cache_without_locks_is_used(text, captions_file, hugging_face_home, monkeypatch, error):
    def refuse(_):
        raise error

    monkeypatch.setattr(module, "FileLock", refuse)
    first = cached_covariance(text, captions_file)
    monkeypatch.setattr(module, "second_moment", None)
    assert torch.equal(cached_covariance(text, captions_file), first)


def test_what_a_killed_process_left_in_the_cache_is_deleted(text, captions_file, hugging_face_home):
    cached_covariance(text, captions_file)
    (path,) = hugging_face_home.rglob("*.safetensors")
    temporary_beside(path).touch()
    other = temporary_beside(path.with_name("covariance-of-another.safetensors"))  # which may be being written
    other.touch()
    path.unlink()
    cached_covariance(text, captions_file)
    assert sorted(path.parent.iterdir()) == sorted([path, path.with_suffix(".lock"), other])


def test_a_read_only_cache_is_read(text, captions_file, monkeypatch):
    first = cached_covariance(text, captions_file)
    monkeypatch.setattr("diffusers_perfusion.training.covariance.FileLock", None)
    assert torch.equal(cached_covariance(text, captions_file), first)


def test_matrices_of_other_people_are_read(covariance, tmp_path):
    np.save(tmp_path / "c.npy", covariance.double().numpy())
    torch.save(covariance, tmp_path / "c.pt")
    torch.save({"any name": covariance}, tmp_path / "named.pt")
    save_file({"C": covariance.contiguous()}, tmp_path / "c.safetensors")
    for name in ("c.npy", "c.pt", "named.pt", "c.safetensors"):
        assert torch.equal(load_covariance(tmp_path / name), covariance)


class Harmful:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_with_code_are_refused_and_not_run(covariance, tmp_path):
    trace = tmp_path / "trace"
    np.save(tmp_path / "c.npy", np.array([Harmful(trace)], dtype=object), allow_pickle=True)
    torch.save({"C": covariance, "harm": Harmful(trace)}, tmp_path / "c.pt")
    for name, message in {
        "c.npy": "is not a covariance file",
        "c.pt": "is not .*: it is broken, or holds more than tensors",
    }.items():
        with pytest.raises(ValueError, match=f"{name} {message}"):
            load_covariance(tmp_path / name)
    assert not trace.exists()


def test_what_is_no_covariance_file_is_refused(covariance, tmp_path):
    save_file({"a": covariance, "b": covariance.clone()}, tmp_path / "two.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.ones(1).expand(2**20, 2**20), tmp_path / "huge.pt")  # in a few bytes
    (tmp_path / "c.txt").write_text("1")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    for name, reason in {
        "two.safetensors": "does not hold one matrix",
        "list.pt": "does not hold one matrix",
        "huge.pt": "only 1 of its numbers are there",
        "c.txt": "suffix is '.txt'",
        "cut.npy": "",
    }.items():
        with pytest.raises(ValueError, match=f"{name} is not a covariance file: .*{reason}"):
            load_covariance(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_covariance(tmp_path / "nowhere.npy")


def test_what_is_no_second_moment_is_refused(covariance, tmp_path):
    skewed, negative, infinite = covariance.clone(), covariance.clone(), covariance.clone()
    skewed[0, 1] += covariance.diagonal().mean()
    negative[3, 3] = -1
    infinite[2, 2] = torch.inf
    for wrong, reason in (
        (covariance[:, :-1], "square"),
        (covariance[0], "square"),
        (covariance[None], "square"),
        (torch.eye(4, dtype=torch.int64), "float"),
        (infinite, "infinity"),
        (covariance * torch.nan, "NaN"),
        (skewed, "not symmetric"),
        (negative, "positive diagonal"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_covariance(wrong)
    np.save(tmp_path / "skewed.npy", skewed.numpy())
    with pytest.raises(ValueError, match=r"skewed\.npy.*not symmetric"):
        load_covariance(tmp_path / "skewed.npy")
    assert torch.equal(check_covariance(covariance, 32), covariance)
    with pytest.raises(ValueError, match=r"width 32.* width 768"):
        check_covariance(covariance, 768)


def test_the_ridge_bounds_the_condition_number():
    e = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c_inv = invert(e.T @ e)  # of rank 5, so without a ridge there is no inverse
    assert torch.linalg.cond(c_inv) <= 40 / RIDGE * 1.01
    assert torch.isfinite(c_inv).all()


def test_the_inverse(covariance):
    c_inv = invert(covariance)
    assert c_inv.dtype == torch.float64
    torch.testing.assert_close(c_inv, c_inv.T, rtol=1e-6, atol=1e-6)
    ridge = RIDGE * covariance.double().diagonal().mean()
    identity = torch.eye(len(covariance), dtype=torch.float64)
    torch.testing.assert_close(c_inv @ (covariance.double() + ridge * identity), identity)
    # The unit of C is free: only the unit of its inverse follows.
    torch.testing.assert_close(invert(covariance * 1024), c_inv / 1024)
