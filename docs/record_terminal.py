"""Record the picture of the terminal in the README: a real run, killed and resumed, drawn by rich.

    python docs/record_terminal.py

Writes docs/terminal.svg.
"""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent


def run(console: Console, shown: str, words: list[str], folder: Path, kill_after_seconds: float = 0.0) -> None:
    """Run a command, record what it prints; so many seconds after its fourth epoch, kill it."""
    console.print(Text(f"$ {shown}", style="bold green"))
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.cli", *words], stdout=subprocess.PIPE, text=True, cwd=folder
    )
    for line in process.stdout:
        console.print(Text(line.rstrip()))
        if kill_after_seconds and "epoch  4/" in line:
            time.sleep(kill_after_seconds)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            console.print(Text("Killed", style="bold red"))
            return
    process.wait()


def main() -> None:
    console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = ["vgg_head", "--epochs", "10", "--augment", "light", "--save-every-steps", "10"]
        run(
            console,
            "finetune recipes/vgg_head.py --epochs 10 --augment light --save-every-steps 10",
            recipe,
            Path(folder),
            kill_after_seconds=0.5,
        )
        run(console, "finetune resume", ["resume"], Path(folder))
    console.save_svg(str(HERE / "terminal.svg"), title="finetune")


if __name__ == "__main__":
    main()
