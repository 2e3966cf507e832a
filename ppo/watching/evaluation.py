"""Evaluation during training: the policy on held-out prompts, beside the reference on the same ones."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_vs_dpo.artifacts.errors import printable, terminal
from ppo_vs_dpo.artifacts.files import write_json
from ppo_vs_dpo.models.passes.logprobs import full_kl, pad_batch
from ppo_vs_dpo.models.sampling.generation import Generated, row_seed
from ppo_vs_dpo.models.text.prompts import decode_completion, encode_completion
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.roles import Roles
from ppo_vs_dpo.ppo.rollouts.prompts import PromptSet
from ppo_vs_dpo.ppo.rollouts.responses import final_scores, sample, score


class Evaluator:
    """Samples one response a prompt and measures it.

    The seeds of the samples are the same at each evaluation, and the same for the reference: two evaluations differ
    by the policies, not by the draw.
    """

    def __init__(self, roles: Roles, args: PPOConfig, accelerator: Accelerator):
        self.roles, self.args, self.accelerator = roles, args, accelerator
        self._reference: tuple[PromptSet, list[Generated], torch.Tensor] | None = None

    def _share(self, n: int) -> list[int]:
        """Rows of this rank. All ranks have as many: under ZeRO-3 each forward pass is everybody's.

        Where ``n`` does not divide, the last ones repeat row 0, which `_gather` leaves out again.
        """
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return [row if row < n else 0 for row in range(rank, rank + -(-n // ranks) * ranks, ranks)]

    def _draw(self, prompts: PromptSet, rows: list[int], what: str, reference: bool = False):
        """Responses to some prompts, and their scores."""
        seeds = [row_seed(self.args.seed, what, row) for row in rows]
        generated = sample(self.roles, [prompts.ids[row] for row in rows], seeds, self.args, reference)
        return generated, torch.tensor(score(self.roles, prompts, rows, generated, self.accelerator, self.args).total)

    def _of_reference(self, prompts: PromptSet):
        """The reference's responses and scores; drawn once, but for a reference that moves (``sync_ref_model``)."""
        if self._reference is None or self._reference[0] is not prompts or self.args.sync_ref_model:
            rows = self._share(len(prompts))
            self._reference = (prompts, *self._draw(prompts, rows, "evaluation", reference=True))
        return self._reference[1:]

    def run(self, prompts: PromptSet, prefix: str, step: int, score_bias: float) -> dict[str, float]:
        """Measure the policy.

        Returns:
            ``reward`` (final score), ``reward_se``, ``score`` (as the reward gave it), ``reference_score``, ``kl``
            (mean over responses of the exact KL at each sampled prefix, summed over tokens; nats), ``kl_se``,
            ``length``, ``eos_rate`` and ``objective = reward - kl_coef x kl``, each with the prefix.
        """
        rows = self._share(len(prompts))
        generated, scores = self._draw(prompts, rows, "evaluation")
        finished = torch.tensor([g.finished for g in generated])
        kl = self._kl([prompts.ids[row] for row in rows], [g.token_ids for g in generated])
        lengths = torch.tensor([float(len(g.token_ids)) for g in generated])
        ref_generated, ref_scores = self._of_reference(prompts)
        shaped_by = ref_scores[:, None] if self.args.reward_shaping == "par" else None
        coef = self.roles.length_coef
        final = final_scores(scores, finished, self.args, score_bias, lengths, coef, shaped_by)
        table = torch.stack([final, scores, kl, lengths, finished.float(), ref_scores], dim=1)
        table = self._gather(table, len(prompts))
        n = len(table)
        mean = table.mean(0).tolist()
        error = (table.std(0) / n**0.5).tolist() if n > 1 else [0.0] * table.shape[1]
        # The fixed coefficient, not an adaptive one at the moment: evaluations must be comparable.
        objective = mean[0] - self.args.kl_coef * mean[2]
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
        if self.accelerator.is_main_process and self.args.num_eval_samples:
            self._write_samples(step, prompts, rows, generated, scores, ref_generated, ref_scores)
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def completions(self, prompts: PromptSet, limit: int | None = None) -> list[dict]:
        """A response to each prompt and its score, in the prompts' order, on every rank."""
        total = len(prompts) if limit is None else min(limit, len(prompts))
        rows = self._share(total)
        generated, scores = self._draw(prompts, rows, "evaluation")
        own = [
            {
                "row": row,
                "prompt": prompts.prompts[row],
                "completion": decode_completion(self.roles.tokenizer, one.token_ids),
                "score": float(score),
                "finished": one.finished,
            }
            for row, one, score in zip(rows, generated, scores.tolist(), strict=True)
        ]
        by_row = {one["row"]: one for one in gather_object(own)}
        return [{key: by_row[row][key] for key in own[0] if key != "row"} for row in range(total)]

    @torch.no_grad()
    def _kl(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> torch.Tensor:
        """``(N,)`` sequence KL to the reference: exact over the vocabulary at each sampled prefix, summed."""
        size, policy, reference = self.args.local_rollout_forward_batch_size, self.roles.policy, self.roles.reference
        pieces = []
        for start in range(0, len(prompt_ids), size):
            part = slice(start, start + size)
            pad_id, device = self.roles.tokenizer.pad_token_id, self.accelerator.device
            batch = pad_batch(prompt_ids[part], response_ids[part], pad_id, device=device)
            with self.roles.computing():
                kl = full_kl(policy, reference.module, batch, self.args.logprob_temperature)
            pieces.append(kl.sum(1).cpu())
        return torch.cat(pieces) if pieces else torch.zeros(0)

    def _gather(self, table: torch.Tensor, total: int) -> torch.Tensor:
        """Rows of all ranks, in the order of the prompts, without those that only filled up a share."""
        rows = self.accelerator.gather(table.to(self.accelerator.device)).cpu()
        return rows.unflatten(0, (-1, len(table))).transpose(0, 1).flatten(0, 1)[:total]

    def _write_samples(self, step, prompts, rows, generated, scores, ref_generated, ref_scores) -> None:
        """A few completions beside the reference's: ``samples/update-N.json``, the same file again after a resume."""
        tokenizer = self.roles.tokenizer
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
            for i, row in enumerate(rows[: self.args.num_eval_samples])
        ]
        write_json(Path(self.args.output_dir) / "samples" / f"update-{step:06d}.json", shown)

    def mean_reference_score(self, prompts: PromptSet, limit: int) -> float:
        """Mean score of the reference completions of prompts: the bias that brings them to 0 (N+ detail 15).

        The column ``completion`` of the data where it exists, else samples of the reference.
        """
        total = min(limit, len(prompts))
        rows = self._share(total)
        if "completion" in prompts.columns:
            texts = [prompts.columns["completion"][row] for row in rows]
            generated = [Generated(encode_completion(self.roles.tokenizer, text), True) for text in texts]
            scores = torch.tensor(score(self.roles, prompts, rows, generated, self.accelerator, self.args).total)
        else:
            scores = self._draw(prompts, rows, "score_bias", reference=True)[1]
        return float(self._gather(scores[:, None], total).double().mean())


def print_rows(rows: list[dict], console: Console | None = None) -> None:
    """Completions as a table on the terminal; texts are shown as they are, never as markup."""
    table = Table(show_lines=True)
    for heading in ("prompt", "completion", "score"):
        table.add_column(heading)
    for row in rows:
        asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        table.add_row(*(Text(printable(text)) for text in (asked, row["completion"], f"{row['score']:.3g}")))
    (console or terminal()).print(table)
