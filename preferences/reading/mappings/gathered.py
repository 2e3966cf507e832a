"""Sources whose rows are not pairs: answers with ratings, one a row, and trees of messages with ranks.

What comes out are rows of pairs (``prompt``, ``chosen``, ``rejected``). All rows of a source that belong together
(answers to one prompt, messages of one tree) are gathered wherever they stand, so these sources are held in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ppo_vs_dpo.preferences.reading.mappings.base import (
    FilteredError,
    UnmappableError,
    flag_of,
    is_null,
    number_of,
    value_of,
)
from ppo_vs_dpo.preferences.reading.mappings.messages import Message, message
from ppo_vs_dpo.preferences.reading.mappings.public import helpsteer_turns
from ppo_vs_dpo.preferences.reading.readers import Broken, Placed

# A row of a pair, or why there is none.
Gathered = tuple[str, "dict[str, Any] | Broken | FilteredError"]


def rated(rows: Iterable[Placed]) -> Iterator[Gathered]:
    """HelpSteer's and HelpSteer2's ratings: the most helpful answer to a prompt against the least helpful.

    The margin is the difference of the two ratings (0 to 4), as in HelpSteer2-Preference (Wang et al. 2024); answers
    of equal ``helpfulness`` are a tie, the first of equals is taken.
    """
    answers: dict[str, list[tuple[str, float, str]]] = {}
    for place, row in rows:
        if isinstance(row, Broken):
            yield place, row
            continue
        if is_null(row.get("helpfulness")):
            yield place, FilteredError("an answer that was not rated")
            continue
        try:
            one = (place, number_of(row, "helpfulness"), value_of(row, "response"))
            answers.setdefault(value_of(row, "prompt"), []).append(one)
        except UnmappableError as problem:
            yield place, Broken(problem.kind, problem.detail)
    for prompt, found in answers.items():
        place = found[0][0]
        best, worst = max(found, key=lambda one: one[1]), min(found, key=lambda one: one[1])
        if len(found) < 2:
            yield place, FilteredError("one answer to a prompt: nothing to compare it with")
        elif best[1] == worst[1]:
            yield place, FilteredError("tie")
        else:
            sides = {"chosen": [message("assistant", best[2])], "rejected": [message("assistant", worst[2])]}
            scores = {"chosen_score": best[1], "rejected_score": worst[1], "margin": best[1] - worst[1]}
            yield place, {"prompt": helpsteer_turns(prompt), **sides, **scores}


def oasst(rows: Iterable[Placed]) -> Iterator[Gathered]:
    """OpenAssistant's messages, one a row (``message_id``, ``parent_id``, ``role``, ``text``, ``rank``)."""
    places: dict[str, str] = {}
    trees: dict[str, list[dict[str, Any]]] = {}
    for place, row in rows:
        if isinstance(row, Broken):
            yield place, row
            continue
        try:
            tree = value_of(row, "message_tree_id")
        except UnmappableError as problem:
            yield place, Broken(problem.kind, problem.detail)
            continue
        places.setdefault(tree, place)
        kept = ("message_id", "parent_id", "role", "text", "rank", "deleted", "tree_state")
        known = {name: None if is_null(row.get(name)) else row[name] for name in kept}
        trees.setdefault(tree, []).append(known)
    for tree, found in trees.items():
        known = {one["message_id"]: {**one, "replies": []} for one in found}
        roots = []
        for one in known.values():
            parent = known.get(one["parent_id"])
            (roots if parent is None else parent["replies"]).append(one)
        whole = len(roots) == 1 and roots[0]["parent_id"] is None
        if not whole:
            yield places[tree], Broken("missing_field", f"the tree {tree} lacks messages that others answer")
            continue
        yield from _of_tree(places[tree], roots[0], found[0].get("tree_state"))


def oasst_trees(rows: Iterable[Placed]) -> Iterator[Gathered]:
    """OpenAssistant's trees, one a row: ``prompt`` is the first message, each with its ``replies``."""
    for place, row in rows:
        root = row if isinstance(row, Broken) else row.get("prompt")
        if isinstance(root, Broken):
            yield place, root
        elif not isinstance(root, dict):
            yield place, Broken("wrong_type", f"prompt is a {type(root).__name__}, it must be a message with replies")
        else:
            yield from _of_tree(place, root, row.get("tree_state"))


def _of_tree(place: str, root: dict[str, Any], state: Any) -> Iterator[Gathered]:
    """Wherever the assistant answers one message more than once: rank 0 against the last rank."""
    if state not in (None, "ready_for_export"):
        yield place, FilteredError(f"a tree of the state {state}")
        return
    pairs = 0
    waiting: list[tuple[list[Message], dict[str, Any]]] = [([], root)]
    while waiting:
        before, node = waiting.pop(0)
        try:
            role = {"prompter": "user", "assistant": "assistant"}[value_of(node, "role")]
            path = [*before, message(role, value_of(node, "text"))]
            replies = [
                one for one in node.get("replies") or [] if is_null(one.get("deleted")) or not flag_of(one, "deleted")
            ]
            ranked = [
                (number_of(one, "rank"), value_of(one, "text"))
                for one in replies
                if one.get("role") == "assistant" and not is_null(one.get("rank"))
            ]
        except KeyError as role:
            yield place, Broken("wrong_type", f"a message of the role {role}; known are prompter and assistant")
            return
        except UnmappableError as problem:
            yield place, Broken(problem.kind, problem.detail)
            return
        waiting += [(path, one) for one in replies]
        best, worst = min(ranked, default=(0, "")), max(ranked, default=(0, ""))
        if role == "user" and best[0] < worst[0]:
            pairs += 1
            sides = {"chosen": [message("assistant", best[1])], "rejected": [message("assistant", worst[1])]}
            yield place, {"prompt": path, **sides}
    if not pairs:
        yield place, FilteredError("a tree without two ranked answers to one message")


GATHERED: dict[str, Callable[[Iterable[Placed]], Iterator[Gathered]]] = {
    "rated": rated,
    "oasst": oasst,
    "oasst_trees": oasst_trees,
}
