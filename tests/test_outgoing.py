"""What goes out with a head: thresholds of several labels, features of norm one."""

import json
import math

import pytest
import torch

import finetune
from finetune.cli import main
from finetune.models.heads import standardised_layers
from finetune.tasks.thresholds import best_cuts, cross_fitted_cuts

# ---- Thresholds of several labels ------------------------------------------------------------------------------------


def f1(decided, true) -> float:
    return 2 * (decided & true).sum().item() / max((decided.sum() + true.sum()).item(), 1)


def test_the_cut_of_a_class_is_that_of_the_best_f1_and_the_nearest_to_one_half():
    generator = torch.Generator().manual_seed(1)
    true = torch.rand(400, 3, generator=generator) < torch.tensor([0.1, 0.4, 0.9])
    outputs = 2.0 * true + torch.randn(400, 3, generator=generator) - torch.tensor([2.5, 1.0, 0.0])
    cuts = best_cuts(outputs, true, honest=False)
    for number in range(3):
        column, wanted = outputs[:, number], true[:, number]
        every = [f1(column > cut, wanted) for cut in [*column.tolist(), -99.0]]
        assert f1(column > cuts[number], wanted) == pytest.approx(max(every), abs=1e-12)
    assert f1(outputs[:, 0] > cuts[0], true[:, 0]) > f1(outputs[:, 0] > 0, true[:, 0]) + 0.05
    apart = torch.where(true[:, :1], 3.0, -3.0)
    assert best_cuts(apart, true[:, :1], honest=False).item() == 0.0  # any cut between them would do


def test_of_few_samples_honest_probabilities_find_better_cuts_than_labels_and_than_one_half():
    def drawn(count, generator):
        true = torch.rand(count, 1, generator=generator) < 0.1
        noise = torch.randn(count, 1, generator=generator)
        return 2 * (noise + torch.where(true, 1.0, -1.0)) - math.log(9), true  # the log odds given the noise

    outputs, true = drawn(100_000, torch.Generator().manual_seed(99))
    kept = {True: [], False: []}
    for seed in range(40):
        few = drawn(80, torch.Generator().manual_seed(seed))
        for honest, found in kept.items():
            found.append(f1(outputs > best_cuts(*few, honest=honest), true))
    by_both, by_labels = (sum(kept[honest]) / 40 for honest in (True, False))
    assert by_both > by_labels + 0.01 and by_both > f1(outputs > 0, true) + 0.02


def test_cuts_that_were_not_found_on_a_sample_promise_no_more_than_they_keep():
    gaps = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        true = torch.rand(2, 200, 4, generator=generator) < 0.1
        outputs = 1.5 * true + torch.randn(2, 200, 4, generator=generator) - 2.0
        own = best_cuts(outputs[0], true[0], honest=False)
        others = cross_fitted_cuts(outputs[0], true[0], honest=False)

        def mean(decided, part):
            return sum(f1(decided[:, n], part[:, n]) for n in range(4)) / 4

        kept = mean(outputs[1] > own, true[1])
        gaps.append([mean(outputs[0] > own, true[0]) - kept, mean(outputs[0] > others, true[0]) - kept])
    optimistic, honest = torch.tensor(gaps).mean(0).tolist()
    error = torch.tensor(gaps)[:, 1].std().item() / len(gaps) ** 0.5
    assert optimistic > 3 * error and honest < 2 * error


def test_thresholds_travel_with_the_export_and_decide_in_predict_and_evaluate(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    words = ["red", "blue", "green", "small"]
    rows = []
    for number in range(200):
        labels = [word for word, share in zip(words, (0.15, 0.5, 0.3, 0.1), strict=True)
                  if torch.rand((), generator=generator) < share]  # fmt: skip
        said = [word for word in labels if torch.rand((), generator=generator) < 0.6]
        rows.append(f"a {' '.join(said) or 'plain'} thing number {number},{'|'.join(labels) or 'none'}")
    (tmp_path / "t.csv").write_text("\n".join(["text,labels", *rows]))
    place = tmp_path / "run"
    common = ["--texts", str(tmp_path / "t.csv"), "--separator", "|", "--epochs", "3", "--track", "none", "--no-report"]
    assert main(["bert_head", *common, "--run", str(place), "--device", "cpu"]) == 0
    half = tmp_path / "half"
    assert main(["bert_head", *common, "--run", str(half), "--device", "cpu", "--thresholds", "half"]) == 0
    capsys.readouterr()
    found = {}
    for run in (place, half):
        assert main(["evaluate", str(run), "--json"]) == 0
        found[run] = json.loads(capsys.readouterr().out)
    assert found[place]["loss"] == found[half]["loss"] and found[place]["out_of_fold"]
    assert found[place]["f1"] != found[half]["f1"] and "thresholds" not in found[half]
    thresholds = found[place]["thresholds"]
    assert len(thresholds) == 5 and min(thresholds) < 0.4
    assert main(["export", str(place)]) == 0
    assert "above its own threshold" in capsys.readouterr().err
    description = json.loads((place / "model.json").read_text())
    assert description["thresholds"] == thresholds
    assert main(["predict", str(place / "model.pt"), "--top-k", "5", str(tmp_path / "t.csv")]) == 0
    limits = dict(zip(description["classes"], thresholds, strict=True))
    for row in map(json.loads, capsys.readouterr().out.splitlines()):
        chances = {one["label"]: one["probability"] for one in row["top"]}
        assert set(row["labels"]) == {name for name, chance in chances.items() if chance > limits[name]}
    # The loop's best has thresholds of its own, chosen by the samples that validate: that is said.
    assert main(["evaluate", str(place), "--from", "best"]) == 0
    assert "this checkpoint and its thresholds were chosen by these very texts" in capsys.readouterr().out
    assert main(["bert_head", "--thresholds", "half", "--run", str(tmp_path / "no")]) == 2
    assert "--thresholds half: has no effect" in capsys.readouterr().err


# ---- Unit rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_features_of_norm_one_are_trained_on_and_exported(head, tmp_path, capsys):
    words = ["vgg_head", "--train-samples", "100", "--epochs", "2", "--track", "none", "--no-report", "--device", "cpu"]
    assert main([*words, "--unit-rows", "--head", head, "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "(--unit-rows) has no stock counterpart" in said and "equal the run's bit for bit" in said
    module = finetune.load(tmp_path / "run" / "model.pt")
    ((_, layer),) = standardised_layers(module)
    rows = torch.rand(3, layer.in_features)
    assert torch.allclose(layer(rows), layer(7 * rows), atol=1e-5)  # a plain layer would give others
    assert (
        main(["vgg_head", "--unit-rows", "--head", "append", "--weights", "none", "--run", str(tmp_path / "no")]) == 2
    )
