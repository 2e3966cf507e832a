"""TRL's ``RewardTrainer`` with one thing added: pairs whose label is a probability."""

from trl.trainer.reward_trainer import RewardTrainer

from ppo_vs_dpo.reward_model.data import COLUMNS, PairCollator


class PairRewardTrainer(RewardTrainer):
    """Bradley-Terry on pairs that are token ids already, with soft labels where the data has them.

    Without a column ``soft_label`` the loss is TRL's, -log sigma(d), d = r(chosen) - r(rejected) (less the margin).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = PairCollator(**vars(self.data_collator))

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Token ids are taken as they are (`reward_model.data`); texts go TRL's way."""
        if "prompt_ids" in dataset.column_names:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*COLUMNS, "margin", "soft_label"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy with the probability p that chosen is better (Bai et al. 2022b, section 4.1).

        -p log sigma(d) - (1 - p) log sigma(-d) = -log sigma(d) + (1 - p) d, since log sigma(-d) = log sigma(d) - d.
        """
        inputs = dict(inputs)
        labels = inputs.pop("soft_label", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if labels is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            difference = chosen - rejected - inputs.get("margin", 0.0)
            loss = loss + ((1 - labels) * difference).mean()
        return (loss, outputs) if return_outputs else loss
