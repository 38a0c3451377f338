"""The decoders of secure aggregation under a coverage-guided fuzzer, in a process with little memory."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parents[1] / "fuzz" / "decoders.py"
SECONDS = 75


@pytest.mark.slow
def test_no_bytes_crash_hang_or_fill_the_memory(tmp_path):
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python or platform")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    subprocess.run([sys.executable, FUZZER, "--seeds", corpus], check=True, timeout=120)
    assert len(list(corpus.iterdir())) > 10
    options = [f"-max_total_time={SECONDS}", "-timeout=5", "-rss_limit_mb=600", "-max_len=20000", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, FUZZER, *options, corpus], capture_output=True, text=True, timeout=SECONDS + 120, check=False
    )
    print(done.stderr[-3000:])
    assert done.returncode == 0, done.stderr[-2000:]
    runs = int(done.stderr.rpartition("Done ")[2].split()[0])
    assert runs > 10_000
