"""The question an LLM judge is asked, and how its reply is read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.artifacts.files import sha256_of
from ppo_vs_dpo.artifacts.settings import nearest
from ppo_vs_dpo.models.sampling.chat import Reply, after_thinking

TEMPLATES = Path(__file__).parents[2] / "configs" / "judge"
KEYS = ("source", "system", "user", "answers", "verdict", "max_tokens")
_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
# What may stand around a verdict: quotes, brackets, stars, "Answer:".
_AROUND = " \t\"'`*_()[]{}.:!"
_LEADS_TO = re.compile(r"(?::|\bis)[\s\"'`*_(\[{]*\S+$")


@dataclass(frozen=True)
class JudgeTemplate:
    """A judge's question. Fields as in ``configs/judge/*.yaml``.

    Attributes:
        name: of the file.
        system: system message, may be empty.
        user: Jinja text with ``prompt``, ``first``, ``second``.
        answers: the words for ``first``, ``second`` and, optionally, ``tie``.
        verdict: ``last_line`` or ``first_word``.
        max_tokens: budget of the reply.
        source: where the criterion is from.
    """

    name: str
    system: str
    user: str
    answers: dict[str, str]
    verdict: str = "last_line"
    max_tokens: int = 160
    source: str = ""

    def identity(self) -> str:
        """Hash of everything that may change a verdict."""
        return sha256_of([self.system, self.user, self.answers, self.verdict, self.max_tokens])[:16]

    def messages(self, prompt: str, first: str, second: str) -> list[dict[str, str]]:
        """The conversation that asks for a verdict on two completions, in this order."""
        question = _ENVIRONMENT.from_string(self.user).render(prompt=prompt, first=first, second=second)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": question.strip()}]

    def parse(self, reply: str) -> float | None:
        """Preference for the *first* completion: 1, 0, 1/2 for a tie, ``None`` where the reply names no verdict.

        Nothing is guessed: a reply that names both, or neither, is unparseable.
        """
        lines = [line.strip(_AROUND) for line in reply.splitlines() if line.strip(_AROUND)]
        if not lines:
            return None
        if self.verdict == "first_word":
            line = lines[0].split()[0].strip(_AROUND)
            named = [side for side, answer in self.answers.items() if line == answer]
        else:
            words = [word.strip(_AROUND) for word in lines[-1].split()]
            named = [side for side, answer in self.answers.items() if answer in words]
            # The line is the verdict, or ends in ": A" or "is A". "A is shorter" and "A tie" name none.
            ends = words[-1] in self.answers.values() and (len(words) == 1 or _LEADS_TO.search(lines[-1]))
            named = named if ends else []
        if len(named) != 1:
            return None
        return {"first": 1.0, "second": 0.0, "tie": 0.5}[named[0]]

    def read(self, reply: Reply, budget: int) -> float | None:
        """`parse` of what was said after thinking; ``None`` also where the reply was cut off before its verdict ended.

        The last line of a reply that was cut off may be any word of a sentence that went on. A verdict that stands
        first is whole where something follows it, or where the budget was a single token.
        """
        if reply.finish == "content_filter":
            return None
        said = after_thinking(reply.text)
        if reply.finish == "length":
            whole = self.verdict == "first_word" and (len(said.split()) > 1 or budget == 1)
            if not whole:
                return None
        return self.parse(said)

    def side_of_token(self, token: str) -> str | None:
        """Which answer a single token is, for log-probabilities of the verdict; ``None`` for any other token."""
        stripped = token.strip(_AROUND + "\n")
        return next((side for side, answer in self.answers.items() if stripped == answer), None)


def load_template(name: str) -> JudgeTemplate:
    """A template of ``configs/judge`` by name, or a YAML file by path.

    Raises:
        UserError: not found, unknown or missing keys, placeholders missing; names the file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TEMPLATES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(item.stem for item in TEMPLATES.glob("*.yaml"))
        raise UserError(
            f"judge template {name}: no such template.{nearest(name, known)} There are {', '.join(known)}."
        )
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path}: not readable YAML ({first_sentence(error)}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: keys {', '.join(KEYS)} are needed.")
    unknown = [f"{key}: no such key.{nearest(str(key), list(KEYS))}" for key in content if key not in KEYS]
    missing = [f"{key}: required, and not set." for key in ("user", "answers") if not content.get(key)]
    absent = [
        f"user: {{{{ {key} }}}} is not in it."
        for key in ("prompt", "first", "second")
        if key not in str(content.get("user"))
    ]
    problems = [*unknown, *missing, *(absent if not missing else [])]
    answers = content.get("answers") or {}
    if not {"first", "second"} <= set(answers) <= {"first", "second", "tie"} and not missing:
        problems.append("answers: first and second are needed, tie is allowed.")
    if content.get("verdict", "last_line") not in ("last_line", "first_word"):
        problems.append("verdict: must be last_line or first_word.")
    if problems:
        raise UserError("\n  ".join([f"{path}:", *problems]))
    content.setdefault("system", "")
    answers = {side: str(answer) for side, answer in answers.items()}
    return JudgeTemplate(name=path.stem, **{**content, "answers": answers})
