"""The wheel alone, outside the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_runs_a_shipped_recipe_by_name_far_from_the_repository(tmp_path):
    def run(*words, **options):
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT))
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "finetune/py.typed",
        "finetune/recipes/vgg_head.py",
        "finetune/bundled/vgg.safetensors",
        "finetune/bundled/vgg.md",
    } <= set(names)
    of_texts = ("recipes/bert_head.py", "bundled/messages.csv", "bundled/bert/model.safetensors", "bundled/bert.md")
    assert {f"finetune/{name}" for name in of_texts} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    environment = os.environ | {"PYTHONPATH": str(site)}
    output = run(
        sys.executable, "-m", "finetune.cli", "vgg_head", "--epochs", "1", "--train-samples", "100", "--device", "cpu",
        cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert output.splitlines()[-1] == "runs/vgg_head-1"
    where = run(sys.executable, "-c", "import finetune; print(finetune.__file__)", cwd=tmp_path, env=environment)
    assert where.startswith(str(site))
    assert (tmp_path / "runs" / "vgg_head-1" / "code" / "vgg_head.py").is_file()
