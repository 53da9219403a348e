"""An environment in which this kit is not installed, and all that it needs is: where an export's receiver works."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

# Runs programs one after the other, each as it would run by itself, and says what each printed.
DRIVER = """
import contextlib, importlib.util, io, json, os, runpy, sys
assert importlib.util.find_spec("finetune") is None, "the kit is here"
printed = []
for folder, program in json.loads(sys.stdin.read()):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        runpy.run_path(program, run_name="__main__")
    printed.append(said.getvalue())
print(json.dumps(printed))
"""


def make_environment(folder: Path) -> Path:
    """The Python of a virtual environment with every package of this one but the kit."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    there = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True
    ).stdout.strip()
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "finetune" not in package.name and package.name != "__pycache__":
            (Path(there) / package.name).symlink_to(package)
    return python


def run_programs(python: Path, programs: list[tuple[Path, str]], place: Path) -> list[Any]:
    """What programs print, each in a folder of its own, read as Python's values."""
    import ast

    listed = []
    for number, (folder, text) in enumerate(programs):
        file = place / f"program-{number}.py"
        file.write_text(text, encoding="utf-8")
        listed.append((str(folder), str(file)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-W", "ignore", "-c", DRIVER], input=json.dumps(listed), capture_output=True, text=True, timeout=300,
        env=environment, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [ast.literal_eval(said) for said in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1])))
