"""The commands and options that users and scripts rely on: none may vanish."""

from __future__ import annotations

import subprocess
import sys

import typer

from ifr_fast.cli import app

SURFACE = {
    "trace": "text --file -f --chat --continue-final-message --no-special-tokens --subfolder "
    "--model -m --position -p --threshold -t --granularity --impl "
    "--recording -r --max-memory --top-paths -k --json --html --png --save --graphml --dot "
    "--parquet --neuronpedia --neuronpedia-folder",
    "generate": "text --file -f --chat --continue-final-message --no-special-tokens --subfolder "
    "--model -m --max-new-tokens -n --threshold -t --granularity "
    "--temperature --seed --impl --sources -k --json",
    "bench": "--model -m --subfolder --lengths -n --file -f --impl --repeat --json",
    "plan": "tokens --model -m --subfolder --max-memory --config --device-memory --dtype",
    "survey": "inputs --out -o --model -m --subfolder --label-by --thresholds --text-field --split "
    "--max-tokens --batch-tokens --window-tokens --engine --workers --resume --strict --impl "
    "--device-map --report",
    "report": "directory --out -o --label --threshold -t --contrast --seed",
    "circuits": "--out --task --model -m --subfolder --prompts -n --seed --threshold -t --draws "
    "--patch-prompts --keep-prompts --keep-threshold --cost-prompts --input-prompts --impl",
    "doctor": "--impl",
}


def test_no_command_and_no_option_vanishes() -> None:
    root = typer.main.get_command(app)
    assert [name for p in root.params for name in p.opts] == ["--version"]
    found = {
        name: [option for parameter in command.params for option in parameter.opts]
        for name, command in root.commands.items()
    }
    for name, options in SURFACE.items():
        assert set(options.split()) <= set(found[name]), name


def test_every_option_has_help() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, (name, parameter.opts)


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from ifr_fast.cli import main
sys.argv = ["ifr-fast", "trace", "--help"]
try:
    main()
except SystemExit:
    pass
print(*sorted({"torch", "numpy", "transformers", "pyarrow", "matplotlib"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--neuronpedia" in run.stdout
    assert run.stdout.splitlines()[-1] == ""
