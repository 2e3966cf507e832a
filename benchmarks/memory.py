"""Memory of PPO's roles: four separate models against one shared base.

    python benchmarks/memory.py MODEL_FOLDER_OR_NAME [--rank 16] [--markdown FILE]

Each arrangement is built in a process of its own: bytes of weights by role (a tensor that several roles share counts
once, under ``base``), and what the process holds in memory when all four are there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from ppo_vs_dpo.artifacts import card


def separate(path: str, rank: int) -> dict[str, int]:
    """Policy and value model with adapters of their own, reference and reward model whole: four copies of the base."""
    from ppo_vs_dpo.models.loading.config import LoraSettings
    from ppo_vs_dpo.models.loading.pretrained import load_policy, load_value_or_reward
    from ppo_vs_dpo.ppo.roles.given import add_adapters
    from ppo_vs_dpo.ppo.roles.roles import held_by_role

    lora = LoraSettings(r=rank, alpha=2 * rank, target_modules=targets(path))
    policy, value_model = load_policy(path), load_value_or_reward(path)
    reference, reward = load_policy(path), load_value_or_reward(path)
    policy, value_model = add_adapters(policy, value_model, lora.peft_config("CAUSAL_LM"))
    return measured(held_by_role(policy, value_model, reference, reward))


def shared(path: str, rank: int) -> dict[str, int]:
    """The four as adapters on one base."""
    from tempfile import TemporaryDirectory

    from ppo_vs_dpo.models.loading.config import LoraSettings
    from ppo_vs_dpo.models.loading.pretrained import load_policy
    from ppo_vs_dpo.ppo.roles.roles import held_by_role
    from ppo_vs_dpo.ppo.roles.shared import share_base

    lora = LoraSettings(r=rank, alpha=2 * rank, target_modules=targets(path))
    with TemporaryDirectory() as folder:
        save_reward_adapter(path, lora, Path(folder))
        policy, value_model, reward = share_base(load_policy(path), lora, Path(folder), "reward_model")
    return measured(held_by_role(policy, value_model, None, reward))


def save_reward_adapter(path: str, lora, folder: Path) -> None:
    """An adapter as the reward-model stage leaves it; made in a process of its own, so that it costs nothing here."""
    code = (
        "import sys; from ppo_vs_dpo.models.loading.pretrained import load_value_or_reward;"
        "from ppo_vs_dpo.models.loading.config import LoraSettings;"
        "from peft import get_peft_model; path, rank, names, out = sys.argv[1:];"
        "lora = LoraSettings(r=int(rank), alpha=2 * int(rank), target_modules=names.split(','));"
        "get_peft_model(load_value_or_reward(path), lora.peft_config('SEQ_CLS')).save_pretrained(out)"
    )
    names = ",".join(lora.target_modules)
    subprocess.run([sys.executable, "-c", code, path, str(lora.r), names, str(folder)], check=True)


def targets(path: str) -> list[str]:
    """The layers that peft adapts by default in this architecture."""
    from transformers import AutoConfig

    from ppo_vs_dpo.pipeline.planning.plan import default_targets

    return default_targets(AutoConfig.from_pretrained(path).model_type)


def measured(roles: dict[str, int]) -> dict[str, int]:
    """The roles' bytes and the resident set of this process (Linux), in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    (resident,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:")]
    return {**roles, "weights": sum(roles.values()), "process": resident}


def in_a_process(arrangement: str, path: str, rank: int) -> dict[str, int]:
    """Build one arrangement in a fresh process."""
    line = [sys.executable, __file__, path, "--rank", str(rank), "--one", arrangement]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(figures: dict[str, dict[str, int]]) -> str:
    """The figures in MB, a row for each role."""
    names = ["base", "policy", "value", "reference", "reward", "weights", "process"]
    rows = [
        [name, *(f"{figures[kind][name] / 1e6:,.1f}" if name in figures[kind] else "-" for kind in figures)]
        for name in names
    ]
    for name in ("weights", "process"):
        share = figures["shared"][name] / figures["separate"][name]
        rows.append([f"{name}, one base / separate", "", f"{share:.3f}"])
    return card.table(("MB", "separate", "one base"), rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a name on the Hub")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="also write the table into this file")
    parser.add_argument("--one", choices=("separate", "shared"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps({"separate": separate, "shared": shared}[given.one](given.model, given.rank)))
        return
    figures = {kind: in_a_process(kind, given.model, given.rank) for kind in ("separate", "shared")}
    text = table(figures)
    print(text)
    if given.markdown:
        from ppo_vs_dpo.artifacts.files import write_text

        write_text(given.markdown, text + "\n")


if __name__ == "__main__":
    main()
