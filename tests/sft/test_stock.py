"""The road of stock parts (`benchmarks.stock`) reads the tokens that ours reads, stage by stage."""

import copy

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.stock import read_alike
from ppo_vs_dpo.dpo.data import dpo_dataset
from ppo_vs_dpo.reward_model.data import reward_dataset
from ppo_vs_dpo.sft.data import sft_dataset
from tests.sft.tiny_run import make_rows

# As many chat templates do, this one writes something after the token that ends an answer: "and".
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {{ eos_token }} and {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.mark.parametrize("conversational", [True, False])
def test_the_same_tokens(word_tokenizer, tiny_llama, tmp_path, conversational):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = TEMPLATE
    pairs = Dataset.from_list(make_rows(6, conversational)).select_columns(["prompt", "chosen", "rejected"])
    answers = pairs.rename_column("chosen", "completion").select_columns(["prompt", "completion"])
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}

    def stock(trainer, config, rows, model=None, **more):
        args = config(str(tmp_path), **plain)
        made = trainer(model=model or tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer, **more)
        return made.train_dataset

    def columns(rows, *names):
        return [[list(row[name]) for name in names] for row in rows]

    ours = columns(sft_dataset(answers, tokenizer, True, None, None), "input_ids", "labels")
    assert columns(stock(SFTTrainer, SFTConfig, read_alike(tokenizer, answers)), "input_ids", "labels") == ours
    # What it is for: handed the messages, TRL trains at the template's last word, too.
    messages = columns(stock(SFTTrainer, SFTConfig, answers), "input_ids", "labels")
    assert (messages != ours) == conversational

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ours = columns(dpo_dataset(pairs, tokenizer), *names)
    read = stock(DPOTrainer, DPOConfig, read_alike(tokenizer, pairs), ref_model=tiny_llama())
    assert columns(read, *names) == ours

    sides = [[row[0] + answer for answer in row[1:]] for row in columns(reward_dataset(pairs, tokenizer), *names)]
    tiny_llama().save_pretrained(tmp_path / "policy")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", num_labels=1, pad_token_id=0)
    read = stock(RewardTrainer, RewardConfig, read_alike(tokenizer, pairs), model)
    assert columns(read, "chosen_ids", "rejected_ids") == sides
