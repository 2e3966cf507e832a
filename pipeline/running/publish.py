"""Finished models on the Hub: where a stage says ``push_to_hub``, its ``model/`` is uploaded once it is done.

The Trainers themselves push nothing: what the Hub gets is the finished folder, not every checkpoint, and a Hub that
cannot be reached costs no training. The token is huggingface_hub's own (``HF_TOKEN`` or ``hf auth login``).
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence, say
from ppo_vs_dpo.artifacts.files import read_marker, write_json
from ppo_vs_dpo.artifacts.run import TRAINED, RunFolder


def wanted(config: DictConfig, stage: str) -> dict[str, Any] | None:
    """What a stage's section asks to be pushed: ``{repo_id, private, revision}``, or ``None``.

    Raises:
        UserError: ``push_to_hub`` without ``hub_model_id``.
    """
    section = OmegaConf.to_container(config.get(stage) or OmegaConf.create({}), resolve=True)
    if stage not in TRAINED or not section.get("push_to_hub"):
        return None
    if not section.get("hub_model_id"):
        raise UserError(f"{stage}.push_to_hub needs a name on the Hub: {stage}.hub_model_id=USER/NAME.")
    return {
        "repo_id": section["hub_model_id"],
        "private": section.get("hub_private_repo"),
        "revision": section.get("hub_revision"),
    }


def publish(run: RunFolder, stages: list[str]) -> None:
    """Push the models of these finished stages that ask for it and are not there yet.

    ``<stage>/pushed.json`` keeps what was pushed where, so the same command does not push it again.

    Raises:
        UserError: the Hub refused or could not be reached; names the stage and what to do.
    """
    for stage in stages:
        target, done = wanted(run.config, stage), run.done(stage)
        if target is None or done is None:
            continue
        record = run.path(stage, "pushed.json")
        state = {**target, "fingerprint": done["fingerprint"], "finished": done.get("finished")}
        pushed = read_marker(record, set_aside=True) or {}
        if {k: v for k, v in pushed.items() if k != "url"} == state:
            continue
        url = push_folder(run.path(stage, "model"), stage=stage, **target)
        write_json(record, {**state, "url": url})
        say(f"{stage}: pushed to {url}\n")


def push_folder(folder, repo_id: str, stage: str, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a model folder as one commit; the repository is made where it is missing. Returns its address.

    Raises:
        UserError: no token, no right to write, no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=str(folder), revision=revision, commit_message=f"{stage} of ppo-vs-dpo"
        )
    except (HTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"{stage}.push_to_hub: {repo_id} could not be pushed ({type(error).__name__}: "
            f"{first_sentence(error)}). Nothing is lost: log in with `hf auth login` or set HF_TOKEN, "
            f"check {stage}.hub_model_id, and give the same command again."
        ) from error
    return url
