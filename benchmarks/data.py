"""How long 160,000 pairs (HH's size) take: read, checked, split and written by the step ``data``; then tokenised.

    python -m benchmarks.data [--pairs 160000] [--model FOLDER]

Prints seconds and the highest memory of each part, each in a process of its own.
"""

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Mean lengths of Anthropic HH (train): dialogues of about 2.4 turns a side, answers of about 70 words.
WORDS = 4_000


def write_pairs(path: Path, count: int, seed: int = 0) -> int:
    """Dialogues of HH's shape and size; returns the bytes written."""
    rng = random.Random(seed)
    letters = "aaabcdeeeefghiiijklmnnooopqrrsssttuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS)]

    def say(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most))).capitalize() + "."

    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            head = f"\n\nHuman: {say(4, 30)}"
            for _ in range(rng.choice((0, 1, 1, 2))):
                head += f"\n\nAssistant: {say(10, 90)}\n\nHuman: {say(3, 25)}"
            row = {side: f"{head}\n\nAssistant: {say(10, 130)}" for side in ("chosen", "rejected")}
            out.write(json.dumps(row) + "\n")
    return path.stat().st_size


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer of the usual kind (byte-level BPE, trained on a few thousand dialogues) and a config beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    sample = folder.with_suffix(".sample.jsonl")
    write_pairs(sample, 3_000, seed=1)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8_000, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator((line for line in sample.open()), trainer)
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    LlamaConfig(vocab_size=8_000).save_pretrained(folder)


def measured(name: str, *command: str) -> dict[str, float]:
    """Run a command; its seconds and its highest memory in MB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    # A process between, whose only child this is: the kernel keeps one maximum for all children of a process.
    watch = (
        "import resource, subprocess, sys;"
        "code = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode;"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", watch, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed")
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {"seconds": seconds, "cpu_seconds": cpu, "max_mb": int(done.stdout.split()[-1]) / 1024}
    sys.stdout.write(f"{name:<46}{row['seconds']:8.1f} s {row['cpu_seconds']:8.1f} CPU s {row['max_mb']:8.0f} MB\n")
    sys.stdout.flush()
    return row


def tokenise(run: str, model: str) -> None:
    """Token ids of the training pairs, as the reward model and DPO get them; the second time they are found."""
    from ppo_vs_dpo.models.loading.pretrained import load_tokenizer
    from ppo_vs_dpo.models.text.encoding import encode_pair_file

    pairs = encode_pair_file(load_tokenizer(model), Path(run, "pairs", "train.parquet"), Path(run, "pairs", "tokens"))
    lengths = pairs["length"][:]
    sys.stderr.write(f"{len(lengths)} pairs, {max(lengths)} tokens at most\n")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=160_000, help="how many pairs")
    parser.add_argument("--model", help="a model folder whose tokenizer is used; default: a byte-level BPE made here")
    parser.add_argument("--folder", help="where to work; default: a temporary folder, removed at the end")
    parser.add_argument("--tokenise", nargs=2, metavar=("RUN", "MODEL"), help="one part alone")
    options = parser.parse_args()
    if options.tokenise:
        tokenise(*options.tokenise)
        return
    folder = Path(options.folder or tempfile.mkdtemp(prefix="benchmark-data-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        source, run = folder / "pairs.jsonl", folder / "run"
        size = write_pairs(source, options.pairs)
        sys.stdout.write(f"{options.pairs} pairs of generated dialogues, {size / 1e6:.0f} MB\n")
        model = Path(options.model) if options.model else folder / "model"
        if not options.model:
            byte_tokenizer(model)
        run.mkdir(exist_ok=True)
        config = (
            f"seed: 1\nmodel: {{path: '{model}'}}\ndata: {{source: pairs, path: '{source}', format: hh, "
            f"max_prompt_tokens: 512, max_response_tokens: 512, on_problem: {{truncated: drop}}}}\n"
        )
        (run / "config.yaml").write_text(config)
        python = sys.executable
        measured("inspect (read, map, check)", python, "-m", "ppo_vs_dpo.pipeline.cli", "data", "inspect", str(source))
        measured(
            "data (read, check, count tokens, split, write)",
            python,
            "-m",
            "ppo_vs_dpo.preferences",
            str(run),
            "--step",
            "data",
        )
        measured("pairs (hand on, hash)", python, "-m", "ppo_vs_dpo.preferences", str(run), "--step", "pairs")
        part = (python, "-m", "benchmarks.data", "--tokenise", str(run), str(model))
        measured("tokenise for training and cache", *part)
        measured("the same again, from the cache", *part)
        measured("importing torch, transformers and datasets", python, "-c", "import ppo_vs_dpo.models.text.encoding")
    finally:
        if not options.folder:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
