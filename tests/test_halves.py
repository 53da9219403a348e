"""Memory that runs out outside of a step: in the pass of the backbone, the first look, a validation, evaluate, predict."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import (
    DyingTerminal,
    Killed,
    assert_equal_runs,
    read,
    resume_run,
    small_recipe,
    start_in,
    train_run,
)
from encoders import make_encoder, sentences
from PIL import Image
from test_distil import recipe_for

from finetune import Trainable
from finetune.cli import main
from finetune.data.digits import load_digits
from finetune.errors import is_out_of_memory
from finetune.export import model
from finetune.export.weights import export
from finetune.recipe.execution import Machine, Numerics, Settings
from finetune.runs import evaluate
from finetune.store.run_folder import RunFolder
from finetune.training import data_check, phase, step, teacher

CPU = Machine("cpu", 0)


def too_many() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def limit_pass(patched, module, name: str, most: int) -> list[int]:
    """The frozen backbone takes no more samples at once than that; how many it was given."""
    sizes, real = [], getattr(module, name)

    def limited(*arguments):
        found = real(*arguments)

        def compute(samples):
            if len(samples) > most:
                raise too_many()
            sizes.append(len(samples))
            return found.compute(samples)

        return dataclasses.replace(found, compute=compute)

    patched.setattr(module, name, limited)
    return sizes


def begun(path, recipe, cache: bool = True) -> list[str]:
    terminal = DyingTerminal()
    start_in(
        path, "test", recipe, Numerics(cache=cache), CPU, Settings(save_every_steps=1, log_every_steps=1), terminal
    )
    return terminal.lines


RULES = (("head", "trainable", 0), ("features.7", "trainable", 1), ("*", "frozen", 0))


def test_a_pass_that_does_not_fit_is_halved_and_a_larger_machine_computes_the_same_rows_again(
    tmp_path, monkeypatch, cache
):
    recipe = small_recipe(augment="none", trainable=Trainable(rules=RULES))
    with monkeypatch.context() as patched:
        sizes = limit_pass(patched, phase, "_pass_of", 40)
        said = begun(tmp_path / "unbroken", recipe)
        with pytest.raises(Killed):
            train_run(tmp_path / "run", recipe, die_after_steps=5)
    assert max(sizes) == 32
    assert [line for line in said if "out of memory" in line] == [
        "out of memory (OutOfMemoryError) at 64 samples at once: 32 from here on; the pass begins anew, as that shows in "
        "a row's last bits"
    ]
    unbroken, run = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "run")
    assert read(unbroken)["frozen"]["features_halvings"] == 1
    assert len(list(cache.glob("*.safetensors"))) == 2  # of both phases; none of what was begun with 64
    shutil.rmtree(cache)
    with monkeypatch.context() as patched:
        sizes = limit_pass(patched, phase, "_pass_of", 1000)
        resume_run(run)
        assert max(sizes) == 32
        sizes.clear()
        train_run(tmp_path / "other", recipe)  # which never ran out of memory: its rows are others
        assert max(sizes) == 64 and len(list(cache.glob("*.safetensors"))) == 4
    assert_equal_runs(run, unbroken)


def test_a_run_whose_pass_fitted_says_that_on_a_smaller_machine_its_rows_are_others(tmp_path, monkeypatch, cache):
    with pytest.raises(Killed):
        train_run(tmp_path / "run", small_recipe(augment="none"), die_after_steps=5)
    shutil.rmtree(cache)
    limit_pass(monkeypatch, phase, "_pass_of", 20)
    said = resume_run(RunFolder(tmp_path / "run"))
    assert "not bit for bit from here on: features were computed with more samples at once" in said
    assert read(RunFolder(tmp_path / "run"))["frozen"]["features_halvings"] == 2


def test_a_teacher_that_does_not_fit_is_halved_and_that_is_remembered(tmp_path, monkeypatch, cache):
    folder, texts = make_encoder(tmp_path / "teacher", "minilm"), tmp_path / "texts.txt"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    texts.write_text("\n".join(text for text, _ in sentences(100)))
    recipe = recipe_for(folder, texts, epochs=1)
    with monkeypatch.context() as patched:
        sizes = limit_pass(patched, teacher, "_teacher_pass", 20)
        with pytest.raises(Killed):
            train_run(tmp_path / "run", recipe, die_after_steps=2)
        assert max(sizes) == 16
    run = RunFolder(tmp_path / "run")
    shutil.rmtree(cache)
    sizes = limit_pass(monkeypatch, teacher, "_teacher_pass", 1000)
    assert not any("bit for bit" in line for line in resume_run(run))
    assert max(sizes) == 16 and read(run)["data"]["taught_halvings"] == 2


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_first_look_that_does_not_fit_begins_anew_with_fewer_at_once(tmp_path, monkeypatch, kept):
    real, sizes = data_check.standardise, []

    def standardise(module, batches, forward=None, **how):
        def limited():
            for batch in batches:
                sizes.append(len(batch))
                if len(batch) > 20:
                    raise too_many()
                yield batch

        real(module, limited(), forward, **how)

    monkeypatch.setattr(data_check, "standardise", standardise)
    said = begun(tmp_path / "run", small_recipe(augment="none", epochs=1), kept)
    assert sizes[:3] == [64, 32, 16] and sum(sizes[2:]) == 100
    assert sum("from here on; the first look begins anew" in line for line in said) == 2
    unlimited = train_run(tmp_path / "unlimited", small_recipe(augment="none", epochs=1), cache=kept)
    ours, theirs = (read(one)["model"]["classifier.1.mean"] for one in (RunFolder(tmp_path / "run"), unlimited))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_evaluate_halves(tmp_path, trained, monkeypatch, capsys):
    words = ["evaluate", str(trained.path), "--from", "best", "--json", "--device", "cpu"]
    assert main(words) == 0
    whole, real = json.loads(capsys.readouterr().out), evaluate.trained_forward

    def limited(*arguments):
        forward = real(*arguments)

        def compute(samples):
            if len(samples) > 40:
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            return forward(samples)

        return compute

    monkeypatch.setattr(evaluate, "trained_forward", limited)
    assert main(words) == 0
    found = capsys.readouterr()
    assert found.err == "out of memory (RuntimeError) at 64 samples at once: 32 from here on\n"
    halved = json.loads(found.out)
    assert halved["samples"] == whole["samples"] and halved["accuracy"] == whole["accuracy"]
    assert halved["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_predict_halves_and_keeps_the_order(tmp_path, trained, monkeypatch, capsys):
    export(trained, "best", tmp_path / "model.pt")
    (tmp_path / "digits").mkdir()
    for number, picture in enumerate(load_digits().images[:10]):
        Image.fromarray(picture[0].numpy()).save(tmp_path / "digits" / f"{number}.png")
    words = ["predict", str(tmp_path / "model.pt"), str(tmp_path / "digits"), "--batch-size", "8", "--device", "cpu"]
    assert main(words) == 0
    whole, real = capsys.readouterr().out, model.to_device

    def limited(samples, device):
        if len(samples) > 3:
            raise too_many()
        return real(samples, device)

    monkeypatch.setattr(model, "to_device", limited)
    assert main(words) == 0
    found = capsys.readouterr()
    assert found.err.splitlines() == [
        f"finetune: out of memory (OutOfMemoryError) at {size} samples at once: {size // 2} from here on"
        for size in (8, 4)
    ]
    for ours, theirs in zip(found.out.splitlines(), whole.splitlines(), strict=True):
        ours, theirs = json.loads(ours), json.loads(theirs)
        assert (ours["file"], ours["label"]) == (theirs["file"], theirs["label"])
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


def test_a_batch_that_does_not_fit_on_the_device_goes_there_in_parts(tmp_path, monkeypatch):
    real = step.to_device

    def limited(samples, device):
        if len(samples) > 9:
            raise too_many()
        return real(samples, device)

    monkeypatch.setattr(step, "to_device", limited)
    said = begun(tmp_path / "run", small_recipe(epochs=1))
    assert "out of memory (OutOfMemoryError) at 16 samples at once: 8 from here on" in said
    assert read(RunFolder(tmp_path / "run"))["halvings"] == 1


@pytest.mark.parametrize(
    ("words", "is_memory"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3.00 GiB", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", True),
        ("FIND was unable to find an engine to execute this computation", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("Unable to find a valid cuDNN algorithm to run convolution", True),
        ("MPS backend out of memory (MPS allocated: 1.00 GB)", True),
        ("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", False),
        ("cuDNN error: CUDNN_STATUS_MAPPING_ERROR", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_torch_and_cudas_libraries_say_when_memory_runs_out_is_known(words, is_memory):
    assert is_out_of_memory(RuntimeError(words)) == is_memory
