"""Standard output that is no terminal: tables keep their lines whole, and a reader that goes away ends the command quietly."""

import json
import os
import subprocess
import sys

import pytest


def run(*arguments: str, stdout: int) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bitpress", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("--help",), ("models", "--nonsense", "--json")])
def test_a_closed_pipe_is_no_error(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(*arguments, stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_tables_in_a_pipe_are_as_wide_as_their_content() -> None:
    rows = json.loads(run("models", "--json", stdout=subprocess.PIPE).stdout)
    lines = run("models", stdout=subprocess.PIPE).stdout.splitlines()
    assert len(lines) == 1 + len(rows)
    assert [line.rstrip() for line in lines] == lines
    assert all(row["what"] in line for row, line in zip(rows, lines[1:], strict=True))


def test_lists_of_models_load_no_torch() -> None:
    code = (
        "import sys; from bitpress.checkpoints.named import describe_models; describe_models(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
