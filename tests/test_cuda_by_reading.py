"""What a GPU needs and can be looked at without one; what can not is in the tests marked `gpu`."""

import pytest
import torch
from conftest import finetune, finish
from torch import nn
from torchvision.models import get_model

from finetune import UsageError
from finetune.base import device as devices
from finetune.base.device import CUBLAS_VARIABLE, numerics_put_back, said_too_late, set_numerics
from finetune.base.halves import in_halves
from finetune.models.backbones import find_backbone
from finetune.models.pooling import DeterministicPool, give_deterministic_pools
from finetune.store.state import (
    CUDA_OF_RUN,
    capture_generators,
    environment_differences,
    numeric_environment,
    restore_generators,
)

CUDA = torch.device("cuda", 1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize(
    ("size", "shape"), [((2, 2), (8, 8)), ((7, 7), (7, 7)), (6, (12, 18)), ((1, 3), (5, 9)), ((None, 2), (3, 4))]
)
def test_the_pool_gives_the_same_forwards_and_backwards(size, shape):
    first = torch.randn(3, 5, *shape, dtype=torch.float64, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    stock, ours = nn.AdaptiveAvgPool2d(size)(first), DeterministicPool(size)(second)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-14)
    weights = torch.randn_like(stock)
    (stock * weights).sum().backward()
    (ours * weights).sum().backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=0, atol=1e-14)


def test_what_is_frozen_before_it_is_pooled_by_torch_itself_to_the_bit():
    images = torch.randn(2, 4, 9, 9)
    assert torch.equal(DeterministicPool((2, 2))(images), nn.AdaptiveAvgPool2d((2, 2))(images))
    with pytest.raises(
        UsageError, match=r"pools 9 x 9 places to 2 x 2, which has no deterministic backward pass on CUDA"
    ):
        DeterministicPool((2, 2))(images.requires_grad_())
    with torch.no_grad():
        DeterministicPool((2, 2))(images)


@pytest.mark.parametrize(
    "name", ["bundled/vgg", "bundled/resnet", "alexnet", pytest.param("vgg11", marks=pytest.mark.slow)]
)
def test_the_pools_of_a_network_are_replaced_and_nothing_else(name):
    network = find_backbone(name).build(3) if name.startswith("bundled") else get_model(name, num_classes=3)
    network.eval()
    size = 32 if name.startswith("bundled") else 224
    before, images = {k: v.clone() for k, v in network.state_dict().items()}, torch.randn(1, 3, size, size)
    pools = [m for m in network.modules() if type(m) is nn.AdaptiveAvgPool2d and m.output_size not in (1, (1, 1))]
    with torch.no_grad():
        wanted = network(images)
    assert give_deterministic_pools(network, torch.device("cpu")) == 0
    with numerics_put_back():
        set_numerics(True, "none")
        assert give_deterministic_pools(network, CUDA) == len(pools) and give_deterministic_pools(network, CUDA) == 0
    assert list(network.state_dict()) == list(before)
    with torch.no_grad():
        assert torch.equal(network(images), wanted)
    network(images).sum().backward()  # all of it trains: the sizes that people have divide evenly
    assert not any(type(m) is nn.AdaptiveAvgPool2d and m.output_size not in (1, (1, 1)) for m in network.modules())


def test_cuda_that_began_before_is_said(monkeypatch):
    def said(*, began: bool, variable: str = "", deterministic: bool = True) -> str:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: began)
        monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
        if variable:
            monkeypatch.setenv(CUBLAS_VARIABLE, variable)
        with numerics_put_back():
            set_numerics(deterministic, "none")
            assert not said_too_late(torch.device("cpu"))
            return said_too_late(CUDA)

    monkeypatch.setattr(devices, "_cublas", {"in time": False})
    assert not said(began=True, deterministic=False)  # nobody asked for the same bits
    assert f"start the process anew with {CUBLAS_VARIABLE}=:4096:8" in said(began=True)
    assert not said(began=True, variable=":16:8")  # somebody said so in time
    monkeypatch.setattr(devices, "_cublas", {"in time": False})
    assert not said(began=False)
    assert not said(began=True)  # a second run in this process: the first said so in time


def test_the_generator_of_the_runs_device_goes_on_wherever_that_is_now(monkeypatch):
    """As on two devices, of which a run had the second, and goes on where that is the only one."""
    states = {0: torch.zeros(4), 1: torch.ones(4)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    saved = capture_generators(CUDA)
    assert torch.equal(saved[CUDA_OF_RUN], states[1]) and CUDA_OF_RUN not in capture_generators()
    put: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda found: put.update(enumerate(found)))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put.update({device.index: state}))
    restore_generators(saved, torch.device("cuda", 0))
    assert torch.equal(put[0], states[1]) and list(put) == [0]
    del saved[CUDA_OF_RUN]  # a checkpoint of before
    restore_generators(saved, torch.device("cuda", 0))
    assert torch.equal(put[0], states[0])


def test_an_attempt_in_halves_begins_with_the_generators_of_every_device(monkeypatch):
    states = [torch.zeros(4), torch.ones(4)]
    put = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put.append)

    def compute(halvings: int) -> int:
        if not halvings:
            raise MemoryError
        return halvings

    assert in_halves(compute, 8, 0, lambda _: None) == (1, 1) and put == [states]


def test_how_many_devices_can_be_seen_moves_no_bit(monkeypatch):
    device = torch.device("cpu")
    saved = numeric_environment(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert numeric_environment(device) == saved == numeric_environment(device) | {"device_count": 1}
    assert environment_differences(saved | {"device_count": 2}, device) == []  # as a checkpoint of before has it


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backbone", ["bundled/vgg", "bundled/resnet"])
def test_all_of_a_bundled_backbone_trains_on_a_gpu_the_same_twice(tmp_path, backbone):
    (tmp_path / "all.py").write_text(
        "import dataclasses\nfrom finetune import Recipe, Trainable, image_head\n\n\n"
        "def recipe(epochs: int = 1) -> Recipe:\n"
        f"    found = image_head(images='digits', backbone={backbone!r}, epochs=epochs)\n"
        "    return dataclasses.replace(found, trainable=Trainable((('*', 'trainable', 0),)))\n"
    )
    for name in ("one", "two"):
        finish(finetune(str(tmp_path / "all.py"), "--device", "cuda", "--run", str(tmp_path / name)))
        finish(finetune("export", str(tmp_path / name), "--from", "latest"))
    assert (tmp_path / "one" / "model.pt").read_bytes() == (tmp_path / "two" / "model.pt").read_bytes()
