import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import finetune, read

from finetune.cli import main
from finetune.store.run_folder import RunFolder


def test_help_imports_no_torch_and_names_every_command_and_recipe():
    code = (
        "import sys\nfrom finetune.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for word in ("rehearse", "resume", "export", "predict", "summary", "new", "vgg_head", "resnet_head", "75"):
        assert word in output


def test_a_recipes_help_imports_no_torch_and_documents_its_options():
    code = (
        "import sys\nfrom finetune.cli import main\n"
        "try:\n    main(['vgg_head', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'torchvision'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for option in (
        "--images", "--backbone", "--image-size", "--augment", "--head", "--dropout", "--epochs", "--batch-size", "--lr",
        "--seed", "--run", "--device", "--precision", "--workers", "--save-every-steps", "--save-every-minutes", "--keep",
        "--resume", "--init-from", "--accumulate", "--optimizer",
    ):  # fmt: skip
        assert option in output, option
    assert "probability that a feature is zeroed" in output


def test_nothing_at_all_shows_the_help_and_is_wrong_usage(capsys):
    assert main([]) == 2
    assert "finetune RECIPE" in capsys.readouterr().out


def test_a_recipe_of_ones_own_with_a_module_beside_it_keeps_both_with_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "vgg_head", "mine/my_head.py"]) == 0
    text = (
        Path("mine/my_head.py").read_text().replace("from finetune", "from my_defaults import EPOCHS\nfrom finetune", 1)
    )
    Path("mine/my_head.py").write_text(text.replace("epochs: int = 0", "epochs: int = EPOCHS"))
    Path("mine/my_defaults.py").write_text("EPOCHS = 1\n")
    capsys.readouterr()
    assert main(["mine/my_head.py", "--train-samples", "100", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "runs/my_head-1"
    assert sorted(path.name for path in Path("runs/my_head-1/code").iterdir()) == ["my_defaults.py", "my_head.py"]
    assert main(["resume"]) == 2  # it is finished, and there is no other
    assert "1 run(s) there, all finished" in capsys.readouterr().err


def test_a_new_recipe_can_be_made_of_any_and_be_called_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = 'C:\\new\\users "x".py'
    assert main(["new", "photo_head", name]) == 0
    text = Path(name).read_text()
    assert ast.get_docstring(ast.parse(text)).splitlines()[2] == f"    finetune '{name}'"
    assert "Regression" not in text  # of images no number is learnt
    assert main(["summary", name]) == 0
    own = (
        "from finetune import Recipe, image_head\n\n\ndef recipe(images: str, epochs: int = 0) -> Recipe:\n"
        '    backbone = "bundled/vgg"\n    return image_head(**locals())\n'
    )
    Path("own.py").write_text(own)
    assert main(["new", "own.py", "copy.py"]) == 0
    assert Path("copy.py").read_text() == own  # somebody must say which images


def test_an_existing_run_is_not_overwritten_and_resumed_only_as_what_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["vgg_head", "--epochs", "1", "--train-samples", "100", "--device", "cpu", "--run", "here"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(words) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert "finished at step 2" in capsys.readouterr().out
    assert main([*words, "--resume", "--lr", "0.5"]) == 2
    assert "optimizer.lr: 0.003 in the run, 0.5 now" in capsys.readouterr().err


def test_the_run_ends_with_what_to_type_next_and_the_folder_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["resnet_head", "--epochs", "1", "--train-samples", "100", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "runs/resnet_head-1"
    for words in (
        "finetune export runs/resnet_head-1",
        "finetune resume runs/resnet_head-1",
        "--images FOLDER",
        "frozen",
        "val loss",
    ):
        assert words in output
    assert main(["resnet_head", "--epochs", "1", "--train-samples", "100", "--device", "cpu", "--quiet"]) == 0
    assert capsys.readouterr().out == "runs/resnet_head-2\n"


def test_a_recipe_json_edited_by_hand_is_one_line(trained, tmp_path, capsys):
    copy = shutil.copytree(trained.path, tmp_path / "copy")
    text = (copy / "recipe.json").read_text()
    for edited, said in (
        (text[:50], "is damaged"),
        ("[]", "is damaged (it holds no checksum)"),
        (
            json.dumps(json.loads(text) | {"config": json.loads(text)["config"] | {"model": 3}, "checksum": ""}),
            "the saved recipe is not one",
        ),
        (text.replace('"seed": 3', '"seed": 4'), "does not match its checksum"),
    ):
        (copy / "recipe.json").write_text(edited)
        assert main(["resume", str(copy)]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_an_export_is_named_by_output_or_format_and_other_endings_are_refused(trained, tmp_path, capsys):
    assert main(["export", str(trained.path), "--output", str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.safetensors'}\n"
    assert main(["export", str(trained.path), "--output", str(tmp_path / "a.bin")]) == 2
    assert "must end in .pt or .safetensors" in capsys.readouterr().err
    assert main(["export", str(trained.path), "--no-weights-only", "--output", str(tmp_path / "full.pt")]) == 0
    assert (tmp_path / "full.pt").read_bytes() == (trained.checkpoints / "final.pt").read_bytes()


def test_summary_shows_what_trains_and_how_large_a_checkpoint_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["summary", "vgg_head"]) == 0
    output = capsys.readouterr().out
    assert "Trainable" in output and "StandardisedLinear (1)" in output
    assert "trainable:   5,130 parameters" in output and "frozen:      287,904 parameters" in output
    assert list(tmp_path.iterdir()) == []
    said = int(output.rsplit("about ", 1)[1].split()[0].replace(",", ""))
    assert main(["vgg_head", "--epochs", "1", "--train-samples", "100", "--device", "cpu", "--quiet"]) == 0
    real = Path("runs/vgg_head-1/checkpoints/latest.pt").stat().st_size
    assert abs(said - real) / real < 0.25


def test_help_and_images_import_no_library_that_they_do_not_need(tmp_path):
    program = """
import sys
from finetune.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
unwanted = "transformers tokenizers pyarrow torchmetrics sklearn pandas scipy wandb apprise IPython tensorflow".split()
# A run draws with them, at its end; that is what it is watched with.
unwanted += [] if "--epochs" in sys.argv else ["matplotlib", "tensorboard"]
unwanted += [] if {"--epochs", "export"} & set(sys.argv) else ["jinja2.environment"]  # cards and programs are templates
found = [name for name in unwanted if name in sys.modules]
assert not found, found
raise SystemExit(code)
"""
    run = str(tmp_path / "run")
    training = ["vgg_head", "--epochs", "1", "--train-samples", "50", "--quiet", "--run", run]
    for words in (["--help"], ["bert_head", "--help"], training, ["export", run]):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_wrong_option_is_one_line_whatever_the_terminal_can_show(encoding):
    for words, starts in (
        (["--epohcs", "3"], "Unrecognized options: --epohcs, 3; Perhaps you meant: --epochs INT"),
        (["--workers", "x"], "--workers x: is no whole number; all options:"),
    ):
        command = [sys.executable, "-m", "finetune.cli", "vgg_head", *words]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stderr
        assert said.startswith(f"finetune: {starts}")
        assert said.endswith("; all options: finetune vgg_head --help\n") and said.count("\n") == 1
        assert "---" not in said


SCRIPT = 'import finetune, sys; finetune.fit(finetune.image_head(images="digits", backbone="bundled/vgg", epochs=1), sys.argv[1], workers=2)'


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "finetune.cli", "vgg_head", "--train-samples", "50", "--workers", "2", "--augment", "light", "--run"],
        pytest.param(
            ["-m", "finetune.cli", "vgg_head", "--train-samples", "50", "--workers", "2", "--run"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["-c", SCRIPT], marks=pytest.mark.slow),
    ],
    ids=["samples", "kept features", "kept features, from Python"],
)
def test_worker_processes_end_with_the_process_that_started_them(tmp_path, words):
    options = ["--epochs", "1", "--quiet"] if words[0] == "-m" else []
    process = subprocess.Popen([sys.executable, *words, str(tmp_path / "run"), *options], start_new_session=True)
    try:
        assert process.wait(timeout=60) == 0
        deadline = time.monotonic() + 2
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)  # the workers belong to its group
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_run_goes_on_to_its_end_when_nobody_reads_its_output_any_more(tmp_path):
    process = finetune("vgg_head", "--epochs", "1", "--train-samples", "100", "--run", str(tmp_path / "run"))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert read(RunFolder(tmp_path / "run"))["status"] == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_output_that_cannot_be_written_is_an_error(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "finetune.cli", "new", "vgg_head", str(tmp_path / "my.py")],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
    assert process.returncode == 1 and "standard output cannot be written" in process.stderr


@pytest.mark.parametrize("command", ["summary", "rehearse", "look", "new"])
def test_commands_that_need_a_recipe_answer_when_they_are_asked_for_help(command, capsys):
    with suppress(SystemExit):
        assert main([command, "--help"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: finetune {command}") and not said.err
    assert ("photo_head" if command != "new" else "vgg_head") in said.out
