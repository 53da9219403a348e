import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.torture
def test_a_run_that_one_version_began_another_ends_with_the_same_bits_and_the_other_way_round(capsys):
    script = Path(__file__).with_name("two_versions.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=1800)
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("the same bits") == 8
