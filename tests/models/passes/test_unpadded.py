"""Training without padding equals TRL's padded pass, gradients included; scores are read at the right token."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification
from trl.trainer.utils import add_fused_lm_head

from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward
from ppo_vs_dpo.models.passes import fused
from ppo_vs_dpo.models.passes.logprobs import base, sequence_scores
from ppo_vs_dpo.models.passes.unpadded import score_at_last_token, skip_padding

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def rows(lengths, width, seed=0):
    """Random right-padded rows; labels on the last half of each."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 20, (len(lengths), width))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    answer = torch.arange(width) >= torch.tensor(lengths)[:, None] // 2
    labels = ids.masked_fill((mask == 0) | ~answer, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


BATCH = rows([9, 2, 5, 5, 12, 1, 7, 3, 9, 4], 12)


def train_pass(model, batch):
    model.zero_grad()
    output = model(**batch, fused_lm_head=True, use_cache=False)
    weight = torch.linspace(0.5, 1.5, output.log_probs.numel()).view(output.log_probs.shape)
    (output.loss + (output.log_probs * weight).sum() / 50).backward()
    return output, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def variant_of(model, variant):
    """A model that trains, with TRL's head; with adapters, or computing activations again."""
    model = model.train()
    add_fused_lm_head(model, outputs=FIELDS)
    if variant == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if variant == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("variant", ["plain", "lora", "checkpointing"])
def test_outputs_and_gradients_equal_the_padded_pass(tiny_llama, heads, variant):
    padded, packed = (variant_of(tiny_llama(num_key_value_heads=heads), variant) for _ in range(2))
    assert skip_padding(packed)
    (expected, expected_grads), (output, grads) = train_pass(padded, BATCH), train_pass(packed, BATCH)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    # TRL gives the log-probability of token t in column t - 1; 0 where there is no label.
    for name in FIELDS:
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=1e-5)
    assert len(grads) == len(expected_grads) > 0
    for mine, other in zip(grads, expected_grads, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max().clamp_min(1)


def pairs_of(prompts, first, second, width=14):
    """Pairs as the trainers hand them over: chosen rows, then rejected ones of the same prompts; labels on answers."""
    torch.manual_seed(3)
    words = [torch.randint(3, 20, (width,)).tolist() for _ in range(3 * len(prompts))]
    ids, mask, labels = [], [], []
    for side, answers in enumerate((first, second)):
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row = words[number][:prompt] + words[(1 + side) * len(prompts) + number][:answer]
            gap = width - len(row)
            ids.append([*row, *[0] * gap])
            mask.append([1] * len(row) + [0] * gap)
            labels.append([-100] * prompt + row[prompt:] + [-100] * gap)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


# Short and long prompts, answers of uneven length, an empty one, and two pairs without a difference.
PAIRED = pairs_of([5, 1, 8, 3, 6], [4, 7, 0, 2, 5], [6, 2, 5, 2, 3])
PAIRED["input_ids"][8] = PAIRED["input_ids"][3]
PAIRED["labels"][8] = PAIRED["labels"][3]


@pytest.fixture
def read():
    """A function that notes how many tokens a model's backbone reads at each call."""

    def watch(model):
        sizes = []
        inner = getattr(base(model), base(model).base_model_prefix)
        inner.layers[0].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
        return sizes

    return watch


@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("variant", ["plain", "lora", "checkpointing", "other layers"])
def test_what_pairs_have_in_common_is_read_once(tiny_llama, read, monkeypatch, heads, variant):
    if variant == "other layers":
        monkeypatch.setattr(fused, "LAYERS", ())

    padded, packed = (variant_of(tiny_llama(num_key_value_heads=heads), variant) for _ in range(2))
    skip_padding(packed, pairs=True)
    sizes = read(packed)
    (expected, expected_grads), (output, grads) = train_pass(padded, PAIRED), train_pass(packed, PAIRED)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    for name in FIELDS:
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=1e-5)
    for mine, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-4)
    # Prompts twice would be 23 tokens more; the last token of each prompt is each row's own, as its state is asked
    # for, but in the pair with an empty answer: there nobody asks the chosen row.
    assert sizes[0] == int(PAIRED["attention_mask"].sum()) - (23 - 5)
    with torch.no_grad():
        torch.testing.assert_close(
            packed(**PAIRED, fused_lm_head=True, use_cache=False).log_probs, expected.log_probs, atol=1e-5, rtol=1e-5
        )


def test_rows_that_are_no_pairs_share_nothing_or_what_they_have(tiny_llama, read):
    """Left padding, rows of an odd number, dropout: each row for itself. Any rows that begin alike are right."""
    padded, packed = tiny_llama().eval(), tiny_llama().eval()
    for model in (padded, packed):
        add_fused_lm_head(model, outputs=FIELDS)
    skip_padding(packed, pairs=True)
    sizes = read(packed)
    odd = {name: values[:5] for name, values in PAIRED.items()}
    gaps = (PAIRED["attention_mask"] == 0).sum(1).tolist()
    left = {
        name: torch.stack([row.roll(gap) for row, gap in zip(values, gaps, strict=True)])
        for name, values in PAIRED.items()
    }
    for batch in (BATCH, odd, left):
        found = packed(**batch, fused_lm_head=True, use_cache=False).log_probs
        expected = padded(**batch, fused_lm_head=True, use_cache=False).log_probs
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert batch is BATCH or sizes[-1] == batch["attention_mask"].sum()
    packed.model.layers[0].mlp.down_proj = torch.nn.Sequential(
        packed.model.layers[0].mlp.down_proj, torch.nn.Dropout()
    )
    for training in (False, True):
        packed.train(training)
        packed(**PAIRED, fused_lm_head=True, use_cache=False)
        assert (sizes[-1] == PAIRED["attention_mask"].sum()) == training


def test_noise_on_embeddings_is_each_row_s_own(tiny_llama, read):
    """NEFTune, which a reward model may train with: by transformers' own hook."""
    from transformers.integrations.neftune import activate_neftune

    model = tiny_llama().train()
    add_fused_lm_head(model, outputs=FIELDS)
    skip_padding(model, pairs=True)
    sizes = read(model)
    model(**PAIRED, fused_lm_head=True, use_cache=False)
    activate_neftune(model, 5.0)
    model(**PAIRED, fused_lm_head=True, use_cache=False)
    whole = int(PAIRED["attention_mask"].sum())
    assert sizes[0] < sizes[1] == whole


def test_generation_and_plain_calls_stay_as_they_are(tiny_llama):
    fresh, taught = tiny_llama(), tiny_llama()
    add_fused_lm_head(taught, outputs=FIELDS)
    skip_padding(taught)
    train_pass(taught, BATCH)
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert taught.generate(prompt, **settings).tolist() == fresh.generate(prompt, **settings).tolist()
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(taught(**inputs).logits[real], fresh(**inputs).logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(taught(prompt).logits, fresh(prompt).logits, atol=1e-5, rtol=1e-5)


def test_other_architectures_keep_the_padded_pass():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    before = model.forward
    assert not skip_padding(model)
    assert model.forward == before


def test_asking_twice_changes_nothing(tiny_llama):
    model = tiny_llama()
    add_fused_lm_head(model, outputs=FIELDS)
    skip_padding(model)
    forward = model.forward
    assert skip_padding(model)
    assert model.forward is forward


@pytest.fixture
def reward_model(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)

    def build():
        torch.manual_seed(0)
        return load_value_or_reward(tmp_path, trainable=True)

    return build


def test_scores_and_gradients_equal_transformers_own(reward_model):
    """Where padding is a token of its own, transformers reads the right one."""
    plain, taught = reward_model(), reward_model()
    score_at_last_token(taught)
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    expected, scores = plain(**inputs).logits, taught(**inputs).logits
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    for model, values in ((plain, expected), (taught, scores)):
        (values * torch.arange(1.0, 11)[:, None]).sum().backward()
        model.grads = [p.grad for p in model.parameters()]
    for mine, other in zip(taught.grads, plain.grads, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max().clamp_min(1)


def test_scores_of_pairs(reward_model, read):
    """The score is read at the last token, each row's own, also where the rows are equal to it."""
    taught, plain = reward_model(), reward_model()
    score_at_last_token(taught, pairs=True)
    score_at_last_token(plain)
    sizes, results = read(taught), []
    for model in (taught, plain):
        scores = model(PAIRED["input_ids"], PAIRED["attention_mask"]).logits
        scores.squeeze(-1).mul(torch.linspace(0.5, 1.5, len(scores))).sum().backward()
        results.append([scores.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-4)
    # All prompts, but of the pair whose chosen answer is empty the last token; and of the equal pair the answer's
    # first token.
    assert sizes[0] == int(PAIRED["attention_mask"].sum()) - (23 - 1 + 1)


@pytest.mark.parametrize("packable", [True, False])
def test_the_score_is_read_at_eos_also_where_it_is_the_padding(reward_model, monkeypatch, packable):
    if not packable:
        monkeypatch.setattr("ppo_vs_dpo.models.passes.unpadded.can_pack", lambda model: False)
        monkeypatch.setattr("ppo_vs_dpo.models.passes.logprobs.can_pack", lambda model: False)
    eos = 2
    finished = torch.tensor([[5, 7, eos, eos, eos]])  # a finished row: the third token is real, the rest is padding
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    alone = torch.tensor([[5, 7, eos]])
    model = reward_model()
    model.config.pad_token_id = eos
    expected = sequence_scores(model, alone, torch.ones_like(alone))
    wrong = model(input_ids=finished, attention_mask=mask).logits[:, 0]
    score_at_last_token(model)
    torch.testing.assert_close(model(finished, mask).logits[:, 0], expected, atol=1e-6, rtol=0)
    # What transformers does by itself: the token before EOS.
    before = sequence_scores(model, alone[:, :2], torch.ones(1, 2, dtype=torch.long))
    torch.testing.assert_close(wrong, before, atol=1e-6, rtol=0)
    assert (wrong - expected).abs() > 1e-3


def test_left_padding_and_no_mask(reward_model):
    model = reward_model()
    score_at_last_token(model)
    row = torch.tensor([[5, 7, 9]])
    left, mask = torch.tensor([[0, 0, 5, 7, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(model(left, mask).logits, model(row).logits, atol=1e-6, rtol=0)
    assert isinstance(model, LlamaForSequenceClassification)
