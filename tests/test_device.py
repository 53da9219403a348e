"""Where and in which arithmetic a network runs; what a GPU alone can show is marked so."""

import subprocess
import sys

import pytest
import torch
from conftest import assert_equal_runs, finetune, finish, kill_after_progress, small_recipe
from torch import nn

from finetune.base.device import ALL_TF32, NO_TF32, TF32_CONVOLUTIONS, numerics_put_back, pick_device, set_tf32
from finetune.cli import main
from finetune.recipe.execution import Numerics, determining_config, split_config
from finetune.store.run_folder import RunFolder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def allowed() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_the_device_of_before_comes_first_where_it_is_and_no_other_is_made_of_it():
    fastest = pick_device("auto").type
    assert pick_device("auto", "cpu").type == "cpu" and pick_device("auto", "").type == fastest
    assert pick_device("auto", "an abacus").type == fastest and pick_device("cpu", fastest).type == "cpu"


@pytest.mark.parametrize(
    ("which", "found"),
    [(NO_TF32, (False, False)), (TF32_CONVOLUTIONS, (True, False)), (ALL_TF32, (True, True))],
)
def test_what_is_computed_in_tf32_is_set_and_put_back(which, found):
    before = allowed()
    with numerics_put_back():
        set_tf32(which)
        assert allowed() == found
    assert allowed() == before


def test_a_record_of_before_the_choice_goes_on_as_torch_did_by_itself():
    config = determining_config(small_recipe(), Numerics())
    assert config.pop("tf32") == NO_TF32
    assert split_config(config)[1].tf32 == TF32_CONVOLUTIONS
    assert Numerics(tf32=ALL_TF32).reduced("cuda") == "tf32" and Numerics(tf32=ALL_TF32).reduced("cpu") == "fp32"
    assert Numerics(backbone_precision="bf16", tf32=ALL_TF32).reduced("cuda") == "bf16"


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older names only")
def test_a_process_that_chose_by_torchs_newer_names_is_told_so(tmp_path):
    code = (
        "import torch, finetune; from finetune import *\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "try: finetune.fit(Recipe(Model('bundled/vgg'), Images('digits'), epochs=1), 'run', device='cpu')\n"
        "except finetune.UsageError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.stdout.startswith("torch.backends...fp32_precision was set in this process"), said.stderr
    assert not (tmp_path / "run").exists()


# ---- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_fp32_is_fp32_on_a_gpu_and_tf32_is_chosen():
    torch.manual_seed(0)
    net, inputs = nn.Conv2d(64, 64, 3).eval(), torch.randn(8, 64, 32, 32)
    with torch.no_grad(), numerics_put_back():
        exact = net.double()(inputs.double())
        net.float().cuda()

        def error(which: str) -> float:
            set_tf32(which)
            return ((net(inputs.cuda()).cpu() - exact).abs().max() / exact.std()).item()

        assert error(NO_TF32) < 1e-5 < 1e-4 < error(TF32_CONVOLUTIONS)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("which", [NO_TF32, TF32_CONVOLUTIONS, ALL_TF32])
def test_a_run_in_tf32_keeps_its_own_features_and_its_export_says_how_far_it_was(tmp_path, monkeypatch, which):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path.parent / "features of all three"))
    run = str(tmp_path / "run")
    said = finish(finetune("vgg_head", "--device", "cuda", "--epochs", "2", "--tf32", which, "--run", run))
    assert "the frozen backbone runs over" in said  # not those of another arithmetic
    assert ("in tf32" in said) == (which != NO_TF32)
    said = finish(finetune("export", run))
    assert ("the run computed in tf32: what it gave lies within" in said) == (which != NO_TF32)
    assert "more than rounding" not in said
    assert main(["evaluate", run, "--device", "cuda"]) == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_resume_goes_on_where_the_run_was(tmp_path, device):
    common = ["vgg_head", "--augment", "light", "--epochs", "2", "--save-every-steps", "1", "--device", device]
    broken, unbroken = RunFolder(tmp_path / "broken"), RunFolder(tmp_path / "unbroken")
    kill_after_progress(finetune(*common, "--run", str(broken.path)), broken, 5)
    said = finish(finetune("resume", str(broken.path)))
    assert ("--device cuda is faster" in said) == (device == "cpu") and "not bit for bit" not in said
    finish(finetune(*common, "--run", str(unbroken.path)))
    assert_equal_runs(broken, unbroken)
