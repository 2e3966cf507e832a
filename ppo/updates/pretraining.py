"""InstructGPT's pretraining mix: texts whose likelihood the policy keeps while it chases reward (arXiv 2203.02155,
eq. 2)."""

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.passes.logprobs import Batch, pad_batch
from ppo_vs_dpo.models.text.encoding import encode_answers, encode_prompts
from ppo_vs_dpo.ppo.config import PPOConfig


class PretrainingText:
    """Texts as token ids, drawn in shuffled order, shared among ranks and micro-batches.

    ``max_length`` tokens are kept of a text; ``batch_size`` ``None``: as many as the minibatch has responses.

    Raises:
        UserError: no such columns, or no text of at least two tokens.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int | None,
        seed: int,
    ):
        columns = set(dataset.column_names)
        if "text" in columns:
            rows = [tokenizer(text)["input_ids"] for text in dataset["text"]]
        elif {"prompt", "completion"} <= columns:
            prompts = list(dataset["prompt"])
            answers, _ = encode_answers(tokenizer, prompts, list(dataset["completion"]))
            rows = [[*head, *tail] for head, tail in zip(encode_prompts(tokenizer, prompts), answers, strict=True)]
        else:
            raise UserError(f"ptx_dataset needs a column text, or prompt and completion; it has {', '.join(columns)}.")
        self.rows = [ids[:max_length] for ids in rows if len(ids[:max_length]) > 1]
        if not self.rows:
            raise UserError("ptx_dataset has no text of at least two tokens.")
        self.pad_id, self.batch_size, self.seed = tokenizer.pad_token_id, batch_size, seed
        # Tokens predicted in the draw at hand, over all ranks: what the loss is averaged over.
        self.tokens_in_draw = 1

    @classmethod
    def of(cls, args: PPOConfig, dataset: Dataset | None, tokenizer: PreTrainedTokenizerBase):
        """Those of a run; ``None`` where ``ppo.ptx_coef`` is 0.

        Raises:
            UserError: they are asked for and not there.
        """
        if not args.ptx_coef:
            return None
        if dataset is None:
            raise UserError("ppo.ptx_coef is set and there is no ptx_dataset: pass pretraining texts, or ptx_coef=0.")
        return cls(dataset, tokenizer, args.ptx_max_length, args.ptx_batch_size, args.seed)

    def draw(self, number: int, size: int) -> list[int]:
        """Rows of one draw; a function of its arguments and the seed alone."""
        positions = np.arange(number * size, (number + 1) * size)
        order = {
            int(p): np.random.Generator(np.random.Philox(key=[self.seed + 1, int(p)])).permutation(len(self.rows))
            for p in np.unique(positions // len(self.rows))
        }
        return [int(order[int(i // len(self.rows))][i % len(self.rows)]) for i in positions]

    def batches(self, number: int, minibatch: int, parts: int, accelerator: Accelerator) -> list[Batch | None]:
        """This rank's texts of one draw, in ``parts`` pieces (``None`` where there are fewer texts than pieces)."""
        rows = self.draw(number, self.batch_size or minibatch)
        self.tokens_in_draw = sum(len(self.rows[row]) - 1 for row in rows)
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        pieces = [mine[part::parts] for part in range(parts)]
        return [
            pad_batch(
                [self.rows[r][:1] for r in piece],
                [self.rows[r][1:] for r in piece],
                self.pad_id,
                accelerator.device,
            )
            if piece
            else None
            for piece in pieces
        ]
