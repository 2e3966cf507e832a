"""What vLLM's workers do for a trainer: vLLM imports this by ``--worker-extension-cls``
(`models.sampling.vllm_server`)."""

from collections.abc import Iterator

import torch


class PolicyWeights:
    """Methods that vLLM adds to its worker; ``/collective_rpc`` calls them by name."""

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
