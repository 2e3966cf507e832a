"""Evaluation during training: the policy on held-out prompts, beside the reference on the same ones."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppo_vs_dpo.artifacts.files import write_json
from ppo_vs_dpo.models.passes.logprobs import full_kl, pad_batch
from ppo_vs_dpo.models.sampling.generation import row_seed
from ppo_vs_dpo.models.text.prompts import decode_completion, encode_completion
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet

if TYPE_CHECKING:
    from ppo_vs_dpo.ppo.trainer import PPOTrainer


class Evaluator:
    """Samples one response a prompt and measures it.

    The seeds of the samples are the same at each evaluation, and the same for the reference: two evaluations differ
    by the policies, not by the draw.
    """

    def __init__(self, trainer: "PPOTrainer"):
        self.trainer = trainer
        self._reference: tuple[PromptSet, list, torch.Tensor] | None = None

    def _share(self, n: int) -> list[int]:
        """Rows of this rank. All ranks have as many: under ZeRO-3 each forward pass is everybody's.

        Where ``n`` does not divide, the last ones repeat row 0, which `_gather` leaves out again.
        """
        rank, ranks = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        return [row if row < n else 0 for row in range(rank, rank + -(-n // ranks) * ranks, ranks)]

    def _seeds(self, rows: list[int]) -> list[int]:
        return [row_seed(self.trainer.args.seed, "evaluation", row) for row in rows]

    def _of_reference(self, prompts: PromptSet):
        """The reference's responses and scores; drawn once, but for a reference that moves (``sync_ref_model``)."""
        trainer = self.trainer
        if self._reference is None or self._reference[0] is not prompts or trainer.args.sync_ref_model:
            rows = self._share(len(prompts))
            generated = trainer.sample([prompts.ids[row] for row in rows], self._seeds(rows), reference=True)
            self._reference = (prompts, generated, trainer.score(rows, generated, prompts))
        return self._reference[1:]

    def run(self, prompts: PromptSet, prefix: str) -> dict[str, float]:
        """Measure the policy.

        Returns:
            ``reward`` (final score), ``reward_se``, ``score`` (as the reward gave it), ``reference_score``, ``kl``
            (mean over responses of the exact KL at each sampled prefix, summed over tokens; nats), ``kl_se``,
            ``length``, ``eos_rate`` and ``objective = reward - kl_coef x kl``, each with the prefix.
        """
        trainer = self.trainer
        rows = self._share(len(prompts))
        generated = trainer.sample([prompts.ids[row] for row in rows], self._seeds(rows))
        scores = trainer.score(rows, generated, prompts)
        finished = torch.tensor([g.finished for g in generated])
        final = trainer.final_scores(scores, finished)
        kl = self._kl([prompts.ids[row] for row in rows], [g.token_ids for g in generated])
        lengths = torch.tensor([float(len(g.token_ids)) for g in generated])
        ref_generated, ref_scores = self._of_reference(prompts)
        table = torch.stack([final, scores, kl, lengths, finished.float(), ref_scores], dim=1)
        table = self._gather(table.to(trainer.accelerator.device), len(prompts))
        n = len(table)
        mean = table.mean(0).tolist()
        error = (table.std(0) / n**0.5).tolist() if n > 1 else [0.0] * table.shape[1]
        # The fixed coefficient, not an adaptive one at the moment: evaluations must be comparable.
        objective = mean[0] - trainer.args.kl_coef * mean[2]
        metrics = {
            "objective": objective,
            "reward": mean[0],
            "reward_se": error[0],
            "score": mean[1],
            "kl": mean[2],
            "kl_se": error[2],
            "length": mean[3],
            "eos_rate": mean[4],
            "reference_score": mean[5],
        }
        self._write_samples(prompts, rows, generated, scores, ref_generated, ref_scores)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    @torch.no_grad()
    def _kl(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> torch.Tensor:
        """``(N,)`` sequence KL to the reference: exact over the vocabulary at each sampled prefix, summed."""
        trainer = self.trainer

        size, device = trainer.args.local_rollout_forward_batch_size, trainer.accelerator.device
        pieces = []
        for start in range(0, len(prompt_ids), size):
            part = slice(start, start + size)
            batch = pad_batch(
                prompt_ids[part], response_ids[part], trainer.processing_class.pad_token_id, device=device
            )
            pieces.append(full_kl(trainer.policy, trainer.reference.module, batch, trainer.temperature).sum(1).cpu())
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def _gather(self, table: torch.Tensor, total: int) -> torch.Tensor:
        """Rows of all ranks, in the order of the prompts, without those that only filled up a share."""
        return (
            self.trainer.accelerator.gather(table)
            .cpu()
            .unflatten(0, (-1, len(table)))
            .transpose(0, 1)
            .flatten(0, 1)[:total]
        )

    def _write_samples(self, prompts, rows, generated, scores, ref_generated, ref_scores) -> None:
        """A few completions beside the reference's: ``samples/update-N.json``, the same file again after a resume."""
        trainer = self.trainer
        if not trainer.is_world_process_zero() or not trainer.args.num_eval_samples:
            return
        tokenizer = trainer.processing_class
        shown = [
            {
                "prompt": prompts.prompts[row],
                "completion": decode_completion(tokenizer, generated[i].token_ids),
                "score": float(scores[i]),
                "finished": generated[i].finished,
                "reference_completion": decode_completion(tokenizer, ref_generated[i].token_ids),
                "reference_score": float(ref_scores[i]),
                "reference_finished": ref_generated[i].finished,
            }
            for i, row in enumerate(rows[: trainer.args.num_eval_samples])
        ]
        step = trainer.state.global_step
        write_json(Path(trainer.args.output_dir) / "samples" / f"update-{step:06d}.json", shown)

    def mean_reference_score(self, limit: int) -> float:
        """Mean score of the reference completions of training prompts: the bias that brings them to 0 (N+ detail 15).

        The column ``completion`` of the training data where it exists, else samples of the reference.
        """
        trainer, prompts = self.trainer, self.trainer.prompts
        rows = self._share(min(limit, len(prompts)))
        if "completion" in prompts.columns:
            from ppo_vs_dpo.models.sampling.generation import Generated

            texts = [prompts.columns["completion"][row] for row in rows]
            generated = [Generated(encode_completion(trainer.processing_class, text), True) for text in texts]
        else:
            seeds = [row_seed(trainer.args.seed, "score_bias", row) for row in rows]
            generated = trainer.sample([prompts.ids[row] for row in rows], seeds, reference=True)
        scores = trainer.score(rows, generated, prompts)
        table = self._gather(scores[:, None].to(trainer.accelerator.device), min(limit, len(prompts)))
        return float(table.double().mean())
