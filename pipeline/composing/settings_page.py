"""``docs/settings.md``: what every field of the argument classes does in each stage.

python -m ppo_vs_dpo.pipeline.composing.settings_page docs/settings.md
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from ppo_vs_dpo.artifacts.errors import say
from ppo_vs_dpo.artifacts.files import write_text
from ppo_vs_dpo.artifacts.settings.rules import RULES, Rule
from ppo_vs_dpo.pipeline.composing.schema import SECTIONS, load_class

STAGES = ("sft", "reward_model", "dpo", "ppo")
HEAD = """# What every setting does

A stage's section holds its own keys (`ppo-vs-dpo show experiment=...` prints each with its comment) and any field of
the argument class it passes through to: `trl.SFTConfig`, `trl.RewardConfig`, `trl.DPOConfig`,
`ppo_vs_dpo.PPOConfig`. Each of these fields **acts**, is **refused** (at once, with the reason, where it is set to
another value than its default), or means **nothing** there: it may stand in a configuration that serves other
programs, too, and changes nothing. `-`: the class has no such field.

Written by `python -m ppo_vs_dpo.pipeline.composing.settings_page docs/settings.md`, held by
`tests/pipeline/composing/test_settings_page.py`, which sets every field to another value.
"""


def argument_classes() -> dict[str, type]:
    """The argument class of each stage."""
    return {stage: load_class(SECTIONS[stage][1]) for stage in STAGES}


def rules() -> dict[str, dict[str, Rule]]:
    """The rules of each stage; PPO's with what its loop does not read."""
    from ppo_vs_dpo.ppo.config import UNUSED

    ppo = {name: Rule("refused", f"has no meaning in PPO: {why}.") for name, why in UNUSED.items()}
    return {stage: {**RULES[stage], **(ppo if stage == "ppo" else {})} for stage in STAGES}


def kinds() -> dict[str, dict[str, str]]:
    """Field -> stage -> ``acts``, ``refused``, ``nothing`` or ``-``; fields sorted by name."""
    classes, ruled = argument_classes(), rules()
    fields = {stage: {f.name for f in dataclasses.fields(cls) if f.init} for stage, cls in classes.items()}
    table: dict[str, dict[str, str]] = {}
    for name in sorted(set().union(*fields.values())):
        table[name] = {
            stage: (ruled[stage][name].kind if name in ruled[stage] else "acts") if name in fields[stage] else "-"
            for stage in STAGES
        }
    return table


def page() -> str:
    """The page as Markdown."""
    table, ruled = kinds(), rules()
    lines = [HEAD, "| field | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    lines += [f"| `{name}` | " + " | ".join(row[stage] for stage in STAGES) + " |" for name, row in table.items()]
    lines += ["", "## Why", "", "| field | stages | why |", "|---|---|---|"]
    for name, row in table.items():
        reasons: dict[str, list[str]] = {}
        for stage in STAGES:
            if row[stage] in ("refused", "nothing"):
                reasons.setdefault(ruled[stage][name].why, []).append(stage)
        lines += [f"| `{name}` | {', '.join(stages)} | {why} |" for why, stages in reasons.items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> Any:
    """Write the page into a file, or print it."""
    if arguments:
        write_text(Path(arguments[0]), page())
    else:
        say(page())


if __name__ == "__main__":
    main(sys.argv[1:])
