"""BatchNorm computed as part of the convolution before it: the same but for rounding, and named where it is done."""

import copy
import json

import pytest
import torch
import torchvision
from conftest import small_recipe, train_run
from torch import nn

from finetune.models.fusion import Fusion
from finetune.recipe.execution import Machine, Numerics, split_config
from finetune.runs.start import Plan, new_setup
from finetune.training.phase import _pass_of, cut


class Branching(nn.Module):
    """Of four pairs one alone is a pair: others read one convolution, call it twice, or train."""

    def __init__(self):
        super().__init__()
        self.alone, self.alone_norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.read, self.read_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.twice_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.learns, self.learns_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images):
        first = self.alone_norm(self.alone(images)).relu()
        read = self.read(first)
        second = self.read_norm(read) + read
        third = self.twice_norm(self.twice(second)) + self.twice(first)
        return self.learns_norm(self.learns(third))


def spread_statistics(network):
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.3, 3, generator=generator)
    return network


def test_only_what_nothing_else_reads_and_nothing_learns_is_computed_at_once():
    network = spread_statistics(Branching()).eval()
    network.learns_norm.train()
    before = copy.deepcopy(network.state_dict())
    fusion, images = Fusion(network), torch.randn(2, 3, 8, 8)
    assert [str(convolution.target) for convolution, _ in fusion.pairs] == ["alone"]
    network.learns_norm.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fusion.network(images), network(images), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert fusion.network.get_submodule("read").weight is network.read.weight  # what is not changed is not copied


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        "resnet18",
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def test_what_comes_out_differs_by_rounding(name):
    network = spread_statistics(torchvision.models.get_model(name)).eval()
    fusion, images = Fusion(network), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    # Those of a densenet stand before a convolution, but for one in each of its layers.
    assert len(fusion.pairs) == {"densenet121": 59}.get(name, norms)
    with torch.inference_mode():
        whole = network(images)
        assert (fusion.network(images) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_a_network_that_cannot_be_traced_has_no_pairs():
    class Strange(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    assert Fusion(Strange()).pairs == []


def test_layers_that_are_put_together_as_they_run_or_count_nothing_are_left_alone():
    plain = nn.Conv2d(3, 4, 3)
    weighed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    network = nn.Sequential(plain, nn.BatchNorm2d(4, track_running_stats=False), weighed, nn.BatchNorm2d(4)).eval()
    fusion, images = Fusion(network), torch.randn(2, 3, 8, 8)
    assert fusion.pairs == []
    with torch.inference_mode():
        assert torch.equal(fusion.network(images), network(images))


def identity_of(**numerics):
    setup, _ = new_setup(Plan(small_recipe(), Numerics(**numerics), Machine("cpu")))
    freeze = setup.freeze.at(0)
    freeze.apply(), freeze.modes()
    return _pass_of(setup, cut(setup.network.module, setup.backbone, setup.device), freeze.sha256())


def test_a_run_names_it_and_one_that_does_not_computes_as_before(tmp_path):
    run = train_run(tmp_path / "run", small_recipe())
    config = json.loads(run.recipe_file.read_text())["config"]
    assert config.pop("fuse_batchnorm") is True
    assert split_config(config)[1].fuse_batchnorm is False  # a record of before
    now, before = identity_of(), identity_of(fuse_batchnorm=False)
    assert now.identity["numerics"] == before.identity["numerics"] | {"fuse_batchnorm": True}
    images = now.loader._pipeline.source.images[:8].expand(-1, 3, -1, -1)
    inputs = now.loader._pipeline.preprocessing.normalise(now.loader._pipeline.preprocessing.resize(images))
    rows, rows_before = now.compute(inputs), before.compute(inputs)
    assert not torch.equal(rows, rows_before)
    assert torch.nn.functional.cosine_similarity(rows, rows_before).min() > 0.999_999
    assert "fuse_batchnorm" not in identity_of(backbone_precision="bf16").identity["numerics"]
