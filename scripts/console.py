"""resnet-deploy: every script of this project as a subcommand."""

from __future__ import annotations

import runpy
import sys

from export.terminal.commands import CONSOLE_SCRIPT, PACKAGE, SCRIPTS

SUMMARIES = {
    "export": "export a ResNet to a bundle and prove every form equal to the eager model",
    "verify": "check a bundle again on this machine, or build its TensorRT engine here",
    "evaluate": "count how many labelled pictures the artefacts of some bundles get right",
    "classify": "name what is in some pictures",
    "serve-config": "write what Triton Inference Server or DeepStream reads of a bundle",
    "convert": "write a checkpoint as .safetensors",
    "benchmark": "compare ways of running a model on this machine",
    "train": "train a model, or compare trainings",
    "compile": "compile every kernel of a model ahead of time",
    "tune": "find the fastest launch configurations on this machine's GPU",
    "gpu": "prove every kernel and network on this machine's GPU and time them",
}


def main() -> int:
    """Run the script that the first argument names, as if its file had been run; the exit code."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(f"usage: {CONSOLE_SCRIPT} COMMAND ...; {CONSOLE_SCRIPT} COMMAND --help lists its flags\n\n{__doc__}\n")
        for name, summary in SUMMARIES.items():
            print(f"  {name:<12}  {summary}")
        return 0
    if command not in SCRIPTS:
        expected = ", ".join(SCRIPTS)
        sys.stderr.write(f"{CONSOLE_SCRIPT}: error: unknown command {command!r}; expected one of {expected}\n")
        return 2
    del sys.argv[1]
    runpy.run_module(f"{PACKAGE}.{SCRIPTS[command].removesuffix('.py')}", run_name="__main__", alter_sys=True)
    return 0  # a script exits by itself
