"""What the trainer does under DeepSpeed only: settle the configuration, and say what a rank holds."""

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sharding.deepspeed import check_settings
from ppo_vs_dpo.models.sharding.state import state_bytes
from ppo_vs_dpo.ppo.roles.roles import held_by_role


class Sharded:
    """The part of `ppo.trainer.PPOTrainer` that knows of shards."""

    def held_bytes(self) -> dict[str, int]:
        """Bytes that this rank holds of each role's weights and, sharded, of the optimizer and its fp32 weights."""
        reward = next((part.model for part in self.rewards.parts if hasattr(part, "model")), None)
        held = held_by_role(self.policy, self.value_model, self.reference.model, reward)
        return {**held, **state_bytes(self.model_wrapped)} if self.is_deepspeed_enabled else held

    def settle_deepspeed(self) -> None:
        """Fill in what the DeepSpeed configuration leaves to the Trainer (``auto``), before any engine is made.

        Raises:
            UserError: it contradicts the settings, or asks for what cannot work.
        """
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage < 1:
            raise UserError("deepspeed.zero_optimization.stage=0 shards nothing: leave out deepspeed for plain DDP.")
        if plugin.zero_stage == 3 and not self.args.ds3_gather_for_generation:
            raise UserError(
                "ppo.ds3_gather_for_generation=false cannot work under ZeRO-3: ranks whose responses end early would "
                "leave the others waiting for their part of the weights. Set it to true."
            )
        check_settings(self.args, "ppo")
        plugin.hf_ds_config.trainer_config_finalize(self.args, self.model, self.num_updates)
