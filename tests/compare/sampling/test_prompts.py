"""What was trained on: each prompt of the three tables once, whatever else their rows hold."""

from ppo_vs_dpo.artifacts.files import write_parquet
from ppo_vs_dpo.artifacts.run import RunFolder
from ppo_vs_dpo.compare.sampling.policies import training_prompts
from ppo_vs_dpo.preferences.schema import prompt_id


def test_training_prompts(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    texts = [f"prompt {number % 1500}" for number in range(2500)]
    ids = [prompt_id(text) for text in texts]
    write_parquet(tmp_path / "data" / "prompts_train.parquet", {"prompt": texts, "prompt_id": ids})
    pairs = [{"prompt": prompt, "chosen": chat[1:], "rejected": chat[1:]} for prompt in (chat, chat[:1], chat)]
    write_parquet(tmp_path / "pairs" / "train.parquet", pairs)
    sft = {"prompt": ["prompt 3", "another"], "completion": ["a", "b"]}
    write_parquet(tmp_path / "data" / "sft_train.parquet", sft)
    found = list(training_prompts(RunFolder(tmp_path)))
    expected = [*texts[:1500], chat, chat[:1], "another"]
    assert [prompt for _, prompt in found] == expected
    assert [identity for identity, _ in found] == [prompt_id(prompt) for prompt in expected]
